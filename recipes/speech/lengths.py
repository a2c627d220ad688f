"""The numbers of samples of many sound files: each header is read once, and what it says is kept beside the data."""

import json
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import anybatch
from recipes.training.once import once, unfinished

Known = dict[str, list[int]]  # of each file its size and its time of change, and its samples
Reader = Callable[[Path], int]


def lengths(folder: Path, name: str, paths: Sequence[Path], *, read: Reader) -> list[int]:
    """`read` of each of `paths`, which lie in `folder`; rank 0 keeps it in the file `name` there.

    A file of another size or time is read again. Where `folder` cannot be written, that is said, and every rank reads
    all of them.

    Raises:
        DataError: what `read` raises.
    """
    once(partial(_update, folder, name, paths, read))
    known = _load(folder / name)
    return [_length(known, folder, path, read) for path in paths]


def _update(folder: Path, name: str, paths: Sequence[Path], read: Reader) -> None:
    known = _load(folder / name)
    now = {_key(folder, path): [*_mark(path), _length(known, folder, path, read)] for path in paths}
    if now == known:
        return
    new = unfinished(folder / name)
    try:
        new.write_text(json.dumps(now))
        new.replace(folder / name)
    except OSError as error:
        new.unlink(missing_ok=True)
        message = f"{folder / name} cannot be written ({error.strerror}): every rank reads {len(paths)} headers."
        warnings.warn(message, anybatch.AnybatchWarning, stacklevel=2)


def _length(known: Known, folder: Path, path: Path, read: Reader) -> int:
    found = known.get(_key(folder, path), [])
    return found[2] if found[:2] == _mark(path) and len(found) == 3 else read(path)


def _key(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _mark(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _load(path: Path) -> Known:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}

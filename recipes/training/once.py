"""What rank 0 prepares for all of them, once: vocabularies, tokens, the lengths of sound files."""

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch.distributed as dist

import anybatch
from recipes.training.task import DataError

_NAME = "made.json"


def once(make: Callable[[], None]) -> None:
    """Rank 0 calls `make`, which leaves files behind, while the others wait; every rank must see the folder.

    Raises:
        DataError: on every rank, where rank 0 met it.
    """
    if not dist.is_initialized():
        make()
        return
    wrong: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            make()
        except DataError as error:
            wrong = [str(error)]
    dist.broadcast_object_list(wrong, src=0)
    if wrong[0] is not None:
        raise DataError(wrong[0])


def prepared(folder: Path, *, of: Sequence[Path], make: Callable[[Path], dict[str, int]]) -> dict[str, int]:
    """What `make(folder)` returned when it wrote its files there, on rank 0, from the files `of` as they are now.

    Where one of these has another size or time than it had then, that is said, and the folder is made anew. A kill
    leaves the old one, the new one or none.

    Raises:
        DataError: `make`'s own; a file that is not there; a folder that cannot be written, or is not seen by all ranks.
    """
    once(partial(_update, folder, of, make))
    made = _made(folder)
    if made is None:
        raise DataError(f"{folder} is not to be seen here: all ranks must see the folder that rank 0 writes to.")
    return made["found"]


def unfinished(path: Path) -> Path:
    """A name beside `path` that no other process has, on no machine that sees the folder: containers share numbers."""
    return path.with_name(f"{path.name}.{uuid4().hex}")


def _update(folder: Path, of: Sequence[Path], make: Callable[[Path], dict[str, int]]) -> None:
    new = unfinished(folder)
    try:
        source = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in of}
        made = _made(folder)
        if made is not None and made["of"] == source:
            return
        if made is not None:
            message = f"{' or '.join(map(str, of))} has changed since {folder} was made of it: it is made anew."
            warnings.warn(message, anybatch.AnybatchWarning, stacklevel=2)
        new.mkdir()
        content = {"of": source, "found": make(new)}
        (new / _NAME).write_text(json.dumps(content) + "\n")
        made = _made(folder)
        if made is None or made["of"] != source:  # else another machine was faster, and its files are being read
            shutil.rmtree(folder, ignore_errors=True)
            new.replace(folder)
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: {error.strerror}; what is made of data is kept beside it."
        ) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _made(folder: Path) -> dict[str, Any] | None:
    try:
        made: dict[str, Any] = json.loads((folder / _NAME).read_text())
        return {"of": made["of"], "found": made["found"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None

"""Parallel text on disk: `train.en` and `train.de`, line by line, and `newstest2014.en` and `.de` (or WMT's own .sgm).

The vocabulary is `vocabulary.<size>.model` of sentencepiece, one for both languages. Where it is not there, it is made
from the training text, by byte-pair encoding and without chance, and kept. The training text's tokens are kept in the
folder `train.<size>.tokens`, and read where they lie. Rank 0 makes both, once, while the others wait.
"""

import html
import re
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from recipes.training.once import once, prepared, unfinished
from recipes.training.task import DataError
from recipes.translation.model import BEGIN, END, PAD, UNKNOWN
from recipes.translation.ragged import Ragged

LONGEST = 256  # tokens of a source or a target to train on; the few longer ones are left out, and counted


class ParallelText(Dataset[tuple[Tensor, Tensor]]):
    """Tokens of each source and target, each with END; `skipped` pairs were empty on a side or too long.

    With `longest=None`, to test on, every pair stays.
    """

    def __init__(self, pairs: Iterator[tuple[str, str]], *, vocabulary: Any, longest: int | None = LONGEST) -> None:
        self.skipped = 0
        self.source, self.target = Ragged(), Ragged()
        while some := list(islice(pairs, 10_000)):
            tokens = (vocabulary.encode(list(texts), out_type=int) for texts in zip(*some, strict=True))
            for source, target in zip(*tokens, strict=True):
                if longest is None or (source and target and max(len(source), len(target)) < longest):
                    self.source.append([*source, END])
                    self.target.append([*target, END])
                else:
                    self.skipped += 1

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.source[index], self.target[index]

    @classmethod
    def kept(cls, folder: Path, *, skipped: int) -> "ParallelText":
        """The pairs that `keep` wrote."""
        text = cls(iter(()), vocabulary=None)
        text.skipped = skipped
        text.source, text.target = (Ragged.mapped(folder / name) for name in ("source", "target"))
        return text

    def keep(self, folder: Path) -> None:
        """Write the tokens of both sides."""
        self.source.write(folder / "source")
        self.target.write(folder / "target")


def train_pairs(data: Path | None, *, vocabulary: Any, size: int) -> ParallelText:
    """The training pairs in the tokens of this vocabulary, made of the text where they are not there.

    Raises:
        DataError: as of `read_pairs`; or the folder cannot be written.
    """
    data = _given(data)
    of = [*_files(data, "train"), data / f"vocabulary.{size}.model"]
    folder = data / f"train.{size}.tokens"
    found = prepared(folder, of=of, make=partial(_make_pairs, data, vocabulary))
    return ParallelText.kept(folder, skipped=found["skipped"])


def _make_pairs(data: Path, vocabulary: Any, folder: Path) -> dict[str, int]:
    text = ParallelText(read_pairs(data, "train"), vocabulary=vocabulary)
    text.keep(folder)
    return {"pairs": len(text), "skipped": text.skipped}


def _given(data: Path | None) -> Path:
    if data is None:
        raise DataError("transformer needs a folder with train.en, train.de, newstest2014.en and newstest2014.de.")
    return Path(data)


def read_pairs(data: Path | None, name: str) -> Iterator[tuple[str, str]]:
    """The lines of `<name>.en` with those of `<name>.de`; `<name>` may be a test set in WMT's .sgm format."""
    paths = _files(_given(data), name)
    count = 0
    try:
        for source, target in zip(*(_lines(path) for path in paths), strict=True):
            count += 1
            yield source, target
    except ValueError as error:
        if isinstance(error, UnicodeDecodeError):
            raise DataError(f"{paths[0]} or {paths[1]}, after line {count}: not UTF-8: {error}") from error
        raise DataError(f"{paths[0]} and {paths[1]}: one ends after {count} lines, the other goes on.") from error


def _files(data: Path, name: str) -> list[Path]:
    """The English and the German one. An English .sgm alone says nothing: WMT's other languages have as long ones."""
    plain = [data / f"{name}.{language}" for language in ("en", "de")]
    missing = [path for path in plain if not path.is_file()]
    if not missing:
        return plain
    for source in sorted(data.glob(f"{name}*-src.en.sgm")):
        reference = source.with_name(source.name.replace("-src.en.sgm", "-ref.de.sgm"))
        if reference.is_file():
            return [source, reference]
    raise DataError(f"{missing[0]}: no such file (and no {name}-*-src.en.sgm with its -ref.de.sgm).")


def _lines(path: Path) -> Iterator[str]:
    # Only "\n" ends a line: the texts have other characters in them that Python takes for line ends.
    with path.open(encoding="utf-8", newline="\n") as file:
        if path.suffix != ".sgm":
            yield from (line.strip() for line in file)
            return
        text = file.read()
    yield from (html.unescape(part).strip() for part in re.findall(r"<seg[^>]*>(.*?)</seg>", text, re.DOTALL))


def vocabulary_of(data: Path | None, *, size: int) -> Any:
    """The sentencepiece model of this size, made if it is not there.

    Raises:
        DataError: it cannot be read, has another size or other special tokens, or the text is too small for it.
    """
    import sentencepiece

    data = _given(data)
    path = data / f"vocabulary.{size}.model"
    once(lambda: None if path.exists() else _make_vocabulary(data, path, size=size))
    try:
        vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: not a sentencepiece model: {error}") from error
    special = tuple(getattr(vocabulary, f"{name}_id")() for name in ("pad", "unk", "bos", "eos"))
    if special != (PAD, UNKNOWN, BEGIN, END) or vocabulary.get_piece_size() != size:
        raise DataError(
            f"{path}: {vocabulary.get_piece_size()} pieces with pad, unk, bos, eos = {special}, but {size} are needed "
            f"with {(PAD, UNKNOWN, BEGIN, END)}. Remove the file, and it is made anew."
        )
    return vocabulary


def _make_vocabulary(data: Path, path: Path, *, size: int) -> None:
    import sentencepiece

    part = unfinished(path)  # a kill leaves no half of a vocabulary
    try:
        with part.open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(text for pair in read_pairs(data, "train") for text in pair),
                model_writer=file,
                model_type="bpe",
                vocab_size=size,
                character_coverage=1.0,
                pad_id=PAD,
                unk_id=UNKNOWN,
                bos_id=BEGIN,
                eos_id=END,
                minloglevel=2,
            )
        if not path.exists():  # another machine may have been faster, and has encoded with its own
            part.replace(path)
    except RuntimeError as error:
        raise DataError(f"{data / 'train.en'} and .de: no vocabulary of {size} pieces can be made: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: the vocabulary cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)

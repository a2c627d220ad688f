"""A plain text as files of tokens: byte-pair encoding by the library tokenizers, made once and kept beside the text.

`text.txt` at 50,257 tokens becomes the folder `text.txt.50257`, with `vocabulary.json` (tokenizers' own format),
`train.bin`, the first 90 % of the text, `val.bin`, the rest, and `made.json`, which says of what text they were made.
`<|endoftext|>` in the text is one token, number 0.
"""

import json
import os
import shutil
import sys
import warnings
from array import array
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import anybatch
from recipes.training.once import once
from recipes.training.task import DataError

SHARE = 0.9  # of the text to train on
SAMPLE = 2**28  # bytes of it that the vocabulary is made of
PIECE = 2**22  # bytes encoded at a time
END = "<|endoftext|>"


def tokenized(text: Path, *, vocabulary: int) -> tuple[Path, int]:
    """The folder with the tokens of `text`, and how many there are to choose from: a small text has fewer.

    Rank 0 makes the folder where it is not there, or is of another text, while the others wait.

    Raises:
        DataError: the text is not there, no UTF-8, or too short; the folder cannot be written.
        InvalidValueError: `vocabulary`, which is from 257 to 65,536, so that a token has two bytes.
    """
    if not 257 <= vocabulary <= 2**16:
        raise anybatch.InvalidValueError(f"--vocabulary is from 257 to 65536, got {vocabulary}.")
    folder = text.with_name(f"{text.name}.{vocabulary}")
    once(partial(_update, text, folder, vocabulary=vocabulary))
    made = _made(folder)
    if made is None:
        raise DataError(f"{folder} is not to be seen here: all ranks must see the folder that rank 0 writes to.")
    return folder, int(made["vocabulary"])


def _update(text: Path, folder: Path, *, vocabulary: int) -> None:
    try:
        stat = text.stat()
        source = {"bytes": stat.st_size, "modified": stat.st_mtime_ns}
        found = _made(folder)
        if found is not None and {name: found.get(name) for name in source} == source:
            return
        if found is not None:
            message = f"{text} has changed since its tokens were made: {folder} is made anew."
            warnings.warn(message, anybatch.AnybatchWarning, stacklevel=2)
        new = folder.with_name(f"{folder.name}.{os.getpid()}")
        try:
            _make(text, new, source, vocabulary=vocabulary)
            shutil.rmtree(folder, ignore_errors=True)
            new.replace(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        raise DataError(f"{error.filename or text}: {error.strerror}; tokens are kept beside the text.") from None


def _made(folder: Path) -> dict[str, Any] | None:
    try:
        made: dict[str, Any] = json.loads((folder / "made.json").read_text())
    except (OSError, ValueError):
        return None
    return made


def _make(text: Path, folder: Path, source: dict[str, int], *, vocabulary: int) -> None:
    folder.mkdir()
    train = round(SHARE * source["bytes"])
    encoder = _vocabulary(chain.from_iterable(_pieces(text, end=min(train, SAMPLE))), size=vocabulary)
    counts = {}
    for name, start, end in (("train", 0, train), ("val", train, source["bytes"])):
        counts[name] = 0
        with (folder / f"{name}.bin").open("wb") as file:
            for lines in _pieces(text, start=start, end=end):
                tokens = array("H", chain.from_iterable(line.ids for line in encoder.encode_batch_fast(lines)))
                if sys.byteorder == "big":
                    tokens.byteswap()
                tokens.tofile(file)
                counts[name] += len(tokens)
        if not counts[name]:
            raise DataError(f"{text}: no line begins in the part for {name}: the text is too short, or is one line.")
    encoder.save(str(folder / "vocabulary.json"))
    made = {**source, "vocabulary": encoder.get_vocab_size(), **counts}
    (folder / "made.json").write_text(json.dumps(made) + "\n")


def _pieces(text: Path, *, start: int = 0, end: int) -> Iterator[list[str]]:
    """Lists of the lines that begin in these bytes, so that a line belongs to one part of the text."""
    with text.open("rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()
        while (position := file.tell()) < end:
            lines = file.readlines(min(PIECE, end - position))
            try:
                yield [line.decode() for line in lines]
            except UnicodeDecodeError as error:
                raise DataError(f"{text}: not UTF-8 after its byte {position}: {error.reason}.") from None


def _vocabulary(lines: Iterator[str], *, size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    encoder = Tokenizer(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    encoder.train_from_iterator(lines, trainer)
    return encoder

"""A plain text as files of tokens: byte-pair encoding by the library tokenizers, made once and kept beside the text.

`text.txt` at 50,257 tokens becomes the folder `text.txt.50257`, with `vocabulary.json` (tokenizers' own format),
`train.bin`, the first 90 % of the text, `val.bin`, the rest, and `made.json`, which says of what text they were made.
`<|endoftext|>` in the text is one token, number 0.
"""

import sys
from array import array
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import anybatch
from recipes.training.once import prepared
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
    found = prepared(folder, of=[text], make=partial(_make, text, vocabulary=vocabulary))
    return folder, found["vocabulary"]


def _make(text: Path, folder: Path, *, vocabulary: int) -> dict[str, int]:
    size = text.stat().st_size
    train = round(SHARE * size)
    encoder = _vocabulary(chain.from_iterable(_pieces(text, end=min(train, SAMPLE))), size=vocabulary)
    counts = {}
    for name, start, end in (("train", 0, train), ("val", train, size)):
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
    return {"vocabulary": encoder.get_vocab_size(), **counts}


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

"""Files of tokens, two bytes each, read where they lie: nanoGPT's, which are tokens alone, and llm.c's with a header.

A folder has one file or many of each kind, told by their names: `*train*.bin` and `*val*.bin`. llm.c's header is 256
numbers of four bytes, the first three 20240520, the version 1, and the number of tokens. All are little-endian.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from recipes.training.task import DataError

_TWO_BYTES, _FOUR_BYTES, _VERSION = 20240520, 20240801, 1  # llm.c's marks of its files
_HEADER = 4 * 256


@dataclass(frozen=True)
class Shard:
    """One file: where its tokens begin, in bytes, and how many there are."""

    path: Path
    offset: int
    length: int


def read_shard(path: Path) -> Shard:
    """What a file says of itself.

    Raises:
        DataError: it cannot be read, is of another format, or ends too early.
    """
    try:
        size = path.stat().st_size
        header = np.fromfile(path, "<i4", 3)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    mark = int(header[0]) if len(header) else 0
    if mark == _FOUR_BYTES:
        raise DataError(f"{path} has tokens of four bytes (llm.c's for Llama 3); files of two bytes a token are read.")
    if mark == _TWO_BYTES and size >= _HEADER:
        version, stated, found = int(header[1]), int(header[2]), (size - _HEADER) / 2
        if version != _VERSION:
            raise DataError(f"{path} is of version {version} of llm.c's format; version {_VERSION} is read.")
        if stated != found:
            raise DataError(f"{path} says that it has {stated} tokens, and has {found:g}.")
        return Shard(path, _HEADER, stated)
    if size == 0 or size % 2:
        raise DataError(f"{path} has {size} bytes, which is not a number of tokens of two bytes.")
    return Shard(path, 0, size // 2)


def read_folder(folder: Path, kind: str) -> list[Shard]:
    """The files of `kind`, `"train"` or `"val"`, in the order of their names."""
    paths = sorted(path for path in folder.glob("*.bin") if kind in path.name)
    if not paths:
        raise DataError(f"{folder} has no file *{kind}*.bin.")
    if both := [path for path in paths if "train" in path.name and "val" in path.name]:
        raise DataError(f"{both[0]} is to train on and to test on, by its name, which holds train and val: rename it.")
    return [read_shard(path) for path in paths]


class Windows(Dataset[Tensor]):
    """Every `context` tokens of the files with the one after them, `[context + 1]`; none reaches over a file's end.

    Args:
        shards: the files.
        context: tokens to predict; a window begins where the one before it ended.
        vocabulary: number of tokens.

    Raises:
        DataError: no file is as long as a window; a token that is not in the vocabulary, when it is met.
    """

    def __init__(self, shards: Sequence[Shard], *, context: int, vocabulary: int) -> None:
        self.shards, self.context, self.vocabulary = shards, context, vocabulary
        self.ends = list(accumulate((shard.length - 1) // context for shard in shards))
        self._open: dict[int, Any] = {}
        if not self.ends[-1]:
            raise DataError(f"{shards[0].path} is too short: a window has {context + 1} tokens.")
        for first in {0, *self.ends[:-1]} - {self.ends[-1]}:  # what is wrong is mostly wrong from the beginning
            self[first]

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Tensor:
        number = bisect_right(self.ends, index)
        start = (index - (self.ends[number - 1] if number else 0)) * self.context
        found = self._tokens(number)[start : start + self.context + 1].astype(np.int64)
        if found.max() >= self.vocabulary:
            raise DataError(
                f"{self.shards[number].path} has the token {found.max()} within {self.context} of its token {start}, "
                f"and the vocabulary ends with {self.vocabulary - 1}: say --vocabulary, or tokenize the text again."
            )
        return torch.from_numpy(found)

    def _tokens(self, number: int) -> Any:
        if number not in self._open:
            shard = self.shards[number]
            self._open[number] = np.memmap(shard.path, "<u2", "r", shard.offset, (shard.length,))
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        """Without the open files: pickling one for another process would copy all of its tokens."""
        return {**self.__dict__, "_open": {}}

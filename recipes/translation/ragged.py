"""Sequences of different lengths, in memory or on disk: millions of lists would not fit into memory."""

from array import array
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Ragged:
    """One array of all tokens, and where each sequence ends."""

    def __init__(self) -> None:
        self.values: Any = array("i")
        self.ends: Any = array("q", [0])
        self.path: Path | None = None

    @classmethod
    def mapped(cls, path: Path) -> "Ragged":
        """What `write` wrote, read where it lies."""
        found = cls()
        found.path, found.ends = path, np.load(path.with_suffix(".ends.npy"))
        found.values = np.load(path.with_suffix(".npy"), mmap_mode="r") if found.ends[-1] else np.zeros(0, "i4")
        return found

    def write(self, path: Path) -> None:
        """Two files of numpy's, the tokens and where each sequence ends."""
        np.save(path.with_suffix(".npy"), np.asarray(self.values))
        np.save(path.with_suffix(".ends.npy"), np.asarray(self.ends))

    def __reduce__(self) -> Any:
        """To another process goes the path: pickling a file that is mapped would copy it."""
        return (Ragged.mapped, (self.path,)) if self.path is not None else super().__reduce__()

    def append(self, values: list[int]) -> None:
        """One more sequence, in memory."""
        self.values.extend(values)
        self.ends.append(len(self.values))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(self.values[self.ends[index] : self.ends[index + 1]], dtype=torch.long)

    def lengths(self) -> list[int]:
        """Of each sequence."""
        return np.diff(np.asarray(self.ends)).tolist()

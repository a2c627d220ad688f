"""A checkpoint on disk: written at once, and read with a word where it cannot be."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from recipes.training.task import DataError

State = dict[str, Any]


def write(state: State, path: Path, *, scratch: Path) -> None:
    """Replace the file at once, by way of `scratch`: a kill at any moment leaves the old one or the new one."""
    with scratch.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def read(path: Path, *, of: str, key: str) -> State | None:
    """What `of` wrote, or `None` where nothing was written; under `key` stands what tells the run from others.

    Raises:
        DataError: it cannot be read, or is something else.
    """
    if not path.exists():
        return None
    try:
        saved: State = torch.load(path, map_location="cpu", weights_only=True)
        saved[key]
    except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise DataError(f"{path} is not a checkpoint of {of}: {error}") from None
    return saved

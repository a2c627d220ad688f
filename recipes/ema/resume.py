"""A run that was killed goes on: what is kept of it, now and then, beside the results file."""

from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import Any

from recipes.training import checkpoint
from recipes.training.checkpoint import State
from recipes.training.once import unfinished

EVERY = 600.0  # seconds between two checkpoints at least: a run of the digits is over before


class Checkpoint:
    """The file of one run.

    Args:
        path: of the file.
        same: what tells the run from others; a file of another one is refused.
    """

    def __init__(self, path: Path, *, same: Mapping[str, Any]) -> None:
        self._path, self._same, self._last = path, dict(same), monotonic()

    def read(self) -> State | None:
        """What was kept; `None` where nothing was.

        Raises:
            DataError: it cannot be read.
            SystemExit: it is of another run.
        """
        saved = checkpoint.read(self._path, of="recipes.ema", key="same")
        if saved is not None and saved["same"] != self._same:
            raise SystemExit(
                f"{self._path} is the checkpoint of a run with other values: delete it, or name another --json."
            )
        return saved

    @property
    def due(self) -> bool:
        """Whether the last one is old enough."""
        return monotonic() - self._last >= EVERY

    def write(self, state: State) -> None:
        """Keep `state`: a kill leaves the old file or the new one."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        scratch = unfinished(self._path)
        try:
            checkpoint.write({**state, "same": self._same}, self._path, scratch=scratch)
        finally:  # on a full disk half a file would take the room of the next one
            scratch.unlink(missing_ok=True)
        self._last = monotonic()

    def remove(self) -> None:
        """The run is over, and in the results."""
        self._path.unlink(missing_ok=True)

"""RunRecord: a run's steps, appended to a file of JSON lines."""

import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anybatch._errors import InvalidValueError, StateError, UsageError
from anybatch._record.append import AppendFile
from anybatch._record.json import json_line
from anybatch._record.layers import as_json
from anybatch._record.lines import HEADER_START, parsed
from anybatch._record.provenance import environment
from anybatch._record.record import RECORD_VERSION, MetricRecord, StepRecord
from anybatch._scaling import check_steps


class RunRecord:
    """Appends a run's steps to a file of JSON lines, under a header with versions, machine, commit, seed and config.

    A run killed at any moment loses at most the line being written. A full disk stops the record, not the training,
    with one warning. A resumed run appends to the same file, which then reads as one run. Nothing is forced to the
    disk: a power cut may take the last seconds.

    Args:
        path: the file; made with its folders, appended to where it exists.
        config: any JSON values that say what the run was; stored in the header. Values with the name of
            something that a controller tells of itself lie under "given" there.
        per_layer: every how many steps the noise is measured by layer; a whole number, 1 or more. The first step is
            measured, and then each step after so many more have counted; `Run.per_layer` averages what was found.
            Such a step takes a norm of its own of each gradient, and changes nothing of the training. `None`: no step.

    Raises:
        InvalidValueError: the file cannot be written, or is not a record; `per_layer` is no number of steps.
        StateError: it was written by a newer anybatch.
        UsageError: another run writes to it.

    Example:
        >>> record = anybatch.RunRecord(tmp_path / "run.jsonl", config={"task": "digits"})
        >>> record.close()
        >>> anybatch.read_record(tmp_path / "run.jsonl").config["task"]
        'digits'
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        config: Mapping[str, Any] | None = None,
        per_layer: int | None = None,
    ) -> None:
        if per_layer is not None:
            check_steps("per_layer", per_layer)
        self.path: Path = Path(path)
        self._per_layer = per_layer
        self._user, self._known = dict(config or {}), dict[str, Any]()
        self._holder: weakref.ref[object] | None = None
        self._file = AppendFile(self.path)
        try:
            _check(self._file)
        except (InvalidValueError, StateError):
            self._file.close()
            raise
        self._begun = False  # the header waits for the controller, which knows more of the run, or for the first line

    @property
    def per_layer(self) -> int | None:
        """Every how many steps the noise is measured by layer; `None`: at no step."""
        return self._per_layer

    def begin(self, config: Mapping[str, Any], *, holder: object | None = None) -> None:
        """Append a header: what follows starts anew, with what `config` tells of it, or goes on from a checkpoint.

        Args:
            config: what the run is; if empty, what it was.
            holder: who writes from now on, until it calls `release`.

        Raises:
            UsageError: somebody else does, or the record is closed.
        """
        if holder is not None:
            if self._held_by() not in (None, holder):
                raise UsageError(
                    f"Another controller writes to the record {str(self.path)!r}: detach() it first, or give this one "
                    "a RunRecord of its own."
                )
            self._holder = weakref.ref(holder)
        self._known = dict(config) or self._known
        self._begun = True
        header = {"kind": "header", "version": RECORD_VERSION, **environment(), "config": self._config()}
        self._file.append(json_line(header), needed=True)

    def release(self, holder: object) -> None:
        """End what `begin` gave to `holder`."""
        if self._held_by() is holder:
            self._holder = None

    def _held_by(self) -> object | None:
        return self._holder and self._holder()

    def _config(self) -> dict[str, Any]:
        """The user's values and the controller's; those that the latter would hide lie under "given"."""
        taken = {*self._known, "given"} if self._user.keys() & self._known.keys() else set()
        given = {name: value for name, value in self._user.items() if name in taken}
        return {**self._user, **self._known, **({"given": given} if given else {})}

    def write(self, line: StepRecord | MetricRecord) -> None:
        """Append one step, or one evaluation."""
        self._begin_once()
        kind, values = "metric", dict(vars(line))
        if isinstance(line, StepRecord):
            kind, layers = "step", values.pop("per_layer")
            values |= {"per_layer": as_json(layers)} if layers else {}
        self._file.append(json_line({"kind": kind, **values}))

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        if self._file.open:
            self._begin_once()
        self._file.close()

    def _begin_once(self) -> None:
        if not self._begun:
            self.begin({})


def _check(file: AppendFile) -> None:
    """Refuse to append to what is not a record. A first header that a kill has torn is one."""
    first = file.first_line()
    if first is None:
        return
    header = parsed(first)
    if isinstance(header, dict) and header["version"] > RECORD_VERSION:
        raise StateError(
            f"{str(file.path)!r} has record version {header['version']}, this anybatch writes {RECORD_VERSION}: "
            "upgrade anybatch, or give this run a file of its own."
        )
    if not first or not first.startswith(HEADER_START[: len(first)]):
        raise InvalidValueError(
            f"{str(file.path)!r} is not an anybatch record, and is left as it is: give this run a file of its own."
        )

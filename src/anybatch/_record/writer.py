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

    A kill costs at most the line being written. A full disk stops the record with one warning, and the training
    continues. A resumed run appends to the same file, which then reads as one run. The file is not synced to the disk:
    a power cut may cost the last seconds.

    Args:
        path: the file; created with its folders, or appended to.
        config: any JSON values that describe the run; stored in the header. Values with the name of one of the
            controller's own are under "given" there.
        per_layer: number of steps between measurements of the noise by layer; a whole number, 1 or more. The first
            step is measured, and then each step after `per_layer` counted ones; `Run.per_layer` averages the results.
            A measured step takes one more norm of each gradient, and the training is unchanged. `None`: no step.

    Raises:
        InvalidValueError: the file cannot be written, or is not a record; `per_layer` is not a number of steps.
        StateError: a newer anybatch wrote the file.
        UsageError: another run writes to the file.

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
        self._resting = False
        self._begun = False  # the controller, or else the first line, writes the header

    @property
    def per_layer(self) -> int | None:
        """Number of steps between measurements by layer; `None`: no step is measured by layer."""
        return self._per_layer

    def begin(self, config: Mapping[str, Any], *, holder: object | None = None) -> None:
        """Append a header: the following lines are of a new run, or of a run that resumes.

        Args:
            config: the controller's configuration; if empty, as in the last header.
            holder: the only writer until it calls `release`.

        Raises:
            UsageError: the record has another holder, or is closed.
        """
        if holder is not None:
            if self._held_by() not in (None, holder):
                raise UsageError(
                    f"Another controller writes to the record {str(self.path)!r}: detach() that controller, or give "
                    "this one a RunRecord of its own."
                )
            self._holder = weakref.ref(holder)
        self._known = dict(config) or self._known
        self._begun = True
        # The user's values that the controller's would hide are under "given".
        taken = {*self._known, "given"} if self._user.keys() & self._known.keys() else set()
        given = {name: value for name, value in self._user.items() if name in taken}
        config = {**self._user, **self._known, **({"given": given} if given else {})}
        header = {"kind": "header", "version": RECORD_VERSION, **environment(), "config": config}
        self._file.append(json_line(header), needed=True)

    def release(self, holder: object) -> None:
        """Let others write, if `holder` is the record's holder."""
        if self._held_by() is holder:
            self._holder = None

    def _held_by(self) -> object | None:
        return self._holder and self._holder()

    def write(self, line: StepRecord | MetricRecord) -> None:
        """Append one step or one evaluation."""
        if resting := self._resting:
            self._file, self._resting = AppendFile(self.path), False
        self._begin_once()
        kind, values = "metric", dict(vars(line))
        if isinstance(line, StepRecord):
            kind, layers = "step", values.pop("per_layer")
            values |= {"per_layer": as_json(layers)} if layers else {}
        self._file.append(json_line({"kind": kind, **values}))
        if resting:
            self.rest()

    def rest(self) -> None:
        """Close the file until the next line, so that another process may write to it."""
        self._resting = self._file.open
        self._file.close()

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        self._resting = False
        if self._file.open:
            self._begin_once()
        self._file.close()

    def _begin_once(self) -> None:
        if not self._begun:
            self.begin({})


def _check(file: AppendFile) -> None:
    """Raise if the file is not a record. A file with a torn first header is one."""
    first = file.first_line()
    if first is None:
        return
    header = parsed(first)
    if isinstance(header, dict) and header["version"] > RECORD_VERSION:
        raise StateError(
            f"{str(file.path)!r} has record version {header['version']}. This anybatch writes version "
            f"{RECORD_VERSION}: upgrade anybatch, or give this run a file of its own."
        )
    if not first or not first.startswith(HEADER_START[: len(first)]):
        raise InvalidValueError(
            f"{str(file.path)!r} is not an anybatch record and was not changed: give this run a file of its own."
        )

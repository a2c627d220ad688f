"""RecordSinks: where a controller's steps are written to, files and functions alike."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from math import isfinite
from os import PathLike
from typing import Any

from anybatch._errors import AnybatchWarning, InvalidValueError, UsageError
from anybatch._record.layers import as_numbers
from anybatch._record.record import MetricRecord, StepRecord
from anybatch._record.writer import RunRecord

_RESERVED = {field.name for field in fields(StepRecord)}  # trackers show them beside the steps' own

Sink = Callable[[dict[str, float]], object]
Destination = str | PathLike[str] | RunRecord | Sink


class RecordSinks:
    """The destinations of `attach(record=...)`.

    Args:
        record: one destination, several or none. Files given by their paths are closed with the logbook.
        config: what the headers say of the run.
        first: whether this is the rank that writes.

    Raises:
        InvalidValueError: something that is no destination, or a file that cannot be written.
        StateError: a file of a newer anybatch.
        UsageError: a file that another run writes to.
    """

    def __init__(self, record: Sequence[Destination], *, config: Mapping[str, Any], first: bool) -> None:
        given = list(record)
        self._lacking = first and not given  # other ranks need not be given any
        self._sinks: list[Sink] = []
        self._records: list[RunRecord] = []
        self._mine: list[RunRecord] = []
        self._fresh = True
        self._closed = False
        try:
            for destination in given if first else []:
                self._take(destination, config)
        except Exception:
            self.close()
            raise

    @property
    def writes(self) -> bool:
        """Whether this rank has something to write to."""
        return bool(self._records or self._sinks)

    def step(self, line: StepRecord) -> None:
        """Write one step."""
        self._fresh = False
        for record in self._records:
            record.write(line)
        if self._sinks:
            values = dict(vars(line))
            layers = values.pop("per_layer")
            self._tell(values | as_numbers(layers))

    def metrics(self, results: Mapping[str, float], *, step: int, tau: float) -> None:
        """Write the results of an evaluation.

        Raises:
            InvalidValueError: a result is not a number, or has the name of one of a step's own numbers.
            UsageError: there is nothing to write to on the rank that writes, or the logbook is closed.
        """
        if self._closed:
            raise UsageError("This controller is detached and writes no more: log before detach().")
        if self._lacking:
            raise UsageError("There is no record to log to: give attach record=, a path or a function.")
        if taken := sorted(results.keys() & _RESERVED):
            raise InvalidValueError(
                f"{', '.join(taken)}: every step is logged with that name, so give your result another one."
            )
        try:
            line = MetricRecord(step, tau, {name: float(value) for name, value in results.items()})
        except (TypeError, ValueError, RuntimeError):
            raise InvalidValueError(f"log() takes numbers, got {dict(results)}.") from None
        for record in self._records:
            record.write(line)
        if self._sinks:
            self._tell({**line.values, "step": line.step, "tau": line.tau})

    def resume(self) -> None:
        """What follows goes on from a loaded state; nothing to say where the last header has no steps yet."""
        if not self._fresh:
            for record in self._records:
                record.begin({})
        self._fresh = True

    def close(self) -> None:
        """Close what the logbook opened, release what it was given, and write no more."""
        for record in self._records:
            record.release(self)
        for record in self._mine:
            record.close()
        self._closed = True
        self._records, self._mine, self._sinks = [], [], []

    def _take(self, destination: Destination, config: Mapping[str, Any]) -> None:
        if isinstance(destination, RunRecord):
            destination.begin(config, holder=self)
            self._records.append(destination)
        elif isinstance(destination, str | PathLike):
            record = RunRecord(destination, config=config)
            self._mine.append(record)
            self._records.append(record)
        else:
            self._sinks.append(destination)

    def _tell(self, values: Mapping[str, float]) -> None:
        for sink in list(self._sinks):
            # A dictionary for each, for it is theirs to change.
            line = {f"anybatch/{name}": _plain(value) for name, value in values.items() if isfinite(value)}
            try:
                sink(line)
            except Exception as error:
                self._sinks.remove(sink)
                warnings.warn(
                    f"{getattr(sink, '__qualname__', sink)} raised {type(error).__name__}: {error}. Training goes on; "
                    "it is told no more.",
                    AnybatchWarning,
                    stacklevel=2,
                )


def _plain(value: float) -> float:
    return int(value) if isinstance(value, bool) else value


def destinations(record: Destination | Sequence[Destination] | None) -> list[Destination]:
    """The destinations of `attach(record=...)` as a list.

    Raises:
        InvalidValueError: something that is no destination.
    """
    if record is None:
        return []
    given: list[Any] = list(record) if isinstance(record, list | tuple) else [record]
    for destination in given:
        if not (isinstance(destination, str | PathLike | RunRecord) or callable(destination)):
            raise InvalidValueError(
                "record takes a path, a RunRecord, a function of a dictionary, or a list of these, got "
                f"{destination!r}. For TensorBoard, W&B and MLflow there are functions in anybatch.sinks."
            )
    return given

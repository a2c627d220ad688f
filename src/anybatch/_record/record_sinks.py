"""RecordSinks: the files and functions that receive a controller's steps."""

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

_RESERVED = {
    field.name for field in fields(StepRecord)
}  # a tracker would mix a result of the same name with the steps' numbers

Sink = Callable[[dict[str, float]], object]
Destination = str | PathLike[str] | RunRecord | Sink


class RecordSinks:
    """The destinations of `attach(record=...)`; the `first` rank alone writes, with `config` in the header."""

    def __init__(self, record: Sequence[Destination], *, config: Mapping[str, Any], first: bool) -> None:
        self._lacking = first and not record  # the other ranks need no destination
        self._sinks: list[Sink] = []
        self._records: list[RunRecord] = []
        self._opened: list[RunRecord] = []
        self._fresh = True  # whether no step was written since the last header
        self._closed = False
        try:
            for destination in record if first else []:
                self._take(destination, config)
        except Exception:
            self.close()
            raise

    @property
    def writes(self) -> bool:
        """Whether this rank has a destination."""
        return bool(self._records or self._sinks)

    def step(self, line: StepRecord) -> None:
        """Write one step."""
        self._fresh = False
        for record in self._records:
            record.write(line)
        if self._sinks:
            values = dict(vars(line))
            layers = values.pop("per_layer")
            self._send(values | as_numbers(layers))

    def metrics(self, results: Mapping[str, float], *, step: int, tau: float) -> None:
        """Write the results of an evaluation."""
        if self._closed:
            raise UsageError("This controller is detached and cannot write: call log() before detach().")
        if self._lacking:
            raise UsageError("There is no record to log to: pass record= to attach, a path or a function.")
        if taken := sorted(results.keys() & _RESERVED):
            raise InvalidValueError(
                f"{', '.join(taken)}: log() cannot take a name of a step's own numbers. Rename your result."
            )
        try:
            line = MetricRecord(step, tau, {name: float(value) for name, value in results.items()})
        except (TypeError, ValueError, RuntimeError):
            raise InvalidValueError(f"log() takes numbers, got {dict(results)}.") from None
        for record in self._records:
            record.write(line)
        if self._sinks:
            self._send({**line.values, "step": line.step, "tau": line.tau})

    def resume(self) -> None:
        """Begin the steps after a loaded state: write a header, unless the last header has no steps."""
        if not self._fresh:
            for record in self._records:
                record.begin({})
        self._fresh = True

    def rest(self) -> None:
        """Close the files given as paths until the next line: the run is over, but may be evaluated."""
        for record in self._opened:
            record.rest()

    def close(self) -> None:
        """Close the files given as paths, release each `RunRecord`, and stop writing."""
        for record in self._records:
            record.release(self)
        for record in self._opened:
            record.close()
        self._closed = True
        self._records, self._opened, self._sinks = [], [], []

    def _take(self, destination: Destination, config: Mapping[str, Any]) -> None:
        if isinstance(destination, RunRecord):
            destination.begin(config, holder=self)
            self._records.append(destination)
        elif isinstance(destination, str | PathLike):
            record = RunRecord(destination, config=config)
            self._opened.append(record)
            self._records.append(record)
        else:
            self._sinks.append(destination)

    def _send(self, values: Mapping[str, float]) -> None:
        for sink in list(self._sinks):
            # A new dictionary for each, since a function may change it.
            finite = {name: value for name, value in values.items() if isfinite(value)}
            line = {f"anybatch/{name}": int(v) if isinstance(v, bool) else v for name, v in finite.items()}
            try:
                sink(line)
            except Exception as error:
                self._sinks.remove(sink)
                warnings.warn(
                    f"{getattr(sink, '__qualname__', sink)} raised {type(error).__name__}: {error}. Training "
                    "continues, and this function is not called again.",
                    AnybatchWarning,
                    stacklevel=2,
                )


def destinations(record: Destination | Sequence[Destination] | None) -> list[Destination]:
    """The destinations of `attach(record=...)` as a list."""
    if record is None:
        return []
    given: list[Any] = list(record) if isinstance(record, list | tuple) else [record]
    for destination in given:
        if not (isinstance(destination, str | PathLike | RunRecord) or callable(destination)):
            raise InvalidValueError(
                "record takes a path, a RunRecord, a function of a dictionary, or a list of these, got "
                f"{destination!r}. anybatch.sinks has functions for TensorBoard, W&B and MLflow."
            )
    return given

"""Reading a record: as a list of its steps, one by one, or as columns of numbers."""

import os
from array import array
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from anybatch._errors import InvalidValueError, StateError
from anybatch._numbers import MOST
from anybatch._record.lines import METRIC_START, STEP_START, Groups, in_order, matcher, numbers, parsed
from anybatch._record.record import RECORD_VERSION, MetricRecord, Run, StepRecord

_BLOCK = 1024  # lines whose numbers are converted together


@dataclass
class _Segment:
    """What follows one header: the step number it starts after, and the one that later segments leave of it."""

    header: dict[str, Any]
    start: int | None = None
    limit: float = inf


def read_record(path: str | os.PathLike[str]) -> Run:
    """Read a record back, whole.

    It takes some 700 bytes of memory for each step; `iter_record` takes constant memory.

    Args:
        path: a file that a `RunRecord` wrote.

    Returns:
        A `Run`: `config`, `steps`, `torn`, `metrics`, `header` and `ranks`, without torn lines, and without steps that
        a resume from an earlier checkpoint took again.

    Raises:
        InvalidValueError: the file cannot be read, or is not a record.
        StateError: it was written by a newer anybatch.
    """
    segments = _segments(path)
    steps: list[StepRecord] = []
    metrics: list[MetricRecord] = []
    torn, taken = 0, segments[:0]
    for line, segment in _entries(path, segments, parsed):
        if isinstance(line, StepRecord):
            steps.append(line)
            if not taken or taken[-1] is not segment:
                taken.append(segment)
        elif isinstance(line, MetricRecord):
            metrics.append(line)
        else:
            torn += 1
    header, ranks = _end(segments, taken)
    return Run(header["config"], steps, torn, metrics, header, ranks)


def iter_record(path: str | os.PathLike[str]) -> Iterator[StepRecord | MetricRecord]:
    """Read a record line by line, in constant memory: the same steps and metrics as `read_record`, in their order.

    The file is read twice, first for where its resumes are.

    Args:
        path: a file that a `RunRecord` wrote.

    Returns:
        An iterator over the steps and the metrics.

    Raises:
        InvalidValueError: the file cannot be read, or is not a record.
        StateError: it was written by a newer anybatch.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> controller = anybatch.attach(optimizer, model=model, scale="count", record=tmp_path / "run.jsonl")
        >>> controller.log(accuracy=0.9)
        >>> [line.values for line in anybatch.iter_record(tmp_path / "run.jsonl")]
        [{'accuracy': 0.9}]
    """
    segments = _segments(path)
    return (
        line for line, _ in _entries(path, segments, parsed) if line is not None and not isinstance(line, dict | tuple)
    )


@dataclass(frozen=True)
class Columns:
    """A record whose steps are columns of float64: eight bytes a number.

    Args:
        config, torn, metrics, header, ranks: as in `Run`.
        measured_by_layer: the steps that hold moments by layer, whole.
        values: the numbers of all steps by the name of their field; true is 1, false 0, and integers end at 2**53.
    """

    config: dict[str, Any]
    torn: int
    metrics: list[MetricRecord]
    header: dict[str, Any]
    ranks: tuple[int, ...]
    measured_by_layer: list[StepRecord]
    values: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]


def read_columns(path: str | os.PathLike[str], names: Collection[str]) -> Columns:
    """Read the same steps as `read_record`, of each the fields `names` alone.

    Args:
        path: a file that a `RunRecord` wrote.
        names: fields of `StepRecord` that are numbers.

    Raises:
        InvalidValueError: the file cannot be read, or is not a record.
        StateError: it was written by a newer anybatch.
    """
    order = in_order({"step", *names})
    match = matcher(order)
    segments = _segments(path)
    values = {name: array("d") for name in order}
    rows: list[Groups] = []
    metrics: list[MetricRecord] = []
    by_layer: list[StepRecord] = []
    torn, taken = 0, segments[:0]

    def flush() -> None:
        for name, column in zip(order, zip(*rows, strict=True), strict=False):  # without a row there is no column
            values[name].extend(numbers(name, column))
        rows.clear()

    def parse(text: bytes) -> Any:
        found = match(text)
        return parsed(text) if found is None else found.groups()

    for line, segment in _entries(path, segments, parse):
        if isinstance(line, tuple):
            rows.append(line)
            if len(rows) == _BLOCK:
                flush()
        elif isinstance(line, StepRecord):
            flush()
            for name in order:
                values[name].append(_as_float(getattr(line, name)))
            if line.per_layer:
                by_layer.append(line)
        elif isinstance(line, MetricRecord):
            metrics.append(line)
            continue
        else:
            torn += 1
            continue
        if not taken or taken[-1] is not segment:
            taken.append(segment)
    flush()
    header, ranks = _end(segments, taken)
    columns = {
        name: torch.frombuffer(found, dtype=torch.float64) if found else torch.empty(0, dtype=torch.float64)
        for name, found in values.items()
    }
    return Columns(header["config"], torn, metrics, header, ranks, by_layer, columns)


def _end(segments: list[_Segment], taken: list[_Segment]) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The header under which the last step was taken, and how many ranks shared the steps."""
    header = (taken or segments)[-1].header
    ranks = {n for segment in taken if isinstance(n := segment.header["config"].get("ranks"), int)}
    return header, tuple(sorted(ranks))


def _segments(path: str | os.PathLike[str]) -> list[_Segment]:
    """The file's headers, each with what holds of the lines below it."""
    segments = [_Segment({})]
    for text in _lines(path):
        if text.startswith(METRIC_START) or (segments[-1].start is not None and text.startswith(STEP_START)):
            continue  # the bulk of the file
        line = parsed(text)
        if isinstance(line, StepRecord) and segments[-1].start is None:
            segments[-1].start = line.step if line.skipped else line.step - 1
        elif isinstance(line, dict):
            if line["version"] > RECORD_VERSION:
                raise StateError(
                    f"{os.fspath(path)!r} has record version {line['version']}, this anybatch reads up to "
                    f"{RECORD_VERSION}: upgrade anybatch."
                )
            segments.append(_Segment(line))
    if len(segments) == 1:
        raise InvalidValueError(f"{os.fspath(path)!r} is not an anybatch record: it has no header line.")
    segments[0].header = segments[1].header  # of lines above the first header that can be read
    limit = inf
    for segment in reversed(segments):
        segment.limit = limit
        if segment.start is not None:  # from nothing: not even an evaluation before the first step is left
            limit = min(limit, segment.start or -1)
    return segments


def _entries(
    path: str | os.PathLike[str], segments: list[_Segment], parse: Callable[[bytes], Any]
) -> Iterator[tuple[StepRecord | MetricRecord | Groups | None, _Segment]]:
    """Each line that counts with its segment; `None` for a torn one. A tuple begins with the step's number."""
    at = 0
    segment = segments[at]
    for text in _lines(path):
        line = parse(text)
        if isinstance(line, dict):
            at = min(at + 1, len(segments) - 1)  # a live run may have gone on since the first look
            segment = segments[at]
        elif line is None or segment.limit == inf or _number_of(line) <= segment.limit:
            yield line, segment


def _as_float(value: float) -> float:
    return float(min(value, MOST)) if isinstance(value, int) else value


def _number_of(line: Any) -> int:
    return int(line[0]) if isinstance(line, tuple) else line.step


def _lines(path: str | os.PathLike[str]) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            yield from file
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InvalidValueError(f"Cannot read the record {os.fspath(path)!r}: {why}.") from None

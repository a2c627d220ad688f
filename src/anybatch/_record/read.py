"""Reading a record: as a list of steps, step by step, or as columns of numbers."""

import os
from array import array
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields
from math import inf
from typing import Any

import torch
from torch import Tensor

from anybatch._errors import InvalidValueError, StateError
from anybatch._numbers import MOST
from anybatch._record.lines import METRIC_START, STEP_START, Groups, matcher, numbers, parsed
from anybatch._record.record import RECORD_VERSION, MetricRecord, Run, StepRecord

_BLOCK = 1024  # lines whose numbers are converted together


@dataclass
class _Segment:
    """The lines below one header: the last step before them, and the last step that later segments do not supersede."""

    header: dict[str, Any]
    start: int | None = None
    limit: float = inf
    taken: bool = False  # whether it holds a step that is not superseded


def read_record(path: str | os.PathLike[str]) -> Run:
    """Read a whole record.

    It takes about 700 bytes of memory for each step; `iter_record` takes constant memory.

    Args:
        path: a file that a `RunRecord` wrote.

    Returns:
        A `Run`: `config`, `steps`, `torn`, `metrics`, `header` and `ranks`, without torn lines and without steps that
        a resume from an earlier checkpoint repeated.

    Raises:
        InvalidValueError: the file cannot be read, or is not a record.
        StateError: a newer anybatch wrote the file.
    """
    segments = _segments(path)
    lines = list(_entries(path, segments, parsed))
    steps = [line for line in lines if isinstance(line, StepRecord)]
    metrics = [line for line in lines if isinstance(line, MetricRecord)]
    header, ranks = _end(segments)
    return Run(header["config"], steps, len(lines) - len(steps) - len(metrics), metrics, header, ranks)


def iter_record(path: str | os.PathLike[str]) -> Iterator[StepRecord | MetricRecord]:
    """Read the steps and metrics of `read_record` line by line, in order and in constant memory.

    It reads the file twice; the first pass finds the resumes.

    Args:
        path: a file that a `RunRecord` wrote.

    Returns:
        An iterator over the steps and the metrics.

    Raises:
        InvalidValueError: the file cannot be read, or is not a record.
        StateError: a newer anybatch wrote the file.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> controller = anybatch.attach(optimizer, model=model, scale="count", record=tmp_path / "run.jsonl")
        >>> controller.log(accuracy=0.9)
        >>> [line.values for line in anybatch.iter_record(tmp_path / "run.jsonl")]
        [{'accuracy': 0.9}]
    """
    entries = _entries(path, _segments(path), parsed)
    return (line for line in entries if isinstance(line, StepRecord | MetricRecord))


@dataclass(frozen=True)
class Columns:
    """A record as in `Run`, with its steps as columns of float64, eight bytes a number."""

    config: dict[str, Any]
    torn: int
    metrics: list[MetricRecord]
    header: dict[str, Any]
    ranks: tuple[int, ...]
    measured_by_layer: list[StepRecord]  # the steps that hold moments by layer
    values: dict[str, Tensor]  # by field; true becomes 1, false 0, and integers are at most 2**53

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]


def read_columns(path: str | os.PathLike[str], names: Collection[str]) -> Columns:
    """Read the fields `names` of the steps of `read_record`.

    Args:
        path: a file that a `RunRecord` wrote.
        names: fields of `StepRecord` that are numbers.

    Raises: as `read_record`.
    """
    order = [each.name for each in fields(StepRecord) if each.name in ("step", *names)]
    match = matcher(order)
    segments = _segments(path)
    values = {name: array("d") for name in order}
    rows: list[Groups] = []
    metrics: list[MetricRecord] = []
    by_layer: list[StepRecord] = []
    torn = 0

    def flush() -> None:
        for name, column in zip(order, zip(*rows, strict=True), strict=False):  # without a row there is no column
            values[name].extend(numbers(name, column))
        rows.clear()

    def parse(text: bytes) -> Any:
        found = match(text)
        return parsed(text) if found is None else found.groups()

    for line in _entries(path, segments, parse):
        if isinstance(line, tuple):
            rows.append(line)
            if len(rows) == _BLOCK:
                flush()
        elif isinstance(line, StepRecord):
            flush()
            for name in order:
                value = getattr(line, name)
                values[name].append(float(min(value, MOST)) if isinstance(value, int) else value)
            if line.per_layer:
                by_layer.append(line)
        elif isinstance(line, MetricRecord):
            metrics.append(line)
        else:
            torn += 1
    flush()
    header, ranks = _end(segments)
    columns = {
        name: torch.frombuffer(found, dtype=torch.float64) if found else torch.empty(0, dtype=torch.float64)
        for name, found in values.items()
    }
    return Columns(header["config"], torn, metrics, header, ranks, by_layer, columns)


def _end(segments: list[_Segment]) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The header of the last step, and the numbers of ranks that shared the steps."""
    taken = [segment for segment in segments if segment.taken]
    header = (taken or segments)[-1].header
    ranks = {n for segment in taken if isinstance(n := segment.header["config"].get("ranks"), int)}
    return header, tuple(sorted(ranks))


def _segments(path: str | os.PathLike[str]) -> list[_Segment]:
    """The file's segments, one for each header."""
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
                    f"{os.fspath(path)!r} has record version {line['version']}. This anybatch reads versions up to "
                    f"{RECORD_VERSION}: upgrade anybatch."
                )
            segments.append(_Segment(line))
    if len(segments) == 1:
        raise InvalidValueError(f"{os.fspath(path)!r} is not an anybatch record: it has no header line.")
    segments[0].header = segments[1].header  # for lines above the first readable header
    limit = inf
    for segment in reversed(segments):
        segment.limit = limit
        if segment.start is not None:  # a start from nothing supersedes even evaluations at step 0
            limit = min(limit, segment.start or -1)
    return segments


def _entries(
    path: str | os.PathLike[str], segments: list[_Segment], parse: Callable[[bytes], Any]
) -> Iterator[StepRecord | MetricRecord | Groups | None]:
    """The lines that are not superseded; `None` for a torn one. A tuple begins with the step's number."""
    at, segment = 0, segments[0]
    for text in _lines(path):
        line = parse(text)
        if isinstance(line, dict):
            at = min(at + 1, len(segments) - 1)  # the run may have written headers since
            segment = segments[at]
            continue
        number = line[0] if isinstance(line, tuple) else getattr(line, "step", 0)
        if segment.limit == inf or line is None or int(number) <= segment.limit:
            segment.taken = segment.taken or isinstance(line, StepRecord | tuple)
            yield line


def _lines(path: str | os.PathLike[str]) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            yield from file
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InvalidValueError(f"Cannot read the record {os.fspath(path)!r}: {why}.") from None

"""What a record holds, and how it is read: one strict JSON object a line, a header before the steps of each start.

[Note: one run] A run that was killed and resumed from a checkpoint has taken the steps after it twice, and both are in
the file, which only grows. The steps that count are those that the weights went through: where the first step after a
header has number n, all earlier lines of steps n and above are superseded, and readers pass over them. So a record
reads as one run, whatever happened; a run that starts from nothing in an old file supersedes all of it.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from math import inf, isfinite, nan
from operator import index
from typing import Any

from anybatch._errors import InvalidValueError, StateError
from anybatch._numbers import real
from anybatch._record.layers import averaged, from_json
from anybatch._scaling import Moments

RECORD_VERSION = 2  # 2: metrics, and a header with provenance
HEADER_START = b'{"kind": "header"'
_STEP_START = b'{"kind": "step"'
_METRIC_START = b'{"kind": "metric"'


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. Numbers that are not known or not finite are null in the file and nan here.

    Args:
        step: steps counted so far, this one included.
        tau: the clock after the step, base iterations.
        iterations: how far this step moved the clock.
        scale: S.
        count: N, micro-batches on all ranks; 0 where nothing was counted.
        raw_variance: this step's own estimate of sigma^2, grad^2.
        raw_sqnorm: this step's own estimate of mu^2, grad^2.
        variance: the averaged sigma^2.
        sqnorm: the averaged mu^2.
        gain: r.
        lr: the learning rate applied to the first parameter group.
        lr_factor: its factor on the base learning rate.
        noise_scale: B_simple in examples, or in base batches where no base batch was given.
        seconds: wall time since the previous step.
        skipped: whether the step was not counted, because of a non-finite gradient.
        metric_variance: the averaged sigma^2 in Adam's metric; nan where it was not measured, as in older records.
        metric_sqnorm: the averaged mu^2, likewise.
        per_layer: `raw_variance` and `raw_sqnorm` by layer, which add up to them, at a step that
            `attach(per_layer=...)` looked at; else empty, and then not in the file.
    """

    step: int
    tau: float
    iterations: float
    scale: float
    count: int
    raw_variance: float
    raw_sqnorm: float
    variance: float
    sqnorm: float
    gain: float
    lr: float
    lr_factor: float
    noise_scale: float
    seconds: float
    skipped: bool = False
    metric_variance: float = nan
    metric_sqnorm: float = nan
    per_layer: Mapping[str, Moments] = field(default_factory=dict)


@dataclass(frozen=True)
class MetricRecord:
    """Results of an evaluation, given to `controller.log`.

    Args:
        step: steps counted until then.
        tau: the clock then, base iterations.
        values: the results by their names; nan where they were not finite.
    """

    step: int
    tau: float
    values: dict[str, float]


@dataclass(frozen=True)
class Run:
    """A record that was read.

    Args:
        config: the header's configuration.
        steps: the steps that led to the run's end, in their order; without those that a resume took again.
        torn: lines that could not be read: at most the last one, and one for each time the run was killed.
        metrics: the results of evaluations, likewise.
        header: versions, machine, commit, seed and configuration, as the run ended: the header under which the last
            of these steps was taken.
        ranks: how many processes shared the steps, in ascending order; two or more where a resume changed it.
    """

    config: dict[str, Any]
    steps: list[StepRecord]
    torn: int
    metrics: list[MetricRecord] = field(default_factory=list)
    header: dict[str, Any] = field(default_factory=dict)
    ranks: tuple[int, ...] = ()

    def per_layer(self, begin: float = 0.0, end: float = inf) -> dict[str, Moments]:
        """Variance and sqnorm of each layer, averaged over the steps that were looked at with `begin < tau <= end`.

            variance_l = mean over steps of tr Cov(g_l)         sqnorm_l = mean over steps of ||E g_l||^2

        in the unit of one base batch. Of single steps both are noisy, sqnorm more than variance, and may be negative:
        take a window of ten looks or more. Its noise scale is in base batches; times `config["base_batch"]`, in
        examples. That of the whole is not their mean, but their mean with sqnorm as weights.

        Args:
            begin: where the window begins, base iterations.
            end: where it ends.

        Returns:
            The moments by layer, in the model's order: a module under its name in the model, weight and bias together,
            a parameter of the model itself under its own. Empty where no step was looked at.

        Example:
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            >>> path = tmp_path / "layers.jsonl"
            >>> controller = anybatch.attach(optimizer, model=model, scale=1, per_layer=2, record=path)
            >>> for batch in torch.randn(20, 16, 4):
            ...     for part in anybatch.split(batch, 2):
            ...         (model(part).square().mean() / 2).backward()
            ...     optimizer.step()
            ...     optimizer.zero_grad()
            >>> found = anybatch.read_record(path).per_layer()
            >>> list(found), found["2"].variance > 0
            (['0', '2'], True)

        Source:
            McCandlish et al. 2018, Appendix A.1, for each layer by itself.
        """
        return averaged(step.per_layer for step in self.steps if begin < step.tau <= end)


@dataclass
class _Segment:
    """What follows one header: the step number it starts after, and the one that later segments leave of it."""

    header: dict[str, Any]
    start: int | None = None
    limit: float = inf


def read_record(path: str | os.PathLike[str]) -> Run:
    """Read a record back, whole.

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
    for line, segment in _entries(path, segments):
        if isinstance(line, StepRecord):
            steps.append(line)
            if not taken or taken[-1] is not segment:
                taken.append(segment)
        elif isinstance(line, MetricRecord):
            metrics.append(line)
        else:
            torn += 1
    header = (taken or segments)[-1].header
    ranks = {n for segment in taken if isinstance(n := segment.header["config"].get("ranks"), int)}
    return Run(header["config"], steps, torn, metrics, header, tuple(sorted(ranks)))


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
        >>> record = anybatch.RunRecord(tmp_path / "run.jsonl")
        >>> record.write(anybatch.MetricRecord(step=3, tau=5.5, values={"accuracy": 0.9}))
        >>> [line.values for line in anybatch.iter_record(tmp_path / "run.jsonl")]
        [{'accuracy': 0.9}]
    """
    segments = _segments(path)
    return (line for line, _ in _entries(path, segments) if line is not None)


def _segments(path: str | os.PathLike[str]) -> list[_Segment]:
    """The file's headers, each with what holds of the lines below it."""
    segments = [_Segment({})]
    for text in _lines(path):
        if text.startswith(_METRIC_START) or (segments[-1].start is not None and text.startswith(_STEP_START)):
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
    path: str | os.PathLike[str], segments: list[_Segment]
) -> Iterator[tuple[StepRecord | MetricRecord | None, _Segment]]:
    """Each line that counts with its segment; `None` for a torn one."""
    at = 0
    for text in _lines(path):
        line = parsed(text)
        if isinstance(line, dict):
            at = min(at + 1, len(segments) - 1)  # a live run may have gone on since the first look
        elif line is None or line.step <= segments[at].limit:
            yield line, segments[at]


def _lines(path: str | os.PathLike[str]) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            yield from file
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InvalidValueError(f"Cannot read the record {os.fspath(path)!r}: {why}.") from None


def parsed(text: bytes) -> StepRecord | MetricRecord | dict[str, Any] | None:
    """A step, a metric or a header; `None` for what is none of them."""
    try:
        line = json.loads(text)
        kind = line["kind"]
        if kind == "step":
            line = {**_NEW_FIELDS, **line}
            return StepRecord(**{name: convert(line[name]) for name, convert in _STEP_FIELDS.items()})
        if kind == "metric":
            values = {name: _number(value) for name, value in line["values"].items()}
            return MetricRecord(_count(line["step"]), _number(line["tau"]), values)
        if kind == "header" and isinstance(line["config"], dict):
            return {**line, "version": _count(line["version"])}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        pass
    return None


def _number(value: Any) -> float:
    """A number; nan where the file has null, or what another program writes for numbers that are not finite."""
    unknown = value is None or (isinstance(value, float) and not isfinite(value))
    number = nan if unknown else real(value)
    if number is None:
        raise ValueError
    return number


def _count(value: Any) -> int:
    if isinstance(value, bool) or index(value) < 0:
        raise ValueError
    return index(value)


def _layers(value: Any) -> dict[str, Moments]:
    return from_json(value, number=_number)


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


_CONVERT: dict[Any, Callable[[Any], Any]] = {float: _number, int: _count, bool: _truth, Mapping[str, Moments]: _layers}
# Which older records, or most lines, do not have.
_NEW_FIELDS: dict[str, Any] = {"metric_variance": None, "metric_sqnorm": None, "per_layer": {}}
_STEP_FIELDS = {f.name: _CONVERT[f.type] for f in fields(StepRecord)}

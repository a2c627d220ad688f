"""From a record to the summary of a run: a few numbers, and curves of bounded length."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan
from os import fspath
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import anybatch
from anybatch._numbers import chosen, median, positive
from anybatch._record import MetricRecord, read_columns
from anybatch._report.layers import LayerMap, layer_map
from anybatch._report.points import Point, drawable, each, thin
from anybatch._report.words import short_number, written

QUANTITIES = {"gain": "gain", "learning rate": "lr", "noise scale": "noise_scale"}  # by the name on the page
_DEEP = 4  # levels of a configuration with a line for each value
_FIELDS = ("step", "tau", "scale", "raw_variance", "raw_sqnorm", "seconds", "skipped", *QUANTITIES.values())
_MANY_STEPS = 10**15  # exact as a float


@dataclass(frozen=True)
class Curve:
    """One quantity of a run, against tau and against the optimizer's steps."""

    tau: list[Point]
    step: list[Point]


@dataclass(frozen=True)
class Summary:
    """The summary of one run."""

    path: Path
    name: str  # a name that no other run has
    rule: str
    scales: str  # its scales as text
    scale: float  # the median of its scales; nan without a step
    constant: bool  # whether the scale never changed
    measured: bool  # whether some step has a variance
    iterations: int  # counted optimizer steps
    gain: float
    base_batches: float  # base batches of all steps, including skipped ones
    seconds: float  # wall time of the steps; nan if unknown
    tau: float  # the clock at the end, base iterations
    total: float  # base iterations of the whole run; nan if unknown
    skipped: int
    torn: int  # unreadable lines
    results: dict[str, float]  # the last result of each metric
    curves: dict[str, Curve]  # `QUANTITIES` by name
    metrics: dict[str, Curve]  # the evaluations by name
    config: dict[str, Any]  # the header's configuration
    facts: dict[str, str]  # the header's values as text, and the scale
    layers: LayerMap | None  # in examples, or in base batches if the record has no base batch

    @property
    def finished(self) -> bool:
        """Whether the run reached its total."""
        return self.tau >= 0.999 * self.total

    @property
    def efficiency(self) -> float:
        """The statistical efficiency, the sum of the gains over the base batches; nan if no gain is known."""
        return self.gain * self.iterations / self.base_batches if self.base_batches else nan

    @property
    def base_batch(self) -> float:
        """Examples of a base batch; nan if unknown."""
        return positive(self.config.get("base_batch")) or nan


def summarise(paths: Sequence[Path], *, unread: Callable[[str], None] | None = None) -> list[Summary]:
    """Read the records one by one into summaries, each file once, sorted by batch and then by name.

    `unread` is called with a sentence for each unreadable record; with `None` the first one raises.
    """
    unique = list({_resolved(path): path for path in reversed(paths)}.values())[::-1]
    found = []
    for path, name in zip(unique, _names(unique), strict=True):
        try:
            found.append(_summary(path, name))
        except anybatch.AnybatchError as error:
            if unread is None:
                raise
            unread(str(error))
    return sorted(found, key=_by_batch)


def _by_batch(run: Summary) -> tuple[float, list[tuple[int, str]]]:
    """A key that sorts bs16 before bs128, and runs without a step last."""
    batch = run.scale * run.base_batch if isfinite(run.base_batch) else run.scale
    parts = re.split(r"(\d+)", run.name)
    return batch if isfinite(batch) else inf, [(int(part), "") if part.isdecimal() else (0, part) for part in parts]


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a loop of links; reading raises the error
        return path.absolute()


def _summary(path: Path, name: str) -> Summary:
    run = read_columns(path, _FIELDS)
    counted = run["skipped"] == 0
    scales, gains, taus = (chosen(run[field], counted & drawable(run[field])) for field in ("scale", "gain", "tau"))
    seconds, every = (chosen(run[field], drawable(run[field])) for field in ("seconds", "scale"))
    iterations = int(counted.sum())
    results = {key: value for line in run.metrics for key, value in line.values.items()}
    return Summary(
        path=path,
        name=name,
        rule=written(run.config.get("rule", "–")).partition("(")[0],
        scales=_scales(scales),
        scale=median(scales) if len(scales) else nan,
        constant=len(scales.unique()) == 1,
        measured=bool((counted & run["raw_variance"].isfinite() & run["raw_sqnorm"].isfinite()).any()),
        iterations=iterations,
        gain=fmean(each(gains)) if len(gains) else nan,
        base_batches=sum(each(every)),
        seconds=sum(each(seconds)) if len(seconds) else nan,
        tau=taus[-1].item() if len(taus) else 0.0,
        total=positive(run.config.get("total")) or nan,
        skipped=len(counted) - iterations,
        torn=run.torn,
        results=results,
        curves={
            name: _curve(*(chosen(run[field], counted) for field in ("tau", "step", of)))
            for name, of in QUANTITIES.items()
        },
        metrics={key: _of_metric(run.metrics, key) for key in results},
        config=run.config,
        facts={**_facts(run.header), "scale": _scales(scales)},
        layers=layer_map(run.measured_by_layer, unit=positive(run.config.get("base_batch")) or 1.0),
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that are all different."""
    paths = [path.absolute() for path in paths]
    for parts in range(1, 1 + max((len(path.parts) for path in paths), default=0)):
        names = [fspath(Path(*path.parts[-parts:])).removesuffix(".jsonl") for path in paths]
        if len(set(names)) == len(names):
            return names
    return [fspath(path) for path in paths]


def _scales(scales: Tensor) -> str:
    """`8` for a constant scale, `32 → 64` for one or two changes, `1 to 128` for more."""
    walk = scales.unique_consecutive()
    if len(walk) > 3:
        return f"{short_number(walk.min().item())} to {short_number(walk.max().item())}"
    return " → ".join(map(short_number, walk.tolist())) or "–"


def _of_metric(lines: Sequence[MetricRecord], name: str) -> Curve:
    found = [(line.tau, float(min(line.step, _MANY_STEPS)), line.values[name]) for line in lines if name in line.values]
    return _curve(*torch.tensor(found, dtype=torch.float64).T)


def _curve(tau: Tensor, step: Tensor, value: Tensor) -> Curve:
    return Curve(thin(tau, value), thin(step.clamp(max=_MANY_STEPS), value, log=True))


def _facts(header: Mapping[str, Any]) -> dict[str, str]:
    """Versions, machine, seed and configuration, each with its full name."""
    facts = {k: written(v) for k, v in header.items() if k not in ("kind", "version", "time", "config")}
    for name, value in _flat("", header["config"], depth=_DEEP):
        facts[name if name not in facts else f"config.{name}"] = value
    return facts


def _flat(name: str, value: Any, *, depth: int) -> list[tuple[str, str]]:
    if depth and value and isinstance(value, dict):
        children = [(f"{name}.{key}" if name else str(key), child) for key, child in value.items()]
    elif depth and isinstance(value, list) and any(isinstance(child, dict) for child in value):
        children = [(f"{name}[{i}]", child) for i, child in enumerate(value)]
    else:
        return [(name, written(value))]
    return [line for key, child in children for line in _flat(key, child, depth=depth - 1)]

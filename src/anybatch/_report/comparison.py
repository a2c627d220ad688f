"""Forecasts from some of the runs against what the others came to."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean
from typing import Any

import anybatch
from anybatch._forecast import Estimate
from anybatch._report.summary import Summary

# What may differ between two runs of one configuration: the batch and its parts, chance and the machine.
_FREE = ("scale", "micro_batch", "ranks", "device", "seed", "batch", "batch_size")
_SOURCES = 12  # half a second each
_SCALES = 8
_GROUPS = 4
_LEAST, _MOST = 1e-3, 1e6  # scales that are forecast


@dataclass(frozen=True)
class Comparison:
    """One configuration at several scales.

    Args:
        happened: the mean iterations of the finished runs at each scale, in ascending order.
        counts: how many runs that is, by scale.
        forecasts: for each run that shows a variance, the iterations at each of these scales.
        notes: why a run is not in it.
    """

    happened: dict[float, float]
    counts: dict[float, int]
    forecasts: list[tuple[Summary, dict[float, Estimate]]]
    notes: list[str]


def compare(runs: Sequence[Summary]) -> list[Comparison]:
    """A comparison for each configuration of AdaScale that was run to its end at two scales or more."""
    groups: dict[str, list[Summary]] = {}
    for run in runs:
        if run.rule == "AdaScale" and run.iterations and isfinite(run.total):
            groups.setdefault(_key(run), []).append(run)
    found = (_comparison(group) for group in groups.values())
    return [comparison for comparison in found if comparison is not None][:_GROUPS]


def _comparison(runs: Sequence[Summary]) -> Comparison | None:
    ended = [run for run in runs if run.finished and run.constant and _LEAST <= run.scale <= _MOST]
    scales = _spread(sorted({run.scale for run in ended}))
    sources = [run for run in _in_turn(runs) if run.measured][:_SOURCES]
    if not any(run.scale != scale for run in sources for scale in scales):
        return None
    forecasts, notes = [], []
    for run in sources:
        try:
            steps = {s.scale: s.steps for s in anybatch.forecast(run.path, scales).scales}
        except anybatch.AnybatchError as error:
            notes.append(f"No forecast from {run.name}: {error}")
            continue
        forecasts.append((run, {s: e for s, e in steps.items() if not (run.constant and s == run.scale)}))
    if not any(steps for _, steps in forecasts):
        return None
    at = {scale: [run.iterations for run in ended if run.scale == scale] for scale in scales}
    return Comparison({s: fmean(n) for s, n in at.items()}, {s: len(n) for s, n in at.items()}, forecasts, notes)


def _key(run: Summary) -> str:
    try:
        return json.dumps(_bound(run.config), sort_keys=True)
    except RecursionError:  # so deep that it is compared with none
        return str(run.path)


def _bound(config: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same, also of the user's values under "given"."""
    given = config.get("given")
    parts = [config, {"given": {k: v for k, v in given.items() if k not in _FREE}} if isinstance(given, dict) else {}]
    return {k: v for part in parts for k, v in part.items() if k not in _FREE}


def _in_turn(runs: Sequence[Summary]) -> list[Summary]:
    """The first run of each scale, the small ones first, then the second ones: what is cut off is the repetitions."""
    seen: dict[str, int] = {}
    turns = []
    for run in runs:
        turns.append((seen.setdefault(run.scales, 0), run.scale))
        seen[run.scales] += 1
    return [run for _, run in sorted(zip(turns, runs, strict=True), key=lambda pair: pair[0])]


def _spread(scales: Sequence[float]) -> list[float]:
    """At most `_SCALES` of them, the ends included."""
    if len(scales) <= _SCALES:
        return list(scales)
    return [scales[round(i * (len(scales) - 1) / (_SCALES - 1))] for i in range(_SCALES)]

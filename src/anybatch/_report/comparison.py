"""Forecasts from some of the runs against the steps that other runs took."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean
from typing import Any

import anybatch
from anybatch._forecast import Estimate
from anybatch._report.points import spread
from anybatch._report.summary import Summary

# The values that may differ between two runs of one configuration.
_FREE = ("scale", "micro_batch", "ranks", "device", "seed", "batch", "batch_size")
_SOURCES = 12  # forecasts; each takes half a second
_SCALES = 8
_GROUPS = 4
_LEAST, _MOST = 1e-3, 1e6  # the range of forecast scales


@dataclass(frozen=True)
class Comparison:
    """One configuration at several scales."""

    happened: dict[float, float]  # the mean iterations of the finished runs at each scale, in ascending order
    counts: dict[float, int]  # the number of finished runs at each scale
    forecasts: list[tuple[Summary, dict[float, Estimate]]]  # forecast iterations by scale, for each measured run
    notes: list[str]  # for each run without a forecast, the reason


def compare(runs: Sequence[Summary]) -> list[Comparison]:
    """A comparison for each configuration of AdaScale with finished runs at two scales or more."""
    groups: dict[str, list[Summary]] = {}
    for run in runs:
        if run.rule == "AdaScale" and run.iterations and isfinite(run.total):
            groups.setdefault(_key(run), []).append(run)
    found = (_comparison(group) for group in groups.values())
    return [comparison for comparison in found if comparison is not None][:_GROUPS]


def _comparison(runs: Sequence[Summary]) -> Comparison | None:
    ended = [run for run in runs if run.finished and run.constant and _LEAST <= run.scale <= _MOST]
    scales = spread(sorted({run.scale for run in ended}), _SCALES)
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
    except RecursionError:  # too deep to be compared
        return str(run.path)


def _bound(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values that must be the same, including the user's values under "given"."""
    given = config.get("given")
    parts = [config, {"given": {k: v for k, v in given.items() if k not in _FREE}} if isinstance(given, dict) else {}]
    return {k: v for part in parts for k, v in part.items() if k not in _FREE}


def _in_turn(runs: Sequence[Summary]) -> list[Summary]:
    """The first run of each scale in ascending order, then the second runs: a cut drops repetitions first."""
    seen: dict[str, int] = {}
    turns = []
    for run in runs:
        turns.append((seen.setdefault(run.scales, 0), run.scale))
        seen[run.scales] += 1
    return [run for _, run in sorted(zip(turns, runs, strict=True), key=lambda pair: pair[0])]

"""The statistics of `same_training` and what they are shown as: tables, JSON and a figure."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from math import exp, inf, isfinite, log, nan
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np
from scipy.stats import ttest_ind

from benchmarks.same_training_tasks import Point, Result

POINTS, FIRST = 20, 0.05  # of a curve: how many, and the share of the run where they begin
LEVEL = 0.05


@dataclass(frozen=True)
class Row:
    """One line of a table: a candidate at a scale, or scale 1.

    Args:
        diverged: how many of the seeds did.
        steps: their mean.
        loss, loss_sd, loss_mark: on held-out data at the end; `-` is significantly worse than scale 1, `+` better.
        metric_mean, metric_sd, metric_mark: the same of the metric.
        distance: of the curve from scale 1's; at scale 1 the noise floor.
        floor: the noise floor.
        relative: the mean loss over scale 1's.
    """

    task: str
    family: str
    lr: float
    total: int
    metric: str
    scale: int
    candidate: str
    seeds: int
    diverged: int
    steps: float
    loss: float
    loss_sd: float
    loss_mark: str
    metric_mean: float
    metric_sd: float
    metric_mark: str
    distance: float
    floor: float
    relative: float


@dataclass(frozen=True)
class Score:
    """What a candidate comes to over cells, each a task at a scale.

    Args:
        common: whether over the cells that all candidates of its family have; else over all of its own.
        worse, better: cells with a significantly worse, or better, loss than scale 1's; `metric_` the same.
        share: geometric mean of the steps over scale 1's.
        loss: geometric mean of the loss over scale 1's.
        distance: mean distance of the curves, where none diverged.
        floor: mean noise floor of these cells.
    """

    family: str
    candidate: str
    common: bool
    cells: int
    worse: int
    better: int
    metric_worse: int
    metric_better: int
    share: float
    loss: float
    distance: float
    floor: float


def mark(values: Sequence[float], base: Sequence[float], *, higher_is_better: bool = False) -> str:
    """`-` where `values` are significantly worse than `base`, `+` where better; a value that is not finite is worse."""
    if not all(map(isfinite, base)):
        return ""
    if not all(map(isfinite, values)):
        return "-"
    difference = fmean(values) - fmean(base)
    constant = len(set(values)) == len(set(base)) == 1  # no spread at all: the test has no denominator
    with catch_warnings():
        simplefilter("ignore", RuntimeWarning)  # equal values on one side: their variance is 0, not a rounding error
        p = float(difference == 0) if constant else float(ttest_ind(values, base, equal_var=False).pvalue)
    if not p < LEVEL:
        return ""
    return "+" if (difference > 0) == higher_is_better else "-"


def distance(curves: Sequence[Sequence[Point]], base: Sequence[Sequence[Point]], *, total: float) -> float:
    """Root mean square of log(mean loss of `curves` / mean loss of `base`), at equal points of tau.

    Between a run's own points the loss is a straight line; points of tau before the first of any run are left out.
    """
    first = max(curve[0]["tau"] for curve in (*curves, *base))
    grid = [tau for tau in np.linspace(FIRST * total, total, POINTS) if tau >= first]
    means = [np.mean([_interpolated(curve, grid) for curve in several], axis=0) for several in (curves, base)]
    if not grid or not all(np.isfinite(mean).all() for mean in means):
        return inf
    return float(np.sqrt(np.mean(np.log(means[0] / means[1]) ** 2)))


def _interpolated(curve: Sequence[Point], grid: Sequence[float]) -> Any:
    return np.interp(grid, [point["tau"] for point in curve], [point["loss"] for point in curve])


def noise_floor(curves: Sequence[Sequence[Point]], *, total: float) -> float:
    """Root mean square of the distances between two halves of `curves`, over all ways to halve them."""
    everyone = set(range(len(curves)))
    halves = [set(half) for half in combinations(sorted(everyone), len(curves) // 2)]
    pairs = [([curves[i] for i in half], [curves[i] for i in everyone - half]) for half in halves]
    return float(np.sqrt(np.mean([distance(a, b, total=total) ** 2 for a, b in pairs])))


def base_row(task: str, runs: Sequence[Result], *, lr: float, total: int, metric: str, family: str) -> Row:
    """The line of scale 1."""
    floor = noise_floor([run.curve for run in runs if not run.diverged], total=total)
    empty = Row(task, family, lr, total, metric, 1, "", 0, 0, nan, nan, nan, "", nan, nan, "", floor, floor, 1.0)
    return replace(row(empty, 1, "", runs, base=runs), distance=floor, relative=1.0)


def row(like: Row, scale: int, candidate: str, runs: Sequence[Result], *, base: Sequence[Result]) -> Row:
    """The line of a candidate at a scale, of the task of the line `like`."""
    losses, baseline = ends(runs, "loss"), ends(base, "loss")
    metrics = ends(runs, "metric")
    curves, others = ([run.curve for run in several if not run.diverged] for several in (runs, base))
    whole = len(curves) == len(runs) and bool(others)
    return replace(
        like,
        scale=scale,
        candidate=candidate,
        seeds=len(runs),
        diverged=len(runs) - len(curves),
        steps=fmean(run.steps for run in runs),
        loss=fmean(losses),
        loss_sd=_spread(losses),
        loss_mark=mark(losses, baseline),
        metric_mean=fmean(metrics),
        metric_sd=_spread(metrics),
        metric_mark=mark(metrics, ends(base, "metric"), higher_is_better=True),
        distance=distance(curves, others, total=like.total) if whole else inf,
        relative=fmean(losses) / fmean(baseline),
    )


def ends(runs: Sequence[Result], name: str) -> list[float]:
    """Where the runs ended; a diverged one at an infinite loss, or at a metric that is infinitely low."""
    return [(inf if name == "loss" else -inf) if run.diverged else run.curve[-1][name] for run in runs]


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 and all(map(isfinite, values)) else nan


def scores(rows: Sequence[Row]) -> list[Score]:
    """Each candidate over the cells that all candidates of its family have, and over all of its own."""
    found = []
    for common in (True, False):
        for family in dict.fromkeys(r.family for r in rows):
            mine = [r for r in rows if r.family == family and r.scale > 1]
            of = {
                label: [r for r in mine if r.candidate == label] for label in dict.fromkeys(r.candidate for r in mine)
            }
            cells = (
                set.intersection(*({(r.task, r.scale) for r in several} for several in of.values())) if of else set()
            )
            for label, several in of.items():
                chosen = [r for r in several if not common or (r.task, r.scale) in cells]
                found += [_score(family, label, common, chosen)] if chosen else []
    return found


def _score(family: str, candidate: str, common: bool, rows: Sequence[Row]) -> Score:
    distances = [r.distance for r in rows if isfinite(r.distance)]
    return Score(
        family,
        candidate,
        common,
        len(rows),
        sum(r.loss_mark == "-" for r in rows),
        sum(r.loss_mark == "+" for r in rows),
        sum(r.metric_mark == "-" for r in rows),
        sum(r.metric_mark == "+" for r in rows),
        exp(fmean(log(r.steps / r.total) for r in rows)),
        exp(fmean(log(r.relative) for r in rows)) if all(isfinite(r.relative) for r in rows) else inf,
        fmean(distances) if distances else inf,
        fmean(r.floor for r in rows),
    )


def markdown(rows: Sequence[Row]) -> str:
    """The scores, and a table for each task."""
    found = scores(rows)
    parts = [
        f"### {title}\n\n" + _scores_table([s for s in found if s.common == common])
        for common, title in ((True, "Where all rules of a family were trained"), (False, "All that was trained"))
        if found
    ]
    return "\n".join([*parts, *(_task_table([r for r in rows if r.task == t]) for t in dict.fromkeys(_tasks(rows)))])


def _tasks(rows: Sequence[Row]) -> list[str]:
    return [r.task for r in rows]


def _scores_table(found: Sequence[Score]) -> str:
    lines = [
        "| family | rule | cells | loss `-` | loss `+` | metric `-` | metric `+` | steps | loss | curve | noise |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {s.family} | {s.candidate} | {s.cells} | {s.worse} | {s.better} | {s.metric_worse} | {s.metric_better} | "
        f"{s.share:.1%} | {_number(s.loss)} | {_number(s.distance)} | {_number(s.floor)} |"
        for s in found
    ]
    return "\n".join(lines) + "\n"


def _task_table(rows: Sequence[Row]) -> str:
    first = rows[0]
    lines = [
        f"### {first.task}",
        "",
        f"Learning rate {first.lr:g}, {first.total} base iterations; noise floor of the curve {_number(first.floor)}.",
        "",
        f"| S | rule | seeds | steps | loss | | {first.metric} | | curve |",
        "|--:|---|--:|--:|--:|---|--:|---|--:|",
    ]
    for r in rows:
        seeds = f"{r.seeds} ({r.diverged} diverged)" if r.diverged else str(r.seeds)
        curve = _number(r.distance) if r.scale > 1 else ""
        lines.append(
            f"| {r.scale} | {r.candidate} | {seeds} | {r.steps:.0f} | {_number(r.loss)} ± {_number(r.loss_sd)} | "
            f"{_code(r.loss_mark)} | {r.metric_mean:.2f} ± {r.metric_sd:.2f} | {_code(r.metric_mark)} | {curve} |"
        )
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return "∞" if value == inf else "–" if not isfinite(value) else f"{value:.4f}"


def _code(found: str) -> str:
    return f"`{found}`" if found else ""


def to_json(rows: Sequence[Row]) -> str:
    """Lines and scores as strict JSON: what is not finite is null."""
    found = {"rows": [asdict(r) for r in rows], "scores": [asdict(s) for s in scores(rows)]}
    for line in (*found["rows"], *found["scores"]):
        line.update({k: None for k, v in line.items() if isinstance(v, float) and not isfinite(v)})
    return json.dumps(found, indent=1) + "\n"


def write(path: Path, text: str) -> None:
    """Write a file into a folder that may not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def figure(rows: Sequence[Row], path: Path) -> None:
    """Steps over those of linear scaling against the loss over scale 1's, a panel for each family of optimizers."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    compared = [r for r in rows if r.scale > 1 and isfinite(r.relative)]
    families = list(dict.fromkeys(r.family for r in compared))
    if not families:
        raise ValueError("There is nothing to draw yet.")
    columns = min(2, len(families))
    lines = -(-len(families) // columns)
    size = (5 * columns, 4.6 * lines)
    drawing, grid = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    panels = grid.flatten()
    for unused in panels[len(families) :]:
        unused.remove()
    shapes = dict(zip(sorted({r.scale for r in compared}), "os^Dv", strict=False))
    for panel, family in zip(panels, families, strict=False):
        mine = [r for r in compared if r.family == family]
        for number, label in enumerate(dict.fromkeys(r.candidate for r in mine)):
            panel.scatter([], [], color=f"C{number}", marker="o", label=label)
            for r in (r for r in mine if r.candidate == label):
                x = r.steps * r.scale / r.total
                panel.scatter(x, r.relative, color=f"C{number}", marker=shapes[r.scale], alpha=0.8, linewidth=0)
        panel.axhline(1, color="gray", linewidth=0.8)
        panel.set(xscale="log", yscale="log", title=family, xlabel="steps / (scale 1's / S)")
        panel.set_ylabel("held-out loss / scale 1's")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if axis is panel.xaxis else tuple(range(1, 10))))
            axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_locator(ticker.NullLocator())
        panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=5, frameon=False)
    for scale, shape in shapes.items():
        panels[0].scatter([], [], color="gray", marker=shape, label=f"S = {scale}")
    panels[0].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=130)
    plt.close(drawing)

"""The demo's figures and its page."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from math import isnan
from pathlib import Path

import matplotlib  # noqa: F401  # if it is missing, this raises before the training and not after it
import torch

import anybatch
from anybatch._demo.digits import BASE_BATCH, EVALUATIONS, Result
from anybatch._demo.run import Curve, Plan, Row, curve, show
from anybatch._record import read_columns, strict
from anybatch._report import (
    BAND,
    INK,
    METHOD,
    Block,
    Chart,
    Grid,
    Heading,
    Legend,
    Line,
    Table,
    Text,
    colour,
    difference,
    page,
    picture,
    thin,
)

COLUMNS = ("scale", "rule", "test accuracy", "training loss", "iterations", "mean gain")
_DASHED = (6.0, 3.5)
NAMES = {"adascale": "AdaScale", "lsw": "LSW", "lsw+": "LSW+"}


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table as text; an asterisk marks an accuracy significantly below scale 1."""
    return (
        row.scale,
        NAMES[row.rule] if row.scale != "1" else "(any)",
        show(row.accuracy, 1) + ("" if isnan(row.spread) else f" ± {row.spread:.1f}") + (" *" if row.worse else ""),
        show(row.loss, 4),
        f"{row.iterations:.0f}",
        show(row.gain, 1),
    )


def curves(results: Sequence[Result], rule: str) -> dict[str, Curve]:
    """The mean curves of one rule, by scale."""
    groups: dict[tuple[int, ...], list[Result]] = {}
    for result in results:
        if result.task.rule == rule:
            groups.setdefault(result.task.scales, []).append(result)
    return {runs[0].task.name: curve(runs) for _, runs in sorted(groups.items(), key=lambda g: (len(g[0]), g[0]))}


def distances(results: Sequence[Result]) -> dict[str, tuple[float, float]]:
    """For each scale, the largest distance of AdaScale's curve from that of scale 1, in accuracy and in test loss.

    The first quarter of the run is left out: there the curves are so steep that a shift of one step looks like a
    difference.
    """
    found = curves(results, "adascale")
    base, first = found.pop("1"), EVALUATIONS // 4

    def largest(values: Sequence[float], base: Sequence[float]) -> float:
        return max(abs(a - b) for a, b in zip(values[first:], base[first:], strict=True))

    return {name: (largest(c.accuracy, base.accuracy), largest(c.loss, base.loss)) for name, c in found.items()}


def write(plan: Plan, results: Sequence[Result], rows: Sequence[Row], *, seconds: float) -> Path:
    """Write results.json, the figures and report.html into `plan.out`; returns the page."""
    data = {
        "rows": [asdict(row) for row in rows],
        "curves": {rule: {name: asdict(c) for name, c in curves(results, rule).items()} for rule in plan.rules},
        "distances": distances(results),
    }
    (plan.out / "results.json").write_text(json.dumps(strict(data), allow_nan=False, indent=1, ensure_ascii=False))
    blocks: list[Block] = [
        Text(
            "A small network learns scikit-learn's handwritten digits with momentum SGD. Its learning rate and "
            f"schedule were tuned at a batch of {BASE_BATCH}. At scale S a step takes {BASE_BATCH} · S images, and all "
            "else is unchanged. AdaScale multiplies the learning rate by the measured gain. Linear scaling with "
            "warm-up (LSW) multiplies it by S; LSW+ does so with AdaScale's number of steps."
        ),
        Table(COLUMNS, [cells(row) for row in rows], frozenset(i for i, row in enumerate(rows) if row.worse)),
        Text(
            f"Means over {plan.seeds} seeds, {plan.total} base iterations. An asterisk: significantly below scale 1 "
            "(one-sided Welch test at 0.95). ±: the standard deviation over seeds. Scales with arrows change at a "
            "quarter and at half of the run.",
            note=True,
        ),
        Heading("Against tau, the curves coincide"),
        *_figure(_against_tau(plan, results), plan, plan.out / "against_tau.svg"),
        Text("Solid: AdaScale; dashed: LSW; mean over the seeds.", note=True),
        *_differences(plan, results),
    ]
    if "adascale" in plan.rules:
        words = (
            "One seed. No warm-up is configured: while the loss falls fastest, the noise is small and the gain falls "
            "to a few. Then the gain and the learning rate grow with the noise."
        )
        figure = _figure(_against_steps(plan), plan, plan.out / "against_steps.svg")
        blocks += [Heading("The gain acts as a warm-up"), *figure, Text(words, note=True)]
    blocks.append(
        Text(
            f"anybatch {anybatch.__version__}, torch {torch.__version__}, {plan.ranks} rank(s), {seconds:.0f} s. "
            "Made by: anybatch demo.",
            note=True,
        )
    )
    target = plan.out / "report.html"
    target.write_text(page("The same training at every batch size", blocks), encoding="utf-8")
    return target


def _differences(plan: Plan, results: Sequence[Result]) -> list[Block]:
    """The section on differences from scale 1, which the curves against tau do not show."""
    largest = distances(results)
    if not largest:
        return []
    runs = {scale: [r for r in results if r.task.rule == "adascale" and r.task.scales == (scale,)]
            for scale in sorted(plan.scales)}  # fmt: skip
    charts = []
    for name in ("accuracy", "loss"):
        points = {s: [list(zip(r.tau, getattr(r, f"test_{name}"), strict=True)) for r in of] for s, of in runs.items()}
        groups = {f"S = {s}": (_colours(plan)[s], found) for s, found in points.items()}
        charts.append(difference(f"test {name}: difference from scale 1", groups, "S = 1"))
    accuracy, loss = max(a for a, _ in largest.values()), max(b for _, b in largest.values())
    words = (
        f"{METHOD} {BAND if plan.seeds > 1 else ''} Accuracy in points. Largest distance of the mean of AdaScale's "
        f"curves, including changing scales: {accuracy:.2f} points of accuracy, {loss:.4f} of test loss."
    )
    return [
        Heading("AdaScale's difference from scale 1"),
        *_figure(charts, plan, plan.out / "from_scale_1.svg"),
        Text(words, note=True),
    ]


def _against_tau(plan: Plan, results: Sequence[Result]) -> list[Chart]:
    accuracy, loss = [], []
    for rule, dash in (("adascale", ()), ("lsw", _DASHED)):
        for name, c in curves(results, rule).items():
            if "→" not in name:
                style = _colours(plan)[int(name)], dash
                accuracy.append(Line(list(zip(c.tau, c.accuracy, strict=True)), f"{NAMES[rule]} at {name}", *style))
                loss.append(Line(list(zip(c.tau, c.loss, strict=True)), f"{NAMES[rule]} at {name}", *style))
    across = "tau (base iterations)"
    return [Chart("test accuracy (%)", across, accuracy), Chart("test loss", across, loss, log_y=True)]


def _against_steps(plan: Plan) -> list[Chart]:
    gain, rate = [], []
    for scale, found in _colours(plan).items():
        steps = read_columns(plan.out / "records" / f"adascale-S{scale}-seed0.jsonl", ("step", "gain", "lr"))
        gain.append(Line(thin(steps["step"], steps["gain"], log=True), f"AdaScale at {scale}", found))
        rate.append(Line(thin(steps["step"], steps["lr"], log=True), f"AdaScale at {scale}", found))
    return [
        Chart("gain", "iteration", gain, log_x=True, log_y=True),
        Chart("learning rate", "iteration", rate, log_x=True, log_y=True),
    ]


def _figure(charts: Sequence[Chart], plan: Plan, path: Path) -> list[Block]:
    """The charts for the page; also writes them as a picture into the file `path`."""
    entries = [(f"S = {scale}", found, ()) for scale, found in _colours(plan).items()]
    dashed = any(line.dash for chart in charts for line in chart.lines)
    rules = [("AdaScale", INK, ()), ("LSW", INK, _DASHED)] if dashed else []
    legend = Legend([*entries, *rules])
    picture(charts, legend, path)
    return [legend, Grid(charts)]


def _colours(plan: Plan) -> dict[int, str]:
    scales = sorted(plan.scales)
    return {scale: colour(i, len(scales)) for i, scale in enumerate(scales)}

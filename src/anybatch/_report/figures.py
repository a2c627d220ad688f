"""The curves of runs, coloured by scale."""

from collections import Counter
from collections.abc import Sequence
from math import isfinite
from pathlib import Path

from anybatch._report.chart import Chart, Dash, Legend, Line
from anybatch._report.comparison import Comparison
from anybatch._report.difference import difference
from anybatch._report.figure import INK, colour
from anybatch._report.page import Block
from anybatch._report.points import spread
from anybatch._report.summary import QUANTITIES, Curve, Summary
from anybatch._report.words import short_number

_DASHES: tuple[Dash, ...] = ((), (6, 3.5), (1.5, 3.5), (8, 3.5, 1.5, 3.5))
_METRICS = 4
_ENTRIES = 8


def charts(runs: Sequence[Summary]) -> list[Block]:
    """Two charts for each metric and quantity, against tau and against iterations."""
    counts = Counter(name for run in runs for name in run.metrics)
    found: list[Block] = []
    for name, _ in counts.most_common(_METRICS):
        found += _pair(runs, name[:60], [run.metrics.get(name) for run in runs])
    for name in QUANTITIES:
        found += _pair(runs, name, [run.curves[name] for run in runs])
    return found


def differences(runs: Sequence[Summary]) -> list[Block]:
    """For each metric and rule a chart of the difference from scale 1; none without a run at scale 1."""
    styles = _styles(runs)
    base = [run for run in runs if run.scale == 1 and run.constant]
    rules = list(dict.fromkeys(run.rule for run in runs if run.scale != 1))
    counts = Counter(name for run in base for name in run.metrics)
    found: list[Block] = []
    for name, _ in counts.most_common(_METRICS):
        for rule in rules:
            members = [run for run in runs if run.rule == rule and run.scale != 1 and isfinite(run.scale)]
            groups: dict[str, list[Summary]] = {"S = 1": base}
            for run in sorted(members, key=lambda run: run.scale):
                groups.setdefault(f"S = {run.scales}", []).append(run)
            points = {
                group: (styles[of[0].path][0], [run.metrics[name].tau for run in of if name in run.metrics])
                for group, of in groups.items()
            }
            title = f"{name[:60]}: difference from scale 1" + (f", {rule[:24]}" if len(rules) > 1 else "")
            found.append(difference(title, points, "S = 1"))
    return [chart for chart in found if isinstance(chart, Chart) and not chart.empty]


def legend(runs: Sequence[Summary], *, rules: bool = True) -> Legend:
    """Scales by colour, or runs if there is one scale; with `rules`, the rules by dash."""
    styles = _styles(runs)
    drawn = [run for run in runs if run.iterations or run.metrics]
    scales = {run.scale: run for run in sorted(drawn, key=lambda run: run.scale) if isfinite(run.scale)}
    if len(scales) > 1:
        shown = spread(list(scales.values()), _ENTRIES)
        entries: list[tuple[str, str, Dash]] = [
            (f"S = {short_number(run.scale)}", styles[run.path][0], ()) for run in shown
        ]
        more = f"{len(scales) - len(shown)} more scales between" if len(scales) > len(shown) else ""
    else:
        shown = spread(drawn, _ENTRIES)
        entries = [(run.name[:40], styles[run.path][0], ()) for run in shown]
        more = f"{len(drawn) - len(shown)} more runs" if len(drawn) > len(shown) else ""
    if not all(run.constant for run in drawn if run.iterations):
        more = "; ".join(filter(None, [more, "a changing scale has the colour of its median"]))
    names = {styles[run.path][1]: run.rule[:24] for run in reversed(drawn)}
    if rules and len(names) > 1:
        entries += [(names[dash], INK, dash) for dash in _DASHES if dash in names]
    return Legend(entries, more)


def forecast_chart(comparison: Comparison) -> Chart:
    """Forecasts as lines with bands, and the steps taken as dots, over the scale."""
    lines: list[Line] = []
    # One line for each constant scale; the table has the others.
    sources = {run.scale: (run, found) for run, found in reversed(comparison.forecasts) if run.constant}
    scales = sorted(sources)
    for run, forecasts in (sources[scale] for scale in scales):
        points = {scale: (e.value, e.low, e.high) for scale, e in forecasts.items()}
        if run.finished:
            points[run.scale] = (float(run.iterations),) * 3
        ordered = sorted(points.items())
        lines.append(
            Line(
                [(scale, value) for scale, (value, _, _) in ordered],
                f"from S = {run.scales}",
                colour(scales.index(run.scale), len(scales)),
                band=[(scale, low, high) for scale, (_, low, high) in ordered],
            )
        )
    happened = Line(list(comparison.happened.items()), "what happened", dots=True)
    return Chart("iterations of a run", "scale", [*lines, happened], log_x=True, log_y=True)


def _pair(runs: Sequence[Summary], title: str, curves: Sequence[Curve | None]) -> list[Block]:
    styles = _styles(runs)
    against_tau, against_steps = [], []
    for run, found in zip(runs, curves, strict=True):
        if found is not None:
            style = styles[run.path]
            against_tau.append(Line(found.tau, run.name[:80], *style))
            against_steps.append(Line(found.step, run.name[:80], *style))
    pair = (
        Chart(title, "tau (base iterations)", against_tau),
        Chart(title, "iteration", against_steps, log_x=True),
    )
    return [chart for chart in pair if not chart.empty]


def _styles(runs: Sequence[Summary]) -> dict[Path, tuple[str, Dash]]:
    """Colour and dash of each run."""
    scales = sorted({run.scale for run in runs if isfinite(run.scale)})
    rules = [rule for rule, _ in Counter(run.rule for run in runs).most_common()]
    styles = {}
    for i, run in enumerate(runs):
        if len(scales) > 1:
            place, many = scales.index(run.scale) if run.scale in scales else 0, len(scales)
        else:
            place, many = i, len(runs)
        styles[run.path] = colour(place, many), _DASHES[min(rules.index(run.rule), len(_DASHES) - 1)]
    return styles

"""The page about recorded runs: a table, curves, forecasts against steps taken, and differences between the runs."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import anybatch
from anybatch._report.chart import Legend
from anybatch._report.comparison import Comparison, compare
from anybatch._report.difference import BAND, METHOD
from anybatch._report.figures import charts, differences, forecast_chart, legend
from anybatch._report.layers import LayerChart, layer_legend, levels
from anybatch._report.page import Block, Fold, Grid, Heading, Table, Text, page
from anybatch._report.summary import Summary, summarise
from anybatch._report.words import LONG, duration, short_number, shorten, written

_METRICS = 3  # columns of results
_TASKS = 6  # sections of curves
_SIDE_BY_SIDE = 6  # runs whose configurations are compared in columns
_VALUES = 6  # listed values of a setting, with more runs
_UNREAD = 20  # listed unreadable records
_LAYERS = 4  # charts of layers
_SETTINGS = 80  # rows of a table of settings
_NUMBERS = (
    "name", "rule", "scale", "scales", "iterations", "gain", "base_batches", "seconds", "tau", "total", "finished",
    "skipped", "torn", "results",
)  # fmt: skip


def report(paths: Sequence[Path], *, warn: Callable[[str], None] = lambda _: None) -> str:
    """The page about the records at `paths`, as HTML. It names each unreadable record, with the reason.

    `warn` is called with a sentence for each unreadable record. If no record can be read, the error is raised.
    """
    runs, unread = _read(paths, warn)
    tasks = _tasks(runs)
    blocks: list[Block] = [Text(_sentence(runs, tasks)), *_missing(unread), *_table(runs)]
    for name, members in list(tasks.items())[:_TASKS]:
        blocks += _curves(members, name if len(tasks) > 1 else "")
    if len(tasks) > _TASKS:
        rest = sum(len(members) for members in list(tasks.values())[_TASKS:])
        blocks.append(Text(f"The page omits the curves of {rest} runs of further tasks.", note=True))
    blocks += [*_forecasts(runs), *_settings(runs)]
    blocks.append(Text(f"Made by: anybatch report ({anybatch.__version__}).", note=True))
    return page(shorten(runs[0].name) if len(runs) == 1 else f"{len(runs)} training runs", blocks)


def in_numbers(paths: Sequence[Path], *, warn: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """The numbers of the page about the records at `paths`: its table, and forecasts against steps taken."""
    runs, unread = _read(paths, warn)
    return {
        "runs": [
            {
                "record": str(run.path),
                **{name: getattr(run, name) for name in _NUMBERS},
                "examples": run.base_batches * run.base_batch,
            }
            for run in runs
        ],
        "comparisons": [
            {
                "iterations": {f"{scale:g}": found for scale, found in each.happened.items()},
                "forecasts": [
                    {"record": str(run.path), "iterations": {f"{s:g}": vars(e) for s, e in found.items() if s != 1}}
                    for run, found in each.forecasts
                ],
                "notes": each.notes,
            }
            for each in compare(runs)
        ],
        "unread": unread,
    }


def _read(paths: Sequence[Path], warn: Callable[[str], None]) -> tuple[list[Summary], list[str]]:
    """The runs, and a sentence for each unreadable record."""
    unread: list[str] = []
    runs = summarise(paths, unread=unread.append if len(paths) > 1 else None)
    if not runs:
        raise anybatch.InvalidValueError(f"None of the records can be read. {' '.join(unread)}")
    for sentence in unread:
        warn(sentence)
    return runs, unread


def _missing(unread: Sequence[str]) -> Iterator[Block]:
    if unread:
        many = "One record is" if len(unread) == 1 else f"{len(unread)} records are"
        yield Text(f"{many} not on this page:")
        yield from (Text(sentence, note=True) for sentence in unread[:_UNREAD])
        if len(unread) > _UNREAD:
            yield _more(len(unread) - _UNREAD)


def _tasks(runs: Sequence[Summary]) -> dict[str, list[Summary]]:
    """The runs that are drawn together: runs of one task, if named, with the same number of parameters."""
    tasks: dict[str, list[Summary]] = {}
    for run in runs:
        named, size = run.config.get("task"), run.config.get("parameters")
        words = [shorten(written(named))] if named is not None else []
        words += [f"{short_number(size)} parameters"] if isinstance(size, int) and 0 < size < 1e15 else []
        tasks.setdefault(", ".join(words) or "unnamed task", []).append(run)
    return tasks


def _sentence(runs: Sequence[Summary], tasks: dict[str, list[Summary]]) -> str:
    scales = sorted({run.scale for run in runs if isfinite(run.scale)})
    reach = " to ".join(dict.fromkeys(short_number(scale) for scale in (*scales[:1], *scales[-1:])))
    where = f"{len(tasks)} tasks" if len(tasks) > 1 else "One task"
    ended = sum(run.finished for run in runs)
    many = f"{ended} of {len(runs)} runs reached"
    end = many if len(runs) > 1 else "The run reached" if ended else "The run did not reach"
    return f"{where}, {f'scale {reach}' if reach else 'no counted step'}. {end} the end of the clock."


def _table(runs: Sequence[Summary]) -> Iterator[Block]:
    count = Counter(name for run in runs for name in run.results)
    metrics = [name for name, _ in count.most_common(_METRICS)]
    columns = [
        "run",
        "rule",
        "scale",
        *(shorten(name, 24) for name in metrics),
        "iterations",
        "mean gain",
        "efficiency",
    ]
    columns += ["examples", "time", "tau", "skipped", "torn lines"]
    rows = [
        [
            shorten(run.name),
            shorten(run.rule, 24),
            run.scales,
            *(f"{run.results[name]:.4g}" if name in run.results else "–" for name in metrics),
            f"{run.iterations:,}",
            f"{run.gain:.3g}" if isfinite(run.gain) else "–",
            f"{run.efficiency:.0%}" if isfinite(run.efficiency) else "–",
            _examples(run),
            duration(run.seconds),
            short_number(run.tau)
            + ("" if run.finished or not isfinite(run.total) else f" ({run.tau / run.total:.0%})"),
            f"{run.skipped:,}",
            f"{run.torn:,}",
        ]
        for run in runs
    ]
    yield Table(columns, rows, frozenset(i for i, run in enumerate(runs) if not run.iterations))
    notes = [
        "Iterations are the counted optimizer steps; examples include those of skipped steps. Efficiency is the gain "
        "over the scale: what an example is worth, relative to one of scale 1. Tau is in base "
        "iterations, with its share of the total if a run is not finished."
    ]
    if metrics:
        notes.append("Results are those of the last evaluation.")
    if len(count) > len(metrics):
        notes.append(f"{len(count) - len(metrics)} further metrics have no column.")
    if not all(run.iterations for run in runs):
        notes.append("Marked runs have no counted step.")
    yield Text(" ".join(notes), note=True)


def _curves(runs: Sequence[Summary], name: str) -> Iterator[Block]:
    grid = charts(runs)
    yield Heading(f"Curves: {name}" if name else "Curves")
    if not grid:
        yield Text("Nothing to draw: no run has a counted step.")
        return
    yield legend(runs)
    yield Grid(grid)
    apart = differences(runs)
    if apart:
        yield Heading("Difference from scale 1")
        yield legend(runs, rules=False)
        yield Grid(apart)
        yield Text(f"{METHOD} {BAND}", note=True)
    yield from _layers(runs)


def _layers(runs: Sequence[Summary]) -> Iterator[Block]:
    found = [(run, run.layers) for run in runs if run.layers is not None]
    limits = levels(layers for _, layers in found)
    if not limits:
        return
    yield Heading("Noise by layer")
    yield layer_legend(limits)
    yield Grid([LayerChart(shorten(run.name), layers, limits) for run, layers in found[:_LAYERS]])
    known = {isfinite(run.base_batch) for run, _ in found}
    unit = "examples" if True in known else "base batches"
    if len(known) > 1:
        unit += " (in base batches for runs without a base batch in their record)"
    yield Text(
        f"The noise scale of each layer in {unit}, as colour, with the layers in the model's order. A cell is long "
        "enough for the mean sqnorm of its measured steps to be two standard errors above 0. In a gap the noise is "
        "larger than the steps can measure. The noise scale of the whole model is the mean of the layers' weighted by "
        "sqnorm.",
        note=True,
    )
    if len(found) > _LAYERS:
        yield Text(f"The page omits the layers of {len(found) - _LAYERS} more runs.", note=True)


def _forecasts(runs: Sequence[Summary]) -> Iterator[Block]:
    comparisons = compare(runs)
    if comparisons or len(runs) > 1:
        yield Heading("Forecast and steps taken")
        yield Text(
            "From each run alone: the forecast iterations of its configuration at the other scales, and their relative "
            "difference from the iterations taken. An asterisk: the iterations taken are outside the forecast's band."
            if comparisons
            else "Nothing to compare. A comparison needs an AdaScale run with a variance in its record, and a finished "
            "run of the same configuration at another scale.",
            note=not comparisons,
        )
    for comparison in comparisons:
        yield _forecast_table(comparison)
        chart = forecast_chart(comparison)
        yield Legend([(line.name, line.colour, line.dash) for line in chart.lines if not line.dots], more="dots: taken")
        yield Grid([chart])
        for note in comparison.notes:
            yield Text(note, note=True)


def _forecast_table(comparison: Comparison) -> Table:
    scales = list(comparison.happened)
    counts = [f" (mean of {n})" if n > 1 else "" for n in (comparison.counts[s] for s in scales)]
    rows = [["iterations taken", *(f"{comparison.happened[s]:,.0f}{n}" for s, n in zip(scales, counts, strict=True))]]
    for run, forecasts in comparison.forecasts:
        cells = []
        for scale, happened in comparison.happened.items():
            found = forecasts.get(scale)
            if found is None or scale == 1:  # at scale 1 an iteration is a base iteration: there is no forecast
                cells.append("")
                continue
            mark = "" if found.low <= happened <= found.high else " *"
            cells.append(f"{found.value:,.0f} ({found.value / happened - 1:+.0%}){mark}")
        rows.append([f"from {shorten(run.name)}", *cells])
    return Table(["", *(f"S = {short_number(scale)}" for scale in scales)], rows, left=1)


def _settings(runs: Sequence[Summary]) -> Iterator[Block]:
    names = list(dict.fromkeys(name for run in runs for name in run.facts))
    differing = [name for name in names if len({run.facts.get(name) for run in runs}) > 1]
    if len(runs) > 1:
        yield Heading("What differs between the runs")
        if not differing:
            yield Text("The headers do not differ.")
        elif len(runs) <= _SIDE_BY_SIDE:
            rows = [[shorten(n), *(shorten(run.facts.get(n, "–")) for run in runs)] for n in differing[:_SETTINGS]]
            yield Table(["setting", *(shorten(run.name, 32) for run in runs)], rows, words=True)
        else:
            rows = [[shorten(n), _values(runs, n)] for n in differing[:_SETTINGS]]
            yield Table(["setting", "values"], rows, words=True)
        yield from _rest(differing)
    same = [name for name in names if name not in differing]
    if same:
        rows = [[shorten(name), shorten(runs[0].facts[name], 4 * LONG)] for name in same[:_SETTINGS]]
        table = Table(["setting", "value"], rows, words=True)
        title = "The configuration" if len(runs) == 1 else f"The same in all runs: {len(same)} settings"
        yield Fold(title, [table, *_rest(same)])


def _values(runs: Sequence[Summary], name: str) -> str:
    """The values of a setting, each with the name of its only run or the number of its runs."""
    holders: dict[str, list[Summary]] = {}
    for run in runs:
        holders.setdefault(run.facts.get(name, "–"), []).append(run)
    if len(holders) == len(runs):
        return f"a different one in each: {', '.join(shorten(v, 24) for v in list(holders)[:_VALUES])}, …"
    ordered = sorted(holders.items(), key=lambda pair: -len(pair[1]))
    words = [f"{shorten(v)} ({r[0].name if len(r) == 1 else f'{len(r)} runs'})" for v, r in ordered[:_VALUES]]
    return ", ".join(words) + (f", and {len(holders) - _VALUES} more" if len(holders) > _VALUES else "")


def _rest(names: Sequence[str]) -> Iterator[Block]:
    if len(names) > _SETTINGS:
        yield _more(len(names) - _SETTINGS)


def _more(count: int) -> Text:
    return Text(f"and {count} more.", note=True)


def _examples(run: Summary) -> str:
    if not run.base_batches:
        return "0"
    if isfinite(run.base_batch):
        return short_number(run.base_batches * run.base_batch)
    return f"{short_number(run.base_batches)} base batches"

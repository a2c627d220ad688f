"""The page about recorded runs: a table, curves, forecasts against what happened, and what differs between the runs."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import anybatch
from anybatch._report.chart import Legend
from anybatch._report.comparison import Comparison, compare
from anybatch._report.difference import BAND, SAYS
from anybatch._report.figures import charts, differences, forecast_chart, legend
from anybatch._report.layers import LayerChart, layer_legend, levels
from anybatch._report.page import Block, Fold, Grid, Heading, Table, Text, page
from anybatch._report.summary import Summary, summarise
from anybatch._report.words import LONG, duration, short_number, shorten, written

_METRICS = 3  # columns of results
_TASKS = 6  # sections of curves
_SIDE_BY_SIDE = 6  # runs whose configurations are compared in columns
_VALUES = 6  # else the values of a setting that are written out
_UNREAD = 20  # records that cannot be read, each with its reason
_LAYERS = 4  # runs whose layers are drawn
_SETTINGS = 80  # rows of a table of settings
_NUMBERS = (
    "name", "rule", "scale", "scales", "iterations", "gain", "base_batches", "seconds", "tau", "total", "finished",
    "skipped", "torn", "results",
)  # fmt: skip


def report(paths: Sequence[Path], *, tell: Callable[[str], None] = lambda _: None) -> str:
    """The page about the records at `paths`, as HTML; a record that cannot be read is named on it, with the reason.

    Args:
        paths: the records.
        tell: called with a sentence for each record that cannot be read.

    Raises:
        InvalidValueError: no record can be read, or none is one.
        StateError: the only one was written by a newer anybatch.
    """
    runs, unread = _read(paths, tell)
    tasks = _tasks(runs)
    blocks: list[Block] = [Text(_sentence(runs, tasks)), *_missing(unread), *_table(runs)]
    for name, members in list(tasks.items())[:_TASKS]:
        blocks += _curves(members, name if len(tasks) > 1 else "")
    if len(tasks) > _TASKS:
        rest = sum(len(members) for members in list(tasks.values())[_TASKS:])
        blocks.append(Text(f"The curves of {rest} runs of further tasks are left out.", note=True))
    blocks += [*_forecasts(runs), *_settings(runs)]
    blocks.append(Text(f"Made by: anybatch report ({anybatch.__version__}).", note=True))
    return page(shorten(runs[0].name) if len(runs) == 1 else f"{len(runs)} training runs", blocks)


def in_numbers(paths: Sequence[Path], *, tell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """The numbers of the page about the records at `paths`: its table, and forecasts against what happened.

    Args, Raises: as `report`.
    """
    runs, unread = _read(paths, tell)
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


def _read(paths: Sequence[Path], tell: Callable[[str], None]) -> tuple[list[Summary], list[str]]:
    """The runs, and a sentence for each record that cannot be read."""
    unread: list[str] = []
    runs = summarise(paths, unread=unread.append if len(paths) > 1 else None)
    if not runs:
        raise anybatch.InvalidValueError(f"None of the records can be read. {' '.join(unread)}")
    for sentence in unread:
        tell(sentence)
    return runs, unread


def _missing(unread: Sequence[str]) -> Iterator[Block]:
    if unread:
        many = "One record is" if len(unread) == 1 else f"{len(unread)} records are"
        yield Text(f"{many} not on this page:")
        yield from (Text(sentence, note=True) for sentence in unread[:_UNREAD])
        if len(unread) > _UNREAD:
            yield Text(f"and {len(unread) - _UNREAD} more.", note=True)


def _tasks(runs: Sequence[Summary]) -> dict[str, list[Summary]]:
    """Runs that are drawn together: those with as many parameters and, where one is named, one task."""
    tasks: dict[str, list[Summary]] = {}
    for run in runs:
        named, size = run.config.get("task"), _size(run)
        words = [shorten(written(named))] if named is not None else []
        tasks.setdefault(", ".join(words + ([size] if size else [])) or "unnamed task", []).append(run)
    return tasks


def _size(run: Summary) -> str:
    """The number of trained parameters in words."""
    parameters = run.config.get("parameters")
    return f"{short_number(parameters)} parameters" if isinstance(parameters, int) and 0 < parameters < 1e15 else ""


def _sentence(runs: Sequence[Summary], tasks: dict[str, list[Summary]]) -> str:
    scales = sorted({run.scale for run in runs if isfinite(run.scale)})
    reach = " to ".join(dict.fromkeys(short_number(scale) for scale in (*scales[:1], *scales[-1:])))
    where = f"{len(tasks)} tasks" if len(tasks) > 1 else "One task"
    ended = sum(run.finished for run in runs)
    end = ("It came" if ended else "It did not come") if len(runs) == 1 else f"{ended} of {len(runs)} runs came"
    return f"{where}, {f'scale {reach}' if reach else 'no step that counted'}. {end} to the end of the clock."


def _table(runs: Sequence[Summary]) -> Iterator[Block]:
    count = Counter(name for run in runs for name in run.results)
    metrics = [name for name, _ in count.most_common(_METRICS)]
    columns = ["run", "rule", "scale", *(shorten(name, 24) for name in metrics), "iterations", "mean gain", "examples"]
    columns += ["time", "tau", "skipped", "torn lines"]
    rows = [
        [
            shorten(run.name),
            shorten(run.rule, 24),
            run.scales,
            *(f"{run.results[name]:.4g}" if name in run.results else "–" for name in metrics),
            f"{run.iterations:,}",
            _or_dash(run.gain, f"{run.gain:.3g}"),
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
        "Iterations are the optimizer steps that counted; examples include those of skipped steps. Tau is in base "
        "iterations, with its share of the total where a run has not come to its end."
    ]
    if metrics:
        notes.append("Results are those of the last evaluation.")
    if len(count) > len(metrics):
        notes.append(f"{len(count) - len(metrics)} further metrics have no column.")
    if not all(run.iterations for run in runs):
        notes.append("Marked runs took no step that counted.")
    yield Text(" ".join(notes), note=True)


def _curves(runs: Sequence[Summary], name: str) -> Iterator[Block]:
    grid = charts(runs)
    yield Heading(f"Curves: {name}" if name else "Curves")
    if not grid:
        yield Text("Nothing to draw: no step counted.")
        return
    yield legend(runs)
    yield Grid(grid)
    apart = differences(runs)
    if apart:
        yield Heading("How far from scale 1")
        yield legend(runs, rules=False)
        yield Grid(apart)
        yield Text(f"{SAYS} {BAND}", note=True)
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
        unit += " (in base batches for runs whose record does not say how large one is)"
    yield Text(
        f"The noise scale of each layer in {unit}, as colour, the layers in the "
        "model's order. Each cell is as long as it takes for the mean sqnorm of the steps that were looked at in it to "
        "be two standard errors above 0; where there is none, the noise is more than these steps can measure. The "
        "noise scale of the whole is not the mean of the layers' but their mean with sqnorm as weights.",
        note=True,
    )
    if len(found) > _LAYERS:
        yield Text(f"The layers of {len(found) - _LAYERS} more runs are left out.", note=True)


def _forecasts(runs: Sequence[Summary]) -> Iterator[Block]:
    comparisons = compare(runs)
    if not comparisons:
        if len(runs) > 1:
            yield Heading("Forecast and what happened")
            yield Text(
                "Nothing to compare: that takes an AdaScale run whose record shows a variance, and a finished run of "
                "the same configuration at another scale.",
                note=True,
            )
        return
    yield Heading("Forecast and what happened")
    yield Text(
        "From each run alone: the iterations that its configuration should take at the other scales, and how far that "
        "is from what it took there. An asterisk: what happened is outside the forecast's band."
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
    took = [f"{comparison.happened[s]:,.0f}{_of(comparison.counts[s])}" for s in scales]
    rows = [["iterations taken", *took]]
    for run, forecasts in comparison.forecasts:
        cells = []
        for scale, happened in comparison.happened.items():
            found = forecasts.get(scale)
            if found is None or scale == 1:  # at scale 1 an iteration is a base iteration: nothing is forecast
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
            yield Text("Nothing that the headers say.")
        elif len(runs) <= _SIDE_BY_SIDE:
            rows = [[shorten(n), *(shorten(run.facts.get(n, "–")) for run in runs)] for n in differing[:_SETTINGS]]
            yield Table(["setting", *(shorten(run.name, 32) for run in runs)], rows, words=True)
        else:
            yield Table(
                ["setting", "values"], [[shorten(n), _values(runs, n)] for n in differing[:_SETTINGS]], words=True
            )
        yield from _rest(differing)
    same = [name for name in names if name not in differing]
    if same:
        rows = [[shorten(name), shorten(runs[0].facts[name], 4 * LONG)] for name in same[:_SETTINGS]]
        table = Table(["setting", "value"], rows, words=True)
        title = "The configuration" if len(runs) == 1 else f"What is the same in all of them: {len(same)} settings"
        yield Fold(title, [table, *_rest(same)])


def _values(runs: Sequence[Summary], name: str) -> str:
    """The values of a setting: with the run's name where one has it, else with how many have."""
    holders: dict[str, list[Summary]] = {}
    for run in runs:
        holders.setdefault(run.facts.get(name, "–"), []).append(run)
    if len(holders) == len(runs):
        return f"another in each of them: {', '.join(shorten(v, 24) for v in list(holders)[:_VALUES])}, …"
    ordered = sorted(holders.items(), key=lambda pair: -len(pair[1]))
    words = [f"{shorten(v)} ({r[0].name if len(r) == 1 else f'{len(r)} runs'})" for v, r in ordered[:_VALUES]]
    return ", ".join(words) + (f", and {len(holders) - _VALUES} more" if len(holders) > _VALUES else "")


def _rest(names: Sequence[str]) -> Iterator[Block]:
    if len(names) > _SETTINGS:
        yield Text(f"and {len(names) - _SETTINGS} more.", note=True)


def _examples(run: Summary) -> str:
    if not run.base_batches:
        return "0"
    if isfinite(run.base_batch):
        return short_number(run.base_batches * run.base_batch)
    return f"{short_number(run.base_batches)} base batches"


def _or_dash(value: float, text: str) -> str:
    return text if isfinite(value) else "–"


def _of(count: int) -> str:
    return f" (mean of {count})" if count > 1 else ""

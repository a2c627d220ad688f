"""The statistics of `instead` and what they are shown as: JSON, tables, the page's blocks and a figure."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp, inf, isfinite, log, nan
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import same_training_results as statistics
from benchmarks.instead import LONG, RETUNED, ROWS, SHORT, Cache, Cell, applies, base_runs, counts, runs_of, tuned
from benchmarks.instead_tasks import TASKS
from benchmarks.instead_train import POINTS, Outcome
from benchmarks.same_training_tasks import Result

SCALES = (8, 32, 128)
SEEDS = 5
EQUAL = tuple(row for row in RETUNED if not row.endswith("T/S"))  # re-tuned, with anybatch's number of steps
BEST, BEST_SHORT = "best of the re-tuned", "best of the re-tuned, T/S"
COMPARED = (
    "usual", "usual, stretched", "unscaled", "unscaled, stretched", "map at S", "map at S, stretched", BEST, BEST_SHORT,
    "static values", "late switch", "scale 1, as many examples",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A row of a cell.

    Args:
        seeds, diverged: trainings, and how many of them diverged.
        steps, examples: means; examples in those of scale 1.
        loss, loss_sd, metric, metric_sd: on held-out data at the end.
        mark, metric_mark: `-` significantly worse than scale 1, `+` better.
        against: the same for the loss, compared with anybatch.
        distance: of the curve from scale 1's, in units of the distance between two halves of scale 1's seeds.
        relative: the mean loss over scale 1's.
        factor: of a re-tuned row, the learning rate over scale 1's before the optimizer's decays are mapped.
    """

    task: str
    scale: int
    row: str
    seeds: int
    diverged: int
    steps: float
    examples: float
    loss: float
    loss_sd: float
    mark: str
    against: str
    metric: float
    metric_sd: float
    metric_mark: str
    distance: float
    relative: float
    factor: float


def collect(cache: Cache) -> list[Line]:
    """All rows with two trainings or more, task by task; the first line of a task is scale 1."""
    lines: list[Line] = []
    for name in TASKS:
        lr, missing = tuned(name, cache)
        base = [] if missing else [cache.found[run] for run in base_runs(name, lr) if run in cache.found]
        if len(base) < 2:
            continue
        results = [_result(name, outcome) for outcome in base]
        task = TASKS[name]
        first = statistics.base_row(name, results, lr=lr, total=task.total, metric=task.metric, family="")
        lines.append(_line(first, "scale 1", base, against="", factor=nan))
        for scale in SCALES:
            cell = Cell(name, scale, lr)
            if counts(cell, cache):
                lines += _cell(cell, first, results, cache)
    return lines


def _cell(cell: Cell, first: statistics.Row, base: Sequence[Result], cache: Cache) -> list[Line]:
    lines, ours = list[Line](), list[float]()
    for row in ROWS:
        found, factor = _found(row, cell, cache)
        if len(found) < 2:
            continue
        results = [_result(cell.task, outcome) for outcome in found]
        line = statistics.row(first, cell.scale, row, results, base=base)
        losses = statistics.ends(results, "loss")
        if row == "anybatch":
            ours = losses
        against = "" if row == "anybatch" or len(ours) < 2 else statistics.mark(losses, ours)
        lines.append(_line(line, row, found, against=against, factor=factor))
    return lines


def _found(row: str, cell: Cell, cache: Cache) -> tuple[list[Outcome], float]:
    """The trainings of as many seeds as there are, and the factor of a re-tuned row."""
    for seeds in range(SEEDS, 1, -1):
        runs, _ = runs_of(row, cell, seeds, cache)
        if runs and all(run in cache.found for run in runs) and (row not in RETUNED or seeds >= 3):
            factor = runs[0].factor if row in RETUNED else nan
            return [cache.found[run] for run in runs], factor
    return [], nan


def _result(name: str, outcome: Outcome) -> Result:
    """As `same_training` has it; the metric is known at the end."""
    total = TASKS[name].total
    curve = [
        {"tau": total * (i + 1) / POINTS, "loss": loss, "metric": outcome.metric}
        for i, loss in enumerate(outcome.losses)
    ]
    return Result(outcome.steps, outcome.diverged, curve, outcome.seconds)


def _line(row: statistics.Row, name: str, found: Sequence[Outcome], *, against: str, factor: float) -> Line:
    return Line(
        row.task, row.scale, name, row.seeds, row.diverged, row.steps, fmean(o.examples for o in found),
        row.loss, row.loss_sd, row.loss_mark, against, row.metric_mean, row.metric_sd, row.metric_mark,
        row.distance / row.floor, row.relative, factor,
    )  # fmt: skip


def to_json(lines: Sequence[Line]) -> str:
    """Strict JSON: what is not finite is null."""
    found = [asdict(line) for line in lines]
    for line in found:
        line.update({k: None for k, v in line.items() if isinstance(v, float) and not isfinite(v)})
        line.update({k: float(f"{v:.6g}") for k, v in line.items() if isinstance(v, float)})
    return "[\n" + ",\n".join(json.dumps(line) for line in found) + "\n]\n"


def from_json(text: str) -> list[Line]:
    """The lines of the JSON; null is infinite for a loss and unknown elsewhere."""

    def number(name: str, value: Any) -> Any:
        return value if value is not None else inf if name in ("loss", "distance", "relative") else nan

    return [Line(**{name: number(name, value) for name, value in line.items()}) for line in json.loads(text)]


class Table:
    """The lines by cell and row; `of` also knows the best of the re-tuned rows."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = {(line.task, line.scale, line.row): line for line in lines}
        self.base = {line.task: line for line in lines if line.scale == 1}
        self.cells = list(dict.fromkeys((line.task, line.scale) for line in lines if line.scale > 1))

    def of(self, task: str, scale: int, row: str) -> Line | None:
        """A line; the best of several is that of the lowest mean loss."""
        if row not in (BEST, BEST_SHORT):
            return self.lines.get((task, scale, row))
        names = [name for name in RETUNED if name.endswith("T/S") == (row == BEST_SHORT)]
        found = [line for name in names if (line := self.lines.get((task, scale, name)))]
        return min(found, key=lambda line: line.loss, default=None)


def markdown(lines: Sequence[Line]) -> str:
    """A table for each task with all of its rows."""
    table, parts = Table(lines), ["# Against what people do instead: all tables\n\n" + _KEY]
    for name, base in table.base.items():
        task = TASKS[name]
        parts.append(
            f"## {name}\n\n{task.label}. {task.total} base iterations of {task.base} examples.\n\n"
            f"| S | row | seeds | steps | examples | factor | loss | scale 1 | anybatch | {task.metric} | | curve |\n"
            "|--:|---|--:|--:|--:|--:|--:|:-:|:-:|--:|:-:|--:|"
        )
        parts[-1] += "".join("\n" + _row(line) for line in lines if line.task == base.task) + "\n"
    return "\n".join(parts)


_KEY = (
    "`-` is significantly worse and `+` significantly better, than scale 1 and than anybatch (Welch, two-sided,\n"
    "0.05). Examples are in those of scale 1. The factor is a re-tuned learning rate over scale 1's, before decays\n"
    "are mapped to the clock. The curve is its distance from scale 1's, in units of that between two halves of\n"
    "scale 1's seeds.\n"
    "[What the rows are](../instead.md#rows).\n"
)


def _row(line: Line) -> str:
    seeds = f"{line.seeds} ({line.diverged} diverged)" if line.diverged else f"{line.seeds}"
    factor = f"{line.factor:.3g}" if isfinite(line.factor) else ""
    distance = "" if line.scale == 1 else _number(line.distance, "{:.1f}")
    metric = "–" if line.diverged else f"{line.metric:.2f} ± {line.metric_sd:.2f}"
    cells = [line.scale, line.row, seeds, f"{line.steps:.0f}", f"{line.examples:.3g}", factor, _loss(line)]
    cells += [_code(line.mark), _code(line.against), metric, _code(line.metric_mark), distance]
    return "| " + " | ".join(map(str, cells)) + " |"


def _loss(line: Line) -> str:
    return "∞" if not isfinite(line.loss) else f"{line.loss:.4g} ± {line.loss_sd:.2g}"


def _number(value: float, form: str) -> str:
    return form.format(value) if isfinite(value) else "∞"


def _code(mark: str) -> str:
    return f"`{mark}`" if mark else ""


def blocks(lines: Sequence[Line]) -> dict[str, str]:
    """The page's tables, by the names of their places."""
    table = Table(lines)
    found = {
        "cells": _cells_table(table, [c for c in table.cells if c[0] in SHORT]),
        "long": _cells_table(table, [c for c in table.cells if c[0] in LONG]),
        "figure": _figure_table(lines),
        "counts": _counts_table(table),
        "losses": _losses(table),
        "missing": _missing_table(table),
    }
    return {name: text or "No cell is trained yet." for name, text in found.items()}


_SHOWN = ("usual", "usual, stretched", BEST, "static values", "scale 1, as many examples")


def _cells_table(table: Table, cells: Sequence[tuple[str, int]]) -> str:
    """The headline rows: the loss, marked against anybatch, and the steps."""
    if not cells:
        return ""
    heads = ["task", "S", "scale 1", "anybatch (steps, examples)", *(f"{row}" for row in _SHOWN)]
    text = ["| " + " | ".join(heads) + " |", "|---|--:" + "|--:" * (len(heads) - 2) + "|"]
    for name, scale in cells:
        ours = table.of(name, scale, "anybatch")
        cell = "–" if ours is None else f"{_short(ours, ours.mark)} ({ours.steps:.0f}, {ours.examples:.2g})"
        others = ["–" if (line := table.of(name, scale, row)) is None else _short(line, line.against) for row in _SHOWN]
        text.append(f"| {name} | {scale} | {table.base[name].loss:.4g} | {cell} | {' | '.join(others)} |")
    return "\n".join(text)


def _short(line: Line, mark: str) -> str:
    few = f" ({line.seeds})" if line.seeds < SEEDS else ""
    return f"{_number(line.loss, '{:.4g}')}{' ' + _code(mark) if mark else ''}{few}"


def tally(table: Table, row: str, scales: Sequence[int], tasks: Sequence[str]) -> tuple[int, int, int]:
    """In how many cells anybatch is significantly worse than a row, not different, and better; scale 1 is a row."""
    worse = same = better = 0
    for name, scale in table.cells:
        ours = table.of(name, scale, "anybatch")
        line = ours if row == "scale 1" else table.of(name, scale, row)
        if ours is None or line is None or scale not in scales or name not in tasks:
            continue
        mark = {"-": "+", "+": "-"}.get(line.against, "") if row != "scale 1" else ours.mark
        worse, same, better = worse + (mark == "-"), same + (mark == ""), better + (mark == "+")
    return worse, same, better


def _counts_table(table: Table) -> str:
    text = [
        "| compared with | cells | anybatch worse | no significant difference | anybatch better |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in ("scale 1", *COMPARED):
        found = tally(table, row, (8, 32), SHORT)
        if sum(found):
            text.append(f"| {row} | {sum(found)} | " + " | ".join(map(str, found)) + " |")
    return "\n".join(text) if len(text) > 2 else ""


def _losses(table: Table) -> str:
    """The cells in which anybatch is significantly worse, at scales 8 and 32."""
    text = []
    for row in ("scale 1", *COMPARED):
        cells = []
        for name, scale in table.cells:
            ours, line = table.of(name, scale, "anybatch"), _compared(table, row, name, scale)
            if ours and line and scale in (8, 32) and (ours.mark == "-" if row == "scale 1" else line.against == "+"):
                cells.append(f"{name} at {scale} ({ours.loss:.4g} instead of {line.loss:.4g})")
        if cells:
            text.append(f"- than {row}: {', '.join(cells)}")
    return "\n".join(text) or "In no cell."


def _compared(table: Table, row: str, name: str, scale: int) -> Line | None:
    return table.base[name] if row == "scale 1" else table.of(name, scale, row)


def _figure_table(lines: Sequence[Line]) -> str:
    text = ["| S | row | tasks | steps / scale 1's | loss / scale 1's |", "|--:|---|--:|--:|--:|"]
    for scale in (8, 32):
        n, found = means(lines, scale, _DRAWN)
        text += [f"| {scale} | {row} | {n} | {x:.3f} | {y:.3f} |" for row, (x, y) in found.items()]
    return "\n".join(text) if len(text) > 2 else ""


def _missing_table(table: Table) -> str:
    """For each row and scale, cells with all seeds, and with fewer, of those that are planned."""
    groups: list[tuple[str, Sequence[str], int]] = [(f"S = {s}", SHORT, s) for s in SCALES]
    groups += [(f"long, S = {s}", LONG, s) for s in (8, 32)]
    text = ["| row | " + " | ".join(name for name, *_ in groups) + " |", "|---" + "|--:" * len(groups) + "|"]
    for row in ROWS:
        cells = []
        for _, tasks, scale in groups:
            planned = [name for name in tasks if applies(row, Cell(name, scale, 0.0))]
            seeds = [line.seeds if (line := table.of(name, scale, row)) else 0 for name in planned]
            whole, part = sum(n >= SEEDS for n in seeds), sum(0 < n < SEEDS for n in seeds)
            cells.append(f"{whole}{f' + {part}' if part else ''} of {len(planned)}")
        text.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def filled(page: str, found: Mapping[str, str]) -> str:
    """The page with its blocks; each lies between `<!-- begin name -->` and `<!-- end name -->`."""
    for name, text in found.items():
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        page = re.sub(pattern, lambda m, text=text: f"{m[1]}\n{text}\n\n{m[2]}", page, flags=re.DOTALL)  # type: ignore[misc]
    return page


def write_all(cache: Cache, out: Path) -> None:
    """Write JSON, tables, figure and the page's blocks."""
    text = to_json(collect(cache))
    lines = from_json(text)
    statistics.write(out / "instead" / "results.json", text)
    statistics.write(out / "instead" / "tables.md", markdown(lines))
    figure(lines, out / "instead" / "frontier.png")
    page = out / "instead.md"
    if page.exists():
        page.write_text(filled(page.read_text(), blocks(lines)))


def means(lines: Sequence[Line], scale: int, rows: Sequence[str]) -> tuple[int, dict[str, tuple[float, float]]]:
    """Geometric means of steps over scale 1's and of loss over scale 1's, over the tasks with all of `rows` finite."""
    table = Table(lines)
    cells = [[table.of(name, scale, row) for row in rows] for name, s in table.cells if s == scale and name in SHORT]
    whole = [found for found in cells if all(line is not None and isfinite(line.loss) for line in found)]
    mean: Callable[[list[float]], float] = lambda values: exp(fmean(map(log, values)))  # noqa: E731
    return len(whole), {
        row: (
            mean([line.steps / TASKS[line.task].total for found in whole if (line := found[i])]),
            mean([line.relative for found in whole if (line := found[i])]),
        )
        for i, row in enumerate(rows)
        if whole
    }


_DRAWN = ("anybatch", BEST, BEST_SHORT, "static values")


def figure(lines: Sequence[Line], path: Path) -> None:
    """Steps against loss, both over scale 1's: anybatch as points, the re-tuned fixed rules as a line."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    drawing, axes = plt.subplots(figsize=(5.2, 4.6), layout="constrained")
    for scale, colour in ((8, "#2f7fdb"), (32, "#dd5f4a")):
        n, found = means(lines, scale, _DRAWN)
        if not n:
            continue
        line = [found[BEST_SHORT], found[BEST]]
        axes.plot(*zip(*line, strict=True), "o-", color=colour, linewidth=2, markersize=5,
                  label=f"S = {scale}: fixed rules, learning rate re-tuned")  # fmt: skip
        axes.plot(*found["static values"], "D", color=colour, markersize=7, fillstyle="none", markeredgewidth=1.6,
                  label=f"S = {scale}: static values, not tuned")  # fmt: skip
        axes.plot(*found["anybatch"], "*", color=colour, markersize=17, markeredgecolor="black",
                  label=f"S = {scale}: anybatch, not tuned ({n} tasks)")  # fmt: skip
    axes.axhline(1, color="gray", linewidth=0.9, linestyle=":")
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("optimizer steps / scale 1's", fontsize=13)
    axes.set_ylabel("held-out loss / scale 1's", fontsize=13)
    for axis, places in ((axes.xaxis, (1, 2, 5)), (axes.yaxis, tuple(range(1, 10)))):
        axis.set_major_locator(ticker.LogLocator(subs=places))
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(ticker.NullLocator())
    axes.tick_params(labelsize=12)
    axes.legend(fontsize=10.5, loc="upper right")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=150)
    plt.close(drawing)

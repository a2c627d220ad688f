"""What `instead` is shown as: tables, the blocks of docs/instead.md and a figure."""

import re
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path

from benchmarks import same_training_results as statistics
from benchmarks.instead_results import (
    BEST,
    BEST_SHORT,
    SCALES,
    SEEDS,
    Line,
    Table,
    collect,
    from_json,
    means,
    tally,
    to_json,
)
from benchmarks.instead_runs import LONG, MORE, ROWS, SHORT, Cache, Cell, applies
from benchmarks.instead_tasks import TASKS

_SHOWN = ("usual", "usual, stretched", "re-tuned", BEST, "static values", MORE)  # of the page's table
_COMPARED = (
    "usual", "usual, stretched", "unscaled", "unscaled, stretched", "map at S", "map at S, stretched", "re-tuned",
    "re-tuned, clock", BEST, BEST_SHORT, "static values", "late switch", MORE,
)  # fmt: skip
_DRAWN = ("anybatch", BEST, BEST_SHORT, "re-tuned", "re-tuned, T/S")  # in the figure


def write_all(cache: Cache, out: Path) -> None:
    """Write JSON, tables, figure and the page's blocks."""
    text = to_json(collect(cache))
    lines = from_json(text)
    statistics.write(out / "instead" / "results.json", text)
    statistics.write(out / "instead" / "tables.md", markdown(lines))
    figure(lines, out / "instead" / "frontier.png")
    for page in (out / "instead.md", out / "index.md", out.parent / "README.md"):
        if page.exists():
            page.write_text(filled(page.read_text(), blocks(lines)))


def markdown(lines: Sequence[Line]) -> str:
    """A table for each task with all of its rows."""
    table, parts = Table(lines), ["# Against what people do instead: all tables\n\n" + _KEY]
    for name, base in table.base.items():
        task = TASKS[name]
        parts.append(
            f"## {name}\n\n{task.label}. Learning rate {base.lr:g}, "
            f"{task.total} base iterations of {task.base} examples.\n\n"
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
    distance = "" if line.scale == 1 else number(line.distance, "{:.1f}")
    metric = "–" if line.diverged else f"{line.metric:.2f} ± {line.metric_sd:.2f}"
    cells = [line.scale, line.row, seeds, f"{line.steps:.0f}", f"{line.examples:.3g}", factor, _loss(line)]
    cells += [_code(line.mark), _code(line.against), metric, _code(line.metric_mark), distance]
    return "| " + " | ".join(map(str, cells)) + " |"


def _loss(line: Line) -> str:
    return "∞" if not isfinite(line.loss) else f"{line.loss:.4g} ± {line.loss_sd:.2g}"


def number(value: float, form: str) -> str:
    """A number, or the sign of infinity."""
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
        "instead": _verdict(lines),
        "losses": _losses(table),
        "missing": _missing_table(table),
    }
    return {name: text or "No cell is trained yet." for name, text in found.items()}


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
    return f"{number(line.loss, '{:.4g}')}{' ' + _code(mark) if mark else ''}{few}"


def _verdict(lines: Sequence[Line]) -> str:
    """The sentences of the first page: equal steps, re-tuned, equal examples."""
    table = Table(lines)
    found = {row: tally(table, row, (8, 32), SHORT) for row in ("scale 1", "re-tuned", BEST, MORE)}
    if not all(map(sum, found.values())):
        return ""
    parts = {scale: means(lines, scale, ("anybatch",))[1]["anybatch"][0] for scale in (8, 32)}
    (worse, _, better), retuned, best, more = found.values()
    tasks = len({name for name, scale in table.cells if scale in (8, 32) and name in SHORT})
    return (
        f"On {tasks} small tasks, at 8 and 32 times the batch ({sum(found['scale 1'])} cells), anybatch took "
        f"{100 * parts[8]:.0f} % and {100 * parts[32]:.0f} % of scale 1's steps.\nIts held-out loss was significantly "
        f"worse than scale 1's in {worse} cells, and better in {better}.\nAt the same number of steps, a learning rate "
        f"re-tuned at that batch ended better than anybatch in {retuned[0]} cells and worse in {retuned[2]}.\nThe best "
        f"of all re-tuned rows ended better in {best[0]} and worse in {best[2]}.\n**Where it loses:** scale 1 with as "
        f"many examples ended better than anybatch in {more[0]} of {sum(more)} cells, and worse in {more[2]}."
    )


def _counts_table(table: Table) -> str:
    text = [
        "| compared with | cells | anybatch worse | no significant difference | anybatch better |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in ("scale 1", *_COMPARED):
        found = tally(table, row, (8, 32), SHORT)
        if sum(found):
            text.append(f"| {row} | {sum(found)} | " + " | ".join(map(str, found)) + " |")
    return "\n".join(text) if len(text) > 2 else ""


def _losses(table: Table) -> str:
    """The cells in which anybatch is significantly worse."""
    text = []
    for row in ("scale 1", *_COMPARED):
        cells = []
        for name, scale in table.cells:
            ours, line = table.of(name, scale, "anybatch"), _compared(table, row, name, scale)
            if ours and line and (ours.mark == "-" if row == "scale 1" else line.against == "+"):
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


def figure(lines: Sequence[Line], path: Path) -> None:
    """Steps against loss, both over scale 1's: anybatch as points, the re-tuned fixed rules as a line."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    drawing, axes = plt.subplots(figsize=(5.2, 4.6), layout="constrained")
    axes.set(xscale="log", yscale="log", xlim=(0.02, 1.3))
    for scale, colour in ((8, "#2f7fdb"), (32, "#dd5f4a")):
        n, found = means(lines, scale, _DRAWN)
        if not n:
            continue
        for rows, style, words in (
            (("re-tuned, T/S", "re-tuned"), "o--", "fixed, learning rate re-tuned"),
            ((BEST_SHORT, BEST), "o-", "fixed, best of all re-tuned"),
        ):
            line = zip(*(found[row] for row in rows), strict=True)
            axes.plot(*line, style, color=colour, linewidth=2, markersize=5, label=f"S = {scale}: {words}")
        axes.plot(*found["anybatch"], "*", color=colour, markersize=17, markeredgecolor="black",
                  label=f"S = {scale}: anybatch, not tuned")  # fmt: skip
    axes.plot(1, 1, "s", color="black", markersize=7, label="scale 1, tuned")
    low, high = axes.get_ylim()
    axes.set_ylim(low / (high / low) ** 0.08, high * (high / low) ** 0.9)  # room for the stars and the legend
    axes.axhline(1, color="gray", linewidth=0.9, linestyle=":")
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

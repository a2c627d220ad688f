"""The statistics of `instead`: its rows against scale 1 and anybatch, as JSON and as a table."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp, inf, isfinite, log, nan
from statistics import fmean
from typing import Any

from benchmarks import same_training_results as statistics
from benchmarks.instead_runs import RETUNED, ROWS, SHORT, Cache, Cell, base_runs, counts, runs_of, tuned
from benchmarks.instead_tasks import TASKS
from benchmarks.instead_train import POINTS, Outcome
from benchmarks.same_training_tasks import Result

SCALES = (8, 32, 128)
SEEDS = 5
Rows = dict[str, tuple[list[Outcome], float]]  # of a cell, the trainings of each row and the factor on its rate
BEST, BEST_SHORT = "best of the re-tuned", "best of the re-tuned, T/S"


@dataclass(frozen=True)
class Line:
    """A row of a cell.

    Args:
        lr: the learning rate that was tuned at scale 1.
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
    lr: float
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
        cells = [cell for scale in SCALES if counts(cell := Cell(name, scale, lr), cache)]
        lines += lines_of(name, lr, base, {cell.scale: _rows(cell, cache) for cell in cells})
    return lines


def lines_of(name: str, lr: float, base: Sequence[Outcome], cells: Mapping[int, Rows]) -> list[Line]:
    """The line of scale 1, then those of each scale; the first row of a scale is the one that others compare with."""
    task, known = TASKS[name], [_result(name, outcome) for outcome in base]
    first = statistics.base_row(name, known, lr=lr, total=task.total, metric=task.metric, family="")
    lines = [_line(first, "scale 1", base, against="", factor=nan)]
    for scale, rows in cells.items():
        ours: list[float] | None = None
        for row, (found, factor) in rows.items():
            results = [_result(name, outcome) for outcome in found]
            losses = statistics.ends(results, "loss")
            against = "" if ours is None else statistics.mark(losses, ours)
            ours = losses if ours is None else ours
            line = statistics.row(first, scale, row, results, base=known)
            lines.append(_line(line, row, found, against=against, factor=factor))
    return lines


def _rows(cell: Cell, cache: Cache) -> Rows:
    found = {row: _found(row, cell, cache) for row in ROWS}
    return {row: each for row, each in found.items() if len(each[0]) > 1}


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
        row.task, row.scale, name, row.lr, row.seeds, row.diverged, row.steps, fmean(o.examples for o in found),
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

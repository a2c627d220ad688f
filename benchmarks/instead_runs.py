"""The rows of `benchmarks.instead`: which training each of them is, and the file in which trainings are kept."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import ceil, inf, isfinite
from pathlib import Path
from typing import Any

from benchmarks.instead_tasks import TASKS
from benchmarks.instead_train import Outcome, Run
from benchmarks.same_training import BASE_SEEDS, TUNING_SEEDS, outwards

LONG = tuple(name for name in TASKS if name.endswith("-long"))
SHORT = tuple(name for name in TASKS if name not in LONG)
MOST = 9  # factors of 2 that a re-tuned rate goes from the usual rule's
LEAST = 50  # steps that anybatch must take at scale 128
WARMUP, LSW = 0.2, 0.055  # of the re-tuned rows, and of the linear rule (Johnson et al. 2020, Section 4)

MORE = "scale 1, as many examples"
FIRST = (
    "anybatch", "usual", "usual, stretched", "static values", "re-tuned", "re-tuned, clock", "re-tuned, T/S",
    "re-tuned, clock, T/S",
)  # fmt: skip
RETUNED = {
    f"re-tuned{clock}{warm}{short}": (bool(clock), WARMUP if warm else 0.0, bool(short))
    for short in ("", ", T/S")
    for warm in ("", ", warm-up")
    for clock in ("", ", clock")
}
ROWS = (
    *FIRST[:3], "unscaled", "unscaled, stretched", "map at S", "map at S, stretched", *RETUNED, "static values",
    "late switch", MORE,
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """What is trained before the next stage begins."""

    tasks: tuple[str, ...]
    scales: tuple[int, ...]
    rows: tuple[str, ...]
    seeds: int


STAGES = (
    Stage(SHORT, (8, 32), FIRST, 3),
    Stage(SHORT, (8, 32), (MORE,), 3),
    Stage(SHORT, (8, 32), (*FIRST, MORE), 5),
    Stage(SHORT, (8, 32), ROWS, 3),
    Stage(SHORT, (8, 32), ROWS, 5),
    Stage(LONG, (8, 32), FIRST, 3),
    Stage(LONG, (8, 32), (*FIRST, MORE), 5),
    Stage(SHORT, (128,), FIRST, 3),
    Stage(SHORT, (128,), FIRST, 5),
)


class Cache:
    """Trainings by what they were; a file with a line of each."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, dict[Run, Outcome]()
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # the last line of a command that was killed
            path.write_text(whole)
        for line in whole.splitlines():
            self._read(line)

    def write(self, run: Run, outcome: Outcome) -> None:
        """Add a line; `found` has what a later command will read, with its rounding."""
        line = _line(run, outcome)
        self._read(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(line + "\n")

    def _read(self, line: str) -> None:
        values = json.loads(line)
        self.found[Run(**values["run"])] = Outcome(**values["outcome"])


def _line(run: Run, outcome: Outcome) -> str:
    rounded = {
        "examples": round(outcome.examples, 3),
        "metric": round(outcome.metric, 3) if isfinite(outcome.metric) else 0.0,
        "seconds": round(outcome.seconds, 2),
        "gains": {scale: [round(x, 4) for x in pair] for scale, pair in outcome.gains.items()},
    }
    return json.dumps({"run": _changed(run), "outcome": _changed(replace(outcome, **rounded))})  # type: ignore[arg-type]


def _changed(values: Run | Outcome) -> dict[str, Any]:
    """Without what has its default."""
    found = asdict(values)
    return {f.name: found[f.name] for f in fields(values) if found[f.name] not in (f.default, {})}


@dataclass(frozen=True)
class Cell:
    """A task at a scale, with the learning rate of scale 1."""

    task: str
    scale: int
    lr: float

    @property
    def short(self) -> int:
        """Steps with the examples of scale 1: T / S."""
        return ceil(TASKS[self.task].total / self.scale)

    @property
    def usual(self) -> float:
        """The usual rule's factor: S for SGD, its square root for the others."""
        return float(self.scale ** TASKS[self.task].exponent)

    def run(self, seed: int, **values: float) -> Run:
        """A training of this cell; factors are kept to six digits, so that equal ones are one training."""
        rounded = {name: x if isinstance(x, int) else float(f"{x:.6g}") for name, x in values.items()}
        return Run(self.task, self.scale, seed, self.lr, **rounded)  # type: ignore[arg-type]


Found = tuple[list[Run], list[Run]]  # a row's trainings that are known, and those that are missing before more are


def tuned(name: str, cache: Cache) -> tuple[float, list[Run]]:
    """The best rate at scale 1 of those a factor 2 apart, and the trainings that are missing before it is known."""
    task = TASKS[name]

    def runs(k: int) -> list[Run]:
        return [Run(name, 1, seed, float(f"{task.lr * 2.0**k:.4g}"), steps=task.total) for seed in TUNING_SEEDS]

    k, missing = outwards(runs, lambda run: loss_of(run, cache))
    return float(f"{task.lr * 2.0**k:.4g}"), missing


def base_runs(name: str, lr: float) -> list[Run]:
    """Scale 1's trainings."""
    return [Run(name, 1, seed, lr, steps=TASKS[name].total) for seed in range(BASE_SEEDS)]


def loss_of(run: Run, cache: Cache) -> float | None:
    """Held-out loss at the end; infinite where it diverged, `None` where it was not trained."""
    found = cache.found.get(run)
    return None if found is None else inf if found.diverged else found.losses[-1]


def runs_of(row: str, cell: Cell, seeds: int, cache: Cache) -> Found:
    """The trainings of a row, of seeds 0, 1, ..., and those that must be made before the rest are known."""
    task = TASKS[cell.task]
    if not applies(row, cell):
        return [], []
    if row == "static values":
        record = Run(cell.task, 1, 0, cell.lr, record=True)
        if record not in cache.found:
            return [], [record]
        return [_static(cell, seed, *cache.found[record].gains[str(cell.scale)]) for seed in range(seeds)], []
    measured = [cell.run(seed) for seed in range(seeds)]
    missing = [run for run in measured if run not in cache.found]
    if row == "anybatch" or missing:
        return [] if missing else measured, missing
    steps = [max(1, cache.found[run].steps) for run in measured]
    if row in RETUNED:
        clock, warmup, short = RETUNED[row]
        of = [cell.short] * seeds if short else steps

        def make(k: int, seed: int) -> Run:
            kappa = task.total / of[seed] if clock else 1.0
            factor = 2.0**k * (1.0 if clock else cell.usual)
            return cell.run(seed, steps=of[seed], factor=factor, kappa=kappa, warmup=warmup)

        tried = range(min(seeds, len(TUNING_SEEDS)))
        k, missing = outwards(lambda k: [make(k, seed) for seed in tried], lambda run: loss_of(run, cache), most=MOST)
        return ([], missing) if missing else ([make(k, seed) for seed in range(seeds)], [])
    return [_fixed(row, cell, seed, n) for seed, n in enumerate(steps)], []


def applies(row: str, cell: Cell) -> bool:
    """Whether a row differs from those before it: plain SGD has no decay to put on the clock."""
    return cell.task != "lstm" or "clock" not in row


def _static(cell: Cell, seed: int, gain: float, steps: float) -> Run:
    """`anybatch plan --record`: SGD's learning rate times the mean gain, all values of other optimizers mapped."""
    sgd = TASKS[cell.task].exponent == 1
    return cell.run(seed, steps=round(steps), factor=gain if sgd else 1.0, kappa=1.0 if sgd else gain)


def _fixed(row: str, cell: Cell, seed: int, steps: int) -> Run:
    """Rows whose values are known from S and from the number of anybatch's steps."""
    sgd = TASKS[cell.task].exponent == 1
    n = steps if row.endswith("stretched") else cell.short
    if row.startswith("usual"):
        return cell.run(seed, steps=n, factor=cell.usual, warmup=LSW if sgd else 0.0)
    if row.startswith("unscaled"):
        return cell.run(seed, steps=n)
    if row.startswith("map at S"):
        return cell.run(seed, steps=n, factor=cell.usual if sgd else 1.0, kappa=1.0 if sgd else cell.scale)
    total = TASKS[cell.task].total
    if row == "late switch":
        return cell.run(seed, steps=total // 2 + ceil(total / 2 / cell.scale), late=total // 2)
    assert row == MORE
    return Run(cell.task, 1, seed, cell.lr, steps=max(steps * cell.scale, total))


def counts(cell: Cell, cache: Cache) -> bool:
    """Whether a cell belongs to the table: at scale 128 anybatch must keep `LEAST` steps."""
    first = cache.found.get(cell.run(0))
    return cell.scale <= 32 or (first is not None and first.steps >= LEAST)


def cells(stage: Stage, cache: Cache) -> Iterator[Cell]:
    """Of the tasks that are tuned."""
    for scale in stage.scales:
        for name in stage.tasks:
            lr, missing = tuned(name, cache)
            if not missing:
                cell = Cell(name, scale, lr)
                if counts(cell, cache):
                    yield cell


def missing_of(stage: Stage, cache: Cache) -> list[Run]:
    """What can be trained now: the tuning at scale 1, then scale 1 and one run of each cell, then the rows."""
    found: list[Run] = []
    for name in stage.tasks:
        lr, missing = tuned(name, cache)
        found += missing or [*base_runs(name, lr), *(Cell(name, scale, lr).run(0) for scale in stage.scales)]
    for seeds in range(1, stage.seeds + 1):
        for cell in cells(stage, cache):
            for row in stage.rows:
                if seeds >= len(TUNING_SEEDS) or row not in RETUNED:  # a search needs all of its seeds
                    found += [run for runs in runs_of(row, cell, seeds, cache) for run in runs]
    return [run for run in dict.fromkeys(found) if run not in cache.found]


def wanted(stages: Sequence[Stage], cache: Cache, complete: set[tuple[int, str]]) -> Iterator[tuple[int, Run]]:
    """What can be trained now, in order, with the number of its stage; one task of a stage after another."""
    for number, stage in enumerate(stages, 1):
        for name in stage.tasks:
            if (number, name) not in complete:
                missing = missing_of(replace(stage, tasks=(name,)), cache)
                if not missing:
                    complete.add((number, name))
                yield from ((number, run) for run in missing)

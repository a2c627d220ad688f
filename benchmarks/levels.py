"""The levels of anybatch's defaults: SGD's noise factor, and Adam's own values, on tasks of `instead`.

    python -m benchmarks.levels [--jobs 2]     trains what its cache lacks, and writes JSON and tables
    python -m benchmarks.levels --table        writes them from the cache

The learning rates are those that `instead` has tuned at scale 1. A line of docs/instead/levels.jsonl is a training; a
stopped command continues from there. Trainings of `instead` are not made again.
"""

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from math import nan
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks import same_training_results as statistics
from benchmarks.instead_page import filled, number
from benchmarks.instead_results import Line, Rows, from_json, lines_of, to_json
from benchmarks.instead_runs import Cache, Cell, base_runs, tuned
from benchmarks.instead_train import Run, train
from benchmarks.same_training import one_thread

DOCS, SEEDS = Path("docs"), 5
EDGE = "digits-sgd, twice the rate"  # near the largest stable learning rate
SGD = ("digits-sgd", EDGE, "conv-sgd", "denoiser", "lstm")
ADAM = ("digits-adamw", "factors", "autoencoder", "bytes-adamw")
ROWS = {
    **dict.fromkeys(SGD, ("", "c = 2", "c = 4")),
    **dict.fromkeys(
        ADAM, ("", "beta1 fixed", "beta2 >= 0.9", "beta2 >= 0.95", "beta1 fixed, beta2 >= 0.95", "eps / sqrt(S)")
    ),
}
SCALES = {name: (8, 32) if name in ("denoiser", "lstm", "factors") else (8, 32, 128) for name in ROWS}


def rates(known: Cache) -> dict[str, tuple[str, float]]:
    """Task and learning rate by name, of those that `instead` has tuned."""
    found = {name: (task := name.partition(",")[0], *tuned(task, known)) for name in ROWS}
    return {name: (task, 2 * lr if name == EDGE else lr) for name, (task, lr, missing) in found.items() if not missing}


def wanted(known: Cache) -> Iterator[Run]:
    """All trainings: seed by seed, so that a stopped command has a table of fewer seeds."""
    found = rates(known)
    for task, lr in found.values():
        yield from base_runs(task, lr)
    for seed in range(SEEDS):
        for name, (task, lr) in found.items():
            for scale in SCALES[name]:
                yield from (replace(Cell(task, scale, lr).run(seed), level=row) for row in ROWS[name])


def work(cache: Cache, known: Cache, jobs: int) -> None:
    """Train what neither cache has."""
    missing = [run for run in dict.fromkeys(wanted(known)) if run not in known.found and run not in cache.found]
    with ProcessPoolExecutor(jobs, get_context("spawn"), one_thread) as pool:
        for run, outcome in zip(missing, pool.map(train, missing), strict=True):
            cache.write(run, outcome)
            print(f"{run.task} S={run.scale} {run.level!r} {run.seed}: {outcome.steps} steps", flush=True)


def collect(cache: Cache, known: Cache) -> list[Line]:
    """The lines of all cells with two seeds or more; `against` compares with the default."""
    found = {**known.found, **cache.found}
    lines: list[Line] = []
    for name, (task, lr) in rates(known).items():
        base = [found[run] for run in base_runs(task, lr) if run in found]
        cells: dict[int, Rows] = {}
        for scale in SCALES[name]:
            first = [Cell(task, scale, lr).run(seed) for seed in range(SEEDS)]
            trained = {
                row: [found[run] for each in first if (run := replace(each, level=row)) in found] for row in ROWS[name]
            }
            cells[scale] = {row: (each, nan) for row, each in trained.items() if len(each) > 1}
        if len(base) > 1:
            lines += [replace(line, task=name) for line in lines_of(task, lr, base, cells)]
    return lines


def tables(lines: Sequence[Line]) -> dict[str, str]:
    """The page's blocks: loss and steps of each row."""
    return {"sgd levels": _table(lines, SGD), "adam levels": _table(lines, ADAM)}


def _table(lines: Sequence[Line], names: Sequence[str]) -> str:
    rows, of = ROWS[names[0]], {(line.task, line.scale, line.row): line for line in lines}
    heads = ["task", "S", "scale 1", "default", *(f"`{row}`" if "=" in row else row for row in rows[1:])]
    text = ["| " + " | ".join(heads) + " |", "|---|--:" + "|--:" * (len(heads) - 2) + "|"]
    for name in names:
        for scale in SCALES[name]:
            base = of.get((name, 1, "scale 1"))
            if base is not None and (name, scale, "") in of:
                cells = [_cell(of.get((name, scale, row))) for row in rows]
                text.append(f"| {name} | {scale} | {base.loss:.4g} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def _cell(line: Line | None) -> str:
    if line is None:
        return "–"
    few = f" ({line.seeds})" if line.seeds < SEEDS else ""
    return f"{number(line.loss, '{:.4g}')}{f' `{line.mark}`' if line.mark else ''}{few}, {line.steps:.0f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=DOCS / "instead" / "levels.jsonl")
    parser.add_argument("--known", type=Path, default=DOCS / "instead" / "runs.jsonl", help="the trainings of instead")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each (default: 2)")
    parser.add_argument("--table", action="store_true", help="write JSON and tables from the cache; train nothing")
    parser.add_argument("--out", type=Path, default=DOCS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cache, known = Cache(options.cache), Cache(options.known)
    if not options.table:
        work(cache, known, options.jobs)
    text = to_json(collect(cache, known))
    statistics.write(options.out / "instead" / "levels.json", text)
    page = options.out / "instead.md"
    page.write_text(filled(page.read_text(), tables(from_json(text))))


if __name__ == "__main__":
    main()

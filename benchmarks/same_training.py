"""How much of one training at any batch is kept: every rule against scale 1, by end and by curve, on several tasks.

    python -m benchmarks.same_training [--only digits-sgd,bytes-adamw] [--scales 8,32] [--seeds 5] [--jobs 2]
    python -m benchmarks.same_training --table [FILE] [--json FILE] [--figure FILE]

Each task's learning rate is tuned at scale 1 first, then each candidate trains at the larger scales with that rate.
Every training is a file in `--cache`; a command that was stopped goes on where it was. A cache belongs to one state of
the library: what a rule does is not part of a file's name, only how it is written. `--table` trains nothing.

A line with `-` is significantly worse than scale 1, with `+` significantly better (Welch, two-sided, 0.05): both are
another training. The distance of the curve is the root mean square, over 20 points of tau from 5 % of the run on, of
log(mean loss / mean loss of scale 1); beside it is the same between two halves of scale 1's own seeds.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from math import inf
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import TypeVar

import torch

import anybatch
from benchmarks import same_training_results as results
from benchmarks.same_training_tasks import CANDIDATES, TASKS, Result, prepare

BASE_SEEDS = 10  # of scale 1 at least, so that its halves are five each
TUNING_SEEDS = (100, 101, 102)  # never those that are compared
OUTWARDS = 5  # factors of 2 that the tuning goes from the task's own rate

R = TypeVar("R")


@dataclass(frozen=True)
class Run:
    """One training; at scale 1 all candidates are one, and have no name."""

    task: str
    candidate: str
    lr: float
    scale: int
    seed: int

    @property
    def rule(self) -> anybatch.Rule:
        """What is attached; a candidate that the library refuses raises here."""
        if self.scale == 1:
            return anybatch.Identity(decays="constant")
        return anybatch.AdaScale(**CANDIDATES[TASKS[self.task].family][self.candidate])

    @property
    def key(self) -> str:
        """The name of its file."""
        task = TASKS[self.task]
        values = [self.task, task.family, task.total, task.evaluations, self.lr, repr(self.rule), self.scale, self.seed]
        digest = hashlib.sha256(json.dumps([*values, torch.__version__]).encode()).hexdigest()[:12]
        label = self.candidate.replace(" ", "").replace("*", "x")
        return f"{self.task}-{label or 'base'}-S{self.scale}-lr{self.lr:g}-seed{self.seed}-{digest}.json"


@dataclass(frozen=True)
class Place:
    """Where trainings lie, where data lies, and how many processes train."""

    cache: Path
    data: Path
    jobs: int


def read(run: Run, cache: Path) -> Result | None:
    """The result of a training that was finished."""
    try:
        return Result(**json.loads((cache / run.key).read_text())["result"])
    except FileNotFoundError:
        return None


def train(run: Run, place: Place) -> Result:
    """One training, written when it is finished."""
    task = TASKS[run.task]
    result = task.train(task, run.lr, run.rule, run.scale, run.seed, place.data)
    path = place.cache / run.key
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps({"run": asdict(run), "rule": repr(run.rule), "result": asdict(result)}) + "\n")
    unfinished.replace(path)
    return result


def train_all(runs: Iterable[Run], place: Place) -> None:
    """Train what the cache lacks, in this order."""
    missing = [run for run in dict.fromkeys(runs) if read(run, place.cache) is None]
    if not missing:
        return
    place.cache.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(run.task for run in missing):
        prepare(name, place.data)
    for number, (run, result) in enumerate(_trained(missing, place), 1):
        print(
            f"{number}/{len(missing)} {run.task} S={run.scale} {run.candidate or 'scale 1'} lr {run.lr:g} "
            f"seed {run.seed}: {result.steps} steps, {result.diverged or format(_loss(result), '.4f')}, "
            f"{result.seconds:.1f} s",
            flush=True,
        )


def _trained(runs: Sequence[Run], place: Place) -> Iterator[tuple[Run, Result]]:
    """In the order in which they are done; one job trains in this process."""
    if place.jobs == 1:
        yield from ((run, train(run, place)) for run in runs)
        return
    with ProcessPoolExecutor(min(place.jobs, len(runs)), get_context("spawn"), one_thread) as pool:
        try:
            futures = {pool.submit(train, run, place): run for run in runs}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:  # what one run is wrong in is said now, not after all others
            pool.shutdown(cancel_futures=True)


def one_thread() -> None:
    """Of a new process."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def _loss(result: Result) -> float:
    return inf if result.diverged else result.curve[-1]["loss"]


def outwards(
    runs: Callable[[int], list[R]], loss: Callable[[R], float | None], *, most: int = OUTWARDS
) -> tuple[int, list[R]]:
    """The k of the lowest mean loss, with one tried on each side of it, and the runs missing before it is known.

    Args:
        runs: of k, the trainings at a rate of `2 ** k` times the first.
        loss: of a training; `None` if it was not made.
        most: the largest k, up or down.
    """
    low, high = -1, 1
    while True:
        found = {k: [(run, loss(run)) for run in runs(k)] for k in range(low, high + 1)}
        missing = [run for pairs in found.values() for run, value in pairs if value is None]
        if missing:
            return 0, missing
        means = {k: fmean(value for _, value in pairs if value is not None) for k, pairs in found.items()}
        best = min(means, key=means.__getitem__)
        if low < best < high or max(-low, high) == most:
            return best, []
        low, high = min(low, best - 1), max(high, best + 1)


def tuned(name: str, cache: Path) -> tuple[float, list[Run]]:
    """The best rate at scale 1 of those a factor 2 apart, and the trainings that are missing before it is known."""
    task = TASKS[name]

    def rate(k: int) -> float:
        return float(f"{task.lr * 2.0**k:.4g}")

    def runs(k: int) -> list[Run]:
        return [Run(name, "", rate(k), 1, seed) for seed in TUNING_SEEDS[: task.tuning]]

    def loss(run: Run) -> float | None:
        result = read(run, cache)
        return None if result is None else _loss(result)

    k, missing = outwards(runs, loss)
    return rate(k), missing


def base_runs(name: str, lr: float, seeds: int) -> list[Run]:
    """Scale 1's trainings."""
    return [Run(name, "", lr, 1, seed) for seed in range(max(seeds, BASE_SEEDS))]


def cells(name: str, *, scales: Sequence[int], candidates: Sequence[str]) -> Iterator[tuple[int, str]]:
    """What is compared with scale 1: scale and candidate; nothing given is everything."""
    task = TASKS[name]
    for scale in task.scales:
        for label in task.candidates.get(scale, tuple(CANDIDATES[task.family])):
            if (not scales or scale in scales) and (not candidates or label in candidates):
                yield scale, label


def estimate(runs: Iterable[Run], cache: Path) -> float:
    """Seconds of one core that the trainings missing in the cache will take."""
    return sum(TASKS[run.task].seconds_at(run.scale) for run in runs if read(run, cache) is None)


def work(names: Sequence[str], options: argparse.Namespace) -> None:
    """Tune, train scale 1, then the candidates, all of them with one seed before the next; the cheap tasks first."""
    place = Place(options.cache, options.data, options.jobs)
    pairs = {n: list(cells(n, scales=options.scales, candidates=options.candidates)) for n in names}
    for name, found in pairs.items():  # a candidate that is refused is said now
        for scale, label in found:
            print(f"{name:24} S={scale:<4} {Run(name, label, 0, scale, 0).rule}")

    def plan(name: str, lr: float, seed: int) -> list[Run]:
        return [Run(name, label, lr, scale, seed) for scale, label in pairs[name]]

    expected = 0.0
    for name in names:
        lr, missing = tuned(name, place.cache)
        compared = [run for seed in range(options.seeds) for run in plan(name, lr, seed)]
        expected += estimate([*missing, *base_runs(name, lr, options.seeds), *compared], place.cache)
    print(f"about {expected / 60:.0f} minutes of one core, on {options.jobs}", flush=True)
    for cheap in (True, False):
        mine = [name for name in names if TASKS[name].cheap == cheap]
        while missing := [run for name in mine for run in tuned(name, place.cache)[1]]:
            train_all(missing, place)
        rates = {name: tuned(name, place.cache)[0] for name in mine}
        train_all((run for name in mine for run in base_runs(name, rates[name], options.seeds)), place)
        train_all((run for s in range(options.seeds) for name in mine for run in plan(name, rates[name], s)), place)


def collect(names: Sequence[str], options: argparse.Namespace) -> list[results.Row]:
    """The lines of the tables, from the cache; tasks and cells with fewer than two seeds are not there yet."""
    rows: list[results.Row] = []
    for name in names:
        lr, missing = tuned(name, options.cache)
        base = [r for run in base_runs(name, lr, options.seeds) if (r := read(run, options.cache))]
        if missing or len(base) < 2:
            continue
        task = TASKS[name]
        rows.append(results.base_row(name, base, lr=lr, total=task.total, metric=task.metric, family=task.family))
        for scale, label in cells(name, scales=options.scales, candidates=options.candidates):
            runs = [Run(name, label, lr, scale, seed) for seed in range(options.seeds)]
            found = [r for run in runs if (r := read(run, options.cache))]
            if len(found) > 1:
                rows.append(results.row(rows[-1], scale, label, found, base=base))
    return rows


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(word) for word in _words(text)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", type=_words, default=list(TASKS), help="tasks, of " + ", ".join(TASKS))
    add("--candidates", type=_words, default=[], help="rules by their labels (default: all)")
    add("--scales", type=_numbers, default=[], help="default: the task's")
    add("--seeds", type=int, default=5, help="of each cell; of scale 1 at least 10 (default: 5)")
    add("--jobs", type=int, default=2, help="processes of one thread each (default: 2)")
    add("--cache", type=Path, default=Path("runs/same-training"))
    add("--data", type=Path, default=Path("made"), help="where the recipes' made data lies or is written")
    add("--table", nargs="?", const="-", help="write the tables to this file, or print them, and train nothing")
    add("--json", type=Path, help="write the lines and the scores here")
    add("--figure", type=Path, help="draw steps against loss here")
    options = parser.parse_args(arguments)
    strangers = set(options.only) - TASKS.keys()
    strangers |= set(options.candidates) - {label for table in CANDIDATES.values() for label in table}
    if strangers:
        parser.error(f"unknown: {', '.join(sorted(strangers))}")
    torch.set_num_threads(1)
    if options.table is None:
        work(options.only, options)
    rows = collect(options.only, options)
    text = results.markdown(rows)
    if options.table in (None, "-"):
        print(text)
    else:
        results.write(Path(options.table), text)
    if options.json:
        results.write(options.json, results.to_json(rows))
    if options.figure:
        results.figure(rows, options.figure)


if __name__ == "__main__":
    main()

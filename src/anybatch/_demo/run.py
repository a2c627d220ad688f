"""Run the demo's trainings on all cores, or on several ranks, and summarise them as a table."""

import queue
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from math import isnan, nan
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from anybatch._demo.digits import ELASTIC, EVALUATIONS, Result, train_group
from anybatch._report import value_at

Group = tuple[tuple[int, ...], int]  # scales, seed


@dataclass(frozen=True)
class Plan:
    """The trainings of a demo."""

    scales: tuple[int, ...]  # including 1
    rules: tuple[str, ...]  # some of `"adascale"`, `"lsw"`, `"lsw+"`
    seeds: int  # number of seeds
    total: int  # base iterations of a run
    ranks: int  # processes that share each step
    out: Path  # folder for the records

    @property
    def groups(self) -> list[Group]:
        """The groups of runs, longest runs first."""
        elastic = [each for each in ELASTIC if {each[0], each[-1]} <= {*self.scales} and "adascale" in self.rules]
        return [((s,), seed) for s in self.scales for seed in range(self.seeds)] + [
            (scales, seed) for scales in elastic for seed in range(self.seeds)
        ]

    @property
    def runs(self) -> int:
        """The number of trainings."""
        return sum(len(self.rules) if len(scales) == 1 and scales != (1,) else 1 for scales, _ in self.groups)


def run(plan: Plan) -> Iterator[Result]:
    """Train all groups; yields each result when its group is finished, in no particular order."""
    (plan.out / "records").mkdir(parents=True, exist_ok=True)
    yield from _on_ranks(plan) if plan.ranks > 1 else _on_cores(plan)


def _on_cores(plan: Plan) -> Iterator[Result]:
    context = get_context("spawn")
    workers = min(cpu_count() or 1, len(plan.groups))
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
        futures = [pool.submit(_group, plan, *group) for group in plan.groups]
        for future in as_completed(futures):
            yield from future.result()


def _group(plan: Plan, scales: tuple[int, ...], seed: int) -> list[Result]:
    rules = ("adascale",) if scales == (1,) else plan.rules
    return list(train_group(scales, seed, rules=rules, total=plan.total, out=plan.out))


def _on_ranks(plan: Plan) -> Iterator[Result]:
    """Train all runs on `plan.ranks` gloo processes; rank 0 sends the results."""
    results: Any = get_context("spawn").Queue()
    with tempfile.TemporaryDirectory() as folder:
        context = start_processes(
            _rank, args=(plan, folder, results), nprocs=plan.ranks, join=False, start_method="spawn"
        )
        for _ in range(plan.runs):
            while True:
                try:
                    yield results.get(timeout=1.0)
                    break
                except queue.Empty:
                    context.join(timeout=0)  # raises a process's error
        context.join()


def _rank(rank: int, plan: Plan, folder: str, results: Any) -> None:
    _one_thread()
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=plan.ranks)
    try:
        for group in plan.groups:
            for result in _group(plan, *group):
                if rank == 0:
                    results.put(result)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _one_thread() -> None:
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Row:
    """A row of the table: a rule at a scale, means over the seeds."""

    scale: str  # a number, or `32→64→128`
    rule: str
    accuracy: float  # mean test accuracy, percent
    spread: float  # standard deviation of the accuracy; nan for one seed
    loss: float  # mean training loss
    iterations: float  # mean number of optimizer steps
    gain: float  # mean gain; nan for fixed rules
    worse: bool  # whether the accuracy is significantly below that of scale 1 (one-sided Welch test, 0.95)


def summarise(results: Sequence[Result]) -> list[Row]:
    """One row for each rule and scale, in the order of the scales."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in sorted(results, key=lambda r: (len(r.task.scales), r.task.scales, r.task.rule)):
        groups.setdefault((result.task.name, result.task.rule), []).append(result)
    base = [r.accuracy for r in groups.get(("1", "adascale"), [])]
    return [
        Row(
            scale=scale,
            rule=rule,
            accuracy=fmean(r.accuracy for r in runs),
            spread=stdev(r.accuracy for r in runs) if len(runs) > 1 else nan,
            loss=fmean(r.loss for r in runs),
            iterations=fmean(r.iterations for r in runs),
            gain=fmean(r.mean_gain for r in runs),
            worse=significantly_below([r.accuracy for r in runs], base),
        )
        for (scale, rule), runs in groups.items()
    ]


def significantly_below(values: Sequence[float], base: Sequence[float]) -> bool:
    """Whether the mean of `values` is below that of `base` at the 0.95 level: one-sided Welch test."""
    return len(values) > 1 and len(base) > 1 and welch(values, base) < 0.05


def welch(values: Sequence[float], base: Sequence[float]) -> float:
    """The p-value of Welch's one-sided test that `values`, two or more, have a lower mean than `base`."""
    if any(map(isnan, (*values, *base))):
        return nan
    first, second = ((fmean(x), stdev(x), len(x)) for x in (values, base))
    if first[1] == second[1] == 0:  # without a spread the test's denominator is 0
        return float(first[0] >= second[0])
    from scipy.stats import ttest_ind_from_stats

    return float(ttest_ind_from_stats(*first, *second, equal_var=False, alternative="less").pvalue)


@dataclass(frozen=True)
class Curve:
    """Means over the seeds at equal steps of tau, interpolated between each run's points."""

    tau: list[float]
    accuracy: list[float]
    loss: list[float]


def curve(runs: Sequence[Result]) -> Curve:
    """The mean curve of one rule at one scale."""
    total = runs[0].task.total
    grid = [total * i / EVALUATIONS for i in range(EVALUATIONS + 1)]
    return Curve(
        grid,
        [fmean(value_at(list(zip(r.tau, r.test_accuracy, strict=True)), tau) for r in runs) for tau in grid],
        [fmean(value_at(list(zip(r.tau, r.test_loss, strict=True)), tau) for r in runs) for tau in grid],
    )


def show(value: float, digits: int) -> str:
    """A number for the table; a dash for nan."""
    return "–" if isnan(value) else f"{value:.{digits}f}"

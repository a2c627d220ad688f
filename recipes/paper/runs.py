"""Trainings of the experiments: each once, cached by its configuration, on all cores, going on where it was stopped."""

import hashlib
import importlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from math import ceil, nan
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

import anybatch
from recipes.train import run
from recipes.training.options import TASKS, Options
from recipes.training.task import Task

Summary = dict[str, Any]
POINTS = 40  # of a curve


@dataclass(frozen=True)
class Run:
    """One training of `train.py`, by what decides its result; without a total, of the task's own length."""

    task: str
    tiny: bool
    data: str | None
    rule: str
    scale: str
    seed: int
    total: int | None
    evaluations: int
    lr: float | None = None
    last_rate: float | None = None
    steps: int | None = None
    decays: str | float | None = None
    estimator: str | None = None
    smoothing: str | float | None = None

    @property
    def key(self) -> str:
        """The name of its folder in the cache; data at another place, and other versions, are another run."""
        values = {
            **asdict(self),
            "data": str(Path(self.data).resolve()) if self.data else None,
            "versions": [anybatch.__version__, torch.__version__],
        }
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.task}-{self.rule}-S{self.scale.replace(',', '-')}-seed{self.seed}-{digest}"


def train_all(runs: Iterable[Run], *, cache: Path, jobs: int) -> Iterator[tuple[Run, Summary]]:
    """Summaries with the evaluations as `"history"`, in the order in which they are done, the cached ones first."""
    missing = []
    for one in dict.fromkeys(runs):
        summary = _cached(one, cache)
        if summary is None:
            missing.append(one)
        else:
            yield one, summary
    if not missing:
        return
    cost = sorted(missing, key=lambda r: -max(float(s.split("@")[0]) for s in r.scale.split(",")))
    with ProcessPoolExecutor(min(jobs, len(missing)), mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        try:
            futures = {pool.submit(_train, one, cache): one for one in cost}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:  # what one run is wrong in is said now, not after all others
            pool.shutdown(cancel_futures=True)


def with_lsw_plus(adascale: Run, summary: Summary) -> Run:
    """LSW stretched to the steps that AdaScale took."""
    return replace(adascale, rule="lsw+", steps=summary["iterations"])


def mean_curve(runs: Sequence[Summary], *, x: str, y: str) -> tuple[list[float], list[float]]:
    """Means over the seeds at equal steps of tau, between a run's own evaluations along straight lines."""
    grid = [runs[0]["total"] * (i + 1) / POINTS for i in range(POINTS)]

    def at(run: Summary, name: str) -> Any:
        return np.interp(grid, [p["tau"] for p in run["history"]], [p[name] for p in run["history"]])

    return tuple(np.mean([at(run, name) for run in runs], axis=0).tolist() for name in (x, y))


def _cached(one: Run, cache: Path) -> Summary | None:
    folder = cache / one.key
    try:
        summary = json.loads((folder / "summary.json").read_text())
        lines = (folder / "results.jsonl").read_text().splitlines()
    except (OSError, ValueError):
        return None
    points = [{k: nan if v is None else v for k, v in json.loads(line).items()} for line in lines]
    return {
        **{k: nan if v is None and k in ("loss", "train_loss") else v for k, v in summary.items()},
        "history": points,
    }


def _train(one: Run, cache: Path) -> Summary:
    out = cache / one.key
    out.mkdir(parents=True, exist_ok=True)
    (out / "run.json").write_text(json.dumps(asdict(one), indent=1) + "\n")
    task = task_of(one)
    options = Options(
        rule=one.rule,
        decays=one.decays,
        estimator=one.estimator,
        smoothing=one.smoothing,
        scale=one.scale,
        seed=one.seed,
        total=task.total,
        evaluations=one.evaluations,
        lr=one.lr,
        last_rate=one.last_rate,
        steps=one.steps,
        save_every=max(task.total / 4, ceil(task.total / 100)),
        out=out,
    )
    run(task, options)
    for name in out.glob("checkpoint*"):
        name.unlink()
    summary = _cached(one, cache)
    if summary is None:
        raise RuntimeError(f"{out} holds no summary after its training.")
    return summary


def _one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def task_of(one: Run) -> Task:
    """The task of a run, with its data."""
    module, name = TASKS[one.task].split(":")
    task: Task = getattr(importlib.import_module(module), name)(Path(one.data) if one.data else None, tiny=one.tiny)
    task.total = one.total or task.total
    return task

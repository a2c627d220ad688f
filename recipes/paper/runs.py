"""A training of the experiments, by what decides its result, and the cache that keeps what it came to."""

import hashlib
import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import torch

import anybatch
from recipes.training.options import TASKS, Options
from recipes.training.task import Task

Summary = dict[str, Any]
POINTS = 40  # of a curve
LATER = {"precision": "fp32", "micro_batch": None}  # fields that older keys do not have, and what they stood for


@dataclass(frozen=True)
class Run:
    """One training of `train.py`, by what decides its result; without a total, of the task's own length.

    How many processes and loaders it runs on, and whether its model is compiled, do not decide it: as with a
    checkpoint, that changes no more than the rounding.
    """

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
    precision: str = "fp32"
    micro_batch: int | None = None  # None: what one process takes

    @property
    def key(self) -> str:
        """The name of its folder in the cache; data at another place, and other versions, are another run."""
        values = {
            **{name: value for name, value in asdict(self).items() if (name, value) not in LATER.items()},
            "data": str(Path(self.data).resolve()) if self.data else None,
            "versions": [anybatch.__version__, torch.__version__],
        }
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.task}-{self.rule}-S{self.scale.replace(',', '-')}-seed{self.seed}-{digest}"

    def options(self, **more: Any) -> Options:
        """What `train.py` is told."""
        chosen = {name: value for name, value in asdict(self).items() if name not in ("task", "tiny", "data")}
        return Options(**chosen, **more)

    def on(self, processes: int, task: Task) -> "Run":
        """This run with the micro-batch that so many processes take; `None` where one process takes the same."""
        options = replace(self, rule="adascale", steps=None).options()
        taken, alone = (
            replace(options, micro_batch=given).micro_batch_for(task, ranks=ranks)
            for given, ranks in ((self.micro_batch, processes), (None, 1))
        )
        return replace(self, micro_batch=None if taken == alone else taken)


def with_lsw_plus(adascale: Run, summary: Summary) -> Run:
    """LSW stretched to the steps that AdaScale took."""
    return replace(adascale, rule="lsw+", steps=summary["iterations"])


def mean_curve(runs: Sequence[Summary], *, x: str, y: str) -> tuple[list[float], list[float]]:
    """Means over the seeds at equal steps of tau, between a run's own evaluations along straight lines."""
    grid = [runs[0]["total"] * (i + 1) / POINTS for i in range(POINTS)]

    def at(run: Summary, name: str) -> Any:
        return np.interp(grid, [p["tau"] for p in run["history"]], [p[name] for p in run["history"]])

    return tuple(np.mean([at(run, name) for run in runs], axis=0).tolist() for name in (x, y))


def cached(one: Run, cache: Path) -> Summary | None:
    """The summary of a finished run, with the evaluations as `"history"`."""
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


def task_of(one: Run) -> Task:
    """The task of a run, with its data."""
    module, name = TASKS[one.task].split(":")
    task: Task = getattr(importlib.import_module(module), name)(Path(one.data) if one.data else None, tiny=one.tiny)
    task.total = one.total or task.total
    return task

"""Train a language model, or one of the papers' tasks, at any scale: one loop over anybatch's public functions.

    python -m recipes.train digits --scale 32
    python -m recipes.train cifar10 --tiny --data made/cifar10 --make-data --scale 8 --rule lsw
    python -m recipes.train language --data shakespeare.txt --scale 4 --grow noise --most 32
    torchrun --nproc-per-node=8 -m recipes.train imagenet --data /data/imagenet --scale 16 --micro-batch 128 \
        --precision bf16 --workers 12 --ema 0.9999

The scale is the batch of a step in base batches: ranks * accumulation * micro-batch / base batch. `--scale` and
`--micro-batch` are given, the accumulation follows. All else is said once, for scale 1, in the task's own module.
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from math import floor, isfinite
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.optim import Optimizer

import anybatch
from recipes.training import parallel
from recipes.training.attempts import Attempts
from recipes.training.growth import growth
from recipes.training.loading import workers_for
from recipes.training.options import PRECISIONS, TASKS, Options, parse, task_of
from recipes.training.parallel import Place
from recipes.training.sharing import ALONE, Share
from recipes.training.task import DataError, Task

__all__ = ["TASKS", "Options", "Training", "main", "run"]

Point = dict[str, Any]


def run(task: Task, options: Options, *, watch: Callable[[float, Point | None], None] = lambda *_: None) -> Point:
    """Train `task`, going on from its checkpoint if there is one, and return the summary.

    `watch(tau, point)` is told of every step, and of the evaluation where there was one.

    Raises:
        anybatch.InvalidValueError: options that do not fit together.
        DataError: the checkpoint is of another run.
    """
    training = Training(task, options, parallel.here())
    try:
        while not training.over:
            training.step()
            point = training.evaluate() if training.due(training.evaluated, task.total / options.evaluations) else None
            if options.out and training.due(training.saved, options.save_every or task.total / 20):
                training.save(options.out)
            watch(training.controller.tau, point)
    finally:
        training.close()
    summary = training.summary()
    if options.out and training.place.first:
        (options.out / "summary.json").write_text(_line(summary))
    return summary


class Training:
    """A model in training: one step, its evaluation, its checkpoint."""

    def __init__(self, task: Task, options: Options, place: Place) -> None:
        self.task, self.options, self.place = task, options, place
        self.start = time.perf_counter()
        task.workers, task.total = workers_in(options, place), options.total or task.total
        task.base_batch = options.base_batch or task.base_batch
        self.micro_batch = options.micro_batch_for(task, ranks=place.ranks)
        for scale, _ in options.scales:
            options.accumulation_for(scale, task, ranks=place.ranks)  # what is wrong is said before training starts
        if options.fsdp and not dist.is_initialized():
            raise anybatch.InvalidValueError("--fsdp needs several processes: start with torchrun.")
        saved = parallel.load(options.out, same=options.identity(task)) if options.out else None

        torch.manual_seed(options.seed)
        self.net = parallel.tuned(
            task.model(), task, device=place.device, precision=options.precision, fsdp=options.fsdp
        )
        self.model = parallel.wrap(self.net, place=place, fsdp=options.fsdp, compiled=options.compile)
        given = task.optimizer(self.net)
        self.optimizers = given if isinstance(given, list) else [given]
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        factor = options.lr / groups[0]["lr"] if options.lr else 1.0
        for group in groups:
            group["lr"] *= factor
        self.schedulers = [self.scheduler(optimizer) for optimizer in self.optimizers]
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=options.precision == "fp16")
        self.record = None
        if options.out and place.first:
            if not saved:  # they are of a run that died before its first checkpoint
                for name in ("record.jsonl", "results.jsonl", "summary.json"):
                    (options.out / name).unlink(missing_ok=True)
            self.record = anybatch.RunRecord(options.out / "record.jsonl", config=options.identity(task))
        self.controller = anybatch.attach(
            self.optimizers,
            model=self.model,
            rule=options.rule_for_attach(),
            scheduler=self.schedulers,
            total=task.total,
            base_batch=task.base_batch,
            micro_batch=self.micro_batch,
            examples=None if options.estimator == "paper" else task.examples,  # the paper's has no such correction
            grad_scaler=self.scaler if self.scaler.is_enabled() else None,
            record=self.record,
        )
        self.growth = growth(options, task, self.controller)

        self.used = 0  # examples (tokens), by all ranks together
        self.history: list[Point] = []
        self.saved = 0.0  # tau of the last checkpoint
        self.attempts = Attempts()
        self.losses = torch.zeros(2, dtype=torch.float64, device=place.device)  # their sum and number, of this rank
        if saved and options.ema is not None:
            parallel.load_model(self.net, saved["ema"])  # ModelEMA starts from what the model holds
        self.ema = None
        if options.ema is not None:
            self.ema = anybatch.ModelEMA(self.net, options.ema, clock=self.controller.clock)
        if saved:
            self.restore(saved)
        shares = {"rank": place.rank, "ranks": place.ranks, "start": self.used, "workers": task.workers}
        self.batches = task.batches(self.micro_batch, seed=options.seed, **shares)

    def scheduler(self, optimizer: Optimizer) -> Any:
        """The task's own schedule, or the one that was asked for."""
        if not self.options.last_rate:
            return self.task.scheduler(optimizer)
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, self.options.last_rate ** (1 / self.task.total))

    @property
    def accumulation(self) -> int:
        """Micro-batches of the next step, on each rank."""
        if self.growth is not None:
            return self.growth.accumulation
        scale = self.options.scale_at(self.controller.tau / self.task.total)
        return self.options.accumulation_for(scale, self.task, ranks=self.place.ranks)

    @property
    def over(self) -> bool:
        """Whether the run is at its end, or has no finite gradient any more."""
        return self.controller.done or self.attempts.hopeless

    @property
    def evaluated(self) -> float:
        """The tau of the last evaluation."""
        return self.history[-1]["tau"] if self.history else 0.0

    def due(self, last: float, every: float) -> bool:
        """Whether the clock has passed a multiple of `every` since `last`, or the run is over."""
        return self.over or self.controller.clock.reached((floor(last / every + 1e-9) + 1) * every)

    def step(self) -> None:
        """One optimizer step of the scale in force, from as many micro-batches as it takes."""
        accumulation = self.accumulation
        precision, device = PRECISIONS[self.options.precision], self.place.device.type
        for i in range(accumulation):
            given = next(self.batches)
            self.controller.micro_batch = self.task.size(given)  # asked on the host: on a device it would be waited for
            batch = self.place.moved(given)
            # Dropout, too, depends on the seed and the examples before it alone: no generator's state is saved.
            before = self.used + (i * self.place.ranks + self.place.rank) * self.micro_batch
            torch.manual_seed(self.options.seed * 1_000_000_007 + before)
            with parallel.without_reduction(self.model, last=i == accumulation - 1):
                with torch.autocast(device, precision, enabled=precision is not None):
                    loss = self.task.loss(self.model, batch)
                self.scaler.scale(loss / accumulation).backward()
            self.losses += torch.stack([loss.detach().double(), torch.ones_like(self.losses[0])])
        if self.task.clip is not None:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.task.clip)
        try:
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        except anybatch.DivergedError:
            self.attempts.give_up()
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.used += accumulation * self.place.ranks * self.micro_batch
        self.attempts.count(self.controller)

    def evaluate(self) -> Point:
        """The metric at this tau, and the mean training loss since the last evaluation; the ranks share the work."""
        total, number = self.place.summed(self.losses).tolist()
        self.losses.zero_()
        point: Point = {"tau": self.controller.tau, "step": self.controller.steps, "train_loss": total / number}
        self.net.eval()
        point |= self.measured()
        if self.ema is not None:
            with self.ema.applied():
                point |= {f"ema_{name}": value for name, value in self.measured().items()}
        self.net.train()
        self.history.append(point)
        if self.record is not None:
            self.controller.log(**{name: value for name, value in point.items() if name not in ("tau", "step")})
        if self.options.out and self.place.first:
            with (self.options.out / "results.jsonl").open("a") as file:
                file.write(_line(point))
        return point

    def measured(self) -> dict[str, float]:
        """What the task says of the model as it is, in the training's precision."""
        place, precision = self.place, PRECISIONS[self.options.precision]
        share = Share(place.rank, place.ranks)
        if self.options.fsdp and not self.task.lockstep:
            share = ALONE  # FSDP2's ranks call the model together, so that all do all of it
        parallel.same_buffers(self.net, place)
        with torch.no_grad(), torch.autocast(place.device.type, precision, enabled=precision is not None):
            return self.task.evaluate(self.net, place.device, share)

    def save(self, out: Path) -> None:
        """Write the checkpoint; every rank calls this, rank 0 writes."""
        losses = self.place.summed(self.losses)
        self.losses = losses if self.place.first else torch.zeros_like(losses)
        self.saved = self.controller.tau
        state = {
            "options": self.options.identity(self.task),
            "model": parallel.model_state(self.net),
            "optimizer": parallel.optimizer_state(self.net, self.optimizers),
            "scheduler": [scheduler.state_dict() for scheduler in self.schedulers],
            "scaler": self.scaler.state_dict(),
            "controller": self.controller.state_dict(),
            "seconds": time.perf_counter() - self.start,
            "used": self.used,
            "attempts": asdict(self.attempts),
            "history": self.history,
            "losses": losses.tolist(),
        }
        if self.growth is not None:
            state["growth"] = self.growth.state_dict()
        if self.ema is not None:
            with self.ema.applied():
                state["ema"] = parallel.model_state(self.net)
        if self.place.first:
            parallel.save(out, state)

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from a checkpoint, on any number of ranks; what was written after it is written again."""
        parallel.load_model(self.net, saved["model"])
        with warnings.catch_warnings():  # of a run that is over: it is this one, its options are the same
            warnings.filterwarnings("ignore", "The optimizer's state is of a run", anybatch.AnybatchWarning)
            parallel.load_optimizer(self.net, self.optimizers, saved["optimizer"])
        for scheduler, state in zip(self.schedulers, saved["scheduler"], strict=True):
            scheduler.load_state_dict(state)
        self.scaler.load_state_dict(saved["scaler"])
        self.controller.load_state_dict(saved["controller"])
        if self.growth is not None:
            self.growth.load_state_dict(saved["growth"])
        self.used, self.history, self.saved = saved["used"], saved["history"], self.controller.tau
        self.attempts = Attempts(**saved["attempts"])
        self.start -= saved["seconds"]
        if self.place.first:
            self.losses += torch.tensor(saved["losses"], dtype=torch.float64, device=self.place.device)
            if self.options.out:
                (self.options.out / "results.jsonl").write_text("".join(map(_line, self.history)))

    def close(self) -> None:
        """Let go of the optimizer and the record."""
        self.controller.detach()
        if self.record is not None:
            self.record.close()

    def summary(self) -> Point:
        """What the run came to."""
        last, controller = self.history[-1], self.controller
        return {
            **self.options.identity(self.task),
            "scale": self.options.scale,
            "ranks": self.place.ranks,
            "micro_batch": self.micro_batch,
            "metric": self.task.metric,
            **({"measured": self.task.measured} if self.task.measured else {}),
            **last,
            "iterations": controller.steps,
            "mean_gain": controller.tau / max(1, controller.steps),
            "examples": self.used,
            "skipped": self.attempts.skipped,
            "diverged": self.attempts.hopeless or not isfinite(last["train_loss"]),
            "seconds": time.perf_counter() - self.start,
        }


def workers_in(options: Options, place: Place) -> int:
    """The loading processes of this rank: as given, or by the cores that it has."""
    if options.workers is not None:
        return options.workers
    return workers_for(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), device=place.device.type == "cuda")


def _line(values: Point) -> str:
    """A line of strict JSON: what is not finite is null."""
    finite = {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in values.items()}
    return json.dumps(finite) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The command line; 2 where the data or the options are wrong."""
    try:
        given, options = parse(arguments)
        with parallel.process_group() as place:
            task = task_of(given, place)
            with _watching(task, options, place) as watch:
                summary = run(task, options, watch=watch)
            if place.first:
                print(json.dumps(summary, indent=2, default=str))
    except (DataError, anybatch.AnybatchError) as error:
        rank = os.environ.get("RANK", "0")  # a file may be missing, or wrong, where one rank reads it
        print(error if rank == "0" else f"rank {rank}: {error}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def _watching(task: Task, options: Options, place: Place) -> Iterator[Callable[[float, Point | None], None]]:
    """Rank 0 shows a progress bar where there is a terminal, and a line for each evaluation."""
    bar = Progress(TextColumn("tau"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar.disable = not (place.first and bar.console.is_terminal)
    total = options.total or task.total
    with bar:
        row = bar.add_task("tau", total=total)

        def watch(tau: float, point: Point | None) -> None:
            bar.update(row, completed=min(round(tau), total))
            if point and place.first:
                bar.console.print("  ".join(f"{k} {v:.5g}" for k, v in point.items()), highlight=False)

        yield watch


if __name__ == "__main__":
    sys.exit(main())

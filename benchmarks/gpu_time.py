"""The time of a step with a controller on a GPU, as a ratio to the plain loop's; see `benchmarks.gpu`."""

import gc
import random
import time
from collections.abc import Iterator
from itertools import count
from statistics import median
from typing import Any

import torch

import anybatch
from benchmarks.gpu_models import MODELS, Place
from benchmarks.overhead import interval

LOOPS = ("plain", "plain again", "anybatch")
WARM, STEPS = 3, 4  # steps before the first turn, and of a turn
LEAST, MOST, SECONDS = 3, 12, 20.0  # turns of a row, and about how long they take


class Loop:
    """One training loop, with a model of its own."""

    def __init__(self, place: Place, name: str, batch: int, *, attach: bool, compiled: bool) -> None:
        torch.manual_seed(0)
        kind = MODELS[name]
        self._device = place.device.type
        self._model = (kind.tiny if place.rehearse else kind.make)().to(place.device)
        self._x = self._model.example(batch).to(place.device)
        self._optimizer = kind.optimizer(self._model.parameters(), place.gpu)
        self._net = place.compiled(self._model) if compiled else self._model
        self._attach = attach
        self._controller: anybatch.Controller | None = None

    def begin(self, accumulation: int) -> None:
        """Attach a controller for this many micro-batches a step."""
        self._accumulation = accumulation
        if not self._attach:
            return
        if self._controller is not None:
            self._controller.detach()
        # One gradient shows no noise, so at A = 1 each step takes the one before as its second sample.
        options: Any = {"scale": 4} if accumulation == 1 else {"scale": "count"}
        rule = anybatch.AdaScale(consecutive=accumulation == 1)
        self._controller = anybatch.attach(self._optimizer, model=self._model, total=1e6, rule=rule, **options)

    def step(self) -> None:
        """One step."""
        for _ in range(self._accumulation):
            with torch.autocast(self._device, torch.bfloat16):
                loss = self._net(self._x) / self._accumulation
            loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


def timed(place: Place, *, compiled: bool) -> Iterator[dict[str, Any]]:
    """The rows of both models, at one and at four micro-batches."""
    for name, model in MODELS.items():
        for halved in count():
            batch = max(model.batch >> halved, 1)
            try:
                yield from list(_rows(place, name, 2 if place.rehearse else batch, compiled=compiled))
                break
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
            _free(place)
        _free(place)


def _rows(place: Place, name: str, batch: int, *, compiled: bool) -> Iterator[dict[str, Any]]:
    loops = {loop: Loop(place, name, batch, attach=loop == "anybatch", compiled=compiled) for loop in LOOPS}
    for accumulation in (4, 1):
        for each in loops.values():
            each.begin(accumulation)
            for _ in range(WARM):
                each.step()
        taken = _turns(place, loops)
        row: dict[str, Any] = {"model": name, "A": accumulation, "micro_batch": batch, "compiled": compiled}
        row["turns"], row["plain_ms"] = len(taken), 1e3 * median(turn["plain"] for turn in taken)
        for loop in LOOPS[1:]:
            ratios = [turn[loop] / turn["plain"] for turn in taken]
            row[loop] = [median(ratios), *interval(ratios)]
        yield row


def _turns(place: Place, loops: dict[str, Loop]) -> list[dict[str, float]]:
    """Seconds of a step of each loop, in each turn."""
    order, taken, end = random.Random(0), list[dict[str, float]](), time.perf_counter() + SECONDS
    while len(taken) < (2 if place.rehearse else MOST) and (len(taken) < LEAST or time.perf_counter() < end):
        seconds = {}
        for loop in order.sample(LOOPS, len(LOOPS)):
            place.synchronise()
            start = time.perf_counter()
            for _ in range(STEPS):
                loops[loop].step()
            place.synchronise()
            seconds[loop] = (time.perf_counter() - start) / STEPS
        taken.append(seconds)
    return taken


def _free(place: Place) -> None:
    gc.collect()
    torch.compiler.reset()
    if place.gpu:
        torch.cuda.empty_cache()

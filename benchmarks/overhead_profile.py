"""Where the time of `benchmarks.overhead` goes: what each part of the library takes of the plain loop's step.

    python -m benchmarks.overhead_profile [--models layers tiny mlp] [--optimizer SGD] [--seconds 5] [--json FILE]

On one process of one thread, by the thread's own clock. A part is timed without the parts inside of it. The plain loop,
the controller's with the clocks and the controller's without them take turns; what the last takes beyond the plain one
and the parts is the hooks themselves, copies of first gradients and what the caches lost. Medians over the turns.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from anybatch._controller.step_hooks import StepHooks
from anybatch._gradients.euclidean import EuclideanNorms, Queue
from anybatch._gradients.hooks import GradientHooks
from benchmarks.overhead import step_of
from benchmarks.overhead_loops import LOOPS
from benchmarks.overhead_models import MODELS, OPTIMIZERS

PARTS: dict[str, list[tuple[Any, str]]] = {
    "what waited, at a backward's end": [(EuclideanNorms, "measure")],
    "large gradients, as they come": [(Queue, "take")],
    "their sum": [(EuclideanNorms, "mean")],
    "begin of a backward": [(GradientHooks, "_begin_backward")],
    "end of a backward": [(GradientHooks, "_end_backward")],
    "before and after optimizer.step()": [(StepHooks, "_before"), (StepHooks, "_after")],
}
REST = "hooks, copies, caches"


class Clocks:
    """Seconds that each part took by itself, since they were last read."""

    def __init__(self) -> None:
        self._taken: defaultdict[str, float] = defaultdict(float)
        self._inside = [0.0]  # of each open part, what the parts inside of it took

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, and its time."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.thread_time() - start
                self._taken[part] += whole - self._inside.pop()
                self._inside[-1] += whole

        return call

    def read(self) -> dict[str, float]:
        """What each part took; from here on they count anew."""
        taken = {part: self._taken[part] for part in PARTS}
        self._taken.clear()
        return taken


@contextmanager
def clocks() -> Iterator[Clocks]:
    """Every part is timed in here, of controllers that are attached in here."""
    found, before = Clocks(), []
    try:
        for part, functions in PARTS.items():
            for owner, name in functions:
                before.append((owner, name, getattr(owner, name)))
                setattr(owner, name, found.timed(part, getattr(owner, name)))
        yield found
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def profile(name: str, optimizer: str, seconds: float) -> dict[str, float]:
    """Each part's time over the plain step's, and what is left over."""

    def made(loop: str) -> Callable[[], None]:
        torch.manual_seed(0)
        x = MODELS[name].example()
        step = step_of(LOOPS[loop], MODELS[name].make(), x, optimizer)
        for _ in range(3):
            step()
        return step

    def took(step: Callable[[], None]) -> float:
        start = time.thread_time()
        step()
        return time.thread_time() - start

    plain, whole = made("plain"), made("anybatch")
    rows: list[dict[str, float]] = []
    with clocks() as found:
        timed = made("anybatch")
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(rows) < 5:
            found.read()
            base = took(plain)
            timed()
            parts = {part: seconds / base for part, seconds in found.read().items()}
            rows.append({**parts, "all": took(whole) / base - 1})
    of = {part: median(row[part] for row in rows) for part in rows[0]}
    return {**{part: of[part] for part in PARTS}, REST: of["all"] - sum(of[part] for part in PARTS), "all": of["all"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="SGD")
    parser.add_argument("--seconds", type=float, default=8, help="about how long to measure a model")
    parser.add_argument("--json", type=Path, help="write the table here, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: profile(name, options.optimizer, options.seconds) for name in options.models}
    print(f"{'of the plain step':36}" + "".join(f"{name:>13}" for name in found))
    for part in [*PARTS, REST, "all"]:
        print(f"{part:36}" + "".join(f"{100 * row[part]:12.1f}%" for row in found.values()))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Forecasts from one small run against runs really made: the digits, and a small language model on python's own help.

    python -m benchmarks.forecast [--seeds 2] [--tasks sgd,adam] [--json rows.json] [--plot forecast.png]

Each task is recorded once at S = 2 and once at S = 8; from each record alone the optimizer steps at S = 4 to 128 are
forecast, and compared with the mean of the runs made there.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import sqrt
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import torch
from torch import Tensor, nn

import anybatch
from anybatch._demo import LAST_RATE, digits, gradients, network
from anybatch._record import Run

RECORDED = (2, 8)
SCALES = (4, 8, 16, 32, 64, 128)
WIDTH, HEADS, CONTEXT, VOCABULARY = 32, 4, 32, 128


class Block(nn.Module):
    """One layer of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.register_buffer("future", torch.ones(CONTEXT, CONTEXT).triu(1).bool(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, CONTEXT, WIDTH]` to the same."""
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2) / sqrt(WIDTH // HEADS)).masked_fill(self.future, float("-inf"))
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))
        return x + self.down(torch.relu(self.up(self.between(x))).square())


class Gpt(nn.Module):
    """Two layers over bytes; `[batch, CONTEXT]` to logits `[batch * CONTEXT, VOCABULARY]`."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.token, self.place = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks, self.last = nn.Sequential(Block(), Block()), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of the next bytes."""
        found = self.blocks(self.token(x) + self.place.weight)
        return self.head(self.last(found)).flatten(0, 1)


@cache
def text() -> Tensor:
    """Python's help on its own topics, as bytes below 128."""
    from pydoc_data.topics import topics

    whole = "\n".join(topics[key] for key in sorted(topics))
    return torch.tensor(list(whole.encode("ascii", "replace")))


def pictures(scale: int, base: int, order: torch.Generator) -> tuple[Tensor, Tensor]:
    x, y, _, _ = digits()
    rows = torch.randint(len(x), (scale, base), generator=order)
    return x[rows], y[rows]


def passages(scale: int, base: int, order: torch.Generator, *, until: int | None = None) -> tuple[Tensor, Tensor]:
    whole = text()[:until]
    start = torch.randint(len(whole) - CONTEXT - 1, (scale, base), generator=order)
    found = whole[start[..., None] + torch.arange(CONTEXT + 1)]
    return found[..., :-1], found[..., 1:].flatten(1)


@dataclass(frozen=True)
class Task:
    """What is trained, with hyperparameters for `base` examples a step and `total` steps."""

    label: str
    make: Callable[..., torch.optim.Optimizer]
    decays: Literal["clock", "constant"]
    base: int = 8
    total: int = 4000
    model: Callable[[int], nn.Module] = network
    batch: Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]] = pictures


TASKS = {
    "sgd": Task("digits, SGD", lambda p: torch.optim.SGD(p, lr=0.1), "constant", base=16),
    "momentum": Task("digits, momentum .9, constant", lambda p: torch.optim.SGD(p, 0.02, momentum=0.9), "constant"),
    "clock": Task("digits, momentum .9, on the clock", lambda p: torch.optim.SGD(p, 0.02, momentum=0.9), "clock"),
    "adam": Task("digits, Adam", lambda p: torch.optim.Adam(p, 1e-3, betas=(0.9, 0.99)), "clock"),
    "gpt": Task(
        "bytes, GPT, AdamW",
        lambda p: torch.optim.AdamW(p, 3e-3, betas=(0.9, 0.95), weight_decay=0.1),
        "clock",
        base=2,
        total=1500,
        model=Gpt,
        batch=passages,
    ),
}


def train(task: Task, *, scale: int, seed: int, record: Path) -> int:
    """Train once, or take the record of such a run; returns the optimizer steps."""
    if record.exists():
        steps = anybatch.read_record(record).steps
        if steps and steps[-1].tau >= task.total:
            return steps[-1].step
    net = task.model(seed)
    optimizer = task.make(net.parameters())
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, LAST_RATE ** (1 / task.total))
    controller = anybatch.attach(
        optimizer,
        model=net,
        rule=anybatch.AdaScale(decays=task.decays),
        scheduler=schedule,
        total=task.total,
        base_batch=task.base,
        micro_batch=task.base,
        record=record,
    )
    order = torch.Generator().manual_seed(1000 * seed + scale)
    while not controller.done:
        controller.observe(gradients(net, *task.batch(scale, task.base, order)))
        optimizer.step()
        optimizer.zero_grad()
    controller.detach()
    return controller.steps


def compare(name: str, *, seeds: int, folder: Path) -> dict[str, Any]:
    """The steps of one task's runs, and their forecasts from each recorded scale."""
    task = TASKS[name]
    steps: dict[int, list[int]] = {}
    for scale in sorted({*RECORDED, *SCALES}):
        for seed in range(seeds):
            path = folder / f"{name}-S{scale}-seed{seed}.jsonl"
            steps.setdefault(scale, []).append(train(task, scale=scale, seed=seed, record=path))
    real = {scale: fmean(values) for scale, values in steps.items()}
    found = {s: anybatch.forecast(folder / f"{name}-S{s}-seed0.jsonl", SCALES) for s in RECORDED}
    rows = []
    for recorded, forecast in found.items():
        for s in forecast.scales:
            n = s.steps
            rows.append({
                "recorded": recorded, "scale": int(s.scale), "real": real[int(s.scale)], "forecast": n.value,
                "low": n.low, "high": n.high, "error": n.value / real[int(s.scale)] - 1,
            })  # fmt: skip
    bands = [[(s.steps.low, s.steps.high) for s in f.scales] for f in found.values()]
    agree = all(max(a[0], b[0]) <= min(a[1], b[1]) for a, b in zip(*bands, strict=True))
    whole = {s: anybatch.read_record(folder / f"{name}-S{s}-seed0.jsonl") for s in sorted(steps)}
    return {
        "task": name, "label": task.label, "rows": rows, "agree": agree, "steps": steps,
        "unfinished": {part: unfinished(whole[8], part, real) for part in (0.75, 0.5, 0.25)},
        "shares": {s: share(run, 0.2, 0.4) for s, run in whole.items()},
    }  # fmt: skip


def unfinished(run: Run, part: float, real: dict[int, float]) -> list[float]:
    """Errors of the forecasts from the first `part` of a record."""
    cut = replace(run, steps=[step for step in run.steps if step.tau <= part * run.config["total"]])
    return [s.steps.value / real[int(s.scale)] - 1 for s in anybatch.forecast(cut, SCALES).scales]


def share(run: Run, start: float, end: float) -> float:
    """`mu^2 / (sigma^2 + mu^2)` of the raw moments between two shares of the run."""
    steps = [s for s in run.steps if start <= (s.tau - s.iterations) / run.config["total"] < end]
    variance, sqnorm = (sum(s.iterations * getattr(s, n) for s in steps) for n in ("raw_variance", "raw_sqnorm"))
    return sqnorm / (variance + sqnorm)


def show(result: dict[str, Any]) -> None:
    for recorded in RECORDED:
        rows = [row for row in result["rows"] if row["recorded"] == recorded]
        cells = " ".join(f"{row['forecast']:5.0f}/{row['real']:6.1f} {row['error']:+6.1%}" for row in rows)
        print(f"{result['label']:34} {recorded:3}  {cells}  {median(abs(r['error']) for r in rows):6.1%}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument(
        "--records", type=Path, help="keep the records in this folder, and take the ones that are there"
    )
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    parser.add_argument("--plot", type=Path, help="draw the last task's forecast from S = 8 here, with its runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.records:
        options.records.mkdir(parents=True, exist_ok=True)
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.records or Path(temporary)
        heads = " ".join(f"{f'S={s}':>19}" for s in SCALES)
        print(f"{'forecast / mean of the real runs':34} rec  {heads}  median")
        for name in options.tasks.split(","):
            results.append(compare(name, seeds=options.seeds, folder=folder))
            show(results[-1])
        if options.plot:
            from anybatch._report import plot

            forecast = anybatch.forecast(folder / f"{name}-S8-seed0.jsonl", [1, 2, *SCALES, 256], per_device=1)
            real = {s: fmean(n) for s, n in results[-1]["steps"].items()}
            plot(forecast, options.plot, real=real, title=f"{TASKS[name].label}: forecast from one run at S = 8")
    rows = [row for result in results for row in result["rows"]]
    errors = [abs(row["error"]) for row in rows]
    inside = sum(row["low"] <= row["real"] <= row["high"] for row in rows)
    print(f"median error {median(errors):.1%}, largest {max(errors):.1%}, within 10 %: {sum(e <= 0.1 for e in errors)} "
          f"of {len(errors)}, in the band: {inside} of {len(rows)}, the two records agree within their bands: "
          f"{sum(r['agree'] for r in results)} of {len(results)} tasks")  # fmt: skip
    for part in (0.75, 0.5, 0.25):
        missed = [abs(e) for r in results for e in r["unfinished"][part]]
        print(
            f"from the first {part:.0%} of the records at S = 8: median {median(missed):.1%}, largest {max(missed):.1%}"
        )
    for r in results:
        shares = ", ".join(f"{value:.3f} at {s}" for s, value in r["shares"].items())
        print(f"{r['label']}: mu^2 / (sigma^2 + mu^2) between 20 and 40 % of tau: {shares}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

"""The critical batch of a small GPT by branches from three checkpoints, beside the measured noise scale.

    python -m benchmarks.branch [--total 4000] [--seeds 3] [--json docs/branch/gpt.json] [--figure docs/branch/gpt.png]

A run at the base batch is saved at 5, 25 and 75 % of its clock. From each checkpoint every batch trains the same
number of examples. A stopped command goes on where it was: `--cache` holds the checkpoints and the finished branches.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import anybatch
from anybatch._branch import Branch
from anybatch._record import strict
from anybatch._report import plot_branch
from benchmarks.layouts import CONTEXT, loss_of, parts, text

BASE = 4  # sequences of a base batch
SHARES = (0.05, 0.25, 0.75)
FACTORS = (1, 2, 4, 8, 16, 32, 64)
EXAMPLES = 2560  # sequences of a branch: 640 base iterations, 10 steps of the largest batch


def split_text() -> tuple[Tensor, Tensor]:
    """The bytes to train on, and the last tenth, which is held out."""
    data = text()
    return data[: -len(data) // 10], data[-len(data) // 10 :]


def windows(data: Tensor, count: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and targets of `count` random windows; the first ones do not depend on the count."""
    starts = torch.randint(len(data) - CONTEXT - 1, (count,), generator=draws)
    window = data[starts[:, None] + torch.arange(CONTEXT + 1)].long()
    return window[:, :-1], window[:, 1:]


def batches(size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one order of windows."""
    data, _ = split_text()
    x, y = windows(data, EXAMPLES, torch.Generator().manual_seed(1000 + seed))
    yield from zip(x.split(size), y.split(size), strict=True)


def step(model: nn.Module, optimizer: Any, _: anybatch.Controller, batch: tuple[Tensor, Tensor]) -> None:
    """One step, in two halves, so that the noise shows."""
    for x, y in anybatch.split(batch, 2):
        (loss_of(model(x), y) / 2).backward()
    optimizer.step()
    optimizer.zero_grad()


def held_out(model: nn.Module) -> float:
    """Nats for each byte of 2,048 held-out windows."""
    x, y = windows(split_text()[1], 2048, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return float(sum(loss_of(model(a), b) for a, b in zip(x.split(512), y.split(512), strict=True)) / 4)


def made() -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model and its optimizer."""
    model = nn.Sequential(*parts(0))
    return model, torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99))


def checkpoints(total: int, cache: Path) -> list[Path]:
    """The states of a run at the base batch, at the shares of its clock; at a constant learning rate."""
    paths = [cache / f"{share:g}-of-{total}.pt" for share in SHARES]
    if all(path.exists() for path in paths):
        return paths
    model, optimizer = made()
    data, draws = split_text()[0], torch.Generator().manual_seed(0)
    for i in range(1, round(total * SHARES[-1]) + 1):
        x, y = windows(data, BASE, draws)
        loss_of(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        for path, share in zip(paths, SHARES, strict=True):
            if i == round(total * share):
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    return paths


def found_at(path: Path, *, seeds: int) -> Branch:
    """The branches from one checkpoint."""
    model, optimizer = made()
    state = torch.load(path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return anybatch.branch(
        step, model=model, optimizer=optimizer, batches=batches, loss=held_out, base_batch=BASE, examples=EXAMPLES,
        factors=FACTORS, seeds=seeds, out=path.with_suffix(".jsonl"),
    )  # fmt: skip


def main() -> None:
    """Train the branches and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--total", type=int, default=4000, help="base iterations of the whole run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path(".branch-cache"))
    parser.add_argument("--json", type=Path, help="write the numbers into this file")
    parser.add_argument("--figure", type=Path, help="draw the branches of the middle checkpoint into this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.cache.mkdir(parents=True, exist_ok=True)
    found = []
    for share, path in zip(SHARES, checkpoints(args.total, args.cache), strict=True):
        found.append(found_at(path, seeds=args.seeds))
        print(f"At {share:.0%} of the run:\n{found[-1]}\n", flush=True)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"share": share, **asdict(each)} for share, each in zip(SHARES, found, strict=True)]
        numbers = {"total": args.total, "base_batch": BASE, "examples": EXAMPLES, "torch": torch.__version__}
        args.json.write_text(json.dumps(strict({**numbers, "rows": rows}), indent=1) + "\n")
    if args.figure is not None:
        plot_branch(found[1], args.figure)


if __name__ == "__main__":
    main()

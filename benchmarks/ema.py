"""What a step of a model average costs: a ratio to an in-place add of the same bytes, and host time.

    python -m benchmarks.ema [--rounds 20] [--json ema.json]

One thread. 160 tensors of 40,000 elements each (6.4 million: more than the caches hold), and for the host time 160 of
4 elements, ten updates in a row. All kinds take turns, in random order, so that they see the same machine; the numbers
are medians of the thread's own time, which other processes disturb less. "add" is
`torch._foreach_add_(averages, weights)`: the least that reads the weights and moves the averages. Libraries that are
not installed are named so.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import anybatch

TENSORS = 160
DECAY = 0.999
REPEATS = 5
SIZES = {"large": 40_000, "tiny": 4}
Update = Callable[[], object]


class Flat(nn.Module):
    """A model of many tensors of one size."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(torch.randn(size).to(dtype) for _ in range(TENSORS))


def add(model: nn.Module) -> Update:
    weights = [p.detach() for p in model.parameters()]
    averages = [w.clone() for w in weights]
    return torch.no_grad()(lambda: torch._foreach_add_(averages, weights))


def ours(model: nn.Module, **options: Any) -> Update:
    return anybatch.ModelEMA(model, options.pop("decay", DECAY), **options).update


def averaged_model(model: nn.Module, **options: Any) -> Update:
    average = AveragedModel(model, **options)
    average.update_parameters(model)  # its first update is a copy
    return lambda: average.update_parameters(model)


def timm(model: nn.Module) -> Update:
    from timm.utils.model_ema import ModelEmaV3

    average = ModelEmaV3(model, decay=DECAY)
    return lambda: average.update(model)


def ema_pytorch(model: nn.Module) -> Update:
    from ema_pytorch import EMA

    average = EMA(model, beta=DECAY, update_every=1, update_after_step=0)
    average.update()  # its first updates are copies
    return average.update


def torch_ema(model: nn.Module) -> Update:
    from torch_ema import ExponentialMovingAverage

    average = ExponentialMovingAverage(model.parameters(), decay=DECAY)
    return lambda: average.update(model.parameters())


def diffusers(model: nn.Module) -> Update:
    from diffusers.training_utils import EMAModel

    average = EMAModel(model.parameters(), decay=DECAY)
    return lambda: average.step(model.parameters())


KINDS: dict[str, Callable[[nn.Module], Update]] = {
    "add": add,
    "add, again": add,  # what the machine's noise alone comes to
    "anybatch": ours,
    "anybatch, 2 decays": lambda model: ours(model, decay=(0.999, 0.9999)),
    "anybatch, warm-up": lambda model: ours(model, warmup=True),
    "AveragedModel, multi_avg_fn": lambda m: averaged_model(m, multi_avg_fn=get_ema_multi_avg_fn(DECAY)),
    "AveragedModel, equal weights": averaged_model,
    "AveragedModel, avg_fn": lambda m: averaged_model(m, avg_fn=lambda a, w, _: DECAY * a + (1 - DECAY) * w),
    "timm ModelEmaV3": timm,
    "ema-pytorch": ema_pytorch,
    "torch_ema": torch_ema,
    "diffusers EMAModel": diffusers,
}
# Of a bfloat16 model the others keep bfloat16 averages, which do not move: there is nothing to compare with.
HALF = ("add", "anybatch", "anybatch, 2 decays")


def measure(size: int, dtype: torch.dtype, *, rounds: int, calls: int) -> dict[str, float | None]:
    """Median milliseconds of one update of each kind, `calls` of them in a row; `None` where it is not installed."""
    times: dict[str, list[float]] = {name: [] for name in KINDS if dtype == torch.float32 or name in HALF}
    order = random.Random(0)
    for _ in range(REPEATS):  # where the tensors happen to lie matters, too
        updates = []
        for name in order.sample(list(times), len(times)):
            try:
                updates.append((name, KINDS[name](Flat(size, torch.float32 if name == "add" else dtype))))
            except ImportError:
                continue
        for turn in range(rounds):
            order.shuffle(updates)  # nobody always comes after the same other, whose memory is in the caches
            for name, update in updates:
                start = time.thread_time()
                for _ in range(calls):
                    update()
                if turn >= rounds // 5:
                    times[name].append(1e3 * (time.thread_time() - start) / calls)
    return {name: median(found) if found else None for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", help="write the rows here, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        large = measure(SIZES["large"], dtype, rounds=options.rounds, calls=1)
        tiny = measure(SIZES["tiny"], dtype, rounds=options.rounds, calls=10)
        for name in large:
            row: dict[str, Any] = {
                "kind": name,
                "weights": str(dtype).removeprefix("torch."),
                "ms": None,
                "ratio": None,
                "host_ms": None,
            }
            mine, least = large[name], large["add"]
            if mine is not None and least is not None:  # the add is always there
                row |= {"ms": mine, "ratio": mine / least, "host_ms": tiny[name]}
            rows.append(row)
    print(f"{'kind':30} {'weights':9} {'ms':>8} {'ratio':>6} {'host ms':>8}")
    for row in rows:
        numbers = "not installed" if row["ms"] is None else "{ms:8.3f} {ratio:6.2f} {host_ms:8.3f}".format(**row)
        print(f"{row['kind']:30} {row['weights']:9} {numbers}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()

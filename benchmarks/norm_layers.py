"""Whether the noise of the normalisation layers alone predicts that of the whole model, on a small GPT and a ViT.

    python -m benchmarks.norm_layers            trains, and writes docs/noise-scale/norm_layers.json
    python -m benchmarks.norm_layers --table    writes the table of docs/noise-scale.md

The norms of single examples' gradients are cheap for LayerNorm, in one backward (Gray et al. 2024, arXiv 2411.00999).
The gain would then need no second micro-batch. Here both noise scales come from the same eight micro-batches of a step,
so they differ only in the parameters. Each is a mean of moments over a tenth of the run. For the
gain, the noise scale of the normalisation layers is divided by the ratio of the run's first tenth.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory

import torch
from torch import nn

import anybatch
from anybatch._demo import LAST_RATE
from anybatch._scaling import Moments
from benchmarks.instead_page import filled
from benchmarks.instead_tasks import TASKS

OUT, PAGE = Path("docs/noise-scale/norm_layers.json"), Path("docs/noise-scale.md")
RATES = {"bytes-adamw": 0.008, "vit": 0.02}  # a quarter and a half of those that `instead` has tuned
SCALE, SCALES = 8, (8, 32, 128)  # of the training, and of the gains
SEEDS, TENTHS = 5, 10


def signal(moments: Sequence[Moments]) -> float:
    """The ratio sqnorm / variance of these layers: 1 over their noise scale, in base batches; 0 if negative."""
    return max(0.0, sum(m.sqnorm for m in moments) / sum(m.variance for m in moments))


def train(name: str, seed: int) -> dict[str, list[float]]:
    """`signal` of the whole model and of its normalisation layers, by tenth of the run."""
    task = TASKS[name]
    net = task.model(seed)
    optimizers = task.optimizers(net, RATES[name])
    normal = {path for path, module in net.named_modules() if isinstance(module, nn.LayerNorm)}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "run.jsonl"
        controller = anybatch.attach(
            optimizers,
            model=net,
            scheduler=[torch.optim.lr_scheduler.ExponentialLR(o, LAST_RATE ** (1 / task.total)) for o in optimizers],
            total=task.total,
            base_batch=task.base,
            micro_batch=task.base,
            record=anybatch.RunRecord(path, per_layer=1),
        )
        order = torch.Generator().manual_seed(seed)
        while not controller.done:
            x, y = task.batch(SCALE, task.base, order)
            for part, target in zip(x, y, strict=True):
                (task.loss(net(part), target) / SCALE).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        controller.detach()
        run = anybatch.read_record(path)
    tenth = task.total / TENTHS
    layers = [run.per_layer(k * tenth, (k + 1) * tenth) for k in range(TENTHS)]
    return {
        "whole": [signal([*found.values()]) for found in layers],
        "norms": [signal([found[each] for each in normal]) for found in layers],
    }


def gain(signal: float, scale: int) -> float:
    """The gain at a scale."""
    return (1 + signal) / (1 / scale + signal)


def row(runs: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """By tenth: means over seeds, their ratio, and the calibrated gain over the measured one with its spread."""
    tenths = range(TENTHS)
    found = {part: [fmean(run[part][k] for run in runs) for k in tenths] for part in ("whole", "norms")}
    found["ratio"] = [w / n for n, w in zip(found["norms"], found["whole"], strict=True)]
    for scale in SCALES:
        pairs = [
            [(run["norms"][k] * run["whole"][0] / run["norms"][0], run["whole"][k]) for run in runs] for k in tenths
        ]
        ratios = [[gain(n, scale) / gain(w, scale) for n, w in each] for each in pairs]
        found[f"gain at {scale}"] = list(map(fmean, ratios))
        found[f"sd at {scale}"] = list(map(stdev, ratios))
    return found


def table(found: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """The page's table."""
    shown = (0, 2, 4, 6, 8, 9)
    text = "| | " + " | ".join(f"{10 * k} to {10 * k + 10} %" for k in shown) + " |\n|---|" + "--:|" * len(shown)
    for name, values in found.items():
        text += f"\n| {name}, ratio | " + " | ".join(f"{values['ratio'][k]:.2f}" for k in shown) + " |"
        for scale in SCALES:
            cells = [f"{values[f'gain at {scale}'][k]:.2f} ± {values[f'sd at {scale}'][k]:.2f}" for k in shown]
            text += f"\n| {name}, gain at {scale} | " + " | ".join(cells) + " |"
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write the page's table from the JSON; train nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if not options.table:
        found = {name: row([train(name, seed) for seed in range(SEEDS)]) for name in RATES}
        rounded = {n: {k: [float(f"{x:.5g}") for x in v] for k, v in each.items()} for n, each in found.items()}
        OUT.parent.mkdir(exist_ok=True)
        OUT.write_text(json.dumps(rounded, indent=1) + "\n")
    PAGE.write_text(filled(PAGE.read_text(), {"norm layers": table(json.loads(OUT.read_text()))}))


if __name__ == "__main__":
    main()

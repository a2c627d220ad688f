"""Supervised training with a model EMA at any batch size.

    python -m recipes.ema.supervised [--out docs/figures]                      the digits, plain SGD
    python -m recipes.ema.supervised --config adamw [--out docs/figures]       the digits, AdamW
    python -m recipes.ema.supervised --config full --data DIR --device cuda    CIFAR-10, ResNet-18
    python -m recipes.ema.supervised --config imagenet --data DIR ...          ImageNet, ResNet-50 v2

The EMA is only looked at here, it has no say in the training. What is compared is its test loss along the run, at eight
equal points of tau, with that of the base batch: the same average of the same path has the same curve.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from anybatch._demo import digits, network
from recipes.ema import runs
from recipes.ema.config import ARMS, Config, Scale
from recipes.ema.plots import COLOURS, MARKERS, figure, kappas, label
from recipes.ema.resnet_v2 import imagenet_resnet_v2
from recipes.ema.runs import Results, Study
from recipes.ema.stream import Stream
from recipes.ema.train import Batch, Experiment
from recipes.images import cifar10, imagenet
from recipes.training.task import Task

CONFIGS = {
    "small": Config(base_batch=16, total=1600, decay=0.995, rate=0.1, evaluations=160, points=16, seeds=16),
    "adamw": Config(
        base_batch=16, total=1600, decay=0.995, rate=1e-3, optimizer="adamw", weight_decay=0.1, evaluations=160,
        points=16, scales=(1, 8, 32), seeds=4,
    ),
    "full": Config(
        base_batch=128, total=39_100, decay=0.9995, rate=0.02, momentum=0.9, weight_decay=5e-4, largest=512,
        evaluations=40, points=40, scales=(0.5, 1, 8, 32), seeds=3,
    ),
    # ResNet-50 v2 over 90 epochs; the rate is 0.1 for 256 images (Goyal et al. 2017).
    "imagenet": Config(
        base_batch=1024, total=112_603, decay=0.9999, rate=0.4, momentum=0.9, weight_decay=1e-4, warmup=6256,
        cosine=True, largest=256, evaluations=24, points=24, scales=(0.5, 1, 4, 8), seeds=3,
    ),
}  # fmt: skip
POINTS = 8
SHOWN = (8, 32)
TOLERANCE = 0.03
TOP = 3000  # per cent; a diverged run is drawn here


class Digits(Experiment[nn.Module]):
    """The demo's network and data."""

    def model(self) -> nn.Module:
        """64-128-128-10."""
        return network(torch.initial_seed())

    def batch(self, examples: int, generator: torch.Generator) -> Batch:
        """Random images and their labels."""
        x, y, _, _ = digits()
        rows = torch.randint(len(x), (examples,), generator=generator)
        return x[rows], y[rows]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy."""
        return cross_entropy(model(batch[0]), batch[1])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """On the test images."""
        _, _, x, y = digits()
        logits = model(x)
        right = 100 * (logits.argmax(1) == y).double().mean().item()
        return {"accuracy": right, "loss": cross_entropy(logits, y).item()}


class Photographs(Experiment[nn.Module]):
    """A recipe's data (recipes/images), with its network or another.

    The network's BatchNorm sees one micro-batch at a time, and its running statistics are the student's for both.

    Args:
        config: see `Config`.
        task: the recipe.
        network: makes the model; the recipe's by default.
        device: where the model and every batch lie.
        workers: processes that load images.
    """

    def __init__(
        self, config: Config, task: Task, *, network: Callable[[], nn.Module] | None = None, device: str = "cpu",
        workers: int = 8,
    ) -> None:  # fmt: skip
        super().__init__(config, device=device)
        self.task, self.network, task.workers = task, network or task.model, workers
        self._order: torch.Generator | None = None

    def model(self) -> nn.Module:
        """The recipe's, or the one given."""
        return self.network()

    def batch(self, examples: int, generator: torch.Generator) -> Batch:
        """Augmented images and their labels, from the recipe's endless epochs."""
        if self._order is not generator:  # another run
            self._order = generator
            chunk = max(1, self.config.base_batch // 4)
            place = {"rank": 0, "ranks": 1, "start": self.start, "workers": self.task.workers}
            self._stream = Stream(self.task.batches(chunk, seed=generator.initial_seed(), **place))
        return tuple(tensor.to(self.device) for tensor in self._stream.take(examples))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy."""
        return self.task.loss(model, batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """On the test images."""
        return self.task.evaluate(model, self.device)


def deviation(results: Results, arm: str, scale: Scale) -> float:
    """The largest relative distance of the EMA model's mean test loss from kappa 1's at eight equal points of tau.

    Both means are over the same seeds.
    """
    curves = {run["seed"]: torch.tensor(run["teacher_loss"]) for run in results.of(arm, scale)}
    bases = [torch.tensor(run["teacher_loss"]) for run in results.of("rule", 1) if run["seed"] in curves]
    curve, base = (eight(torch.stack(list(values)).mean(0)) for values in (curves.values(), bases))
    return float((curve / base - 1).abs().max())


def eight(curve: Tensor) -> Tensor:
    """Eight equal points of a stored curve."""
    return curve[len(curve) // POINTS - 1 :: len(curve) // POINTS]


def points(results: Results) -> str:
    """The eight points of every arm at the scales that are compared."""
    lines = ["| | kappa | " + " | ".join(f"{i}/8" for i in range(1, POINTS + 1)) + " | largest deviation |"]
    lines.append("|---" * (POINTS + 3) + "|")
    pairs = [("rule", 1)] + [(arm, scale) for scale in SHOWN for arm in results.study.scales]
    for arm, scale in pairs:
        if not results.of(arm, scale):
            continue
        curve = eight(results.curve(arm, scale, "teacher_loss")).tolist()
        values = " | ".join(f"{value:.3f}" if value < 10 else "diverged" for value in curve)
        distance = 100 * deviation(results, arm, scale)
        largest = f"{distance:.1f} %" if distance < TOP else f"over {TOP} %"
        name = "any" if scale == 1 else ARMS[arm].label
        lines.append(f"| {name} | {scale:g} | {values} | {largest} |")
    return "\n".join(lines)


def make(config: Config, options: argparse.Namespace) -> Experiment[nn.Module]:
    """The experiment that `--config` names."""
    if options.config == "full":
        return Photographs(config, cifar10.Cifar10(options.data), device=options.device)
    if options.config == "imagenet":
        task = imagenet.ImageNet(options.data)
        network = partial(imagenet_resnet_v2, len(task.classes))
        return Photographs(config, task, network=network, device=options.device)
    return Digits(config)


def draw(results: Results, path: Path) -> None:
    """Curves at the compared kappas; the deviation at all."""
    shown = [kappa for kappa in SHOWN if results.of("adascale", kappa)]
    with figure(path, panels=len(shown) + 1) as axes:
        for axis, kappa in zip(axes, shown, strict=False):
            _curves(axis, results, kappa)
        axes[0].set_ylabel("test loss of the EMA model")
        axis, scales = axes[-1], results.config.scales
        axis.axhline(100 * TOLERANCE, color="black", ls=":", lw=1.2, label="3 %")
        for arm in results.study.scales:
            chosen = [kappa for kappa in scales if kappa != 1 and results.of(arm, kappa)]
            if not chosen:  # kappa 1 alone was trained so far: a logarithmic axis cannot be drawn around nothing
                continue
            values = [min(100 * deviation(results, arm, kappa), TOP) for kappa in chosen]
            axis.plot(chosen, values, color=COLOURS[arm], marker=MARKERS[arm], ms=5, lw=1.3, label=label(arm))
        axis.set_yscale("log")
        axis.set_ylim(0.2, 1.3 * TOP)
        kappas(axis, scales)
        axis.set_ylabel("largest deviation of the test loss\nfrom κ = 1 at eight points of τ, %")
        axis.set_title("At every κ")
        axes[0].legend(fontsize=8)


def _curves(axis: Any, results: Results, kappa: float) -> None:
    """Every arm at one kappa against tau; what diverges leaves the picture."""
    tau = results.of("rule", 1)[0]["tau"]
    axis.plot(tau, results.curve("rule", 1, "teacher_loss"), color="black", lw=5, alpha=0.3, label="κ = 1")
    for arm in results.study.scales:
        if results.of(arm, kappa):
            curve = results.curve(arm, kappa, "teacher_loss")
            axis.plot(tau, curve, color=COLOURS[arm], marker=MARKERS[arm], ms=4, lw=1.3, label=label(arm))
    axis.set_yscale("log")
    axis.set_ylim(0.06, 20)
    axis.set_yticks([0.1, 0.3, 1, 3, 10], ["0.1", "0.3", "1", "3", "10"])
    axis.set_xlabel("τ, base iterations")
    axis.set_title(f"Along the run, κ = {kappa:g}")


STUDY = Study(
    name="supervised",
    description=__doc__,
    make=make,
    configs=CONFIGS,
    scales={"rule": None, "off": None, "adascale": None, "adascale-off": (8, 32), "adascale-scale": (8, 32)},
    metric="teacher_loss",
    draw=draw,
    compared=(("adascale", 8), ("adascale", 32)),
    few=4,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: every run, and the eight points."""
    print(points(runs.main(STUDY, arguments)))


if __name__ == "__main__":
    main()

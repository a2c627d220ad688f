"""The pictures of docs/idea.md: tau, the gain, and the warm-up that nobody wrote, from real runs on the digits.

python -m benchmarks.idea                       writes docs/figures/idea-*.png, in half a minute

Plain SGD without momentum, so that nothing but the gain is to be seen; the first picture is the mean over three seeds.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import anybatch
from anybatch._demo import LAST_RATE, digits, gradients, network
from anybatch._report import INK, colour

BASE_BATCH, LEARNING_RATE, TOTAL, SEEDS = 16, 0.1, 1500, 3
SCALES = (1, 8, 32)
WINDOW = 0.05  # share of the run over which the raw moments are averaged for the picture


@dataclass
class Run:
    """One training: a line for each step, and the test loss at equal steps of tau."""

    scale: int
    steps: list[dict[str, Any]] = field(default_factory=list)
    curve: list[tuple[float, float, float]] = field(default_factory=list)  # steps, tau, test loss

    def note(self, values: dict[str, float]) -> None:
        """Keep a step's numbers: the controller calls it, as any function given as `record`."""
        self.steps.append({name.removeprefix("anybatch/"): value for name, value in values.items()})


def train(
    scale: int, rule: anybatch.Rule | None = None, *, seed: int = 0, total: int = TOTAL, evaluations: int = 60
) -> Run:
    """The demo's network at one scale; at scale 1 each base batch in two halves, which shows the noise."""
    x, y, x_test, y_test = digits()
    net = network(seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, LAST_RATE ** (1 / total))
    run = Run(scale)
    parts = 2 if scale == 1 else scale
    size = BASE_BATCH * scale // parts
    controller = anybatch.attach(
        optimizer, model=net, rule=rule, scheduler=scheduler, total=total, base_batch=BASE_BATCH, micro_batch=size,
        record=run.note,
    )  # fmt: skip
    order = torch.Generator().manual_seed(seed)
    while True:
        if controller.done or controller.clock.reached(len(run.curve) * total / evaluations):
            with torch.no_grad():
                run.curve.append((controller.steps, controller.tau, cross_entropy(net(x_test), y_test).item()))
        if controller.done:
            return run
        rows = torch.randint(len(x), (parts, size), generator=order)
        with controller.paused():  # their forward is no micro-batch of its own
            samples = gradients(net, x[rows], y[rows])
        controller.observe(samples)
        optimizer.step()
        optimizer.zero_grad()


def pictures(folder: Path, *, total: int = TOTAL) -> list[Path]:
    """Train at every scale, and draw the three pictures."""
    torch.set_num_threads(1)
    seeds = [[train(scale, seed=seed, total=total) for scale in SCALES] for seed in range(SEEDS)]
    runs = seeds[0]
    lsw = train(SCALES[-1], anybatch.Linear(warmup=0.055), total=total)
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _draw(folder / "idea-tau.png", [_against(what, seeds, total) for what in ("steps", "examples", "tau")]),
        _draw(folder / "idea-gain.png", [_moments(runs[-1]), _gains(runs)]),
        _draw(folder / "idea-warmup.png", [_rates(runs[-1], lsw)]),
    ]


def _draw(path: Path, panels: Sequence[Callable[[Any], None]]) -> Path:
    from matplotlib import style
    from matplotlib.figure import Figure

    looks = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e3e6ea",
             "font.size": 10.0, "legend.frameon": False, "axes.titlesize": "medium"}  # fmt: skip
    with style.context(["default", looks]):
        width = 3.1 * len(panels) if len(panels) > 1 else 5.5
        figure = Figure(figsize=(width, 2.9), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            panel(axes)
        figure.savefig(path, dpi=150)
    return path


def _colour(scale: int) -> str:
    return colour(SCALES.index(scale), len(SCALES))


def _against(what: str, seeds: Sequence[Sequence[Run]], total: int) -> Callable[[Any], None]:
    titles = {"steps": "optimizer steps", "examples": "examples seen", "tau": "tau, base iterations"}

    def panel(axes: Any) -> None:
        for runs in zip(*seeds, strict=True):
            points = [
                [fmean(values) for values in zip(*point, strict=True)]
                for point in zip(*_curves(runs, total), strict=True)
            ]
            size = runs[0].scale * BASE_BATCH
            places = {"steps": [p[0] for p in points], "examples": [p[0] * size for p in points],
                      "tau": [p[1] for p in points]}[what]  # fmt: skip
            axes.plot(places[1:], [p[2] for p in points[1:]], color=_colour(runs[0].scale),
                      label=f"S = {runs[0].scale}: {points[-1][0]:.0f} steps")  # fmt: skip
        axes.set(yscale="log", xlabel=titles[what], title=f"test loss against {titles[what].split(',')[0]}")
        axes.set_yticks([0.1, 0.2, 0.5, 1, 2], [0.1, 0.2, 0.5, 1, 2])
        axes.minorticks_off()
        if what == "tau":
            axes.legend()
        else:
            axes.set_xscale("log")

    return panel


def _curves(runs: Sequence[Run], total: int) -> list[list[tuple[float, float, float]]]:
    """Each run's curve at the same taus, between its own points."""
    found = []
    for run in runs:
        line = []
        for i in range(61):
            tau = total * i / 60
            after = next((j for j, p in enumerate(run.curve) if p[1] >= tau - 1e-6), len(run.curve) - 1)
            low, high = run.curve[max(0, after - 1)], run.curve[after]
            share = (tau - low[1]) / (high[1] - low[1]) if high[1] > low[1] else 0.0
            line.append((low[0] + share * (high[0] - low[0]), tau, low[2] + share * (high[2] - low[2])))
        found.append(line)
    return found


def _moments(run: Run) -> Callable[[Any], None]:
    def panel(axes: Any) -> None:
        grid = [TOTAL * (i + 0.5) * WINDOW for i in range(int(1 / WINDOW))]
        last = run.steps[-1]["tau"]
        taus = [tau for tau in grid if tau < last]
        for name, label, hue in (("raw_variance", "noise sigma² of one base batch", "#c27a12"),
                                 ("raw_sqnorm", "signal mu²", "#2f7fdb")):  # fmt: skip
            axes.plot(taus, [_near(run, name, tau) for tau in taus], color=hue, label=label)
        axes.set(yscale="log", xlabel="tau, base iterations", title="what a step measures", ylim=(1e-5, 10))
        axes.legend(loc="lower left")

    return panel


def _near(run: Run, name: str, tau: float) -> float:
    """The mean of a raw number of the steps around `tau`; where chance makes it negative, a gap."""
    width = WINDOW * TOTAL
    found = [step[name] for step in run.steps if abs(step["tau"] - tau) <= width]
    mean = sum(found) / max(1, len(found))
    return mean if mean > 0 else float("nan")


def _gains(runs: Sequence[Run]) -> Callable[[Any], None]:
    def panel(axes: Any) -> None:
        for run in runs:
            axes.plot([s["tau"] for s in run.steps], [s["gain"] for s in run.steps], color=_colour(run.scale),
                      label=f"S = {run.scale}")  # fmt: skip
            axes.axhline(run.scale, color=_colour(run.scale), linewidth=0.8, linestyle=":")
        axes.set(yscale="log", xlabel="tau, base iterations", title="the gain (dotted: the scale)", ylim=(0.5, 40))
        axes.set_yticks([1, 2, 4, 8, 16, 32], [1, 2, 4, 8, 16, 32])
        axes.minorticks_off()
        axes.legend(loc="lower center", ncols=3)

    return panel


def _rates(adascale: Run, lsw: Run) -> Callable[[Any], None]:
    def panel(axes: Any) -> None:
        for run, label, hue, dash in ((adascale, "AdaScale: measured", "#2f7fdb", "-"),
                                      (lsw, "linear scaling: a warm-up by hand", "#dd5f4a", "--")):  # fmt: skip
            axes.plot([s["step"] for s in run.steps], [s["lr_factor"] for s in run.steps], dash, color=hue, label=label)
        axes.axhline(1, color=INK, linewidth=0.8, linestyle=":", label="as tuned at scale 1")
        axes.set(yscale="log", xlabel="optimizer step", ylabel="times the tuned learning rate", ylim=(0.2, 40))
        axes.set_yticks([1, 2, 4, 8, 16, 32], [1, 2, 4, 8, 16, 32])
        axes.minorticks_off()
        axes.legend(loc="lower right")

    return panel


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    parser.add_argument("--total", type=int, default=TOTAL, help="base iterations of a run")
    options = parser.parse_args()
    for path in pictures(options.out, total=options.total):
        print(path)

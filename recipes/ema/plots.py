"""The figures' common look, and the one that two experiments share."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from recipes.ema.config import ARMS
from recipes.ema.runs import Results, spread

# Okabe and Ito's palette: told apart by colour-blind eyes; markers tell them apart in grey.
COLOURS = {
    "rule": "#0072B2",
    "off": "#D55E00",
    "adascale": "#009E73",
    "adascale-off": "#CC79A7",
    "adascale-scale": "#E69F00",
    "linear": "#56B4E9",
}
MARKERS = {"rule": "o", "off": "s", "adascale": "^", "adascale-off": "D", "adascale-scale": "v", "linear": "P"}


@contextmanager
def figure(path: Path, *, panels: int) -> Iterator[Any]:
    """Axes side by side, saved to `path` in the end."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    with mpl.rc_context({
        "font.size": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "axes.titlesize": 10.5,
    }):  # fmt: skip
        drawing, axes = plt.subplots(1, panels, figsize=(5.2 * panels, 4.0), layout="constrained")
        yield axes if panels > 1 else [axes]
        drawing.savefig(path, dpi=100)
        plt.close(drawing)


def label(arm: str) -> str:
    """The arm's label with its powers set as such."""
    return ARMS[arm].label.replace("ρ^κ", r"$\rho^{\kappa}$").replace("ρ^r", r"$\rho^{r}$").replace("ρ ", r"$\rho$ ")


def kappas(axis: Any, scales: tuple[float, ...]) -> None:
    """A logarithmic axis with a tick at every kappa."""
    axis.set_xscale("log", base=2)
    names = {0.25: "1/4", 0.5: "1/2"}
    axis.set_xticks(scales, [names.get(kappa, f"{kappa:g}") for kappa in scales])
    axis.set_xlabel("κ: batch / base batch")


def accuracy(results: Results, path: Path, *, what: str) -> None:
    """Left: the accuracy at the end against kappa. Right: curves against tau at kappa 1 and at 8, or at the largest."""
    study, scales = results.study, results.config.scales
    shown = 8 if 8 in scales else max(scales)
    with figure(path, panels=2) as (left, right):
        base = results.ends("rule", 1)
        mean, deviation = fmean(base), spread(base)
        left.axhspan(
            mean - deviation, mean + deviation, color="black", alpha=0.12, lw=0, label="κ = 1, ± 1 std. deviation"
        )
        for i, arm in enumerate(study.scales):
            ends = [results.ends(arm, kappa) for kappa in scales]
            left.errorbar(
                [kappa * 2 ** (0.06 * (i - 1)) for kappa in scales],
                [fmean(values) for values in ends],
                list(map(spread, ends)),
                color=COLOURS[arm], marker=MARKERS[arm], ms=5, lw=1.5, capsize=2, label=label(arm),
            )  # fmt: skip
        for scale, marker in zip(study.sequences(results.config), "*PX", strict=False):
            values, name = results.ends("rule", scale), "→".join(f"{kappa:g}" for kappa in scale)
            left.errorbar(
                scale[-1] * 2**0.2, fmean(values), spread(values), color="black",
                marker=marker, ms=9, capsize=2, ls="", label=f"the rule, progressive {name}",
            )  # fmt: skip
        kappas(left, scales)
        left.set_ylabel(f"{what}, %")
        left.set_title("At the end of training")
        left.legend(fontsize=8, loc="lower left")
        tau = results.of("rule", 1)[0]["tau"]
        right.plot(tau, results.curve("rule", 1), color="black", lw=4, alpha=0.35, label="κ = 1")
        for arm in study.scales:
            curve = results.curve(arm, shown)
            right.plot(tau, curve, color=COLOURS[arm], marker=MARKERS[arm], ms=4, label=label(arm))
        right.set_xlabel("τ, base iterations")
        right.set_title(f"Along the run, κ = {shown:g}")
        right.legend(fontsize=8, loc="lower right")


def teacher_probe(results: Results, path: Path) -> None:
    """The accuracy that a linear probe reads off a self-supervised teacher."""
    accuracy(results, path, what="linear probe of the teacher")

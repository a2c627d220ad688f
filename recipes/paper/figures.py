"""The figures of reproduce.py."""

from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl

import anybatch
from recipes.paper.runs import Run, Summary, mean_curve

mpl.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"adascale": "#0072b2", "lsw": "#d55e00", "lsw+": "#e69f00", "linear": "#d55e00", "identity": "#009e73"}
LABELS = {"adascale": "AdaScale", "lsw": "LSW", "lsw+": "LSW+", "linear": "linear", "identity": "identity"}


def table2(rows: list[dict[str, Any]], path: Path, *, metric: str) -> None:
    """Metric, training loss and iterations against the scale."""
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    base = next(row for row in rows if row["scale"] == "1")
    for rule in ("adascale", "lsw", "lsw+"):
        mine = [base, *(row for row in rows if row["rule"] == rule and row["scale"] != "1")]
        scales = [int(row["scale"]) for row in mine]
        style = {"color": COLOURS[rule], "marker": "o", "label": LABELS[rule]}
        axes[0].errorbar(scales, [r["metric"] for r in mine], [r["spread"] or 0 for r in mine], capsize=3, **style)
        axes[1].plot(scales, [row["train_loss"] for row in mine], **style)
        axes[2].plot(scales, [row["iterations"] for row in mine], **style)
    for axis, label in zip(axes, (metric, "training loss", "iterations"), strict=True):
        axis.set(xscale="log", xlabel="scale S", ylabel=label)
        axis.set_xticks(scales := [int(r["scale"]) for r in rows if r["rule"] == "adascale"], [str(s) for s in scales])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")
    axes[2].set_yscale("log")
    axes[0].set_ylim(0, 102)
    axes[0].legend()
    _save(fig, path)


def rules(found: dict[Run, Summary], path: Path, *, metric: str) -> None:
    """Metric and test loss of the rules, against iterations and against examples."""
    fig, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for (scale, rule), runs in _groups(found).items():
        colour = "black" if scale == "1" else COLOURS[rule]
        label = "S = 1" if scale == "1" else f"S = {scale}, {LABELS[rule]}"
        for axis, name in zip(axes, (metric, "loss"), strict=True):
            steps, values = mean_curve(runs, x="step", y=name)
            axis.plot(steps, values, color=colour, label=label)
    for axis, label in zip(axes, (metric, "test loss"), strict=True):
        axis.set(xscale="log", xlabel="iterations", ylabel=label)
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")
    axes[0].legend()
    _save(fig, path)


def gains(found: dict[str, Any], path: Path) -> None:
    """Online, offline and tied gains against tau."""
    fig, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
    for name, colour, label, width in (
        ("online", "#0072b2", "online, one run", 1.2),
        ("tied", "#009e73", "common gain of five trajectories", 1.2),
    ):
        axis.plot([t for t, _ in found[name]], [g for _, g in found[name]], color=colour, label=label, lw=width)
    axis.plot(
        [point["tau"] for point in found["offline"]],
        [point["offline"] for point in found["offline"]],
        "o",
        color="#d55e00",
        label=f"offline, {found['batches']} base batches",
    )
    axis.set(xlabel="τ, base iterations", ylabel=f"gain at S = {found['scale']}", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    _save(fig, path)


def curves(found: dict[Run, Summary], records: dict[str, Path], path: Path, *, metric: str) -> None:
    """The metric against iterations and against tau, the training loss against tau, and the learning rates applied."""
    fig, axes = plt.subplots(2, 2, figsize=(12, 7.5), layout="constrained")
    groups = {int(scale): runs for (scale, _), runs in _groups(found).items()}
    for i, scale in enumerate(sorted(groups)):
        colour = mpl.colormaps["viridis"](0.9 * i / max(1, len(groups) - 1))
        style = {"color": colour, "label": f"S = {scale}", "lw": 1.4}
        for axis, x, y in (
            (axes[0, 0], "step", metric),
            (axes[0, 1], "tau", metric),
            (axes[1, 0], "tau", "train_loss"),
        ):
            axis.plot(*mean_curve(groups[scale], x=x, y=y), **style)
        tau, rate = _rates(records[str(scale)])
        axes[1, 1].plot(tau, rate, **style)
    low = min(min(mean_curve(runs, x="tau", y=metric)[1][3:]) for runs in groups.values())
    for axis in axes[0]:
        axis.set_ylim(bottom=low - 2)
    for axis, x, y in zip(
        axes.flat,
        ("iterations", "τ, base iterations", "τ, base iterations", "τ, base iterations"),
        (metric, metric, "training loss", "learning rate applied"),
        strict=True,
    ):
        axis.set(xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
    axes[0, 0].set_xscale("log")
    axes[1, 0].set_yscale("log")
    axes[1, 1].set_yscale("log")
    axes[0, 1].legend()
    _save(fig, path)


def elastic(found: dict[Run, Summary], records: dict[tuple[str, str], Path], path: Path, *, metric: str) -> None:
    """The metric and the gain against tau, with the scale changed in mid-run."""
    fig, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    styles = {"up": "-", "down": "--"}
    for (scale, rule), runs in _groups(found).items():
        if scale == "1":
            axes[0].axhline(fmean(run[metric] for run in runs), color="black", lw=1, ls=":", label="S = 1, at its end")
            continue
        way = "up" if float(scale.split(",")[0]) < float(scale.rsplit(",", 1)[1].split("@")[0]) else "down"
        style = {"color": COLOURS[rule], "ls": styles[way], "label": f"{LABELS[rule]}, {way}"}
        axes[0].plot(*mean_curve(runs, x="tau", y=metric), **style)
        if rule == "adascale":
            steps = anybatch.read_record(records[scale, rule]).steps
            axes[1].plot([s.tau for s in steps], [s.gain for s in steps], **style)
            axes[1].plot([s.tau for s in steps], [s.scale for s in steps], color="grey", lw=0.8, ls=styles[way])
    axes[0].set(xlabel="τ, base iterations", ylabel=metric)
    axes[1].set(xlabel="τ, base iterations", ylabel="gain (grey: scale)", yscale="log")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[1].legend()
    _save(fig, path)


def grid(values: dict[str, Any], path: Path, *, metric: str) -> None:
    """One heat map for each method, with the contour of one point below scale 1's best."""
    names = list(values["metric"])
    best = values["best"]["scale 1"]
    fig, axes = plt.subplots(1, len(names), figsize=(3.7 * len(names) + 1, 4.1), layout="constrained", sharey=True)
    size = len(values["rates"])
    for axis, name in zip(axes, names, strict=True):
        rows = values["metric"][name]
        image = axis.imshow(rows, origin="lower", cmap="viridis", vmin=best - 20, vmax=best, aspect="auto")
        if min(map(min, rows)) < best - 1 < max(map(max, rows)):
            axis.contour(rows, levels=[best - 1], colors="white", linewidths=1.5)
        axis.set_title(f"{name}\n{values['area'][name]} within one point", fontsize=10)
        axis.set_xlabel("first learning rate")
        if name.startswith("direct"):
            axis.set_xlabel("first learning rate × mean gain")
        ticks = range(0, size, 3)
        axis.set_xticks(ticks, [f"{values['rates'][i]:.3g}" for i in ticks])
        axis.set_yticks(ticks, [f"{values['lasts'][i]:.2g}" for i in ticks])
    axes[0].set_ylabel("last / first learning rate")
    fig.colorbar(image, ax=axes, label=metric, extend="min")
    _save(fig, path)


def _groups(found: dict[Run, Summary]) -> dict[tuple[str, str], list[Summary]]:
    groups: dict[tuple[str, str], list[Summary]] = {}
    for run in sorted(found, key=lambda r: (len(r.scale), r.scale, r.rule, r.seed)):
        groups.setdefault((run.scale, run.rule), []).append(found[run])
    return groups


def _rates(record: Path) -> tuple[list[float], list[float]]:
    steps = [s for s in anybatch.read_record(record).steps if not s.skipped]
    return [s.tau for s in steps], [s.lr for s in steps]


def _save(fig: Any, path: Path) -> None:
    fig.savefig(path, dpi=90)
    plt.close(fig)

"""The demo's two figures and its page."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from math import isnan
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib import figure as mpl

import anybatch
from anybatch._demo.digits import BASE_BATCH, Result
from anybatch._demo.run import Curve, Plan, Row, curve, largest_distance, show
from anybatch._record import strict
from anybatch._report import Block, Figure, Heading, Table, Text, page

COLUMNS = ("scale", "rule", "test accuracy", "training loss", "iterations", "mean gain")
NAMES = {"adascale": "AdaScale", "lsw": "LSW", "lsw+": "LSW+"}


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table, as text; an accuracy significantly below scale 1 carries a mark."""
    plural = not isnan(row.spread)  # of one seed there is no spread
    return (
        row.scale,
        NAMES[row.rule] if row.scale != "1" else "(any)",
        show(row.accuracy, 1) + (f" ± {show(row.spread, 1)}" if plural else "") + (" *" if row.worse else ""),
        show(row.loss, 4),
        f"{row.iterations:.0f}",
        show(row.gain, 1),
    )


def curves(results: Sequence[Result], rule: str) -> dict[str, Curve]:
    """The mean curves of one rule, by scale."""
    groups: dict[tuple[int, ...], list[Result]] = {}
    for result in results:
        if result.task.rule == rule:
            groups.setdefault(result.task.scales, []).append(result)
    return {runs[0].task.name: curve(runs) for _, runs in sorted(groups.items(), key=lambda g: (len(g[0]), g[0]))}


def distances(results: Sequence[Result]) -> dict[str, tuple[float, float]]:
    """For each scale, the largest distance of AdaScale's curve from that of scale 1, in accuracy and in test loss."""
    found = curves(results, "adascale")
    base = found.pop("1")
    return {name: largest_distance([c], base) for name, c in found.items()}


def write(plan: Plan, results: Sequence[Result], rows: Sequence[Row], *, seconds: float) -> Path:
    """Write results.json, the figures and report.html into `plan.out`; returns the page."""
    data = {
        "rows": [asdict(row) for row in rows],
        "curves": {rule: {name: asdict(c) for name, c in curves(results, rule).items()} for rule in plan.rules},
        "distances": distances(results),
    }
    (plan.out / "results.json").write_text(json.dumps(strict(data), allow_nan=False, indent=1, ensure_ascii=False))
    against_tau = _against_tau(plan, results)
    blocks: list[Block] = [
        Text(
            "A small network learns scikit-learn's handwritten digits with momentum SGD. Its learning rate and "
            f"schedule were tuned at a batch of {BASE_BATCH}; a scale S trains with {BASE_BATCH} · S images a step and "
            "nothing else changed. AdaScale measures how much of the larger batch is useful and goes that far; linear "
            "scaling with warm-up (LSW) multiplies the learning rate by S; LSW+ gets as many steps as AdaScale took."
        ),
        Table(COLUMNS, [cells(row) for row in rows], frozenset(i for i, row in enumerate(rows) if row.worse)),
        Text(
            f"Means over {plan.seeds} seeds, {plan.total} base iterations. * significantly below scale 1 "
            "(one-sided Welch test at 0.95), ± the standard deviation over seeds. Scales with arrows change at a "
            "quarter and at half of the run.",
            note=True,
        ),
        Heading("Against tau, the curves fall on one another"),
        Figure(against_tau, _distance_sentence(results)),
    ]
    if "adascale" in plan.rules:
        figure = _against_steps(plan)
        caption = (
            "One seed. Nobody wrote a warm-up: while the loss falls fastest all samples agree, and the gain falls to a "
            "few; then it grows with the noise, and the learning rate with it."
        )
        blocks += [Heading("The warm-up appears by itself"), Figure(figure, caption)]
    blocks.append(
        Text(
            f"anybatch {anybatch.__version__}, torch {torch.__version__}, {plan.ranks} rank(s), {seconds:.0f} s. "
            "Made by: anybatch demo.",
            note=True,
        )
    )
    target = plan.out / "report.html"
    target.write_text(page("The same training at every batch size", blocks), encoding="utf-8")
    return target


def _distance_sentence(results: Sequence[Result]) -> str:
    found = distances(results)
    if not found:
        return "AdaScale, mean over the seeds."
    accuracy, loss = max(a for a, _ in found.values()), max(b for _, b in found.values())
    return (
        "Solid: AdaScale; dashed: LSW; mean over the seeds. Largest distance of an AdaScale curve from scale 1 after "
        f"the first quarter of the run: {accuracy:.2f} points of accuracy, {loss:.4f} of test loss."
    )


def _against_tau(plan: Plan, results: Sequence[Result]) -> Path:
    figure = mpl.Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    colours = colormaps["viridis"]
    for rule, style in (("adascale", "-"), ("lsw", "--")):
        found = {name: c for name, c in curves(results, rule).items() if "→" not in name}
        names = [str(s) for s in sorted(plan.scales)]
        for name, c in found.items():
            colour = colours(names.index(name) / max(1, len(names) - 0.5))
            for ax, values in zip(axes, (c.accuracy, c.loss), strict=True):
                ax.plot(c.tau, values, style, color=colour, lw=1.6, label=f"{NAMES[rule]} S={name}")
    axes[0].set(xlabel="tau (base iterations)", ylabel="test accuracy (%)", ylim=(0, 100))
    axes[1].set(xlabel="tau (base iterations)", ylabel="test loss", yscale="log")
    for ax in axes:
        ax.grid(alpha=0.25)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return _save(figure, plan.out / "against_tau.png")


def _against_steps(plan: Plan) -> Path:
    figure = mpl.Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    colours = colormaps["viridis"]
    scales = sorted(plan.scales)
    for i, scale in enumerate(scales):
        steps = anybatch.read_record(plan.out / "records" / f"adascale-S{scale}-seed0.jsonl").steps
        number = [step.step for step in steps]
        colour = colours(i / max(1, len(scales) - 0.5))
        for ax, values in zip(axes, ([s.gain for s in steps], [s.lr for s in steps]), strict=True):
            ax.plot(number, values, color=colour, lw=1.4, label=f"S={scale}")
    axes[0].set(xlabel="iteration", ylabel="gain", xscale="log", yscale="log")
    axes[1].set(xlabel="iteration", ylabel="learning rate", xscale="log", yscale="log")
    for ax in axes:
        ax.grid(alpha=0.25)
    axes[0].legend(fontsize=8, frameon=False)
    return _save(figure, plan.out / "against_steps.png")


def _save(figure: mpl.Figure, path: Path) -> Path:
    figure.savefig(path, dpi=140)
    return path

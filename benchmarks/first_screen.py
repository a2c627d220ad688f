"""The table and the picture of README.md: the demo's runs, and beside them the rules that people use without measuring.

python -m benchmarks.first_screen               writes docs/figures/first-screen.json and .png, in two minutes

The demo's rows are those of `make demo`, to the last digit on the same machine. "Square root" multiplies the learning
rate by sqrt(S), "unscaled" leaves it alone; both see as many examples as scale 1 did, with the schedule stretched over
them, as a training that counts epochs does.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import isnan
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import anybatch
from anybatch._demo import (
    BASE_BATCH,
    LEARNING_RATE,
    MOMENTUM,
    Plan,
    digits,
    run,
    significantly_below,
    summarise,
)
from benchmarks.digits import trained

SCALES, SEEDS, TOTAL = (1, 8, 32, 128), 3, 4000
NAMES = {
    "adascale": "AdaScale",
    "lsw": "linear, warm-up (LSW)",
    "lsw+": "LSW with AdaScale's steps (LSW+)",
    "sqrt": "square root",
    "none": "unscaled",
}


@dataclass(frozen=True, kw_only=True)
class Unscaled(anybatch.Rule):
    """The learning rate as it is, and as many examples as at scale 1."""

    def __call__(self, *, scale: float, gain: float, clock: anybatch.Clock, exponent: float) -> anybatch.Scaling:  # noqa: ARG002, D102
        return anybatch.Scaling(1.0, scale)


def main() -> None:
    """Train, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    parser.add_argument("--total", type=int, default=TOTAL, help="base iterations of a run")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--draw", action="store_true", help="draw the picture of what is there, without training")
    options = parser.parse_args()
    if options.draw:
        pictures(json.loads((options.out / "first-screen.json").read_text())["rows"], options.out)
        return
    rows = table(total=options.total, seeds=options.seeds)
    options.out.mkdir(parents=True, exist_ok=True)
    data = {"torch": torch.__version__, "total": options.total, "seeds": options.seeds, "rows": rows}
    (options.out / "first-screen.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    pictures(rows, options.out)
    print("\n".join(markdown(rows)))


def table(*, total: int, seeds: int) -> list[dict[str, Any]]:
    """A row for each scale and rule: the demo's own, then the baselines."""
    with TemporaryDirectory() as folder:
        plan = Plan(SCALES, ("adascale", "lsw", "lsw+"), seeds, total, 1, Path(folder))
        results = list(run(plan))
        rows = [asdict(row) | {"examples": _examples(plan, row.rule, row.scale)} for row in summarise(results)]
    base = [r.accuracy for r in results if r.task.scales == (1,)]
    torch.set_num_threads(1)
    for rule, name in ((anybatch.SquareRoot(), "sqrt"), (Unscaled(), "none")):
        for scale in SCALES[1:]:
            found = [train(rule, scale, seed=seed, total=total) for seed in range(seeds)]
            accuracies = [accuracy for accuracy, _, _ in found]
            steps = fmean(step for _, _, step in found)
            rows.append({
                "scale": str(scale), "rule": name, "accuracy": fmean(accuracies),
                "spread": stdev(accuracies) if seeds > 1 else None, "loss": fmean(loss for _, loss, _ in found),
                "iterations": steps, "gain": None, "worse": significantly_below(accuracies, base),
                "examples": steps * scale / total,
            })  # fmt: skip
    return [{key: None if isinstance(v, float) and isnan(v) else v for key, v in row.items()} for row in rows]


def train(rule: anybatch.Rule, scale: int, *, seed: int, total: int) -> tuple[float, float, int]:
    """Test accuracy, training loss and steps of one run, on the demo's task."""
    make = partial(torch.optim.SGD, lr=LEARNING_RATE, momentum=MOMENTUM)
    net, steps = trained(make, rule, base=BASE_BATCH, total=total, scale=scale, seed=seed)
    x, y, x_test, y_test = digits()
    with torch.no_grad():
        accuracy = 100 * (net(x_test).argmax(1) == y_test).double().mean().item()
        return accuracy, cross_entropy(net(x), y).item(), steps


def _examples(plan: Plan, rule: str, scale: str) -> float:
    """What the demo's runs saw, in units of what scale 1 sees: of their records, for a scale may change."""
    names = [f"{rule}-S{scale.replace('→', '-')}-seed{seed}.jsonl" for seed in range(plan.seeds)]
    steps = [anybatch.read_record(plan.out / "records" / name).steps for name in names]
    return fmean(sum(step.scale for step in each) for each in steps) / plan.total


def markdown(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows of README.md's table."""
    order = list(NAMES)
    lines = []
    for row in sorted(rows, key=lambda r: ("→" in r["scale"], int(r["scale"].split("→")[0]), order.index(r["rule"]))):
        name = NAMES[row["rule"]] if row["scale"] != "1" else "(any)"
        mark = " *" if row["worse"] else ""
        cells = (row["scale"], name, f"{row['accuracy']:.1f} ± {row['spread'] or 0:.1f}{mark}",
                 f"{row['loss']:.4f}", f"{row['iterations']:.0f}", f"{row['examples']:.2f}")  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def pictures(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """The picture for a wide page and for a narrow one."""
    return [
        draw(rows, folder / "first-screen.png"),
        draw(rows, folder / "first-screen-narrow.png", tall=True),
    ]


def draw(rows: Sequence[dict[str, Any]], path: Path, *, tall: bool = False) -> Path:
    """Accuracy close to scale 1's, the steps, and the price in examples; below one another for a phone."""
    from matplotlib import style
    from matplotlib.figure import Figure

    looks = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e3e6ea",
             "font.size": 10.0, "legend.frameon": False, "axes.titlesize": "medium"}  # fmt: skip
    marks = {"adascale": ("#2f7fdb", "o", 2.4), "lsw": ("#dd5f4a", "s", 1.2), "sqrt": ("#c27a12", "^", 1.2),
             "none": ("#6b7280", "v", 1.2)}  # fmt: skip
    base = next(row for row in rows if row["scale"] == "1")
    floor = 92.0
    with style.context(["default", looks]):
        figure = Figure(figsize=(4.2, 8.4) if tall else (9.0, 3.3), layout="constrained")
        accuracy, steps, examples = figure.subplots(3, 1) if tall else figure.subplots(1, 3)
        accuracy.axhspan(base["accuracy"] - (base["spread"] or 0), base["accuracy"] + (base["spread"] or 0),
                         color="#e8eef7", linewidth=0)  # fmt: skip
        for rule, (hue, mark, width) in marks.items():
            mine = [base] + [row for row in rows if row["rule"] == rule and row["scale"].isdigit() and row is not base]
            scales = [int(row["scale"]) for row in mine]
            look = {"color": hue, "marker": mark, "markersize": 5, "linewidth": width, "label": NAMES[rule]}
            aside = [
                scale * (0.9 + 0.05 * list(marks).index(rule)) for scale in scales
            ]  # or the spreads hide one another
            accuracy.errorbar(aside, [row["accuracy"] for row in mine], [row["spread"] or 0 for row in mine],
                              capsize=2, clip_on=True, **look)  # fmt: skip
            for row in mine:
                if row["accuracy"] < floor:
                    place = (0.93 * int(row["scale"]), floor + (0.1 if rule == "lsw" else 0.6))
                    accuracy.annotate(f"{row['accuracy']:.0f} %", place, color=hue, fontsize=9, ha="right")
            steps.plot(scales, [row["iterations"] for row in mine], **look)
            examples.plot(scales, [row["examples"] for row in mine], **look)
        accuracy.set(title="test accuracy, % (band: scale 1)", ylim=(floor, 99))
        steps.set(title="optimizer steps", yscale="log")
        steps.set_yticks([40, 100, 400, 1000, 4000], [40, 100, 400, "1,000", "4,000"])
        examples.set(title="examples, in those of scale 1", ylim=(0, None))
        for axes in (accuracy, steps, examples):
            axes.set(xlabel="batch size, times the tuned one", xscale="log")
            axes.set_xticks(SCALES, SCALES)
            axes.minorticks_off()
            axes.margins(x=0.08)
        handles, labels = examples.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2 if tall else 4)
        figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    main()

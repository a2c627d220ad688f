"""The experiments of the AdaScale paper, on any of its tasks.

    python -m recipes.reproduce table2 --task digits
    python -m recipes.reproduce fig5 --task cifar10 --data /data/cifar10

    table2   metric, training loss and iterations of AdaScale, LSW and LSW+ at every scale
    fig1     what the rules make of a large scale: identity, linear and AdaScale against iterations
    fig2     the online gain against gradients of 1000 batches, and against five trajectories tied by their gain
    fig3     training curves against iterations and against tau, and the learning rates that AdaScale arrives at
    fig4     the scale changed in mid-run, up and down
    decays   the optimizer's decays constant, as in the paper, against decays on the clock
    fig5     a grid of exponential schedules: scale 1, AdaScale, LSW, and direct search at the large scale

Every training but those of fig2 is cached under `--cache`, by its configuration, and goes on where it was stopped.
Results come as a table, as `<out>/<task>-<what>.json` (`<task>-tiny-<what>.json` with `--tiny`) and as a figure. `*`
marks what is significantly below scale 1 (one-sided Welch test, 0.95, each row by itself: not corrected for the number
of rows, so that of twenty rows that are no worse one is marked on average).
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from math import ceil, isfinite
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import anybatch
from anybatch._demo import significantly_below
from recipes.paper import figures, gains
from recipes.paper.runs import Run, Summary, mean_curve, task_of, train_all, with_lsw_plus
from recipes.training.options import TASKS, number_or_word
from recipes.training.task import DataError

GRID = 13
UNTOLD = ("what", "cache", "out", "jobs")  # arguments that do not decide the numbers
ELASTIC = ("32,64@0.25,128@0.5", "128,64@0.25,32@0.5")


class Lab:
    """Trains what an experiment asks for, with a progress bar."""

    def __init__(self, base: Run, given: argparse.Namespace) -> None:
        self.given, self.task = given, task_of(base)
        self.base = replace(base, total=self.task.total)

    def train(self, runs: Iterable[Run]) -> dict[Run, Summary]:
        """All summaries."""
        wanted = list(dict.fromkeys(runs))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        found = {}
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task(self.given.what, total=len(wanted))
            for one, summary in train_all(wanted, cache=self.given.cache, jobs=self.given.jobs):
                found[one] = summary
                progress.update(bar, advance=1)
        return found

    def seeds(self, **changes: Any) -> list[Run]:
        """The base run with changes, once for each seed."""
        return [replace(self.base, seed=seed, **changes) for seed in range(self.given.seeds)]

    def write(self, values: Any, draw: Callable[[Path], None] | None = None) -> None:
        """The numbers as JSON, and the figure beside them."""
        self.given.out.mkdir(parents=True, exist_ok=True)
        name = (
            self.given.out / f"{self.base.task}{'-tiny' if self.base.tiny else ''}-{self.given.name or self.given.what}"
        )
        content = {
            "command": self.given.command,
            "task": self.base.task,
            **({"measured": self.task.measured} if self.task.measured else {}),
            "total": self.base.total,
            "seeds": self.given.seeds,
        }
        name.with_suffix(".json").write_text(json.dumps({**content, "results": _strict(values)}, indent=1) + "\n")
        if draw is not None:
            draw(name.with_suffix(".png"))


def table2(lab: Lab) -> None:
    """Every rule at every scale."""
    adascale = lab.train(run for s in lab.given.scales for run in lab.seeds(scale=str(s)))
    large = [run for run in adascale if run.scale != "1"]
    found = adascale | lab.train(
        [replace(run, rule="lsw") for run in large] + [with_lsw_plus(run, adascale[run]) for run in large]
    )
    rows = _rows(lab, found)
    _print(rows, lab.task.metric)
    lab.write(rows, lambda path: figures.table2(rows, path, metric=lab.task.metric))


def fig1(lab: Lab) -> None:
    """Identity keeps quality and saves nothing, linear saves most and loses quality, AdaScale is between them."""
    scale = str(lab.given.scale)
    found = lab.train(lab.seeds(scale="1") + [r for rule in ("identity", "linear", "adascale")
                                              for r in lab.seeds(scale=scale, rule=rule)])  # fmt: skip
    _print(rows := _rows(lab, found), lab.task.metric)
    lab.write(rows, lambda path: figures.rules(found, path, metric=lab.task.metric))


def fig2(lab: Lab) -> None:
    """Is the gain that a run sees the true one?"""
    found = gains.compare(lab.base, scale=lab.given.scale, batches=lab.given.batches, points=12, trajectories=5)
    for point in found["offline"]:
        print(f"tau {point['tau']:8.0f}   online {point['online']:6.2f}   offline {point['offline']:6.2f}")
    print(f"online / offline: mean {found['mean_ratio']:.3f}, largest deviation {found['largest_deviation']:.1%}")
    print(f"single run / five tied: largest deviation {found['largest_tied_deviation']:.1%} after a tenth of the run")
    lab.write(found, lambda path: figures.gains(found, path))


def fig3(lab: Lab) -> None:
    """Against tau the curves of all scales are one."""
    found = lab.train(run for s in lab.given.scales for run in lab.seeds(scale=str(s)))
    base = mean_curve([found[r] for r in found if r.scale == "1"], x="tau", y=lab.task.metric)
    values = {}
    for scale in map(str, lab.given.scales):
        curve = mean_curve([found[r] for r in found if r.scale == scale], x="tau", y=lab.task.metric)
        late = [abs(a - b) for tau, a, b in zip(*curve, base[1], strict=True) if tau >= lab.task.total / 4]
        values[scale] = {"tau": curve[0], "metric": curve[1], "largest_distance_after_a_quarter": max(late)}
        print(f"S = {scale:>4}: within {max(late):.2f} of scale 1 at equal tau, after the first quarter")
    records = {r.scale: lab.given.cache / r.key / "record.jsonl" for r in found if r.seed == 0}
    lab.write(values, lambda path: figures.curves(found, records, path, metric=lab.task.metric))


def fig4(lab: Lab) -> None:
    """The scale doubled at a quarter and at half of the run, and halved."""
    found = lab.train(
        lab.seeds(scale="1")
        + [r for s in ELASTIC for rule in ("adascale", "lsw") for r in lab.seeds(scale=s, rule=rule)]
    )
    _print(rows := _rows(lab, found), lab.task.metric)
    records = {(r.scale, r.rule): lab.given.cache / r.key / "record.jsonl" for r in found if r.seed == 0}
    lab.write(rows, lambda path: figures.elastic(found, records, path, metric=lab.task.metric))


def fig5(lab: Lab) -> None:
    """Which exponential schedules train well, of 13 first rates and 13 last ones?"""
    optimizer = lab.task.optimizer(lab.task.model())
    lr = (optimizer[0] if isinstance(optimizer, list) else optimizer).param_groups[0]["lr"]
    half = GRID // 2
    rates = [lr * 2 ** ((i - half) / 2) for i in range(GRID)]
    lasts = [10 ** (-i / 3) for i in range(GRID)]
    scale = str(lab.given.scale)
    grid = [(rate, last) for last in lasts for rate in rates]
    seeds = range(lab.given.seeds)

    def at(rule: str, scale: str, **changes: Any) -> list[Run]:
        factor = changes.pop("factor", 1.0)
        return [
            replace(
                lab.base, rule=rule, scale=scale, lr=rate * factor, last_rate=last, seed=seed, evaluations=1, **changes
            )
            for rate, last in grid
            for seed in seeds
        ]

    methods = {"scale 1": at("adascale", "1"), f"AdaScale, S = {scale}": at("adascale", scale),
               f"LSW, S = {scale}": at("lsw", scale)}  # fmt: skip
    found = lab.train(run for runs in methods.values() for run in runs)
    steps = fmean(found[run]["iterations"] for run in methods[f"AdaScale, S = {scale}"])
    # The large batch tuned by itself, with as many steps as AdaScale takes on average, around the rates it arrives at.
    direct = at("identity", scale, total=ceil(steps), factor=lab.task.total / steps)
    methods[f"direct search, S = {scale}"] = direct
    found |= lab.train(direct)
    values: dict[str, Any] = {"rates": rates, "lasts": lasts, "metric": {}, "area": {}, "best": {}}
    for name, runs in methods.items():
        means = [
            fmean(_metric(found[runs[i + k]], lab.task.metric) for k in seeds) for i in range(0, len(runs), len(seeds))
        ]
        values["metric"][name] = [means[i : i + GRID] for i in range(0, len(means), GRID)]
    best = max(max(row) for row in values["metric"]["scale 1"])
    for name, rows in values["metric"].items():
        flat = [value for row in rows for value in row]
        values["best"][name] = max(flat)
        values["area"][name] = sum(value >= best - 1 for value in flat)
        print(
            f"{name:24} best {max(flat):6.2f}   schedules within one point of scale 1's best: {values['area'][name]:3}"
        )
    lab.write(values, lambda path: figures.grid(values, path, metric=lab.task.metric))


def decays(lab: Lab) -> None:
    """Is AdaScale better with the optimizer's decays on the clock?"""
    large = [s for s in map(str, lab.given.scales) if s != "1"]
    found = lab.train(lab.seeds(scale="1") + [r for s in large for d in ("constant", "clock")
                                              for r in lab.seeds(scale=s, decays=d)])  # fmt: skip
    _print(rows := _rows(lab, found), lab.task.metric)
    lab.write(rows)


EXPERIMENTS = {"table2": table2, "decays": decays, "fig1": fig1, "fig2": fig2, "fig3": fig3, "fig4": fig4, "fig5": fig5}


def _rows(lab: Lab, found: dict[Run, Summary]) -> list[dict[str, Any]]:
    """A row for each scale and rule, means over the seeds."""
    metric = lab.task.metric
    groups: dict[tuple[str, str], list[Summary]] = {}
    for run, summary in found.items():
        compared = str(run.decays) if lab.given.what == "decays" and run.scale != "1" else run.rule
        groups.setdefault((run.scale, compared), []).append(summary)
    base = [_metric(s, metric) for s in groups.get(("1", "adascale"), [])]
    order = {rule: i for i, rule in enumerate(("adascale", "constant", "clock", "identity", "linear", "lsw", "lsw+"))}
    rows = []
    for (scale, rule), runs in sorted(groups.items(), key=lambda g: (len(g[0][0]), g[0][0], order[g[0][1]])):
        values = [_metric(s, metric) for s in runs]
        rows.append({
            "scale": scale,
            "rule": rule,
            "metric": fmean(values),
            "spread": stdev(values) if len(values) > 1 else None,
            "worse": significantly_below(values, base) if scale != "1" else False,
            "train_loss": fmean(s["train_loss"] for s in runs),
            "test_loss": fmean(s["loss"] for s in runs),
            "iterations": fmean(s["iterations"] for s in runs),
            "mean_gain": fmean(s["mean_gain"] for s in runs),
            "diverged": sum(s["diverged"] for s in runs),
        })  # fmt: skip
    return rows


def _print(rows: list[dict[str, Any]], metric: str) -> None:
    print(f"{'scale':>20} {'rule':9} {metric:>15}  {'train loss':>10} {'test loss':>10} {'iterations':>10} {'gain':>6}")
    for row in rows:
        spread = "" if row["spread"] is None else f"± {row['spread']:.1f}"
        value = f"{row['metric']:.1f} {spread}{' *' if row['worse'] else '  '}"
        print(
            f"{row['scale']:>20} {row['rule']:9} {value:>17} {row['train_loss']:10.4f} {row['test_loss']:10.4f} "
            f"{row['iterations']:10.0f} {row['mean_gain']:6.1f}"
        )


def _metric(summary: Summary, metric: str) -> float:
    value = summary[metric]
    return 0.0 if value is None or not isfinite(value) else value


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _whole(text: str) -> list[int]:
    return sorted({1, *(int(word) for word in text.split(","))})


def main(arguments: list[str] | None = None) -> int:
    """The command line; 2 where the data or the options are wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=EXPERIMENTS)
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--data", help="folder with the data set")
    parser.add_argument("--tiny", action="store_true", help="the small model and the short run")
    parser.add_argument("--scales", type=_whole, default=_whole("8,16,32,64,128"), help="for table2, fig3 and decays")
    parser.add_argument("--scale", type=int, help="for fig1 and fig5 (16) and fig2 (32)")
    parser.add_argument("--seeds", type=int, help="default: 5; fig5 1")
    parser.add_argument("--total", type=int, help="base iterations, in place of the task's")
    parser.add_argument("--decays", type=number_or_word, help="as in recipes.train; the paper's: constant")
    parser.add_argument("--estimator", help="likewise; the paper's: paper")
    parser.add_argument("--smoothing", type=number_or_word, help="likewise; the paper's: paper")
    parser.add_argument("--name", help="of the files, in place of the experiment's")
    parser.add_argument("--batches", type=int, default=1000, help="for fig2: base batches of the offline gain")
    parser.add_argument("--evaluations", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trainings at a time")
    parser.add_argument("--cache", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--out", type=Path, default=Path("docs/reproduction"))
    given = parser.parse_args(arguments)
    given.command = _command(given, parser)
    given.seeds = given.seeds or (1 if given.what == "fig5" else 5)
    given.scale = given.scale or {"fig2": 32}.get(given.what, 16)
    base = Run(given.task, given.tiny, given.data, "adascale", "1", 0, given.total, given.evaluations,
               decays=given.decays, estimator=given.estimator, smoothing=given.smoothing)  # fmt: skip
    try:
        EXPERIMENTS[given.what](Lab(base, given))
    except (DataError, anybatch.AnybatchError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _command(given: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """What was called, without the defaults."""
    words = ["python", "-m", "recipes.reproduce", given.what]
    for name, value in vars(given).items():
        if name not in UNTOLD and value != parser.get_default(name):
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words += [f"--{name}"] if value is True else [f"--{name}", text]
    return shlex.join(words)


if __name__ == "__main__":
    sys.exit(main())

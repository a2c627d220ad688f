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
Each takes one device, or `--processes` of them by torchrun, and there are as many at a time as devices allow. Machines
that see the same cache can be given the same command: each trains what no other is at. Before it starts it says how
many runs, device-hours and gigabytes it will take, from measured steps; `--plan` stops there.
Results come as a table, as `<out>/<task>-<what>.json` (`<task>-tiny-<what>.json` with `--tiny`) and as a figure. `*`
marks what is significantly below scale 1 (one-sided Welch test, 0.95, each row by itself: not corrected for the number
of rows, so that of twenty rows that are no worse one is marked on average).
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from math import ceil, isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import anybatch
from recipes.paper import figures, gains, plan
from recipes.paper.jobs import train_all
from recipes.paper.machine import Machine, machine_here
from recipes.paper.runs import Run, Summary, mean_curve, task_of, with_lsw_plus
from recipes.paper.tables import rows_of, show, value_of
from recipes.paper.wanted import POINTS, TRAJECTORIES, WANTED, Question
from recipes.training.options import PRECISIONS, TASKS, number_or_word
from recipes.training.task import DataError

# They do not decide the numbers; the processes do, where they cut the micro-batches.
UNTOLD = ("what", "cache", "out", "jobs", "workers", "compile", "plan")


class Lab:
    """Trains what an experiment asks for, with a progress bar."""

    def __init__(self, base: Run, given: argparse.Namespace, machine: Machine) -> None:
        self.given, self.machine, self.task = given, machine, task_of(base)
        self.base = replace(base, total=self.task.total)
        rate = self._rate() if given.what == "fig5" else 0.0  # the others take the task's own
        self.question = Question(self.base, tuple(given.scales), given.scale, given.seeds, rate)

    def _rate(self) -> float:
        optimizer = self.task.optimizer(self.task.model())
        rate: float = (optimizer[0] if isinstance(optimizer, list) else optimizer).param_groups[0]["lr"]
        return rate

    def wanted(self) -> list[Run]:
        """What the experiment asks for, in the micro-batches of this machine's processes."""
        return [self.placed(one) for one in WANTED[self.given.what](self.question)]

    def placed(self, one: Run) -> Run:
        """In the micro-batches of this machine's processes."""
        return one.on(self.machine.processes, self.task)

    def plan(self) -> str:
        """What is missing, and what it takes."""
        if self.given.what == "fig2":
            more = POINTS * self.given.batches
            return plan.told(self.wanted(), cache=None, machine=self.machine, task=self.task, more=more)
        return plan.told(self.wanted(), cache=self.given.cache, machine=self.machine, task=self.task)

    def train(self, runs: Iterable[Run]) -> dict[Run, Summary]:
        """All summaries."""
        wanted = list(dict.fromkeys(runs))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        found = {}
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task(self.given.what, total=len(wanted))
            for one, summary in train_all(wanted, cache=self.given.cache, machine=self.machine):
                found[one] = summary
                progress.update(bar, advance=1)
        return found

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
    wanted = lab.wanted()
    adascale = lab.train(run for run in wanted if run.rule == "adascale")
    linear = [
        run if run.rule == "lsw" else with_lsw_plus(one := replace(run, rule="adascale"), adascale[one])
        for run in wanted
        if run.rule != "adascale"
    ]
    rows = rows_of(adascale | lab.train(linear), metric=lab.task.metric)
    show(rows, lab.task.metric)
    lab.write(rows, lambda path: figures.table2(rows, path, metric=lab.task.metric))


def fig1(lab: Lab) -> None:
    """Identity keeps quality and saves nothing, linear saves most and loses quality, AdaScale is between them."""
    found = lab.train(lab.wanted())
    show(rows := rows_of(found, metric=lab.task.metric), lab.task.metric)
    lab.write(rows, lambda path: figures.rules(found, path, metric=lab.task.metric))


def fig2(lab: Lab) -> None:
    """Is the gain that a run sees the true one?"""
    sizes = {"scale": lab.given.scale, "batches": lab.given.batches, "points": POINTS, "trajectories": TRAJECTORIES}
    found = gains.compare(lab.base, lab.machine, **sizes)
    for point in found["offline"]:
        print(f"tau {point['tau']:8.0f}   online {point['online']:6.2f}   offline {point['offline']:6.2f}")
    print(f"online / offline: mean {found['mean_ratio']:.3f}, largest deviation {found['largest_deviation']:.1%}")
    print(f"single run / five tied: largest deviation {found['largest_tied_deviation']:.1%} after a tenth of the run")
    lab.write(found, lambda path: figures.gains(found, path))


def fig3(lab: Lab) -> None:
    """Against tau the curves of all scales are one."""
    found = lab.train(lab.wanted())
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
    found = lab.train(lab.wanted())
    show(rows := rows_of(found, metric=lab.task.metric), lab.task.metric)
    records = {(r.scale, r.rule): lab.given.cache / r.key / "record.jsonl" for r in found if r.seed == 0}
    lab.write(rows, lambda path: figures.elastic(found, records, path, metric=lab.task.metric))


def fig5(lab: Lab) -> None:
    """Which exponential schedules train well, of 13 first rates and 13 last ones?"""
    question = lab.question
    methods = {name: [lab.placed(run) for run in runs] for name, runs in question.grids().items()}
    found = lab.train(run for runs in methods.values() for run in runs)
    scale = str(question.scale)
    steps = fmean(found[run]["iterations"] for run in methods[f"AdaScale, S = {scale}"])
    # The large batch tuned by itself, with as many steps as AdaScale takes on average, around the rates it arrives at.
    direct = question.at("identity", scale, factor=lab.task.total / steps, total=ceil(steps))
    methods[f"direct search, S = {scale}"] = direct = [lab.placed(run) for run in direct]
    found |= lab.train(direct)
    rates, lasts = question.grid()
    values: dict[str, Any] = {"rates": rates, "lasts": lasts, "metric": {}, "area": {}, "best": {}}
    seeds, columns = question.seeds, len(rates)
    for name, runs in methods.items():
        means = [
            fmean(value_of(found[run], lab.task.metric) for run in runs[i : i + seeds])
            for i in range(0, len(runs), seeds)
        ]
        values["metric"][name] = [means[i : i + columns] for i in range(0, len(means), columns)]
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
    found = lab.train(lab.wanted())
    show(rows := rows_of(found, metric=lab.task.metric, by_decays=True), lab.task.metric)
    lab.write(rows)


EXPERIMENTS = {"table2": table2, "decays": decays, "fig1": fig1, "fig2": fig2, "fig3": fig3, "fig4": fig4, "fig5": fig5}


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _whole(text: str) -> list[int]:
    return sorted({1, *(int(word) for word in text.split(","))})


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
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
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="as in recipes.train")
    parser.add_argument("--micro-batch", type=int, help="likewise, of every run (default: what a process takes)")
    parser.add_argument("--compile", action="store_true", help="likewise")
    parser.add_argument("--workers", type=int, help="likewise (default: by the cores of a process; on a CPU none)")
    parser.add_argument("--processes", type=int, default=1, help="of each training, a device each (default: 1)")
    parser.add_argument("--jobs", type=int, help="trainings at a time (default: one for each --processes devices)")
    parser.add_argument("--plan", action="store_true", help="say what is to be trained and what it takes, and stop")
    parser.add_argument("--cache", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--out", type=Path, default=Path("docs/reproduction"))
    return parser


def base_run(given: argparse.Namespace) -> Run:
    """The run at scale 1 that all others are changes of."""
    return Run(
        given.task, given.tiny, given.data, "adascale", "1", 0, given.total, given.evaluations, decays=given.decays,
        estimator=given.estimator, smoothing=given.smoothing, precision=given.precision, micro_batch=given.micro_batch,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """The command line; 2 where the data or the options are wrong."""
    given = parser().parse_args(arguments)
    given.command = _command(given, parser())
    given.seeds = given.seeds or (1 if given.what == "fig5" else 5)
    given.scale = given.scale or {"fig2": 32}.get(given.what, 16)
    try:
        if given.what == "fig2" and given.processes > 1:
            raise anybatch.InvalidValueError("fig2 is one process: leave out --processes.")
        machine = machine_here(
            jobs=given.jobs, processes=given.processes, workers=given.workers, compiled=given.compile
        )
        lab = Lab(base_run(given), given, machine)
        print(lab.plan() or f"Every run is in {given.cache}.", file=sys.stderr)
        if not given.plan:
            EXPERIMENTS[given.what](lab)
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
            option = f"--{name.replace('_', '-')}"
            words += [option] if value is True else [option, text]
    return shlex.join(words)


if __name__ == "__main__":
    sys.exit(main())

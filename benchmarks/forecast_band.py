"""How wide a forecast's band must be: of tasks held out from its making, in how many cases it held.

    python -m benchmarks.forecast_band --json docs/forecast/band.json     says what the rows there come to
    python -m benchmarks.forecast_band --record all --json ...            makes them first, in eight minutes

The runs really made are those of `benchmarks.same_training` (docs/same-training/results.json: 5 seeds at each scale, at
a rate tuned at scale 1, with the defaults of each optimizer) and of `benchmarks.forecast --json` (docs/forecast/
tasks.json, 2 seeds). Of each task of the first this trains and records one run at scales 1 (in two halves), 2 and 8.

A case is one record and one larger scale, d doublings from the record's. With e = log(real / forecast) the band says

    -down (1 + d) <= e <= up (1 + d)

where `down` and `up` are exceeded in 5 % of the cases each, every task with the same weight. What that is worth is
measured by leaving one task out: the two numbers from the others, and whether they hold on the one; and the same with
all tasks of one kind of data left out, which is nearer to a user's own task. (Also tried: e / d and e / sqrt(d), the
steps beyond total / S in place of the steps, one number for both sides: the coverage is the same within a few cases.)
"""

import argparse
import json
from collections.abc import Callable, Sequence
from math import ceil, expm1, log, log2
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

import torch

import anybatch
from anybatch._demo import LAST_RATE, gradients
from benchmarks import beyond
from benchmarks import same_training_tasks as tasks
from benchmarks.same_training_tasks import OPTIMIZERS, SOURCES, TASKS

DEFAULTS = {"momentum": "auto", "adam": "euclidean", "muon": "clock", "signum": "clock"}
LEVEL = 0.9
DATA = {"gpt": "bytes", **dict.fromkeys(("sgd", "momentum", "clock", "adam", "conv"), "digits")}
KIND = {"sgd": "momentum", "clock": "momentum", "gpt": "adam"}  # of those of benchmarks.forecast
Row = dict[str, Any]


def real_steps(path: Path) -> dict[str, dict[int, float]]:
    """Task to scale to the mean steps of the runs with the defaults, none of which diverged."""
    found: dict[str, dict[int, float]] = {}
    for row in json.loads(path.read_text())["rows"]:
        if row["candidate"] == DEFAULTS[row["family"]] and row["scale"] > 1 and not row["diverged"]:
            found.setdefault(row["task"], {})[row["scale"]] = row["steps"]
    return found


def tuned_rate(path: Path, name: str) -> float:
    return next(row["lr"] for row in json.loads(path.read_text())["rows"] if row["task"] == name)


def record(name: str, *, lr: float, scale: int, path: Path) -> None:
    """Train once with the defaults; scale 1 in two halves, which show its noise."""
    task, source = TASKS[name], SOURCES[name]
    net = source.model(0)
    optimizer = OPTIMIZERS[task.family](tasks.trained(net, task.family), lr)
    halves = 2 if scale == 1 else 1
    controller = anybatch.attach(
        optimizer,
        model=net,
        rule=anybatch.AdaScale(like=torch.optim.Muon) if task.family == "signum" else anybatch.AdaScale(),
        scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, LAST_RATE ** (1 / task.total)),
        total=task.total,
        base_batch=source.base,
        micro_batch=source.base // halves,
        record=path,
    )
    order = torch.Generator().manual_seed(0)
    while not controller.done:
        x, y = source.batch(scale, source.base, order)
        x, y = (part.unflatten(1, (halves, -1)).flatten(0, 1) for part in (x, _by_example(y, source)))
        found = gradients(net, x, y.flatten(1))
        controller.observe([g for g, p in zip(found, net.parameters(), strict=True) if p.requires_grad])
        optimizer.step()
        optimizer.zero_grad()
    controller.detach()


def _by_example(y: torch.Tensor, source: beyond.Task) -> torch.Tensor:
    """The targets as `[scale, base, of one example]`; the bytes' come flat."""
    return y.unflatten(1, (source.base, -1))


def recorded_recipe(name: str, *, lr: float, scale: int, path: Path, data: Path) -> None:
    """The same of a recipe's tiny task."""
    tasks.prepare(name, data)
    TASKS[name].train(TASKS[name], lr, anybatch.AdaScale(), scale, 0, data, path.parent)


def rows_of(name: str, *, results: Path, data: Path) -> list[Row]:
    """Record one run at each of the small scales and forecast the steps at those that were measured."""
    real, lr, rows = real_steps(results)[name], tuned_rate(results, name), []
    with TemporaryDirectory() as folder:
        for scale in (1, 2, 8) if name in SOURCES else (2, 8):
            path = Path(folder) / f"S{scale}" / "record.jsonl"
            path.parent.mkdir()
            if name in SOURCES:
                record(name, lr=lr, scale=scale, path=path)
            else:
                recorded_recipe(name, lr=lr, scale=scale, path=path, data=data)
            found = {int(s.scale): s for s in anybatch.forecast(path, [s for s in real if s > scale]).scales}
            rows += [{"task": name, "recorded": scale, "scale": s, "real": real[s],
                      "forecast": round(each.steps.value, 1)} for s, each in found.items()]  # fmt: skip
    return rows


def earlier(path: Path) -> list[Row]:
    """The rows of `benchmarks.forecast`, of scales above the record's."""
    found = []
    for task in json.loads(path.read_text()):
        total = 1500 if task["task"] == "gpt" else 4000
        found += [
            {**row, "task": task["task"], "total": total} for row in task["rows"] if row["scale"] > row["recorded"]
        ]
    return found


def error(row: Row) -> float:
    """The logarithm of what happened over what was forecast, for one and a doubling."""
    return log(row["real"] / row["forecast"]) / (1 + log2(row["scale"] / row["recorded"]))


def quantile(values: Sequence[tuple[str, float]], level: float) -> float:
    """The value that this share of the cases is at most, each task with the same weight."""
    names = [name for name, _ in values]
    passed = 0.0
    for value, weight in sorted((value, 1 / names.count(name)) for name, value in values):
        passed += weight
        if passed >= level * len(set(names)) - 1e-9:
            return value
    raise AssertionError("there are cases")


def bounds(rows: Sequence[Row]) -> tuple[float, float]:
    """`down` and `up`."""
    side = (1 + LEVEL) / 2
    down, up = (quantile([(row["task"], sign * error(row)) for row in rows], side) for sign in (-1, 1))
    return down, up


def left_out(rows: Sequence[Row], key: Callable[[str], str]) -> dict[str, list[bool]]:
    """For each group of tasks whether the band of the others holds, case by case."""
    found = {}
    for name in dict.fromkeys(key(row["task"]) for row in rows):
        down, up = bounds([row for row in rows if key(row["task"]) != name])
        found[name] = [-down <= error(row) <= up for row in rows if key(row["task"]) == name]
    return found


def data_of(task: str) -> str:
    first = task.partition("-")[0]
    return DATA.get(first, first)


def main(arguments: Sequence[str] | None = None) -> None:
    """Record where asked, then say what the rows come to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", default="", help="tasks to record anew, comma-separated, or all")
    parser.add_argument("--json", type=Path, default=Path("docs/forecast/band.json"))
    parser.add_argument("--earlier", type=Path, default=Path("docs/forecast/tasks.json"))
    parser.add_argument("--results", type=Path, default=Path("docs/same-training/results.json"))
    parser.add_argument("--data", type=Path, default=Path("made"), help="where the recipes' made data lies")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    known = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
    names = list(real_steps(options.results)) if options.record == "all" else options.record.split(",")
    for name in filter(None, names):
        made = rows_of(name, results=options.results, data=options.data)
        known = [row for row in known if row["task"] != name] + made
        options.json.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n  ".join(map(json.dumps, known))
        options.json.write_text(f'{{\n "torch": "{torch.__version__}",\n "rows": [\n  {lines}\n ]\n}}\n')
        print(name, *(f"{r['recorded']}->{r['scale']} {r['forecast']:.0f}/{r['real']:.0f}" for r in made), flush=True)
    say(known + earlier(options.earlier))


def say(rows: Sequence[Row]) -> None:
    """The band, its coverage, and the error by distance and by kind of optimizer."""
    down, up = bounds(rows)
    print(f"{len({row['task'] for row in rows})} tasks, {len(rows)} cases: down {down:.3f}, up {up:.3f}")
    for what, key in (("task", str), ("kind of data", data_of)):
        held = left_out(rows, key)
        cases = [each for found in held.values() for each in found]
        mean = fmean(sum(found) / len(found) for found in held.values())
        print(f"one {what} left out: held in {sum(cases)} of {len(cases)} cases ({sum(cases) / len(cases):.0%}), "
              f"{mean:.0%} in the mean over {len(held)}")  # fmt: skip
        print("  " + ", ".join(f"{name} {sum(found)}/{len(found)}" for name, found in held.items()))
    print("| doublings | cases | median error | 90 % within | largest | band |\n|---|---|---|---|---|---|")
    for low, high in ((1, 2), (3, 4), (5, 6), (7, 8)):
        group = [row for row in rows if low <= round(log2(row["scale"] / row["recorded"])) <= high]
        edges = (f"{expm1(-down * (1 + d)):+.0%} to {expm1(up * (1 + d)):+.0%}" for d in (low, high))
        print(f"| {low} to {high} | {_errors(group)} | {', '.join(edges)} |")
    print("| optimizer | cases | median error | 90 % within | largest | steps taken over forecast, median |\n"
          "|---|---|---|---|---|---|")  # fmt: skip
    kinds = {row["task"]: _kind(row["task"]) for row in rows}
    for kind in dict.fromkeys(kinds.values()):
        group = [row for row in rows if kinds[row["task"]] == kind]
        print(f"| {kind} | {_errors(group)} | {median(row['real'] / row['forecast'] for row in group):.2f} |")


def _errors(rows: Sequence[Row]) -> str:
    errors = sorted(abs(row["forecast"] / row["real"] - 1) for row in rows)
    most = errors[ceil(LEVEL * len(errors)) - 1]
    return f"{len(errors)} | {median(errors):.1%} | {most:.1%} | {errors[-1]:.1%}"


def _kind(task: str) -> str:
    return TASKS[task].family if task in TASKS else KIND.get(task, task)


if __name__ == "__main__":
    main()

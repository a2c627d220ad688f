"""Many runs of one experiment: the command line, the file that keeps what was trained, the table and the test.

Every finished run is written to the results file at once, and a long one has a checkpoint beside it until then. Called
again, an experiment goes on with what is missing and draws the figure anew, so that a figure can be changed without
training. Several processes, each with its device and its own kappas, may write to one file.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import anybatch
from anybatch._demo import welch
from recipes.ema.config import ARMS, Config, Scale
from recipes.ema.resume import Checkpoint
from recipes.ema.train import Experiment, train
from recipes.training.once import unfinished

VERSIONS = {"torch": str(torch.__version__), "anybatch": anybatch.__version__}
Make = Callable[[Config, argparse.Namespace], Experiment[Any]]


@dataclass(frozen=True)
class Study:
    """What an experiment trains and draws.

    Args:
        name: of its files.
        description: for `--help`.
        make: the experiment from its configuration and the command line.
        configs: by the name that `--config` takes; the first is the default.
        scales: for each arm, at which kappas it is run; `None` for all of the configuration's. At kappa 1 all arms are
            the same training: only the first arm is run there.
        metric: the curve whose end is compared.
        draw: the figure, from the results.
        compared: the arms and scales that the claims are about: run, like kappa 1, from all seeds.
        few: from how many seeds the others are run.
        progressive: sequences of kappas to run as well, by the first arm, where the configuration has their last one.
    """

    name: str
    description: str
    make: Make
    configs: Mapping[str, Config]
    scales: Mapping[str, Sequence[float] | None]
    metric: str
    draw: Callable[["Results", Path], None]
    compared: Sequence[tuple[str, Scale]] = (("rule", 8), ("off", 8), ("adascale", 8))
    few: int = 2
    progressive: Sequence[tuple[float, ...]] = ()

    def plan(self, config: Config) -> list[tuple[str, Scale, int]]:
        """Arm, scale and seed of every run, seeds last so that a first look is soon complete."""
        first = next(iter(self.scales))
        pairs: list[tuple[str, Scale]] = []
        for arm, scales in self.scales.items():
            wanted = config.scales if scales is None else [kappa for kappa in scales if kappa in config.scales]
            pairs += [(arm, kappa) for kappa in wanted if kappa != 1 or arm == first]
        pairs += [(first, scale) for scale in self.sequences(config)]
        all_ = [(first, 1), *self.compared]
        seeds = {pair: config.seeds if pair in all_ else min(config.seeds, self.few) for pair in pairs}
        return [(arm, scale, seed) for seed in range(config.seeds) for arm, scale in pairs if seed < seeds[arm, scale]]

    def sequences(self, config: Config) -> list[tuple[float, ...]]:
        """The progressive runs of a configuration."""
        return [scale for scale in self.progressive if scale[-1] in config.scales]


class Results:
    """The runs of one configuration, on disk as JSON.

    Args:
        study: what they belong to.
        config: the configuration; runs of another one are refused.
        path: the file; written after every run.
        data: the folder of the data; runs on another one are refused.
    """

    def __init__(self, study: Study, config: Config, path: Path, *, data: Path | None = None) -> None:
        self.study, self.config, self.path = study, config, path
        self.data = str(data.resolve()) if data else None
        self.runs: list[dict[str, Any]] = []
        self.versions = VERSIONS
        self.read()

    def read(self) -> None:
        """Take what is in the file and not yet here: another process may have trained as well."""
        if not self.path.exists():
            return
        saved = json.loads(self.path.read_text())
        # What a configuration has got since then is at its default in runs from before.
        if (_DEFAULTS | saved["config"], saved.get("data")) != (_plain(self.config), self.data):
            raise SystemExit(f"{self.path} holds runs of another configuration: name another --json, or delete it.")
        done = self.done()
        self.runs += [run for run in saved["runs"] if _key(run["arm"], run["scale"], run["seed"]) not in done]
        self.versions = {name: saved.get(name, version) for name, version in VERSIONS.items()}

    def done(self) -> set[Any]:
        """The keys of the runs that are here."""
        return {_key(run["arm"], run["scale"], run["seed"]) for run in self.runs}

    def complete(self, experiment: Experiment[Any]) -> None:
        """Train what is missing, if there is something, with the versions of what is there."""
        done = self.done()
        missing = [run for run in self.study.plan(self.config) if _key(*run) not in done]
        if missing and self.versions != VERSIONS:
            raise SystemExit(f"{self.path} holds runs of {self.versions}, these are {VERSIONS}: name another --json.")
        for i, (arm, scale, seed) in enumerate(missing, start=1):
            self.read()
            if _key(arm, scale, seed) in self.done():
                continue
            checkpoint = self.checkpoint(arm, scale, seed)
            run = train(experiment, arm, scale=scale, seed=seed, checkpoint=checkpoint)
            self.runs.append(json.loads(json.dumps(run), parse_float=lambda number: float(f"{float(number):.5g}")))
            self.save()
            checkpoint.remove()
            end = f"{run[self.study.metric][-1]:.3f}" if run[self.study.metric] else ""
            print(
                f"[{i}/{len(missing)}] {arm:15} kappa {_shown(scale):12} seed {seed}: {run['steps']} steps, {end}",
                flush=True,
            )

    def checkpoint(self, arm: str, scale: Scale, seed: int) -> Checkpoint:
        """Where a run is kept until it is here."""
        same = {**VERSIONS, "config": _plain(self.config), "data": self.data, "run": [arm, _shown(scale), seed]}
        name = f"{self.path.stem}.{arm}-{_shown(scale).replace(' ', '')}-{seed}.pt"
        return Checkpoint(self.path.with_name(name), same=same)

    def save(self) -> None:
        """Write the file, one run a line."""
        self.read()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        head = json.dumps({"study": self.study.name, **VERSIONS, "data": self.data, "config": _plain(self.config)})
        runs = ",\n".join(json.dumps(run) for run in self.runs)
        scratch = unfinished(self.path)
        scratch.write_text(f'{head[:-1]}, "runs": [\n{runs}\n]}}\n')
        scratch.replace(self.path)

    def of(self, arm: str, scale: Scale) -> list[dict[str, Any]]:
        """The runs of an arm at a scale, by seed; at kappa 1 the arms share theirs."""
        first = next(iter(self.study.scales))
        wanted = first if scale == 1 else arm
        return [run for run in self.runs if _key(run["arm"], run["scale"], 0) == _key(wanted, scale, 0)]

    def ends(self, arm: str, scale: Scale, metric: str | None = None) -> list[float]:
        """The last value of a curve, for each seed."""
        return [run[metric or self.study.metric][-1] for run in self.of(arm, scale)]

    def curve(self, arm: str, scale: Scale, metric: str | None = None) -> torch.Tensor:
        """A curve's mean over the seeds, `[points]`."""
        values = [run[metric or self.study.metric] for run in self.of(arm, scale)]
        return torch.tensor(values, dtype=torch.float64).mean(0)

    def pairs(self) -> list[tuple[str, Scale]]:
        """Every arm and scale that was run, in the plan's order."""
        return list(dict.fromkeys((arm, scale) for arm, scale, _ in self.study.plan(self.config)))


def spread(values: Sequence[float]) -> float:
    """The standard deviation: 0 of one value, nan where a run diverged, with which `statistics.stdev` cannot deal."""
    return torch.tensor(values, dtype=torch.float64).std().item() if len(values) > 1 else 0.0


def table(results: Results) -> str:
    """Means and standard deviations at the end, and how likely so low a mean is if kappa 1 is no better."""
    name = results.study.metric.replace("_", " ")
    lines = [f"| | kappa | seeds | steps | {name} | p (lower than kappa 1) |", "|---" * 6 + "|"]
    base = results.ends(next(iter(results.study.scales)), 1)
    for arm, scale in results.pairs():
        ends = results.ends(arm, scale)
        steps = fmean(run["steps"] for run in results.of(arm, scale))
        p = f"{welch(ends, base):.4f}" if scale != 1 and len(ends) > 1 else ""
        label = "any" if scale == 1 else ARMS[arm].label
        lines.append(
            f"| {label} | {_shown(scale)} | {len(ends)} | {steps:.0f} | {fmean(ends):.4g} ± {spread(ends):.2g} | {p} |"
        )
    return "\n".join(lines)


def main(study: Study, arguments: Sequence[str] | None = None) -> Results:
    """The command line of every study."""
    parser = argparse.ArgumentParser(
        prog=f"python -m recipes.ema.{study.name}",
        description=study.description,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--config", choices=list(study.configs), default=next(iter(study.configs)))
    parser.add_argument("--seeds", type=int, help="how many; the configuration's by default")
    parser.add_argument("--scales", type=float, nargs="+", help="kappas beside 1; the configuration's by default")
    parser.add_argument("--total", type=int, help="base iterations of a run; the configuration's by default")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the figure")
    parser.add_argument("--json", type=Path, help="the results file; in --out by default")
    parser.add_argument("--data", type=Path, help="folder with the data of a full configuration")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1 if options.device == "cpu" else torch.get_num_threads())
    config = study.configs[options.config]
    scales = tuple(sorted({1, *options.scales})) if options.scales else None  # kappa 1 is what all is compared with
    changes = {"seeds": options.seeds, "total": options.total, "scales": scales}
    config = replace(config, **{name: value for name, value in changes.items() if value})
    suffix = "" if options.config == next(iter(study.configs)) else f"_{options.config}"
    path = options.json or options.out / f"ema_{study.name}{suffix}.json"
    results = Results(study, config, path, data=options.data)
    results.complete(study.make(config, options))
    print(table(results))
    options.out.mkdir(parents=True, exist_ok=True)
    study.draw(results, options.out / f"ema_{study.name}{suffix}.png")
    return results


_MANY = {"seeds", "scales"}
_DEFAULTS = {
    field.name: field.default for field in fields(Config) if field.default is not MISSING and field.name not in _MANY
}


def _plain(config: Config) -> dict[str, Any]:
    """What makes runs comparable: all but how many there are."""
    return {name: value for name, value in asdict(config).items() if name not in _MANY}


def _key(arm: str, scale: Scale | list[float], seed: int) -> tuple[str, tuple[float, ...], int]:
    return arm, tuple(scale) if isinstance(scale, list | tuple) else (float(scale),), seed


def _shown(scale: Scale) -> str:
    return "→".join(f"{kappa:g}" for kappa in scale) if isinstance(scale, tuple) else f"{scale:g}"

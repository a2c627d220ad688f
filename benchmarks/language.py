"""A small GPT at one batch, at 8 and 32 of it, and with a batch that grows: by AdamW, and by Muon with AdamW.

    python -m benchmarks.language --json docs/language/results.json [--jobs 2]

trains what is not there yet, in about three quarters of an hour of a core, and prints the table of
docs/language-models.md.

Each study sees the same number of tokens at scale 1, and its learning rate is tuned there: from the task's own by
factors of 2 until both neighbours of the best are worse, with seeds that are not in the table. All else is
`recipes.train language --tiny` with the options of `ROWS`. The loss is that of a token of the text's last tenth, in
nats; Welch's test, two-sided, compares it with scale 1's over the seeds.
"""

import argparse
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

import torch
from scipy.stats import ttest_ind

from benchmarks.kept import Kept, Row
from recipes.language import made
from recipes.language.task import RATES, Language
from recipes.train import run
from recipes.training.options import Options

SEEDS, TUNING = 5, (100, 101)


@dataclass(frozen=True)
class Study:
    """One optimizer at one base batch, in tokens."""

    optimizer: Literal["adamw", "muon"]
    base_batch: int
    total: int

    @property
    def name(self) -> str:
        """As the table has it."""
        return f"{'AdamW' if self.optimizer == 'adamw' else 'Muon and AdamW'}, {self.base_batch} tokens"


STUDIES = (Study("adamw", 128, 4000), Study("muon", 128, 4000), Study("adamw", 512, 1000))
BASE = "scale 1"
ROWS: dict[str, Row] = {  # a micro-batch in base batches, and the options
    BASE: {"parts": 1, "scale": "1"},
    "scale 8": {"parts": 2, "scale": "8"},
    "scale 32": {"parts": 8, "scale": "32"},
    "grows with the noise": {"parts": 1, "scale": "2", "grow": "noise", "most": 32, "efficiency": 0.5},
    "Seesaw": {"parts": 1, "scale": "1", "rule": "sqrt", "grow": "seesaw", "most": 10},
}


@dataclass(frozen=True)
class Wanted:
    """One training."""

    study: Study
    row: str
    lr: float
    seed: int

    @property
    def name(self) -> Row:
        """What tells it from the others in the file."""
        return {**asdict(self.study), "row": self.row, "lr": self.lr, "seed": self.seed}


def train(wanted: Wanted, data: Path) -> Row:
    """Its loss, its share of right tokens in percent, its steps and the tokens that they took."""
    torch.set_num_threads(1)
    study, given = wanted.study, dict(ROWS[wanted.row])
    options = Options(
        micro_batch=given.pop("parts") * study.base_batch, base_batch=study.base_batch, total=study.total,
        lr=wanted.lr, seed=wanted.seed, evaluations=2, **given,
    )  # fmt: skip
    summary = run(Language(data, tiny=True, optimizer=study.optimizer), options)
    result = {"loss": "loss", "accuracy": "accuracy", "steps": "iterations", "tokens": "examples"}
    return wanted.name | {ours: summary[theirs] for ours, theirs in result.items()}


class Runs(Kept):
    """Trainings, kept in a file as they end.

    Args:
        path: the file.
        jobs: how many at a time.
    """

    def __init__(self, path: Path, *, jobs: int) -> None:
        super().__init__(path, {"options": ROWS}, apart="other options")
        self._jobs = jobs

    def of(self, wanted: Sequence[Wanted]) -> list[Row]:
        """Those runs, trained now where they were not yet."""
        missing = [each for each in wanted if self.find(each.name) is None]
        if missing:
            with (
                tempfile.TemporaryDirectory() as folder,
                ProcessPoolExecutor(self._jobs, mp_context=get_context("spawn")) as pool,
            ):
                made.make(Path(folder))
                Language(Path(folder), tiny=True)  # the tokens are made once, before the others look for them
                for ended in as_completed([pool.submit(train, each, Path(folder)) for each in missing]):
                    self.keep(ended.result())
        return [row for each in wanted if (row := self.find(each.name)) is not None]


def tuned(runs: Runs, study: Study) -> float:
    """The rate with the lowest loss at scale 1, its neighbours tried."""
    losses: dict[float, float] = {}
    best = RATES["tiny"]
    while True:
        rates = [rate for rate in (best / 2, best, best * 2) if rate not in losses]
        if not rates:
            return best
        found = runs.of([Wanted(study, BASE, rate, seed) for rate in rates for seed in TUNING])
        losses |= {rate: fmean(row["loss"] for row in found if row["lr"] == rate) for rate in rates}
        best = min(losses, key=losses.__getitem__)


def table(runs: Runs, *, seeds: int = SEEDS) -> list[str]:
    """The page's lines."""
    lines = [
        "| | | validation loss, nats | p | right tokens % | steps | fewer | tokens, of scale 1's |",
        "|---" * 8 + "|",
    ]
    for study in STUDIES:
        lr = tuned(runs, study)
        wanted = [Wanted(study, row, lr, seed) for row in ROWS for seed in range(seeds)]
        found = runs.of(wanted)
        of = {name: [row for row in found if row["row"] == name] for name in ROWS}
        base = {name: [row[name] for row in of[BASE]] for name in ("loss", "steps", "tokens")}
        for name, rows in of.items():
            losses, right = ([row[each] for row in rows] for each in ("loss", "accuracy"))
            steps, tokens = (fmean(row[each] for row in rows) for each in ("steps", "tokens"))
            p = ttest_ind(losses, base["loss"], equal_var=False).pvalue
            told = "" if name == BASE else f"{p:.3f}" if p >= 0.001 else "<.001"
            fewer = "" if name == BASE else f"{fmean(base['steps']) / steps:.1f}"
            first = f"{study.name}, rate {lr:g}" if name == BASE else ""
            lines.append(
                f"| {first} | {name} | {fmean(losses):.3f} ± {stdev(losses):.3f} | {told} | {fmean(right):.1f} ± "
                f"{stdev(right):.1f} | {steps:,.0f} | {fewer} | {tokens / fmean(base['tokens']):.2f} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file of the runs, those to come and those that were")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    given = parser.parse_args()
    print("\n".join(table(Runs(given.json, jobs=given.jobs))))


if __name__ == "__main__":
    main()

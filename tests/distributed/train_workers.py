"""What the processes of test_train.py do."""

import contextlib
import dataclasses
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

import anybatch
from recipes.digits import Digits
from recipes.train import main, run
from recipes.training.options import TASKS, Options


class Killed(Exception):
    """In place of a kill: the run ends in the middle, and nothing of it is written any more."""


def train(options, *, out, stop=None):
    """Gains and clock of a run of the digits, and its summary; `stop` kills it after so many steps."""
    out = Path(out)
    taus, summary = [], None

    def watch(tau, point):
        taus.append(tau)
        if len(taus) == stop:
            raise Killed

    warnings.simplefilter("ignore")
    with contextlib.suppress(Killed):
        summary = run(Digits(), dataclasses.replace(options, out=out), watch=watch)
    return {"gains": [step.gain for step in anybatch.read_record(out / "record.jsonl").steps], "taus": taus,
            "summary": summary}  # fmt: skip


def ranks(rank, options, folder):
    """On each rank: a whole run, and six steps of one that a single process began; under DDP and with FSDP2."""
    results = {"unwhole": _unwhole()}
    for kind in ("DDP", "FSDP2"):
        chosen = dataclasses.replace(options, fsdp=kind == "FSDP2")
        straight = Path(folder) / kind / "straight"
        run(Digits(), dataclasses.replace(chosen, out=straight))
        dist.barrier()
        steps = anybatch.read_record(straight / "record.jsonl").steps
        results[kind] = {
            "gains": [step.gain for step in steps],
            "taus": [step.tau for step in steps],
            "weights": torch.load(straight / "checkpoint.pt", weights_only=True)["model"],
            "moved": train(chosen, out=Path(folder) / kind / "moved", stop=6)["taus"],
        }
        dist.barrier()
    return results


def tasks(rank, folder):
    """On each rank: the exit code of three steps of every task."""
    common = "--tiny --make-data --rule linear --scale 2 --total 6 --evaluations 1"
    return {
        task: main([task, "--data", f"{folder}/{task}", "--out", f"{folder}/out/{task}", *common.split()])
        for task in TASKS
    }


def _unwhole():
    """The error of three base batches on two ranks."""
    try:
        run(Digits(), Options(scale="3", micro_batch=8))
    except anybatch.InvalidValueError as error:
        return str(error)
    return None

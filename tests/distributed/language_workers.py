"""What the processes of test_language.py do."""

import dataclasses
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

import anybatch
from recipes.language.task import Language
from recipes.train import run
from recipes.training.once import once
from recipes.training.task import DataError


def train(data, options, *, out, optimizer="adamw"):
    """Gains, clock and weights of a run."""
    warnings.simplefilter("ignore")
    run(Language(Path(data), tiny=True, optimizer=optimizer), dataclasses.replace(options, out=Path(out)))
    if dist.is_initialized():
        dist.barrier()
    steps = anybatch.read_record(Path(out) / "record.jsonl").steps
    weights = torch.load(Path(out) / "checkpoint.pt", weights_only=True)["model"]
    return {"gains": [step.gain for step in steps], "taus": [step.tau for step in steps], "weights": weights}


def ranks(rank, data, options, folder):
    """On each rank: AdamW and Muon under DDP, and with FSDP2; and what is made once, well and badly."""
    found = {"once": _once(rank, Path(folder))}
    for kind, optimizer in (("DDP", "adamw"), ("DDP", "muon"), ("FSDP2", "adamw"), ("FSDP2", "muon")):
        chosen = dataclasses.replace(options, fsdp=kind == "FSDP2")
        found[kind, optimizer] = train(data, chosen, out=f"{folder}/{kind}-{optimizer}", optimizer=optimizer)
        dist.barrier()
    return found


def _once(rank, folder):
    calls = []
    once(lambda: calls.append((folder / "made").write_text("by rank 0")))

    def fail():
        raise DataError("the text is gone")

    try:
        once(fail)
    except DataError as error:
        return len(calls), (folder / "made").read_text(), str(error)
    return None

"""The table of docs/frameworks.md: the same micro-batches in a plain loop and in every framework's.

The tests measure each row and hold it to the one that is kept. `SAME=write`, which the page names, keeps the rows anew
and writes the page's table.
"""

import functools
import json
import math
import os
import re
from pathlib import Path

import oracle
import pytest

from integrations import task

DOCS = Path(__file__).parent.parent.parent / "docs"
KEPT = DOCS / "frameworks" / "same.json"
PAGE = DOCS / "frameworks.md"
FRAMEWORKS = ("plain loop", "Lightning", "Trainer", "Accelerate", "Fabric")
SHARDED = ("Lightning, FSDP2", "Trainer, FSDP2", "Accelerate, FSDP2")  # on two processes, without clipping
WRITES = os.environ.get("SAME") == "write"

plain = functools.cache(task.plain)


def hold(framework, ranks, clip=None, **options):
    """Compare a run of four micro-batches a step, as each rank tells of it, with the plain loop's and with its row."""
    gains, weights = map(max, zip(*(task.check(found, plain(clip=clip, **options)) for found in ranks)))
    found, world = ranks[0], len(ranks)
    tau, lr = found["taus"][-1], found["lr"]
    row = {
        "framework": framework,
        "processes": world,
        "micro_batches": task.MICRO_BATCHES // world,
        "clip": clip,
        "steps": len(found["gains"]),
        "gains": gains,
        "weights": weights,
        "tau": tau,
        "lr": lr,
        "end": oracle.LR * (1 + math.cos(math.pi * math.floor(tau) / task.TOTAL)) / 2,
    }
    names = ("framework", "processes", "clip")
    rows = {tuple(each[name] for name in names): each for each in _kept()}
    if WRITES:
        rows[framework, world, clip] = row
        order = sorted(rows, key=lambda key: ((*FRAMEWORKS, *SHARDED).index(key[0]), key[1], key[2] or 0))
        kept = {"total": task.TOTAL, "lr": oracle.LR, "rows": [rows[key] for key in order]}
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")
        text = PAGE.read_text()
        PAGE.write_text(re.sub(r"\| framework \| processes .*\n(\|.*\n)+", "\n".join(table()) + "\n", text))
    kept = rows[framework, world, clip]
    assert row["steps"] == kept["steps"]
    assert (row["tau"], row["lr"]) == pytest.approx((kept["tau"], kept["lr"]), rel=1e-6, abs=1e-12)


def table():
    """The lines of the page's."""
    columns = ("framework", "processes × micro-batches", "clipping", "gains", "weights", "steps", "tau", "last rate")
    lines = [f"| {' | '.join((*columns, 'schedule there'))} |", "|---" * 9 + "|"]
    for row in _kept():
        layout = f"{row['processes']} × {row['micro_batches']}"
        clip = "off" if row["clip"] is None else f"{row['clip']:g}"
        differences = f"{row['gains']:.1g} | {row['weights']:.1g}"
        end = f"{row['tau']:.4f} | {row['lr']:.3g} | {row['end']:.3g}"
        lines.append(f"| {row['framework']} | {layout} | {clip} | {differences} | {row['steps']} | {end} |")
    return lines


def _kept():
    return json.loads(KEPT.read_text())["rows"] if KEPT.is_file() else []

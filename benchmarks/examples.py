"""The examples at 1, 8 and 32 times the batch they were tuned for: quality, steps and examples, over three seeds.

python -m benchmarks.examples                   writes docs/examples.json; docs/examples.md shows it
"""

import argparse
import json
import runpy
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch

FOLDER = Path(__file__).parent.parent
SCALES = (1, 8, 32)
# The example, its quality and what it counts its data in, and what its `train` is given beside the scale and the seed.
TASKS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("images", "accuracy", "images", {}),
    ("language", "loss", "bytes", {"total": 500}),
    ("ddp", "accuracy", "images", {}),
)


def main() -> None:
    """Train what is missing in the file, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=FOLDER / "docs/examples.json")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
    for name, quality, unit, more in TASKS:
        train = under_torchrun if name == "ddp" else runpy.run_path(str(FOLDER / f"examples/{name}.py"))["train"]
        for scale in SCALES:
            if any((row["example"], row["scale"]) == (name, scale) for row in rows):
                continue
            runs = [train(scale=scale, seed=seed, **more) for seed in range(options.seeds)]
            values = [run[quality] for run in runs]
            rows.append({
                "example": name, "scale": scale, "quality": quality, "mean": fmean(values), "spread": stdev(values),
                "steps": fmean(run["steps"] for run in runs), "unit": unit, "seen": fmean(run[unit] for run in runs),
            })  # fmt: skip
            data = {"torch": torch.__version__, "seeds": options.seeds, "rows": rows}
            options.json.write_text(json.dumps(data, indent=1) + "\n")
    print("\n".join(line(row, rows) for row in rows))


def under_torchrun(*, scale: int, seed: int) -> dict[str, float]:
    """examples/ddp.py: one rank at scale 1, else two that accumulate."""
    ranks = min(2, scale)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    options = ["--accumulate", str(scale // ranks), "--seed", str(seed)]
    with TemporaryDirectory() as folder:
        command = [sys.executable, *launcher, str(FOLDER / "examples/ddp.py"), *options]
        said = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    found = json.loads(said.strip().splitlines()[-1])
    return {**found, "images": found["steps"] * found["scale"] * 8}


def line(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """A row of the table in docs/examples.md."""
    base = next(each for each in rows if each["example"] == row["example"] and each["scale"] == 1)
    digits = 1 if row["quality"] == "accuracy" else 3
    cells = (
        f"`{row['example']}.py`",
        str(row["scale"]),
        f"{row['mean']:.{digits}f} ± {row['spread']:.{digits}f}" + (" %" if row["quality"] == "accuracy" else " nats"),
        f"{row['steps']:,.0f}",
        f"{row['seen']:,.0f} {row['unit']}",
        f"{row['seen'] / base['seen']:.2f}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()

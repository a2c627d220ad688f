"""What a controller costs on one GPU: every part of it in at most eight minutes.

    make gpu                                     with a python3 whose torch finds the device
    python -m benchmarks.gpu --json gpu.json     the same, with the rows in another file
    python -m benchmarks.gpu --rehearse --json gpu.json     the same code on a CPU: none of its numbers has a meaning

Each part runs in a process of its own with a limit of time, so that one that fails or takes too long costs the others
nothing. Its rows are kept as they come. The parts:

    reads               Synchronisations that each option adds to a step, as torch.cuda.set_sync_debug_mode shows them.
    eager, compiled     The time of a step of GPT-2 124M (AdamW, fused) and of ResNet-50 (SGD, channels last), in
                        bfloat16 by autocast, at one and at four micro-batches, as a ratio to the plain loop's. Three
                        loops take turns in random order, each with its own model. The device is synchronised only
                        before and after a turn of four steps, so a host that falls behind the device shows.
    tests               The tests that are marked gpu, where pytest is installed.
    graphs              CUDA graphs of a model, mode="reduce-overhead", and a captured backward, which is refused.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_models import Place
from benchmarks.gpu_options import graphs, reads
from benchmarks.gpu_time import timed

Row = dict[str, Any]
SECONDS = 470.0  # for all parts
HERE = Path(__file__).resolve().parent.parent
TESTS = ("tests/test_gpu.py", "tests/test_ema_model.py")


def tests(_: Place) -> Iterator[Row]:
    """The result of the tests that are marked gpu."""
    if importlib.util.find_spec("pytest") is None:
        yield {"way": "tests", "result": "pytest is missing, so the tests marked gpu did not run"}
        return
    # Without the packages for development there is no conftest, which the tests of this one file do not need on a GPU.
    files = TESTS if importlib.util.find_spec("hypothesis") else ("--noconftest", TESTS[0])
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    lines = (done.stdout or done.stderr).strip().splitlines() or ["no output"]
    yield {"way": "tests", "result": lines[-1]}
    yield from ({"way": "tests", "result": line} for line in lines if line.startswith(("FAILED", "ERROR")))


PARTS: dict[str, Callable[[Place], Iterator[Row]]] = {
    "reads": reads,
    "eager": partial(timed, compiled=False),
    "tests": tests,
    "graphs": graphs,
    "compiled": partial(timed, compiled=True),
}


def part(name: str, path: Path, *, rehearse: bool) -> None:
    """Append the rows of one part to a file, a line of JSON each."""
    warnings.simplefilter("ignore")
    with path.open("a") as file:
        for row in PARTS[name](Place(rehearse=rehearse)):
            file.write(json.dumps({"part": name, **row}) + "\n")
            file.flush()


def run(name: str, path: Path, *, seconds: float, rehearse: bool) -> None:
    """Run one part in a process of its own, and append why it ended early if it did."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--json", str(path)]
    command += ["--rehearse"] if rehearse else []
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen(command, cwd=HERE, start_new_session=True, **pipes)
    try:
        error = child.communicate(timeout=seconds)[1].strip().splitlines()
        why = f"exit status {child.returncode}: {error[-1] if error else 'no message'}" if child.returncode else ""
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # with what it has started
        child.communicate()
        why = f"stopped after {seconds:.0f} s"
    if why:
        with path.open("a") as file:
            file.write(json.dumps({"part": name, "way": name, "result": why}) + "\n")


def table(rows: list[Row]) -> str:
    """The rows as tables for docs/overhead.md."""
    lines = ["| one step | micro-batch | plain, ms | plain again | anybatch |", "|---|--:|--:|--:|--:|"]
    for row in (row for row in rows if "plain_ms" in row):
        step = f"{row['model']}, A = {row['A']}, {'compiled' if row['compiled'] else 'eager'}"
        ratios = " | ".join("{:.3f} [{:.3f}, {:.3f}]".format(*row[loop]) for loop in ("plain again", "anybatch"))
        lines.append(f"| {step} | {row['micro_batch']} | {row['plain_ms']:.1f} | {ratios} |")
    lines += ["", "| option | reads in a step | expected |", "|---|--:|--:|"]
    lines += [f"| {row['option']} | {row['reads']} | {row['expected']} |" for row in rows if "option" in row]
    return "\n".join([*lines, "", *(f"- {row['way']}: {row['result']}" for row in rows if "way" in row)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="write the rows here")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts")
    parser.add_argument("--rehearse", action="store_true", help="tiny models on a CPU")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        part(options.part, options.json, rehearse=options.rehearse)
        return
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("This torch finds no CUDA device: run it where there is one, or with --rehearse.")
    end, rows = time.monotonic() + options.seconds, list[Row]()
    head = {"device": Place(rehearse=options.rehearse).name, "torch": torch.__version__}
    print(f"{head['device']}, torch {head['torch']}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        path.touch()
        for name in PARTS:
            run(name, path, seconds=max(end - time.monotonic(), 1), rehearse=options.rehearse)
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            options.json.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
            print(f"{name}: {end - time.monotonic():.0f} s are left", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()

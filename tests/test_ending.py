"""A loop that ends before its run does: one line, and none where the run is over or an error ended it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import anybatch

PROGRAM = """
import sys, torch, anybatch
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
def main():
    controller = anybatch.attach(optimizer, model=model, total=20, base_batch=4, micro_batch=4)
    for _ in range({steps}):
        for _ in range(2):
            (model(torch.randn(4, 4)).square().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    {end}
main()
"""
CASES = {
    "a loop over steps": (5, "", True),
    "the run is over": (20, "", False),
    "no step": (0, "", False),
    "detached": (5, "controller.detach()", True),
    "detached at the end": (20, "controller.detach()", False),
    "an error": (5, "raise KeyError('a')", False),
    "an exit": (5, "sys.exit(3)", True),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_ends_early_prints_one_line(case):
    steps, end, expected = CASES[case]
    source = str(Path(anybatch.__file__).parents[1])
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(steps=steps, end=end or "pass")],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": source},
    )  # fmt: skip
    lines = [line for line in found.stderr.splitlines() if line.startswith("anybatch:")]
    assert len(lines) == expected
    for line in lines:
        assert "of 20 base iterations" in line
        assert "while not controller.done" in line
        tau = float(line.split("tau = ")[1].split(" of")[0])
        assert 5 <= tau < 20

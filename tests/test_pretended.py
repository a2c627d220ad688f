"""Trainings on a pretended GPU: the CPU's weights, the reads by the host, and the launches added to each step.

`pretended/device.py` says what is pretended. The pretence changes torch for a whole process, so it has one of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pretended import build
from pretended.cases import CASES
from pretended.rows import KEYS, of

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "overhead.md").read_text()
pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing())


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    """What each selected case and row showed."""
    selected = [each for each in request.session.items if each.path == request.path and hasattr(each, "callspec")]
    names = [each.callspec.params["name"] for each in selected]
    path = tmp_path_factory.mktemp("pretended") / "found.json"
    places = [str(TESTS), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
    command = [sys.executable, "-m", "pretended", path, *dict.fromkeys(names)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())


def shown(found, name):
    assert "error" not in found[name], found[name]["error"]
    return found[name]


@pytest.mark.parametrize("name", CASES)
def test_a_gpus_training_is_the_cpus(found, name):
    """The same weights and averages by each bit. The controller's numbers may differ in the order of a sum.

    They are near those of the operations that a CPU takes, of which those for Adam's metric are in float32.
    """
    case, training = CASES[name], shown(found, name)
    assert training["weights"] == 0
    assert training["numbers"] <= 1e-13
    assert training["off"] <= (1e-6 if "rule" in case.attach else 1e-13)
    assert training["skipped"] == case.skipped
    assert training["hazards"] == []


@pytest.mark.parametrize("name", CASES)
def test_a_step_reads_no_more_than_the_docs_say(found, name):
    """Each read synchronises: of anybatch, and of torch itself."""
    case, training = CASES[name], shown(found, name)
    own = [len(lines) for lines in training["own"]]
    expected = [case.reads[step % len(case.reads)] for step in range(case.steps)]
    assert own == [expected[0] + case.first, *expected[1:]], training["own"]
    by_torch = [every - mine for every, mine in zip(training["reads"], own, strict=True)]
    assert by_torch[2:] == [case.plain[step % len(case.plain)] for step in range(2, case.steps)]


def test_the_docs_have_the_number_of_trainings():
    assert f"In {len(CASES)} trainings" in PAGE


@pytest.mark.parametrize("name", KEYS)
def test_launches_added_to_each_backward_and_to_the_step(found, name):
    row, network = of(name)
    launched = shown(found, name)
    assert tuple(launched["added"]) == row.added[network]
    assert len(launched["own"]) == row.reads, launched["own"]
    first, second, third, last, step = row.added[network]
    assert second == third
    assert f"| {network}, {name.split(' | ')[0]} | {first} | {second} | {last} | {step} |" in PAGE

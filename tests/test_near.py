"""The table of which tests know which file, which the mutants and `make near` use."""

import subprocess
import sys
from pathlib import Path

import near
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "anybatch"
FILES = {f"{path.relative_to(PACKAGE)}" for name in near.PACKAGE for path in (PACKAGE / name).glob("[!_]*.py")}


def test_every_file_of_the_core_has_tests_and_the_table_no_others():
    assert set(near.NEAR) == FILES


@pytest.mark.parametrize("file", sorted(near.NEAR))
def test_its_tests_exist(file):
    named = near.paths(near.NEAR[file].split())
    found = [*near.of_one_process(file), *near.of_several_ranks(file)]
    assert named
    assert set(named) <= set(found)
    assert [path for path in found if not (ROOT / path).exists()] == []
    assert len(found) == len(set(found))


def test_a_file_that_is_not_in_the_table_is_named():
    command = [sys.executable, ROOT / "tests" / "near.py", "src/anybatch/_scaling/other.py"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 1
    assert "src/anybatch/_scaling/other.py is not in the table" in found.stderr

import json
import subprocess
import sys

import pytest

import anybatch

typer = pytest.importorskip("typer")
from typer.testing import CliRunner

from anybatch import cli

run = CliRunner().invoke


def test_the_package_is_the_command():
    done = subprocess.run([sys.executable, "-m", "anybatch", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"anybatch {anybatch.__version__}\n"


def test_version():
    result = run(cli.app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"anybatch {anybatch.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--scales", "0,8"], "--scales"),
        (["--scales", "8,many"], "--scales"),
        (["--scales", "1.5"], "--scales"),
        (["--rules", "adascale,best"], "--rules"),
        (["--rules", "lsw"], "--rules"),
        (["--out", "/proc/nothing/here"], "--out"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(arguments, word):
    result = run(cli.app, ["demo", *arguments])
    assert result.exit_code == 2
    assert word in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_a_small_demo(tmp_path):
    pytest.importorskip("sklearn")
    out = tmp_path / "out"
    arguments = ["demo", "--scales", "4", "--rules", "adascale,lsw", "--seeds", "2", "--total", "60", "--out", str(out)]
    for _ in range(2):  # the second run replaces the first one's records
        result = run(cli.app, arguments)
        assert result.exit_code == 0, result.output
        assert "AdaScale" in result.output
        assert str(out / "report.html") in result.output.replace("\n", "")
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert {(row["scale"], row["rule"]) for row in rows} >= {("1", "adascale"), ("4", "adascale"), ("4", "lsw")}
    lsw = next(row for row in rows if row["rule"] == "lsw")
    assert lsw["iterations"] == 15
    assert len(anybatch.read_record(out / "records" / "lsw-S4-seed1.jsonl").steps) == 15

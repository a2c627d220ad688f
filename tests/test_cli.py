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


COMMANDS = sorted(typer.main.get_command(cli.app).commands)


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_is_whole_and_has_a_short_option(command):
    texts = [run(cli.app, [*command, option], env={"COLUMNS": "80"}).output for option in ("-h", "--help")]
    assert texts[0] == texts[1]
    assert "-h, --help" in texts[0]
    assert "..." not in texts[0].replace("[ARGS]...", "").replace("[records]...", "").replace("records...", "").replace(
        "rmsprop, ...", "").replace("attach(...", "")  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_its_help(name):
    command = typer.main.get_command(cli.app).commands[name]
    assert all(each.help for each in command.params)


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["plan", "--betas-rule", "x"], '--betas-rule must be "power"'),
        (["plan", "--ema", "2"], "--ema must be"),
        (["plan", "--batch-norm-momentum", "-1"], "--batch-norm-momentum must be"),
        (["plan", "--base-batch", "0"], "--base-batch must be"),
        (["plan", "--batch", "-3"], "--batch must be"),
        (["plan", "--total", "0"], "--total must be"),
        (["plan", "--optimizer", "lion"], "--optimizer must be one of"),
        (["forecast", "--scales", ","], "--scales is empty"),
        (["forecast", "--scales", "-1"], "--scales must be"),
        (["forecast", "--per-device", "-1"], "--per-device must be"),
        (["forecast", "--seconds-per-step", "0"], "--seconds-per-step must be"),
        (["forecast", "--sync-seconds", "-1"], "--sync-seconds must be"),
        (["forecast", "--price-per-device-hour", "-1"], "--price-per-device-hour must be"),
    ],
)
def test_an_error_names_the_option_that_was_given(tmp_path, arguments, start):
    anybatch.RunRecord(tmp_path / "per_device.jsonl").close()
    given = {"plan": ["--optimizer", "sgd", "--lr", "1", "--base-batch", "8", "--batch", "16"],
             "forecast": [str(tmp_path / "per_device.jsonl")]}  # fmt: skip
    command, *others = arguments
    result = run(cli.app, [command, *given[command], *others])
    assert result.exit_code == 2
    assert result.output.startswith(start)


def test_a_files_name_is_no_option(tmp_path):
    result = run(cli.app, ["forecast", str(tmp_path / "per_device.jsonl")])
    assert "per_device.jsonl'" in result.output


def test_every_optimizer_that_plan_offers_is_planned():
    base = ["plan", "--lr", "0.01", "--base-batch", "8", "--batch", "16", "--optimizer"]
    offered = run(cli.app, [*base, "lion"]).output.partition("one of ")[2].partition(";")[0].split(", ")
    assert {"sgd", "adamw"} <= {*offered}
    for name in offered:
        result = run(cli.app, [*base, name])
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("scales", "elastic"), [((1, 8), 0), ((1, 32), 0), ((1, 128), 0), ((1, 32, 128), 2), ((1, 8, 32, 128), 2)]
)
def test_the_demo_trains_no_scale_beyond_those_given(tmp_path, scales, elastic):
    from anybatch._demo.run import Plan

    groups = Plan(scales, ("adascale",), 1, 60, 1, tmp_path).groups
    assert [each for each, _ in groups if len(each) == 1] == [(scale,) for scale in scales]
    changing = [each for each, _ in groups if len(each) > 1]
    assert len(changing) == elastic
    assert all(min(scales) <= scale <= max(scales) for each in changing for scale in each)


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
    assert {row["scale"] for row in rows} == {"1", "4"}
    lsw = next(row for row in rows if row["rule"] == "lsw")
    assert lsw["iterations"] == 15
    assert len(anybatch.read_record(out / "records" / "lsw-S4-seed1.jsonl").steps) == 15

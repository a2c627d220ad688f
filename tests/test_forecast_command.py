"""`anybatch forecast` on files, and a forecast of real runs."""

import json
import math
import subprocess
import sys
import warnings

import pytest
import torch
from torch.nn.functional import cross_entropy

import anybatch

typer = pytest.importorskip("typer")
from test_forecast import falling, recorded
from typer.testing import CliRunner

from anybatch import cli

run = CliRunner().invoke
PNG = b"\x89PNG"


def written(path, *, config=None, **values):
    """A record on disk; returns its steps."""
    source = recorded(falling(), 8, seed=0, config=config, **values)
    record = anybatch.RunRecord(path, config=source.config)
    for step in source.steps:
        record.write(step)
    record.close()
    return source.steps


def test_the_table_the_sentence_and_the_picture(tmp_path):
    written(tmp_path / "run.jsonl")
    arguments = ["forecast", str(tmp_path / "run.jsonl"), "--scales", "1,8,64", "--price-per-device-hour", "2.5",
                 "--seconds-per-step", "3600", "--per-device", "1", "--out", str(tmp_path / "plot.png")]  # fmt: skip
    result = run(cli.app, arguments, env={"COLUMNS": "140"})
    assert result.exit_code == 0, result.output
    assert "Doubling the devices pays up to scale" in result.output
    row = next(line for line in result.output.splitlines() if line.strip().startswith("1 "))
    assert [cell.strip() for cell in row.strip().split("  ") if cell.strip()] == [
        "1", "1", "1,000", "8,000", "100.0%", "41.7 d", "41.7 d", "2,500",
    ]  # fmt: skip
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)


def test_times_of_sizes_not_timed_are_ranges_in_table_json_and_picture(tmp_path):
    """A record at scale 8: half of a second a step says nothing of scale 1, whose steps take from a sixteenth on."""
    written(tmp_path / "run.jsonl")
    arguments = ["forecast", str(tmp_path / "run.jsonl"), "--scales", "1,8,64", "--price-per-device-hour", "3.6"]
    result = run(cli.app, arguments, env={"COLUMNS": "200"})
    row = next(line for line in result.output.splitlines() if line.strip().startswith("1 "))
    assert [cell.strip() for cell in row.strip().split("  ") if cell.strip()][-3:] == [
        "62.5 s to 8.33 min", "62.5 s to 8.33 min", "0.0625 to 0.5",
    ]  # fmt: skip
    rows = [line for line in result.output.splitlines() if line.strip()[:2] in ("8 ", "64")]
    assert len(rows) == 2
    assert not any(" to " in row.partition("%")[2] for row in rows)
    assert "ranges at scale 1:" in result.output
    found = json.loads(run(cli.app, [*arguments, "--json"]).output)
    assert found["scales"][0]["step_seconds"] == {"value": pytest.approx(0.5 / 8**0.5), "low": 0.0625, "high": 0.5}
    assert found["scales"][0]["seconds"]["high"] == pytest.approx(500)
    assert "ranges at scale 1:" in found["notes"][-1]
    for scales, wide in (("1,8", True), ("8,64", False)):
        picture = tmp_path / "plot.svg"
        run(cli.app, [*arguments[:3], scales, "--out", str(picture)])
        assert ("steps of a size not timed" in picture.read_text()) == wide


def test_json_is_what_the_function_returns(tmp_path):
    path = tmp_path / "run.jsonl"
    written(path, seconds=math.nan)
    result = run(cli.app, ["forecast", str(path), "--scales", "2,16", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output, parse_constant=lambda name: pytest.fail(name))
    forecast = anybatch.forecast(str(path), [2, 16])
    assert found["critical"]["value"] == forecast.critical.value
    assert [s["steps"]["high"] for s in found["scales"]] == [s.steps.high for s in forecast.scales]
    assert found["scales"][0]["seconds"]["value"] is None
    result = run(cli.app, ["forecast", str(path), "--out", str(tmp_path / "plot.svg")])
    assert result.exit_code == 0, result.output
    assert "--seconds-per-step" in result.output.replace("\n", " ")
    assert "wall time" not in result.output.splitlines()[1]
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")


def _bad_files(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "foreign.jsonl").write_bytes(b"\x00\xff\n{}\n[1]\n")
    anybatch.RunRecord(tmp_path / "bare.jsonl").close()
    written(tmp_path / "blind.jsonl", raw_variance=math.nan, raw_sqnorm=math.nan)
    (tmp_path / "newer.jsonl").write_text('{"kind": "header", "version": 99, "config": {}}\n')
    written(tmp_path / "good.jsonl")
    good = (tmp_path / "good.jsonl").read_text()
    (tmp_path / "falling.jsonl").write_text(good.replace('"step": 31, "tau": ', '"step": 31, "tau": 9, "was": '))
    (tmp_path / "folder").mkdir()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["empty.jsonl"], "not an anybatch record"),
        (["foreign.jsonl"], "not an anybatch record"),
        (["missing.jsonl"], "missing.jsonl"),
        (["folder"], "folder"),
        (["bare.jsonl"], "no step"),
        (["blind.jsonl"], "two or more gradients"),
        (["newer.jsonl"], "99"),
        (["good.jsonl", "--scales", "0,8"], "scales"),
        (["good.jsonl", "--scales", "8,many"], "--scales"),
        (["good.jsonl", "--scales", "nan"], "scales"),
        (["good.jsonl", "--scales", ","], "scales"),
        (["good.jsonl", "--per-device", "-1"], "--per-device"),
        (["good.jsonl", "--seconds-per-step", "0"], "--seconds-per-step"),
        (["good.jsonl", "--sync-seconds", "1e300"], "--sync-seconds must be between 0 and 1e+12"),
        (["falling.jsonl"], "step 31: tau = 9 is less than in the step before"),
        (["good.jsonl", "--out", "/proc/nothing/here.png"], "--out"),
        (["good.jsonl", "--out", "plot.xyz"], "--out"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(tmp_path, monkeypatch, arguments, word):
    _bad_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    result = run(cli.app, ["forecast", *arguments])
    assert result.exit_code == 2, result.output
    assert word in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_without_matplotlib_only_pictures_are_missing(tmp_path, monkeypatch):
    written(tmp_path / "run.jsonl")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(cli.app, ["forecast", str(tmp_path / "run.jsonl")]).exit_code == 0
    for command in ("forecast", "report"):
        result = run(cli.app, [command, str(tmp_path / "run.jsonl"), "--out", str(tmp_path / "out.png")])
        assert result.exit_code == 2, result.output
        assert len(result.output.strip().splitlines()) == 1
        assert "anybatch[report]" in result.output
    code = "import sys; import anybatch._report; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_torn_and_repeated_lines_change_nothing_but_the_note(tmp_path):
    path = tmp_path / "run.jsonl"
    steps = written(path)
    clean = anybatch.forecast(path, [32]).scales[0].steps
    lines = path.read_bytes().splitlines(keepends=True)
    lines[41:41] = lines[40:41] * 2  # written twice
    lines[100] = lines[100][:50] + b"\n"  # cut
    lines[120:123] = [b"\x00" * 300 + b"\n"]
    path.write_bytes(b"".join(lines))
    found = anybatch.forecast(path, [32])
    assert any("could not be read" in note for note in found.notes)
    assert found.scales[0].steps.value == pytest.approx(clean.value, rel=0.05)
    resumed = anybatch.RunRecord(path, config={"total": 1000})
    for step in steps[len(steps) // 2 :]:  # from a checkpoint in the middle: every line after it is there twice
        resumed.write(step)
    resumed.close()
    assert anybatch.forecast(path, [32]).scales[0].steps.value == pytest.approx(clean.value, rel=0.05)


@pytest.mark.parametrize("half", [False, True])
def test_a_real_run_forecasts_another(tmp_path, half):
    """The digits at scale 4, or at scale 1 in two halves, say how many steps scale 16 takes."""
    pytest.importorskip("sklearn")
    from anybatch._demo.digits import digits, gradients, network

    x, y, _, _ = digits()
    total, base = 800, 16

    def train(scale, *, parts, record=None):
        net = network(0)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / total))
        controller = anybatch.attach(
            optimizer, model=net, scheduler=schedule, total=total, base_batch=base,
            micro_batch=scale * base / parts, record=record,
        )  # fmt: skip
        order = torch.Generator().manual_seed(scale)
        while not controller.done:
            rows = torch.randint(len(x), (parts, scale * base // parts), generator=order)
            controller.observe(gradients(net, x[rows], y[rows]))
            optimizer.step()
            optimizer.zero_grad()
        controller.detach()
        with torch.no_grad():
            assert cross_entropy(net(x), y) < 0.3
        return controller.steps

    path = tmp_path / "run.jsonl"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        taken = train(1, parts=2, record=path) if half else train(4, parts=4, record=path)
        real = train(16, parts=16)
    found = anybatch.forecast(path, [1 if half else 4, 16])
    own, other = (s.steps for s in found.scales)
    assert own.low <= taken <= own.high
    assert other.value == pytest.approx(real, rel=0.2 if half else 0.12)
    assert other.low <= real <= other.high
    assert 0 < found.scales[0].seconds.value < 600


def test_a_narrow_terminal_gets_two_tables_that_do_not_wrap(tmp_path):
    written(tmp_path / "run.jsonl")
    arguments = ["forecast", str(tmp_path / "run.jsonl"), "--scales", "1,8,64", "--price-per-device-hour", "2.5",
                 "--seconds-per-step", "3600", "--per-device", "1"]  # fmt: skip
    tables = {}
    for columns in (80, 140):
        result = run(cli.app, arguments, env={"COLUMNS": str(columns)})
        rows = [line.split() for line in result.output.splitlines() if line.strip()[:2] in ("1 ", "8 ", "64", "sc")]
        drawn = result.output.partition("base iterations")[0]
        assert max(map(len, drawn.splitlines())) <= columns
        tables[columns] = rows
    assert len(tables[140]) == 4
    assert len(tables[80]) == 8
    assert [first + second[1:] for first, second in zip(tables[80][:4], tables[80][4:], strict=True)] == tables[140]
    assert "…" not in result.output

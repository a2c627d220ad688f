"""`anybatch report`: what the page says of records, and that hostile ones stay inert."""

import json
import math
from pathlib import Path

import pytest

import anybatch
from anybatch._record import MetricRecord
from anybatch._report.comparison import compare
from anybatch._report.report import report
from anybatch._report.summary import summarise

typer = pytest.importorskip("typer")
from test_forecast import falling, recorded
from test_report import Tags
from typer.testing import CliRunner

from anybatch import cli

run = CliRunner().invoke
NAMES = ["<\u2215script><script>alert(1)<", "<img src=x onerror=alert(1)>", "=cmd|' C'!A0", "a\x01\x1b[31m",
         "\udcff\udc80", "..x..", "x" * 200, "\u202egnp.evil", "$\\frac{1}{0}$ $$", "{title} {0} %s",
         "\nline\ttab", "'\"&amp;"]  # fmt: skip


def written(path, *, scale=8, metrics=(), header=None, config=None, count=None, **values):
    """A record on disk of a made-up run; returns it as it should be read."""
    source = recorded(falling(), scale, seed=scale, config=config, **values)
    record = anybatch.RunRecord(path, config={"rule": "AdaScale()", **source.config, **(header or {})})
    for step in source.steps[:count]:
        record.write(step)
    for step, tau, results in metrics:
        record.write(MetricRecord(step, tau, results))
    record.close()
    return anybatch.read_record(path)


def cells(text, name):
    """The cells of the first table's row that begins with `name`."""
    row = next(part for part in text.split("<tr") if f">{name}</td>" in part)
    return [cell.rpartition(">")[2] for cell in row.split("</td>")][:-1]


def test_the_table_says_what_the_record_says(tmp_path):
    metrics = [(10, 20.0, {"accuracy": 0.5}), (50, 90.0, {"accuracy": 0.875, "loss": math.nan})]
    source = written(tmp_path / "a.jsonl", metrics=metrics, header={"base_batch": 32})
    written(tmp_path / "b.jsonl", scale=2, count=3)
    text = report([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    found = cells(text, "a")
    gain = sum(step.gain for step in source.steps) / len(source.steps)
    assert found[1:7] == ["AdaScale", "8", "0.875", "nan", f"{len(source.steps):,}", f"{gain:.3g}"]
    examples = len(source.steps) * 8 * 32
    assert found[7] == f"{gain / 8:.0%}"  # of an example at scale 1
    assert found[8] in (str(examples), f"{examples / 1000:.4g}k")
    assert found[-2:] == ["0", "0"]
    assert cells(text, "b")[3:6] == ["–", "–", "3"]
    assert "1 of 2 runs reached the end" in text


def test_forecasts_are_those_of_the_function(tmp_path):
    runs = {(s, i): written(tmp_path / f"{s}-{i}.jsonl", scale=s) for s, i in ((2, 0), (8, 0), (8, 1), (32, 0))}
    written(tmp_path / "other.jsonl", scale=16, header={"task": "another"})
    [found] = compare(summarise(sorted(tmp_path.glob("*.jsonl"))))
    assert list(found.happened) == [2, 8, 32]
    assert found.counts == {2: 1, 8: 2, 32: 1}
    assert found.happened[8] == (len(runs[8, 0].steps) + len(runs[8, 1].steps)) / 2
    from_32 = next(forecasts for source, forecasts in found.forecasts if source.scale == 32)
    real = anybatch.forecast(tmp_path / "32-0.jsonl", [2, 8, 32]).scales
    assert {s: e.value for s, e in from_32.items()} == {s.scale: s.steps.value for s in real[:2]}
    assert "Forecast and steps taken" in report(sorted(tmp_path.glob("*.jsonl")))


def test_runs_come_by_batch_and_numbers_in_names_are_numbers(tmp_path):
    for name, scale in (("bs16", 1), ("bs128-seed10", 8), ("bs128-seed9", 8), ("bs512", 32), ("a", 32)):
        written(tmp_path / f"{name}.jsonl", scale=scale, count=5, header={"base_batch": 16})
    anybatch.RunRecord(tmp_path / "0.jsonl").close()
    found = [run.name for run in summarise(sorted(tmp_path.glob("*.jsonl")))]
    assert found == ["bs16", "bs128-seed9", "bs128-seed10", "a", "bs512", "0"]


def test_how_far_from_scale_1_is_drawn_for_each_rule(tmp_path):
    for i, (scale, rule) in enumerate(((1, "AdaScale()"), (8, "AdaScale()"), (8, "Linear()"))):
        metrics = [(k, 100.0 * k, {"loss": i + 1 / k}) for k in range(1, 9)]
        written(tmp_path / f"{i}.jsonl", scale=scale, count=9, metrics=metrics, header={"rule": rule})
    text = report(sorted(tmp_path.glob("*.jsonl")))
    apart = text.partition("Difference from scale 1</h2>")[2].partition("<h2>")[0]
    assert apart.count('<svg class="chart"') == 2
    assert "loss: difference from scale 1, AdaScale" in apart
    assert "S = 8\n1 at tau (base iterations) 800" in apart
    assert "S = 8\n2 at tau (base iterations) 800" in apart
    assert "How far" not in report([tmp_path / "1.jsonl", tmp_path / "2.jsonl"])


def test_what_cannot_be_compared_is_not(tmp_path):
    written(tmp_path / "blind-2.jsonl", scale=2, raw_variance=math.nan, raw_sqnorm=math.nan)
    written(tmp_path / "blind-8.jsonl", scale=8, raw_variance=math.nan, raw_sqnorm=math.nan)
    written(tmp_path / "linear.jsonl", scale=32, header={"rule": "Linear()"})
    paths = sorted(tmp_path.glob("*.jsonl"))
    assert compare(summarise(paths)) == []
    assert "Nothing to compare" in report(paths)


def test_what_differs_is_found(tmp_path):
    for i, lr in enumerate((0.1, 0.1, 0.25)):
        groups = [{"lr": lr, "momentum": 0.9}]
        written(tmp_path / f"{i}.jsonl", count=2, header={"param_groups": groups, "data": {"shuffle": i}})
    paths = sorted(tmp_path.glob("*.jsonl"))
    text = report(paths).partition("What differs")[2]
    differs, _, same = text.partition("<details>")
    assert cells(differs, r"param_groups[0].lr")[1:] == ["0.1", "0.1", "0.25"]
    assert cells(differs, "data.shuffle")[1:] == ["0", "1", "2"]
    assert "momentum" not in differs
    assert cells(same, "param_groups[0].momentum")[1:] == ["0.9"]
    (tmp_path / "more").mkdir()
    more = [tmp_path / "more" / f"{i}.jsonl" for i in range(5)]
    for path in more:
        written(path, count=2, header={"param_groups": [{"lr": 0.1, "momentum": 0.9}]})
    differs = report([*paths, *more]).partition("What differs")[2].partition("<details>")[0]
    assert "0.1 (7 runs), 0.25 (" in cells(differs, "param_groups[0].lr")[1]
    assert ">more/0<" in report([*paths, *more])


def test_runs_without_steps(tmp_path):
    anybatch.RunRecord(tmp_path / "empty.jsonl").close()
    step = recorded(falling(), 8, seed=0).steps[0]
    record = anybatch.RunRecord(tmp_path / "skipped.jsonl", config={"rule": "AdaScale()", "total": 100})
    for _ in range(3):
        record.write(anybatch.StepRecord(**{**vars(step), "step": 0, "skipped": True, "gain": math.nan, "tau": 0.0}))
    record.close()
    with open(tmp_path / "skipped.jsonl", "ab") as file:
        file.write(b'{"kind": "step", "st')
    text = report([tmp_path / "empty.jsonl", tmp_path / "skipped.jsonl"])
    assert cells(text, "skipped")[-2:] == ["3", "1"]
    assert text.count('class="marked"') == 2
    assert "Nothing to draw" in text
    assert "<figure" not in report([tmp_path / "empty.jsonl"])


def test_fifty_runs_and_several_tasks(tmp_path):
    for i in range(50):
        header = {"rule": "Linear()", "task": f"task {i % 2}", "parameters": 10}
        written(tmp_path / f"{i}.jsonl", scale=1 + i // 2, count=10, header=header)
    text = report(sorted(tmp_path.glob("*.jsonl")))
    tags = Tags(text)
    assert tags.text.count("Curves: task 0, 10 parameters") == tags.text.count("Curves: task 1, 10 parameters") == 1
    legends = text.split('<ul class="legend">')[1:]
    assert len(legends) == 2
    assert all(legend.partition("</ul>")[0].count("<li>") == 9 for legend in legends)  # eight and what is left out
    assert text.count('<svg class="chart"') == 2 * 6


def test_hostile_names_are_inert(tmp_path):
    for i, name in enumerate(NAMES):
        header = {"task": name, name: [{name: name}], "rule": name if i % 2 else "AdaScale()", "parameters": 10**400,
                  "base_batch": name, "total": 10**400 if i % 3 else name}  # fmt: skip
        values = [(i, float(i), {name: v}) for i, v in enumerate((1.0, math.inf, 1e300, -1e300, 5e-324))]
        written(tmp_path / f"{name}.jsonl", count=30, metrics=values, header=header)
    before = sorted(tmp_path.iterdir())
    tags = Tags(report(before))
    assert set(tags.tags) <= {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "table",
                              "thead", "tbody", "tr", "th", "td", "ul", "li", "svg", "path", "g", "text", "figure",
                              "figcaption", "details", "summary"}  # fmt: skip
    assert not any(name.startswith("on") or name in ("id", "src", "href") for name, _ in tags.attributes)
    text = "".join(tags.text)
    assert "<img src=x onerror=alert(1)>" in text
    assert "\\u202egnp.evil" in text
    assert not set(text) & set("\x00\x01\x1b\u202e\udcff")
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_writes_the_page_and_nothing_else(tmp_path):
    written(tmp_path / "a.jsonl", count=5)
    out = tmp_path / "page.html"
    for _ in range(2):
        result = run(cli.app, ["report", str(tmp_path / "a.jsonl"), "--out", str(out)])
        assert result.exit_code == 0, result.output
        assert str(out) in result.output.replace("\n", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "page.html"]
    assert out.read_text().startswith("<!doctype html>")


def test_json_has_the_numbers_of_the_page_and_writes_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "a.jsonl", count=5)
    (tmp_path / "foreign.jsonl").write_text("{}")
    result = run(cli.app, ["report", "a.jsonl", "foreign.jsonl", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout, parse_constant=pytest.fail)
    [row] = found["runs"]
    counted = [step for step in anybatch.read_record("a.jsonl").steps if not step.skipped]
    assert (row["record"], row["iterations"], row["torn"]) == ("a.jsonl", len(counted), 0)
    assert row["tau"] == counted[-1].tau
    assert row["gain"] == pytest.approx(sum(step.gain for step in counted) / len(counted))
    assert "foreign.jsonl" in found["unread"][0]
    assert found["comparisons"] == []
    assert not (tmp_path / "report.html").exists()


def _bad(tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "foreign").write_bytes(b"\x00\xff\n{}\n[1]\n")
    (tmp_path / "newer").write_text('{"kind": "header", "version": 99, "config": {}}\n')
    written(tmp_path / "good", count=3)
    return [["empty"], ["foreign"], ["newer"], ["none"], ["."], [], ["empty", "foreign"],
            ["good", "--out", "good"], ["good", "--out", "."], ["good", "--out", "none/page.html"],
            ["good", "--out", "good/page.html"], ["good", "--out", "x" * 300],
            ["good", "--out", "/proc/page.html"], ["good", "--out", "/dev/null"]]  # fmt: skip


@pytest.mark.parametrize("case", range(14))
def test_what_goes_wrong_is_one_clear_line_and_exit_code_2(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    arguments = _bad(tmp_path)[case]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    result = run(cli.app, ["report", *arguments])
    assert result.exit_code == 2, result.output
    assert len(result.output.strip().splitlines()) == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_record_that_cannot_be_read_does_not_keep_the_others_off_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _bad(tmp_path)
    (tmp_path / "circle").symlink_to("circle")
    result = run(cli.app, ["report", "empty", "good", "newer", "circle", "--out", "page.html"])
    assert result.exit_code == 0, result.output
    said = result.stderr.splitlines()
    text = " ".join(Tags((tmp_path / "page.html").read_text()).text)
    for name, why in (("empty", "not an anybatch record"), ("newer", "upgrade anybatch"), ("circle", "ymbolic link")):
        assert sum(f"{name}'" in line and why in line for line in said) == 1
        assert f"{name}'" in text
        assert why in text
    assert len(said) == 3
    assert "3 records are not on this page" in text
    assert cells((tmp_path / "page.html").read_text(), "good")[1] == "AdaScale"


def test_a_page_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    written(tmp_path / "a.jsonl", count=3)
    out = tmp_path / "page.html"
    out.write_text("<!doctype html>old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    result = run(cli.app, ["report", str(tmp_path / "a.jsonl"), "--out", str(out)])
    assert (result.exit_code, out.read_text()) == (2, "<!doctype html>old")
    assert "No space left" in result.output
    assert len(list(tmp_path.iterdir())) == 2

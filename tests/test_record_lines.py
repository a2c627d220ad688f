"""Lines of records: plain ones and all others read alike, as steps and as columns; a new field needs its default."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from test_record import step

import anybatch
from anybatch._record import MetricRecord, read_columns
from anybatch._record.lines import parsed
from anybatch._scaling import Moments

ROOT = Path(__file__).parents[1]
NUMBERS = [field.name for field in dataclasses.fields(anybatch.StepRecord) if field.type in (int, float, bool)]


def line_of(tmp_path_factory, *lines):
    """The bytes of the lines of a record, its header first."""
    path = tmp_path_factory.mktemp("lines") / "r.jsonl"
    record = anybatch.RunRecord(path)
    for line in lines:
        record.write(line)
    record.close()
    return path.read_bytes().splitlines(keepends=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    layers = {"a": Moments(1.5, -2e-7)}
    values = {"tau": 1.5e-7, "gain": math.nan, "lr": -0.0, "noise_scale": 1e300, "seconds": 123456.789}
    return line_of(tmp_path_factory, step(3, **values), step(4, per_layer=layers), step(0, skipped=True))[1:]


# ---- plain lines ----

TEXTS = [
    "-0", "-0.0", "0", "00", "05", "-05", "5.", ".5", "-.5", "+5", "1e5", "1E5", "1e+5", "1e-5", "1.5e05", "1e400",
    "-1e400", "1e99",
    "1e+99", "1e-400", "1e", "1e+", "1_0", "nan", "NaN", "Infinity", "-Infinity", "-", "", " 1", "1 ", "0x1", "--1",
    "9007199254740993", "123456789012345678", "1234567890123456789", "9" * 40, "9" * 400, "0." + "3" * 400, "true",
    "false",
    "null", "Null", '"3"', "[]", "{}", "{", '{"a": [1, 2]}', '{"a": [1, "2"]}', '{"a": [1, 2]}, "b": {}', '{"a": 1}}',
    "1, 2", "١",
]  # fmt: skip


def same(text):
    """A line reads like itself with one more space, which no plain line has and JSON passes over."""
    found = parsed(text)
    spaced = text.replace(b'{"kind"', b'{ "kind"', 1)
    assert spaced != text
    assert repr(found) == repr(parsed(spaced))
    return found


@pytest.mark.parametrize("name", [*NUMBERS, "per_layer"])
def test_a_value_of_a_plain_line_is_that_of_json(plain, name):
    kept = 0
    for text in plain:
        for value in TEXTS:
            changed = re.sub(rf'"{name}": ([^,}}]*|{{.*}})([,}}])', rf'"{name}": {value}\2', text.decode(), count=1)
            found = same(changed.encode())
            kept += found is not None
            if found is not None and name != "per_layer":
                expected, value = json.loads(changed)[name], getattr(found, name)
                finite = isinstance(expected, int) or (expected is not None and math.isfinite(expected))
                assert repr(value) == repr(type(value)(expected) if finite else math.nan)
    assert 0 < kept < len(TEXTS) * len(plain)


@given(st.data())
def test_a_damaged_plain_line_is_read_as_json_reads_it(plain, data):
    text = bytearray(data.draw(st.sampled_from(plain)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(10, len(text) - 1))
        kind = data.draw(st.sampled_from(["cut", "insert", "put"]))
        new = data.draw(st.sampled_from([*b'0123456789.-+eE,:{}[]" \nlnut\xff\x00']))
        if kind == "cut":
            del text[at]
        else:
            text[at : at + (kind == "put")] = bytes([new])
    same(bytes(text))


@pytest.mark.parametrize("end", [b"\n", b"", b"\r\n", b" \n", b"\n\n", b"}\n", b",\n"])
def test_the_end_of_a_line(plain, end):
    for text in plain:
        assert (same(text.rstrip() + end) is None) == (b"}" in end or b"," in end)


# ---- columns ----


@given(
    st.lists(st.sampled_from(["plain", "spaced", "layers", "skipped", "torn", "metric", "header"]), max_size=40),
    st.integers(1, 5),
)
@example(["header"], 1)
def test_columns_are_the_values_of_the_steps(tmp_path_factory, kinds, block):
    """Whatever the order of plain lines and others, and of starts that go back."""
    path, count = tmp_path_factory.mktemp("columns") / "r.jsonl", 0
    record = anybatch.RunRecord(path, config={"ranks": 1})
    for i, kind in enumerate(kinds):
        if kind == "header":
            record.begin({"ranks": i})
            count = max(0, count - 2)
        elif kind == "torn":
            with path.open("ab") as file:
                file.write(b'{"kind": "step", "step": 1, "tau"\n')
        elif kind == "metric":
            record.write(MetricRecord(count, float(i), {"x": 1.0}))
        else:
            count += kind != "skipped"
            values = {"layers": {"per_layer": {"a": Moments(1.0, 2.0)}}, "skipped": {"skipped": True}}
            line = step(count, tau=float(i), gain=math.nan if i % 3 else 2.0, **values.get(kind, {}))
            record.write(line)
            if kind == "spaced":
                data = path.read_bytes()
                at = data.rindex(b'{"kind"')
                path.write_bytes(data[:at] + b" " + data[at:])
    record.close()
    run = anybatch.read_record(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anybatch._record.read._BLOCK", block)
        found = read_columns(path, NUMBERS)
    for name in NUMBERS:
        expected = [float(getattr(line, name)) for line in run.steps]
        assert repr(found[name].tolist()) == repr(expected)
    assert found.measured_by_layer == [line for line in run.steps if line.per_layer]
    for name in ("config", "torn", "metrics", "header", "ranks"):
        assert getattr(found, name) == getattr(run, name)


@pytest.mark.parametrize("number", [2**53, 2**53 + 1, 10**400])
def test_a_number_of_steps_beyond_all_floats_ends_at_the_last_whole_one(tmp_path, number):
    record = anybatch.RunRecord(tmp_path / "r.jsonl")
    record.write(step(number))
    assert read_columns(tmp_path / "r.jsonl", ["step"])["step"].tolist() == [2.0**53]


def test_a_column_takes_eight_bytes_a_step(tmp_path):
    record, peaks = anybatch.RunRecord(tmp_path / "r.jsonl"), []
    for n in range(1, 30_001):
        record.write(step(n))
        if n in (10_000, 30_000):
            tracemalloc.start()
            read_columns(tmp_path / "r.jsonl", ["step", "tau"])
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[1] - peaks[0] < 1.25 * 8 * 2 * 20_000  # an array grows by a share of itself


# ---- a new field ----


def test_a_number_is_added_to_the_record_as_contributing_says(tmp_path):
    """A field with its default, and its value: the changed package reads older records and writes the number."""
    [says] = re.findall(
        r"- \*\*a number in the record\*\*: (.*?)\n- ", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL
    )
    record_file, tally_file = re.findall(r"`(src/\S+\.py)`", says)
    assert "default" in says
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for file, before, new in (
        (record_file, "    per_layer: Mapping[str, Moments] = ", "    temperature: float = nan\n"),
        (tally_file, "            per_layer={} if skipped", "            temperature=36.5,\n"),
    ):
        text = (tmp_path / file).read_text()
        assert text.count(before) == 1
        (tmp_path / file).write_text(text.replace(before, new + before))
    record = anybatch.RunRecord(tmp_path / "old.jsonl")
    for n in range(1, 6):
        record.write(step(n))
    record.close()
    code = """
        import math, torch, anybatch
        old = anybatch.read_record("old.jsonl")
        assert (len(old.steps), old.torn) == (5, 0), old
        assert all(math.isnan(line.temperature) and line.tau == 1.5 for line in old.steps)
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        anybatch.attach(optimizer, model=model, scale="count", record="new.jsonl")
        for _ in range(3):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        new = anybatch.read_record("new.jsonl")
        assert ([line.temperature for line in new.steps], new.torn) == ([36.5] * 3, 0), new
        print("read")
    """
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
    command = [sys.executable, "-c", "\n".join(line.removeprefix(8 * " ") for line in code.splitlines())]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.stdout == "read\n", result.stderr[-2000:]
    assert len(anybatch.read_record(tmp_path / "new.jsonl").steps) == 3  # and this one passes over the new number


@pytest.mark.parametrize("field", dataclasses.fields(anybatch.StepRecord), ids=lambda field: field.name)
def test_a_line_may_lack_what_has_a_default_and_nothing_else(plain, field):
    line = json.loads(plain[0])
    line.pop(field.name, None)
    found = parsed(json.dumps(line).encode())
    required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    assert (found is None) == required
    same(json.dumps(line).encode())

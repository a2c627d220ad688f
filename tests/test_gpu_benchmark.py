"""`benchmarks.gpu` on a CPU: its tiny form, and that a part that fails costs the others nothing."""

import json
import sys

import pytest
import torch

from benchmarks import gpu, gpu_options
from benchmarks.gpu_models import GPT2, MODELS, ResNet50


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.jsonl"


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["eager", "compiled"])
def test_each_model_has_a_ratio_at_one_and_at_four_micro_batches(path, name):
    gpu.part(name, path, rehearse=True)
    found = rows(path)
    assert [(row["model"], row["A"]) for row in found] == [(model, a) for model in MODELS for a in (4, 1)]
    for row in found:
        median, low, high = row["anybatch"]
        assert 0 < low <= median <= high
        assert row["turns"] == 2
        assert row["compiled"] == (name == "compiled")


@pytest.mark.filterwarnings("ignore")
def test_each_option_trains_and_is_counted(path):
    gpu.part("reads", path, rehearse=True)
    assert {row["option"]: row["expected"] for row in rows(path)} == {
        option: expected for option, (_, _, expected) in gpu_options.READS.items()
    }
    assert {row["reads"] for row in rows(path)} == {0}  # a CPU never synchronises


@pytest.mark.parametrize("option", gpu_options.READS)
def test_the_docs_have_the_reads_of_each_option(option):
    assert f"| {option} | {gpu_options.READS[option][2]} |" in (gpu.HERE / "docs" / "overhead.md").read_text()


@pytest.mark.filterwarnings("ignore")
def test_a_way_that_fails_shows_why(path):
    gpu.part("graphs", path, rehearse=True)
    found = {row["way"]: row["result"] for row in rows(path)}
    assert len(found) == 3
    assert "at most 0.0e+00" in found['torch.compile(mode="reduce-overhead")']
    assert "CUDA" in found["torch.cuda.make_graphed_callables"]


def test_a_part_that_takes_too_long_or_fails_is_named(path, monkeypatch):
    gpu.run("eager", path, seconds=0.01, rehearse=True)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    gpu.run("eager", path, seconds=10, rehearse=True)
    assert [row["result"] for row in rows(path)] == ["stopped after 0 s", "exit status 1: no message"]


def test_without_pytest_the_rest_goes_on(monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda _: None)
    (row,) = gpu.tests(None)
    assert "pytest is missing" in row["result"]


def test_the_command_writes_the_rows_and_prints_the_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "--rehearse", "--json", str(tmp_path / "gpu.json")])
    monkeypatch.setattr(gpu, "PARTS", {name: gpu.PARTS[name] for name in ("reads",)})
    gpu.main()
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert len(written["rows"]) == len(gpu_options.READS)
    assert written["torch"] == torch.__version__
    assert "| exact | 0 | 1 |" in capsys.readouterr().out
    time = {"part": "eager", "model": "m", "A": 4, "micro_batch": 8, "compiled": False, "plain_ms": 1.25}
    time |= {"plain again": [1, 0.9, 1.1], "anybatch": [1.02, 1.01, 1.03]}
    assert "| m, A = 4, eager | 8 | 1.2 | 1.000 [0.900, 1.100] | 1.020 [1.010, 1.030] |" in gpu.table([time])


def test_without_a_device_the_command_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "--json", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main()


@pytest.mark.parametrize(("make", "parameters", "tensors"), [(GPT2, 124_439_808, 148), (ResNet50, 25_557_032, 161)])
def test_the_models_have_the_published_sizes(make, parameters, tensors):
    with torch.device("meta"):
        model = make()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(list(model.parameters())) == tensors

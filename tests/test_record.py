import dataclasses
import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch

import anybatch


def step(i, **values):
    names = [field.name for field in dataclasses.fields(anybatch.StepRecord)]
    return anybatch.StepRecord(**{**dict.fromkeys(names, 1.5), "step": i, "count": 2, "skipped": False, **values})


def test_round_trip_and_resume(tmp_path):
    path = tmp_path / "folder" / "run.jsonl"
    record = anybatch.RunRecord(path, config={"lr": 0.1, "names": ("a", "b"), "path": path, "rate": math.inf})
    record.write(step(1))
    record.close()
    record.close()
    again = anybatch.RunRecord(path, config={"lr": 0.2})
    again.write(step(2, gain=math.nan))
    again.close()
    run = anybatch.read_record(path)
    assert run.config == {"lr": 0.1, "names": ["a", "b"], "path": str(path), "rate": None}
    assert run.steps[0] == step(1)
    assert math.isnan(run.steps[1].gain)
    assert run.torn == 0
    header = json.loads(path.read_text().splitlines()[0])
    assert header["torch"] == torch.__version__
    assert header["anybatch"] == anybatch.__version__


def test_every_line_is_strict_json(tmp_path):
    record = anybatch.RunRecord(tmp_path / "r.jsonl")
    record.write(step(1, noise_scale=math.inf, gain=math.nan, lr=-math.inf))
    for line in (tmp_path / "r.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize("cut", [1, 30, 150])
def test_a_torn_last_line_is_passed_over_and_a_resume_starts_on_a_new_one(tmp_path, cut):
    path = tmp_path / "r.jsonl"
    record = anybatch.RunRecord(path)
    record.write(step(1))
    record.write(step(2))
    record.close()
    os.truncate(path, path.stat().st_size - cut)
    run = anybatch.read_record(path)
    assert ([s.step for s in run.steps], run.torn) in [([1], 1), ([1, 2], 0)]  # cutting the newline alone tears nothing
    record = anybatch.RunRecord(path)
    record.write(step(3))
    assert anybatch.read_record(path).steps[-1].step == 3


def test_a_killed_process_loses_nothing_that_it_wrote(tmp_path):
    path = tmp_path / "r.jsonl"
    code = f"""
import anybatch, itertools, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_record import step
record = anybatch.RunRecord({str(path)!r})
for i in itertools.count(1):
    record.write(step(i))
    print(i, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for _ in range(50):
        last = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    process.wait()
    steps = [s.step for s in anybatch.read_record(path).steps]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= last


@pytest.mark.parametrize("content", ["", "not json\n", '{"kind": "step"}\n', "[1, 2]\n", "\x00\xff\n"])
def test_foreign_files_are_refused(tmp_path, content):
    (tmp_path / "r.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(anybatch.InvalidValueError, match="not an anybatch record"):
        anybatch.read_record(tmp_path / "r.jsonl")


def test_newer_records_are_refused(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"kind": "header", "version": 99, "config": {}}\n')
    with pytest.raises(anybatch.StateError, match="99"):
        anybatch.read_record(tmp_path / "r.jsonl")


def test_a_run_is_recorded_as_it_happened(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    path = tmp_path / "r.jsonl"
    controller = anybatch.attach(
        optimizer, model=model, scheduler=scheduler, base_batch=4, micro_batch=8, total=100, record=path
    )
    expected = []
    for t in range(4):
        base = optimizer.param_groups[0]["lr"]
        factor = math.inf if t == 2 else 1.0
        for _ in range(3):
            (factor * model(torch.randn(8, 4)).square().mean() / 3).backward()
        kept = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        if t == 2:
            with torch.no_grad():
                for p, k in zip(model.parameters(), kept, strict=True):
                    p.copy_(k)
        else:
            expected.append((controller.gain, controller.tau, base * controller.gain, controller.noise_scale))
    run = anybatch.read_record(path)
    done = [s for s in run.steps if not s.skipped]
    assert [(s.gain, s.tau, s.lr, s.noise_scale) for s in done] == [pytest.approx(e) for e in expected]
    assert [s.skipped for s in run.steps] == [False, False, True, False]
    assert all((s.scale, s.count) == (6, 3) for s in run.steps)
    assert run.config["optimizer"] == "SGD"
    assert "AdaScale" in run.config["rule"]
    assert (run.config["base_batch"], run.config["total"]) == (4, 100)

"""The examples run as they stand, by public names alone, and come to what they say."""

import ast
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import Processes, script, torchrun

import anybatch

pytest.importorskip("sklearn")

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
SECONDS = 1800  # for a hang alone: the two starts of Ray have taken 800 on two cores with fifteen processes


def run(name, *options, ranks=0, folder):
    """The last line that the example prints, as JSON; under torchrun with `ranks`. In fresh processes, as a user's."""
    source = str(Path(anybatch.__file__).parents[1])
    paths = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    found = subprocess.run(
        [sys.executable, *launcher, str(FOLDER / f"{name}.py"), *map(str, options)],
        capture_output=True, text=True, cwd=folder, timeout=SECONDS, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout.strip().splitlines()[-1])


def forked(name, *options, ranks=0, folder):
    """The same in processes that have imported torch already: where the import is not what is tested."""
    processes, path = Processes(folder), FOLDER / f"{name}.py"
    alone = ("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--nproc-per-node={ranks}")
    try:
        with contextlib.chdir(folder):
            start = (torchrun, *alone, path, *options) if ranks else (script, path, options)
            child = processes.start(*start)
        child.result(SECONDS)
        return json.loads([line for line in child.text().splitlines() if line.startswith("{")][-1])
    finally:
        processes.close()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_public_names_alone(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "anybatch":
            assert node.attr in (*anybatch.__all__, "sinks"), f"anybatch.{node.attr}"
        assert not any(part.startswith("_") for name in names for part in name.split(".") if part != "__future__")


@pytest.mark.slow
def test_images_learn_in_epochs(tmp_path):
    found = run("images", "--epochs", 3, "--scale", 4, folder=tmp_path)
    assert 3 * 168 / 4 <= found["steps"] < 3 * 168 / 2
    assert found["images"] == found["steps"] * 8 * 4
    assert 2 < found["gain"] <= 4
    assert found["accuracy"] > 85


@pytest.mark.slow
def test_language_learns_at_any_batch(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    one, eight = (forked("language", "--total", 120, "--scale", s, "--text", text, folder=tmp_path) for s in (1, 8))
    assert one["steps"] == 120
    assert eight["steps"] < 80
    assert one["bytes"] == 120 * 4 * 32
    assert max(one["loss"], eight["loss"]) < 3.5  # 5.5 nats at the first weights


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_a_run_goes_on_with_other_ranks(name, tmp_path):
    more = ["--accumulate", 2] if name == "ddp" else []
    start = run if name == "ddp" else forked
    first = start(name, "--total", 300, "--stop-at", 100, *more, ranks=2, folder=tmp_path)
    second = start(name, "--total", 300, *more, ranks=3, folder=tmp_path)
    assert first["scale"] == 4  # two micro-batches a rank
    assert 100 <= first["tau"] == second["from"] < 110
    assert second["tau"] >= 300 > first["tau"]
    assert second["scale"] == first["scale"] / 2 * 3
    assert second["accuracy"] > max(70, first["accuracy"])


@pytest.mark.slow
def test_one_worker_of_ray_train_is_stopped_and_two_go_on(tmp_path):
    found = run("ray_train", "--workers", 1, 2, "--stop-at", 100, "--total", 200, folder=tmp_path)
    assert (found["resumed"], found["scale"], 200 <= found["tau"] < 202, found["steps"] < 200) == (100, 2, True, True)
    assert found["accuracy"] > 60
    assert Path(tmp_path / "ray" / "newest").read_text().strip()


@pytest.mark.slow
def test_the_batch_grows(tmp_path):
    found = forked("growing_batch", "--total", 600, folder=tmp_path)
    sizes = [size for _, size in found["batches"]]
    assert sizes[0] == 16
    assert sizes == sorted(sizes)
    assert sizes[-1] >= 24
    assert found["steps"] < 600 / 1.5
    assert found["accuracy"] > 75


@pytest.mark.slow
def test_a_gan_has_one_clock_and_one_end(tmp_path):
    one, eight = (forked("gan", "--total", 400, "--scale", scale, folder=tmp_path) for scale in (1, 8))
    assert one["steps"] == 400
    assert 50 <= eight["steps"] < 250
    for found in (one, eight):
        assert found["rates"] == pytest.approx([1e-4, 1e-4], rel=1e-9)  # both schedules are at their end
        assert found["modes"] >= 3


@pytest.mark.slow
def test_the_noise_scale_is_measured_and_forecast(tmp_path):
    found = forked("noise_scale", "--total", 200, "--record", tmp_path / "run.jsonl", folder=tmp_path)
    assert found["steps"] == 200
    assert all(4 < noise < 1000 for _, noise in found["noise_scale"])
    low, critical, high = found["critical_batch"]
    assert 16 <= low <= critical <= high < 1000
    assert list(found["by_layer"]) == ["0", "2"]
    assert all(4 < noise < 1000 for noise in found["by_layer"].values())
    record = anybatch.read_record(tmp_path / "run.jsonl")
    assert {(step.gain, step.scale, step.lr_factor) for step in record.steps} == {(1.0, 1.0, 1.0)}
    forecast = anybatch.forecast(tmp_path / "run.jsonl", [1, 8])
    assert forecast.scales[0].steps.value == 200 > forecast.scales[1].steps.value >= 25

"""The converted scripts of docs/convert.md end where the page says, and its diffs are those of the files.

`CONVERT=write python -m pytest tests/test_convert.py` writes the diffs into the page.
"""

import difflib
import json
import os
import re
from pathlib import Path

import pytest
from processes import Processes, script

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples/convert"
PAGE = ROOT / "docs/convert.md"
# name: base iterations of the run, options for 8 times the batch, and those to stop half way and to resume at 16 times
SCRIPTS = {
    "images": (9 * 1400 / 16, "--batch-size 128 --accumulation 4", "--stop-at 4", "--batch-size 256 --accumulation 8"),
    "gpt": (240, "--accumulation 16", "--stop-at 100", "--accumulation 32"),
    "finetune": (120, "--accumulation 8", "--max-steps 60", "--accumulation 16"),
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Of each script: before; after at the same batch, at 8 times, stopped half way, and resumed at 16 times."""
    pytest.importorskip("sklearn")
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("convert")
    processes = Processes(folder)
    found = {}

    def run(name, file, options, place):
        (folder / place).mkdir(exist_ok=True)
        here = Path.cwd()
        os.chdir(folder / place)
        try:
            child = processes.start(script, FOLDER / name / file, options.split())
        finally:
            os.chdir(here)
        child.result(300)
        text = child.text()
        return json.loads([line for line in text.splitlines() if line.startswith("{")][-1]) | {"text": text}

    try:
        for name, (_, large, stop, larger) in SCRIPTS.items():
            resume = "--resume" if name == "finetune" else "--resume checkpoint.pt"
            found[name] = {
                "before": run(name, "before.py", "", f"{name}-before"),
                "same": run(name, "after.py", "", f"{name}-same"),
                "large": run(name, "after.py", large, f"{name}-large"),
                "stopped": run(name, "after.py", f"{large} {stop}", f"{name}-resumed"),
                "resumed": run(name, "after.py", f"{larger} {resume}", f"{name}-resumed"),
            }
    finally:
        processes.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_converted_script_trains_at_its_own_batch_as_before(name, ends):
    before, same = ends[name]["before"], ends[name]["same"]
    for key in {"lr", "accuracy", "loss"} & before.keys():
        assert same[key] == before[key]
    assert same["tau"] == SCRIPTS[name][0]


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_converted_script_ends_with_its_schedule_at_8_times_the_batch(name, ends):
    before, large, total = ends[name]["before"], ends[name]["large"], SCRIPTS[name][0]
    assert large.get("scale", 8) == 8
    assert total <= large["tau"] < total + 8
    assert total / 8 <= large["steps"] < total / 2
    # the images' and the fine-tuning's last rate is that of the schedule's end; the GPT's is that of its last step
    assert large["lr"] == pytest.approx(before["lr"], rel=1e-12 if name != "gpt" else 0.1)
    if name == "gpt":  # one evaluation for each 40 base iterations, as before, and the rate is that of the loop's clock
        assert [int(tau // 40) for tau in large["saved"]] == [1, 2, 3, 4, 5, 6]
        assert abs(large["loss"] - before["loss"]) < 0.1
    if name == "images":
        assert abs(large["accuracy"] - before["accuracy"]) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_converted_script_resumes_at_its_clock_with_another_batch(name, ends):
    stopped, resumed, total = ends[name]["stopped"], ends[name]["resumed"], SCRIPTS[name][0]
    assert 0 < stopped["tau"] < total
    if name != "finetune":
        assert resumed["start"] == (stopped["tau"] if name == "gpt" else 4)
        assert resumed["scale"] == 16
    assert total <= resumed["tau"] < total + 16
    assert (total - stopped["tau"]) / 16 <= resumed["steps"] - stopped["steps"] < total / 16
    assert resumed["lr"] == pytest.approx(ends[name]["before"]["lr"], rel=1e-12 if name != "gpt" else 0.2)


def diff(name):
    before, after = ((FOLDER / name / file).read_text().splitlines() for file in ("before.py", "after.py"))
    lines = list(difflib.unified_diff(before, after, n=1, lineterm=""))[2:]
    return "\n".join("" if line.startswith("@@") else line for line in lines).strip("\n")


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_diffs_of_the_page_are_those_of_the_scripts(name):
    text = PAGE.read_text()
    pattern = re.compile(rf"(<!-- {name} -->\n```diff\n).*?(\n```)", re.DOTALL)
    if os.environ.get("CONVERT") == "write":
        PAGE.write_text(pattern.sub(lambda m: m[1] + diff(name) + m[2], text))
        text = PAGE.read_text()
    assert f"<!-- {name} -->\n```diff\n{diff(name)}\n```" in text


def test_the_scripts_use_public_names_alone():
    for path in FOLDER.glob("*/*.py"):
        assert not re.search(r"anybatch(\.\w+)*\._|from anybatch(\.\w+)* import _", path.read_text()), path

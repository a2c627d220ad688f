"""The benchmark of a GPT in the Trainer: a few steps of it, and the page's table, which is that of its runs."""

import json
from pathlib import Path

import pytest
import torch

from integrations import task

trainer_gpt = pytest.importorskip("benchmarks.trainer_gpt", exc_type=ModuleNotFoundError)

ROOT = Path(__file__).parent.parent.parent
KEPT = ROOT / "docs" / "frameworks" / "gpt.json"


def test_the_lengths_of_the_examples_differ_and_none_is_in_both_parts():
    data, held_out = trainer_gpt.paragraphs()
    lengths = torch.tensor([float(len(each)) for each in data])
    assert lengths.std() > 0.4 * lengths.mean()
    assert len(held_out) == pytest.approx(len(data) / (trainer_gpt.HELD_OUT - 1), rel=0.01)


@pytest.mark.filterwarnings("ignore:At scale .* an example is worth:anybatch.AnybatchWarning")
def test_a_run_of_a_few_steps_ends_at_its_total():
    task.as_launched(0, 1)
    row = trainer_gpt.train(8, rate=5e-3, seed=0, total=16, size=16)
    assert 16 <= row["tau"] < 24
    assert row["steps"] < 16
    assert 2 < row["loss"] < 5  # log(128) = 4.85 at the first weights


def test_runs_of_another_length_are_refused(tmp_path):
    other = tmp_path / "gpt.json"
    other.write_text(json.dumps({**json.loads(KEPT.read_text()), "total": trainer_gpt.TOTAL + 1}))
    with pytest.raises(SystemExit, match="another batch or length"):
        trainer_gpt.Results(other)


def test_the_pages_table_is_that_of_the_runs_and_no_scale_differs_from_scale_1():
    results = trainer_gpt.Results(KEPT)
    kept = len(results.rows)
    lines = trainer_gpt.table(results)
    assert len(results.rows) == kept  # nothing was trained for it
    assert "\n".join(lines) in (ROOT / "docs" / "frameworks.md").read_text()
    assert all(float(line.split("|")[4]) > 0.05 for line in lines[3:])
    assert json.loads(KEPT.read_text())["total"] == trainer_gpt.TOTAL
    assert all(trainer_gpt.TOTAL <= row["tau"] < trainer_gpt.TOTAL + row["scale"] for row in results.rows)

"""A notebook: the bar without a terminal, tables for objects, and a record that is closed when the run is over."""

import os
from pathlib import Path

import pytest

import anybatch

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

CELLS = [
    """
import torch, anybatch
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
controller = anybatch.attach(optimizer, model=model, total=60, base_batch=4, micro_batch=8, record="run.jsonl")
with controller.progress():
    while not controller.done:
        for _ in range(2):
            x = torch.randn(8, 4)
            ((model(x) - x.sum(1, keepdim=True) + torch.randn(8, 1)).square().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
""",
    "controller",
    'other = anybatch.RunRecord("run.jsonl")  # the run is over, so its file is free\nother.close()\nprint("free")',
    'controller.log(accuracy=0.9)\nprint(len(anybatch.read_record("run.jsonl").metrics))',
    'anybatch.forecast("run.jsonl", [1, 8])',
]


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """Each cell's outputs."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in CELLS])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(anybatch.__file__).parents[1]), before]))
    try:
        nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return [cell.outputs for cell in notebook.cells]


def html(outputs):
    return [each.data["text/html"] for each in outputs if "text/html" in each.get("data", {})]


def test_the_bar_is_drawn_below_the_cell(cells):
    (bar,) = html(cells[0])  # one output, which each drawing replaces
    assert "tau 6" in bar
    assert '<progress value="60' in bar
    assert "gain" in bar


def test_the_controller_and_a_forecast_are_tables(cells):
    (controller,), (forecast,) = html(cells[1]), html(cells[4])
    assert "<td>tau</td><td>6" in controller
    assert "<td>scale</td><td>4</td>" in controller
    assert "<th>efficiency</th>" in forecast
    assert forecast.count("<tr>") == 3  # the head and two scales
    assert "Critical scale:" in forecast


def test_the_record_of_a_run_that_is_over_is_closed_and_takes_an_evaluation(cells):
    assert [each.text.strip() for each in (*cells[2], *cells[3])] == ["free", "1"]

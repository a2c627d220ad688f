"""The table of layouts in docs/distributed.md: each row names tests, and they exist."""

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "distributed.md").read_text()
ROWS = {
    cells[0]: cells[-1]
    for line in PAGE.splitlines()
    if line.startswith("| ") and len(cells := [cell.strip() for cell in line.strip("|").split(" | ")]) == 3
}
HEAD = ROWS.pop("layout")
# Kinds that a reader looks for, by a part of their row's first cell.
KINDS = (
    "DistributedDataParallel",
    "FSDP2, HSDP",
    "tensor parallelism (TP)",
    "SequenceParallel",
    "FSDP2 x TP",
    "HSDP x TP",
    "TP under DistributedDataParallel",
    "experts on a second mesh",
    "a pipeline",
    "ZeroRedundancyOptimizer",
    "DeepSpeed",
)


def functions(path):
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("layout", ROWS)
def test_each_row_names_tests_that_exist(layout):
    named = re.findall(r"`([^`]+)`", ROWS[layout])
    assert named
    for name in named:
        file, _, function = name.partition("::")
        assert (HERE / file).is_file(), name
        found = functions(HERE / file)
        assert function in found if function else any(each.startswith("test_") for each in found), name


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_a_row(kind):
    assert HEAD.startswith("tested by")
    assert any(kind in layout for layout in ROWS)

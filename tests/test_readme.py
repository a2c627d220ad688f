"""The README's examples run, and its figures are the demo's."""

import re
from pathlib import Path

import pytest
import torch

import anybatch

TEXT = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_examples_run(index, capsys):
    torch.manual_seed(0)
    names = {"torch": torch, "anybatch": anybatch}
    exec(compile(BLOCKS[index], f"README example {index}", "exec"), names)
    assert names["controller"].done


def test_the_diff_is_valid_python_before_and_after():
    diff = re.search(r"```diff\n(.*?)```", TEXT, re.DOTALL).group(1).splitlines()
    for sign in "+-":
        compile("\n".join(line[1:] for line in diff if line[:1] in (" ", sign, "")), "README diff", "exec")


def test_the_table_lists_every_rule():
    for name in ("AdaScale", "Linear", "SquareRoot", "Identity"):
        assert f"`{name}(" in TEXT

"""The README's examples run, and its figures are the demo's."""

import json
import re
from pathlib import Path

import pytest
import torch

import anybatch

TEXT = (Path(__file__).parent.parent / "README.md").read_text()
RESULTS = json.loads((Path(__file__).parent.parent / "docs/figures/first-screen.json").read_text())["rows"]
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_examples_run(index, capsys):
    if "sklearn" in BLOCKS[index]:
        pytest.importorskip("sklearn")
    torch.manual_seed(0)
    names = {"torch": torch, "anybatch": anybatch}
    exec(compile(BLOCKS[index], f"README example {index}", "exec"), names)
    assert names["controller"].done
    if said := capsys.readouterr().out:
        steps, tau, right = map(float, re.findall(r"[\d.]+", said)[:3])
        told = re.search(r"\n    (\d+) steps, (\d+) base iterations, ([\d.]+)%", TEXT).groups()
        assert [steps, tau, right] == [pytest.approx(float(told[0]), rel=0.1), pytest.approx(float(told[1]), rel=0.01),
                                       pytest.approx(float(told[2]), abs=2)]  # fmt: skip


def test_the_diff_is_valid_python_before_and_after():
    diff = re.search(r"```diff\n(.*?)```", TEXT, re.DOTALL).group(1).splitlines()
    for sign in "+-":
        compile("\n".join(line[1:] for line in diff if line[:1] in (" ", sign, "")), "README diff", "exec")


def test_the_table_lists_every_rule():
    for name in ("AdaScale", "Linear", "SquareRoot", "Identity"):
        assert f"`{name}(" in TEXT


def test_the_table_is_that_of_the_results():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if " ± " in line]
    found = {(row[0], row[1]): row[2:] for row in rows if len(row) == 6}
    names = {"adascale": "AdaScale", "lsw": "linear, warm-up (LSW)", "lsw+": "LSW with AdaScale's steps (LSW+)",
             "sqrt": "square root", "none": "unscaled"}  # fmt: skip
    assert len(found) == len(RESULTS) == 18
    for row in RESULTS:
        star = " *" if row["worse"] else ""
        assert found[row["scale"], names[row["rule"]] if row["scale"] != "1" else "(any)"] == [
            f"{row['accuracy']:.1f} ± {row['spread']:.1f}{star}",
            f"{row['loss']:.4f}",
            f"{row['iterations']:.0f}",
            f"{row['examples']:.2f}",
        ]


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_sentence_of_gain_and_price_is_of_the_same_rows(page):
    text = " ".join((Path(__file__).parent.parent / page).read_text().split())
    [steps, examples] = re.search(
        r"32 times the tuned batch takes (\d+) .*?(?:in place|instead) of 4,000.*? ([\d.]+) times the", text
    ).groups()
    [row] = [row for row in RESULTS if (row["scale"], row["rule"]) == ("32", "adascale")]
    assert (steps, examples) == (f"{row['iterations']:.0f}", f"{row['examples']:.2f}")

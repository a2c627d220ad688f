"""The pages' links and pictures exist, and the table of the paper's reproduction is that of its results."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} points to {target}"


@pytest.mark.parametrize("page", [*PAGES, *sorted(ROOT.glob("docs/reproduction/*.json"))], ids=lambda page: page.name)
def test_commands_that_are_named_exist(page):
    text = page.read_text()
    assert not re.findall(r"(?:python|=\d+) (?:recipes|benchmarks)/", text), "a file of a package is no command"
    for module in re.findall(r"-m ((?:recipes|benchmarks)(?:\.\w+)*)", text):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), f"{page.name} names {module}"


def test_the_reproduced_table_is_that_of_the_results():
    text = (ROOT / "docs/reproduction.md").read_text()
    rows = json.loads((ROOT / "docs/reproduction/digits-table2.json").read_text())["results"]
    assert len(rows) == 16
    for row in rows:
        star = " *" if row["worse"] else ""
        assert f"{row['metric']:.1f} ± {row['spread']:.1f}{star} |" in text
        assert f"{row['iterations']:.0f}" in text

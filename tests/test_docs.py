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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_are_named_exist(page):
    for script in re.findall(r"python ((?:recipes|benchmarks)/[\w/]+\.py)", page.read_text()):
        assert (ROOT / script).is_file(), f"{page.name} names {script}"


def test_the_reproduced_table_is_that_of_the_results():
    text = (ROOT / "docs/reproduction.md").read_text()
    rows = json.loads((ROOT / "docs/reproduction/digits-table2.json").read_text())["results"]
    assert len(rows) == 16
    for row in rows:
        star = " *" if row["worse"] else ""
        assert f"{row['metric']:.1f} ± {row['spread']:.1f}{star} |" in text
        assert f"{row['iterations']:.0f}" in text

"""The pages' links and pictures exist, their code runs, and their tables are those of their results."""

import json
import re
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch

ROOT = Path(__file__).parent.parent
FRAGMENTS = ("ema.md", "hyperparameters.md")  # their code is of a larger program
WITH_CODE = [
    page for page in sorted(ROOT.glob("docs/*.md")) if page.name not in FRAGMENTS and "```python" in page.read_text()
]
FIRST_SCREEN = json.loads((ROOT / "docs/figures/first-screen.json").read_text())
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#:]+)[)#]|(?:src|srcset)=\"([^\":]+)\"", text):
        target = "".join(target)
        assert (page.parent / target).exists(), f"{page.name} points to {target}"


@pytest.mark.parametrize("page", [*PAGES, *sorted(ROOT.glob("docs/reproduction/*.json"))], ids=lambda page: page.name)
def test_commands_that_are_named_exist(page):
    text = page.read_text()
    assert not re.findall(r"(?:python|=\d+) (?:recipes|benchmarks)/", text), "a file of a package is no command"
    for module in re.findall(r"-m ((?:recipes|benchmarks)(?:\.\w+)*)", text):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), f"{page.name} names {module}"


@pytest.mark.filterwarnings(
    "ignore:The .train_dataloader. does not have many workers", "ignore:.*LeafSpec:FutureWarning"
)
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert all("import anybatch" in block for block in blocks[:1])
    names = {"__name__": page.stem}
    for i, block in enumerate(blocks):
        torch.manual_seed(0)
        exec(compile(block, f"{page.name}, block {i}", "exec"), names)


def test_the_diffs_are_valid_python_before_and_after():
    for page in ROOT.glob("docs/*.md"):
        for diff in re.findall(r"```diff\n(.*?)```", page.read_text(), re.DOTALL):
            for sign in "+-":
                lines = [line[1:] for line in diff.splitlines() if line[:1] in (" ", sign, "")]
                compile("\n".join(lines), f"{page.name}, diff", "exec")


@pytest.mark.parametrize("name", ["table2", "table2-paper"])
def test_the_reproduced_table_is_that_of_the_results(name):
    text = (ROOT / "docs/reproduction.md").read_text()
    rows = json.loads((ROOT / f"docs/reproduction/digits-{name}.json").read_text())["results"]
    assert len(rows) == 16
    of = {(row["scale"], row["rule"]): row for row in rows}
    quality = lambda row: f"{row['metric']:.1f} ± {row['spread']:.1f}{' *' if row['worse'] else ''}"  # noqa: E731
    for scale in ("8", "16", "32", "64", "128"):
        ours, lsw, plus = (of[scale, rule] for rule in ("adascale", "lsw", "lsw+"))
        losses = f"{ours['train_loss']:.4f} / {lsw['train_loss']:.3f} / {plus['train_loss']:.3f}"
        steps = f"{ours['iterations']:.0f} / {lsw['iterations']:.0f}"
        line = [scale, *map(quality, (ours, lsw, plus)), losses, steps, f"{ours['mean_gain']:.1f}"]
        assert f"| {' | '.join(line)} |" in text


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/reproduction/*-tiny-table2.json")), ids=lambda path: path.stem)
def test_the_tiny_tables_are_those_of_the_results(path):
    text = (ROOT / "docs/reproduction.md").read_text()
    content = json.loads(path.read_text())
    for row in content["results"]:
        assert f"{row['metric']:.1f} ± {row['spread']:.1f}{' *' if row['worse'] else ''} |" in text
        assert f"{row['iterations']:.0f}" in text
        assert f"{row['train_loss']:.3f}" in text


def test_the_elastic_table_is_that_of_the_results():
    text = (ROOT / "docs/reproduction.md").read_text()
    for name in ("fig4", "fig4-paper"):
        for row in json.loads((ROOT / f"docs/reproduction/digits-{name}.json").read_text())["results"]:
            star = " *" if row["worse"] else ""
            line = f"{row['metric']:.1f} ± {row['spread']:.1f}{star} | {row['train_loss']:.4f}"
            assert line in text or line.replace(line[-6:], f"{row['train_loss']:.3f}") in text


def test_the_table_of_every_kth_step_is_that_of_the_results():
    text = (ROOT / "docs/overhead.md").read_text()
    rows = json.loads((ROOT / "docs/overhead/every.json").read_text())
    assert len(rows) == 16
    for row in rows:
        losses = [1e3 * loss for loss in row["losses"]]
        assert f"| {fmean(row['steps']):.0f}, {fmean(losses):.2f} ± {stdev(losses):.2f} |" in text


def test_the_examples_table_is_that_of_the_results():
    lines = [line for line in (ROOT / "docs/examples.md").read_text().splitlines() if " ± " in line]
    rows = json.loads((ROOT / "docs/examples.json").read_text())["rows"]
    assert len(lines) == len(rows) == 9
    for line, row in zip(lines, rows, strict=True):
        script, scale, quality, steps, seen, times = (cell.strip() for cell in line.strip("|").split("|"))
        assert (script, scale) == (f"`{row['example']}.py`", str(row["scale"]))
        digits = 3 if row["example"] == "language" else 1
        assert quality.startswith(f"{row['mean']:.{digits}f} ± {row['spread']:.{digits}f}")
        assert (steps, seen.split()[0]) == (f"{row['steps']:,.0f}", f"{row['seen']:,.0f}")
        assert times == f"{row['seen'] / next(r['seen'] for r in rows if r['example'] == row['example']):.2f}"


@pytest.mark.slow
def test_the_pictures_are_made_from_runs(tmp_path):
    for name in ("matplotlib", "sklearn"):
        pytest.importorskip(name)
    from benchmarks import first_screen, idea

    made = [*idea.pictures(tmp_path, total=60), *first_screen.pictures(FIRST_SCREEN["rows"], tmp_path)]
    assert len(made) == 5
    for path in made:
        assert path.read_bytes()[:4] == b"\x89PNG"
        assert (ROOT / "docs/figures" / path.name).is_file()
    accuracy, loss, steps = first_screen.train(first_screen.Unscaled(), 8, seed=0, total=80)
    assert steps == 10
    assert 0 <= accuracy <= 100
    assert loss > 0

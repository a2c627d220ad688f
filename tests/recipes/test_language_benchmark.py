"""The benchmark of the language model: how its rate is tuned, a few steps of it, and the page's table."""

import json
from math import log
from pathlib import Path

import pytest

from benchmarks import language
from recipes.language import made

ROOT = Path(__file__).parent.parent.parent
STUDY = language.Study("muon", 128, 24)


class Known:
    """Runs whose loss is a parabola of the rate's logarithm."""

    def __init__(self, best):
        self.best, self.asked = best, []

    def of(self, wanted):
        self.asked += wanted
        return [each.name | {"loss": log(each.lr / self.best) ** 2 + 1e-3 * each.seed} for each in wanted]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    made.make(folder)
    return folder


@pytest.mark.parametrize("best", [5e-4, 2e-3, 1.6e-2])
def test_the_rate_is_looked_for_until_both_neighbours_are_worse(best):
    runs = Known(best)
    assert language.tuned(runs, STUDY) == best
    tried = [each.lr for each in runs.asked]
    assert {best / 2, best, 2 * best} <= set(tried)
    assert len(tried) == len(set(tried)) * len(language.TUNING)
    assert not {each.seed for each in runs.asked} & set(range(language.SEEDS))


@pytest.mark.filterwarnings("ignore:At scale .* an example is worth:anybatch.AnybatchWarning")
@pytest.mark.parametrize("row", language.ROWS)
def test_a_run_of_a_few_steps_ends_at_its_total(row, data):
    found = language.train(language.Wanted(STUDY, row, 2e-3, 0), data)
    assert 3 < found["loss"] < 7  # log(512) = 6.2 at the first weights
    assert 1 <= found["steps"] <= STUDY.total
    assert found["tokens"] >= found["steps"] * STUDY.base_batch
    if row == language.BASE:
        assert (found["steps"], found["tokens"]) == (STUDY.total, STUDY.total * STUDY.base_batch)


def test_the_pages_table_is_that_of_the_runs():
    runs = language.Runs(ROOT / "docs/language/results.json", jobs=1)
    kept = len(runs.rows)
    lines = language.table(runs)
    assert len(runs.rows) == kept  # nothing was trained for it
    assert "\n".join(lines) in (ROOT / "docs/language-models.md").read_text()


def test_runs_of_other_options_are_refused(tmp_path):
    other = tmp_path / "language.json"
    other.write_text(json.dumps({"options": language.ROWS | {language.BASE: {"scale": "2"}}, "rows": []}))
    with pytest.raises(SystemExit, match="other options"):
        language.Runs(other, jobs=1)

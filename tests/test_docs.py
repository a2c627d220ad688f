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


FAIRSCALE = re.findall(r"^\| (.*?) \| `([^`|]*)` \|", (ROOT / "docs/from-fairscale.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("old", "new"), FAIRSCALE, ids=[old for old, _ in FAIRSCALE])
def test_the_calls_in_place_of_fairscales_do_the_same(old, new):
    """Each right-hand call, at its place in a step of two backwards, and what fairscale's call is said to give."""
    import anybatch

    torch.manual_seed(0)
    model = torch.nn.Linear(10, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = {"anybatch": anybatch, "model": model, "optimizer": optimizer, "total": 50, "accumulation": 2}
    if "scheduler" in new:
        names["scheduler"] = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (1 + i))
    first = re.match("rule|.*attach", new) is not None
    if first:
        exec(new, names)
    rule = names.get("rule", anybatch.AdaScale())
    if "controller" not in names:
        names["controller"] = anybatch.attach(optimizer, model=model, rule=rule, total=50, base_batch=8, micro_batch=8)
    controller, weights, found = names["controller"], model.weight.detach().clone(), None
    gradients = []
    for x in torch.randn(2, 8, 10):
        names["loss"] = model(x).square().mean()
        gradients.append(torch.autograd.grad(names["loss"], model.weight, retain_graph=True)[0])
        exec(new if "backward" in new else "(loss / 2).backward()", names)
    if "peek" in new:
        found = eval(new, names)
    mean = model.weight.grad.clone()
    torch.testing.assert_close(mean, sum(gradients) / 2)
    exec(new if "step()" in new else "optimizer.step()", names)
    scale = 2.5 if "2.5" in new else 2
    assert controller.scale == scale
    assert 1 <= controller.tau == controller.gain <= scale
    torch.testing.assert_close(model.weight.detach(), weights - 0.1 * controller.gain * mean)
    if "scheduler" in new:
        assert names["scheduler"].last_epoch == int(controller.tau) == 1
    if not first and not re.search("peek|backward|[.]step", new):
        if "=" in new or "detach" in new:
            exec(new, names)
        else:
            found = eval(new, names)
    if new.startswith("controller.micro_batch"):
        optimizer.zero_grad()
        for x in torch.randn(2, 16, 10):
            (model(x).square().mean() / 2).backward()
        optimizer.step()
        assert controller.scale == 4
    if "detach" in new:
        weights = model.weight.detach().clone()
        optimizer.step()
        torch.testing.assert_close(model.weight.detach(), weights - 0.1 * mean)
    gain = controller.gain
    values = {"controller.peek()": gain, "controller.gain": gain, "controller.tau": gain, "controller.scale": 2}
    values |= {"not controller.done": True}
    assert (new in values) == (found is not None and "state_dict" not in new)
    assert found == values.get(new, found)


def test_every_call_of_fairscales_has_a_row():
    rows = [line for line in (ROOT / "docs/from-fairscale.md").read_text().splitlines() if line.startswith("| ")]
    assert len(FAIRSCALE) == len(rows) - 1 >= 16


def test_the_diffs_are_valid_python_before_and_after():
    for page in ROOT.glob("docs/*.md"):
        for diff in re.findall(
            r"(?<!-->\n)```diff\n(.*?)```", page.read_text(), re.DOTALL
        ):  # those behind a marker are of files
            for sign in "+-":
                lines = [line[1:] for line in diff.splitlines() if line[:1] in (" ", sign, "")]
                compile("\n".join(lines), f"{page.name}, diff", "exec")


@pytest.mark.parametrize("name", ["table2", "table2-paper"])
def test_the_reproduced_table_is_that_of_the_results(name):
    text = (ROOT / "docs/reproduction.md").read_text()
    rows = json.loads((ROOT / f"docs/reproduction/digits-{name}.json").read_text())["results"]
    assert len(rows) == 16
    of = {(row["scale"], row["rule"]): row for row in rows}
    for scale in ("8", "16", "32", "64", "128"):
        ours, lsw, plus = (of[scale, rule] for rule in ("adascale", "lsw", "lsw+"))
        losses = f"{ours['train_loss']:.4f} / {lsw['train_loss']:.3f} / {plus['train_loss']:.3f}"
        steps = f"{ours['iterations']:.0f} / {lsw['iterations']:.0f}"
        line = [scale, *map(_quality, (ours, lsw, plus)), losses, steps, f"{ours['mean_gain']:.1f}"]
        assert f"| {' | '.join(line)} |" in text


@pytest.mark.parametrize("task", ["cifar10", "imagenet", "speech", "transformer", "yolo"])
def test_the_tiny_tables_are_those_of_the_results(task):
    found = json.loads((ROOT / f"docs/reproduction/{task}-tiny-table2.json").read_text())
    of = {(row["scale"], row["rule"]): row for row in found["results"]}
    assert (found["seeds"], len(of)) == (3, 7)
    loss = lambda row: f"{row['train_loss']:.3f}" if row["train_loss"] is not None else "–"  # noqa: E731
    base = of["1", "adascale"]
    lines = [f"| {task} | 1 | {_quality(base)} | | | {loss(base)} | {base['iterations']:.0f} |"]
    for scale in ("8", "32"):
        rows = [of[scale, rule] for rule in ("adascale", "lsw", "lsw+")]
        steps = " / ".join(f"{row['iterations']:.0f}" for row in rows[:2])
        lines.append(f"| | {scale} | {' | '.join(map(_quality, rows))} | {' / '.join(map(loss, rows))} | {steps} |")
    text = (ROOT / "docs/reproduction.md").read_text()
    assert "\n".join(lines) in text
    assert found["command"].startswith(f"python -m recipes.reproduce table2 --task {task} --data made/{task} --tiny")


def _quality(row):
    return f"{row['metric']:.1f} ± {row['spread']:.1f}{' *' if row['worse'] else ''}"


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


def test_the_layouts_of_the_page_are_those_of_the_file():
    page, found = (
        (ROOT / "docs/distributed.md").read_text(),
        json.loads((ROOT / "docs/distributed/layouts.json").read_text()),
    )
    distances = {row["layout"]: row["distance"] for row in found["rows"]}
    for row in found["rows"]:
        numbers = " | ".join(f"{row[name]:.1e}" for name in ("distance", "gain_median", "gain_most"))
        assert f"| {row['layout']} | {row['processes']} | {row['steps']} | {numbers} |" in page
    seed = distances.pop("one process, another seed")
    assert f"{seed / distances.pop('DeepSpeed ZeRO-2'):.0f} times nearer" in page
    assert f"which takes {found['steps']} steps" in page
    assert max(distances.values()) < 1e-9  # "the same to rounding"


def test_the_branches_of_the_page_are_those_of_the_file():
    page = (ROOT / "docs/branch.md").read_text()
    rows = json.loads((ROOT / "docs/branch/gpt.json").read_text())["rows"]
    assert len(rows) == 3
    for row in rows:
        cells = [row[name] for name in ("critical", "noise_scale", "noise_factor")]
        words = " | ".join(f"{each['value']:.3g} ({each['low']:.3g} to {each['high']:.3g})" for each in cells)
        assert f"| {row['share']:.0%} of the run | {words} |" in page
        assert 0.2 <= round(row["noise_factor"]["value"], 2) <= 0.35  # "a fifth to a third"


# docs/ema.md: every number of its tables, from docs/figures/ema_*.json

LABELS = {
    "rule": "fixed scaling, ρ^κ (the rule)",
    "off": "fixed scaling, ρ (rule off)",
    "adascale": "AdaScale, ρ^r (ours)",
    "adascale-off": "AdaScale, ρ (rule off)",
    "adascale-scale": "AdaScale, ρ^κ",
}


def ema_tables(heading):
    """The tables under a heading, as lists of rows of cells without the head."""
    text = (ROOT / "docs/ema.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in t.splitlines()[2:]] for t in tables]


def ema_results(name):
    return json.loads((ROOT / f"docs/figures/ema_{name}.json").read_text())


class Ends:
    """Where the runs of a study ended, by arm and scale; kappa 1 is the first arm's."""

    def __init__(self, name, metric):
        self.runs, self.metric = ema_results(name)["runs"], metric

    def of(self, arm, scale, metric=None):
        wanted = ("rule" if scale == 1 else arm, scale)
        return [run[metric or self.metric][-1] for run in self.runs if (run["arm"], run["scale"]) == wanted]

    def steps(self, arm, scale):
        return fmean(run["steps"] for run in self.runs if (run["arm"], run["scale"]) == (arm, scale))

    def p(self, arm, scale, than=None):
        from scipy.stats import ttest_ind

        ends, others = self.of(arm, scale), self.of(*(than or ("rule", 1)))
        return ttest_ind(ends, others, equal_var=False, alternative="less").pvalue


def shown(values, digits=1):
    """Mean and deviation as the tables beside the programs' own have them: .2 below one, else .1."""
    return f"{fmean(values):.2f} ± {stdev(values):.{2 if stdev(values) < 1 else digits}f}"


def kappa_of(cell):
    return [float(part) for part in cell.split("→")] if "→" in cell else float(cell)


def test_the_parabolas_table_is_that_of_the_results():
    rows = ema_results("parabola")["rows"]
    (table,) = ema_tables("The noisy parabola")
    assert len(table) == len(rows) == 10
    for cells, row in zip(table, rows, strict=True):
        on, off, target = row["rule"], row["off"], row["target"]
        numbers = [*(f"{x:.4f}" for x in (target, on, off)), f"{on / target:.2f}", f"{off / on:.1f}"]
        assert cells == [f"{row['order']} the step", str(row["kappa"]), *numbers]


def eight_points(runs, arm, scale):
    """Means over the seeds at eight equal points, and the largest distance from kappa 1's over the same seeds."""
    curves = {run["seed"]: run["teacher_loss"][1::2] for run in runs if (run["arm"], run["scale"]) == (arm, scale)}
    base = [run["teacher_loss"][1::2] for run in runs if (run["arm"], run["scale"]) == ("rule", 1)]
    base = [curve for seed, curve in enumerate(base) if seed in curves]
    means, bases = ([fmean(column) for column in zip(*some)] for some in (curves.values(), base))
    return means, 100 * max(abs(a / b - 1) for a, b in zip(means, bases, strict=True))


def test_the_supervised_tables_are_those_of_the_results():
    for name, table, points in (
        ("supervised", ema_tables("Supervised learning")[0], range(8)),
        ("supervised_adamw", ema_tables("Under Adam and AdamW")[1], (0, 1, 3, 5, 7)),
    ):
        runs, many = ema_results(name)["runs"], {label: arm for arm, label in LABELS.items()}
        assert len(table) == {"supervised": 11, "supervised_adamw": 9}[name]
        for label, kappa, *cells in table:
            arm = many.get(label, "rule")
            means, deviation = eight_points(runs, arm, float(kappa))
            wanted = [f"{means[i]:.3f}" if means[i] < 10 else "diverged" for i in points]
            largest = f"{deviation:.1f} %" if deviation < 3000 else "over 3000 %"
            if name == "supervised_adamw":
                steps = Ends(name, "teacher_loss").steps(arm, float(kappa))
                wanted, largest = [f"{steps:.0f}", *wanted], largest if kappa != "1" else ""
            assert cells == [*wanted, largest], (label, kappa)


@pytest.mark.parametrize(("heading", "name"), [("Pseudo-labelling", "pseudo"), ("BYOL", "byol")])
def test_the_tables_of_all_kappas_are_those_of_the_results(heading, name):
    ends, arms = Ends(name, {"pseudo": "student_accuracy", "byol": "teacher_accuracy"}[name]), LABELS.items()
    (table,) = ema_tables(heading)
    assert len(table) == {"pseudo": 22, "byol": 24}[name] == len({str((r["arm"], r["scale"])) for r in ends.runs})
    for label, kappa, seeds, steps, quality, p in table:
        scale, arm = kappa_of(kappa), next((arm for arm, words in arms if words == label), "rule")
        values = ends.of(arm, scale)
        assert [seeds, steps] == [str(len(values)), f"{ends.steps(arm, scale):.0f}"]
        assert quality == f"{fmean(values):.4g} ± {stdev(values):.2g}", (label, kappa)
        assert p == ("" if scale == 1 else f"{ends.p(arm, scale):.4f}"), (label, kappa)


def test_the_pseudo_labels_under_adam_are_those_of_the_results():
    both = [Ends(f"pseudo_{name}", "student_accuracy") for name in ("adamw", "adam")]
    table = ema_tables("Under Adam and AdamW")[0]
    assert [row[0] for row in table] == ["any", *(LABELS[arm] for arm in ("rule", "off", "adascale"))]
    for arm, (_, kappa, steps, *cells) in zip(("rule", "rule", "off", "adascale"), table):
        scale = float(kappa)
        assert steps == ", ".join(dict.fromkeys(f"{ends.steps(arm, scale):.0f}" for ends in both))
        found = [(shown(e.of(arm, scale)), "" if scale == 1 else f"{e.p(arm, scale):.4f}") for e in both]
        assert cells == [cell for pair in found for cell in pair], (arm, kappa)


def test_the_parabola_under_adam_is_that_of_the_results():
    table = ema_tables("Under Adam and AdamW")[2]
    assert [cells[:2] for cells in table] == [[name, k] for name in ("adam", "adam-quiet") for k in ("2", "8", "32")]
    for name, kappa, *cells in table:
        before, after = (row for row in ema_results(f"parabola_{name}")["rows"] if row["kappa"] == int(kappa))
        wanted = [f"{before['target']:.4f}", f"{after['rule']:.4f}", f"{after['off']:.4f}"]
        wanted += [f"{after['off'] / after['rule']:.1f}", f"{before['rule']:.4f}"]
        assert cells == [*wanted, f"{before['off'] / before['rule']:.1f}"], (name, kappa)


def test_the_tables_of_dino_and_lars_are_those_of_the_results():
    words = {label: arm for arm, label in LABELS.items()} | {"any": "rule", "linear, ρ^κ (the rule)": "linear"}
    words |= {"square root, ρ^κ (the rule)": "rule", "square root, ρ (rule off)": "off"}
    for heading, name, size in (("DINO", "dino", 7), ("LARS", "lars", 5)):
        ends, (table,) = Ends(name, "teacher_accuracy"), ema_tables(heading)
        assert len(table) == size
        for label, kappa, steps, quality, p, other, *student in table:
            arm, scale = words[label], float(kappa)
            assert [steps, quality] == [f"{ends.steps(arm, scale):.0f}", shown(ends.of(arm, scale))], (label, kappa)
            assert p == ("" if scale == 1 else f"{ends.p(arm, scale):.4f}")
            assert other == (f"{ends.p(arm, scale, ('rule', scale)):.4f}" if arm in ("off", "linear") else "")
            values = ends.of(arm, scale, "student_accuracy")
            assert student == ([f"{fmean(values):.1f} ± {stdev(values):.1f}"] if name == "lars" else []), (label, kappa)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:At scale 32 an example is worth:anybatch.AnybatchWarning")  # a run of 60 iterations
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

"""docs/real-machines.md: its commands are parsed by the programs themselves, its numbers follow from its equations."""

import re
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.run import get_args_parser

from benchmarks import real_machines
from recipes import reproduce
from recipes.paper.plan import work
from recipes.paper.wanted import WANTED, Question
from recipes.training.options import TASKS, parse

PAGE = (Path(__file__).parents[1] / "docs/real-machines.md").read_text()
COMMANDS = [
    " ".join(words.replace("\\\n", " ").split())
    for words in re.findall(r"^    ((?:torchrun|python -m recipes)(?:.*\\\n)*.*)$", PAGE, re.MULTILINE)
]
BASE_BATCHES = {"language": 524_288, "cifar10": 128, "imagenet": 256, "speech": 32, "transformer": 2048, "yolo": 16}
TOTALS = {"language": 19_073, "cifar10": 39_100, "imagenet": 451_000, "speech": 84_800, "transformer": 1_550_000,
          "yolo": 207_000}  # fmt: skip


def rows(head):
    """The table that begins with `head`, as lists of cells."""
    lines = PAGE[PAGE.index(head) :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def number(text):
    return float(re.match(r"[\d.,]+", text).group().replace(",", ""))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_that_the_program_takes(command):
    words, ranks = command.split(), 1
    if words[0] == "torchrun":
        launched = get_args_parser().parse_args(words[1:])
        assert launched.module
        ranks = int(launched.nnodes.split(":")[-1]) * int(launched.nproc_per_node)
        words = ["python", "-m", launched.training_script, *launched.training_script_args]
    assert words[:2] == ["python", "-m"]
    if words[2] == "recipes.reproduce":
        given = reproduce.parser().parse_args(words[3:])
        base = reproduce.base_run(given)
        task = SimpleNamespace(base_batch=BASE_BATCHES[given.task], total=TOTALS[given.task])
        for one in WANTED[given.what](Question(base, tuple(given.scales), 16, 5, 0.1)):
            assert work(one.on(given.processes, task), task, processes=given.processes)[0].steps > 0
        return
    given, options = parse(words[3:])
    task = SimpleNamespace(base_batch=BASE_BATCHES[given.task])
    for scale, _ in options.scales:
        accumulation = options.accumulation_for(scale, task, ranks=ranks)
        size = options.micro_batch_for(task, ranks=ranks)
        assert ranks * accumulation * size == scale * task.base_batch
    assert (ranks > 8) == (str(given.out).startswith("/shared"))


def test_every_task_has_commands_for_one_gpu_for_eight_and_for_sixty_four():
    for task in set(TASKS) - {"digits"}:
        mine = [c for c in COMMANDS if re.search(rf"recipes\.train {task} ", c)]
        assert [c.startswith("torchrun") for c in mine] == [False, True, True]
        assert ["--nnodes=8" in c for c in mine] == [False, False, True]
        if task != "language":
            assert any(f"table2 --task {task} " in c and "--plan" not in c for c in COMMANDS)


def test_the_hours_follow_from_the_equation_with_the_page_s_own_numbers():
    sizes = {row[0]: row for row in rows("| task | weights")}
    utilisation = {task: number(row[3]) / 100 for task, row in sizes.items()}
    found, least = rows("| task | S |"), {}
    assert len(found) == 18
    for task, scale, steps, examples, *hours in found:
        steps, scale = number(steps), int(scale)
        assert number(examples) == pytest.approx(steps * scale * BASE_BATCHES[task] / 1e6, abs=0.51)
        flops = number(sizes[task][2]) * 1e9
        for gpus, shown in zip((1, 8, 64), hours):
            if shown != "–":
                exact = steps * scale * BASE_BATCHES[task] * flops / (gpus * 312e12 * utilisation[task] * 3600)
                assert number(shown) == pytest.approx(exact, rel=0.06)
        if scale == 1:
            assert steps == TOTALS[task]
            least[task] = number(hours[0])
    for task, row in sizes.items():
        weights, optimizer = number(row[1]) * 1e6, 2 if task == "language" else 1
        assert number(row[4]) == pytest.approx(4 * (2 + optimizer) * weights / 1e9, rel=0.06)
        assert number(row[6]) == pytest.approx(4 * (1 + optimizer) * weights / 1e9, rel=0.06)
        assert number(row[7]) == pytest.approx(310 * TOTALS[task] / 1e6, abs=0.51)
        large = [number(hours[4]) for hours in found if hours[0] == task and hours[1] != "1"]
        if large:
            assert number(row[8]) == pytest.approx(
                5 * (least[task] + sum(2 * h + least[task] for h in large)), rel=0.05
            )


def test_the_cores_follow_too():
    sizes = {row[0]: row for row in rows("| task | weights")}
    for name, loaded, taken, cores in rows("| | loaded a second"):
        task, tokens = name.split(",")[0], 1024 if "1024" in name else 1
        exact = 312e12 * number(sizes[task][3]) / 100 / (number(sizes[task][2]) * 1e9 * tokens)
        assert number(taken) == pytest.approx(exact, rel=0.01)
        assert number(cores) == pytest.approx(number(taken) / number(loaded), rel=0.2)


def test_flops_are_those_that_one_counts_by_hand():
    """ResNet-50: 3.8 billion multiply-adds forwards (He et al. 2016a, Table 1), twice as many backwards."""
    found = real_machines.counted(real_machines.JOBS["imagenet"])
    assert found.flops == pytest.approx(3.8e9 * 2 * 3, rel=0.01)
    assert f"| imagenet | {found.weights / 1e6:.1f} M | {found.flops / 1e9:.3g} |" in PAGE
    # A GPT: two operations for each weight of its matrices, and four for each entry of queries, keys and values seen.
    found = real_machines.counted(real_machines.JOBS["language"])
    width, layers, context = 768, 12, 1024
    matrices = layers * 12 * width**2 + 50_304 * width
    assert found.flops == pytest.approx(3 * (2 * matrices + layers * 4 * width * context), rel=0.01)
    assert f"| language | {found.weights / 1e6:.1f} M | {found.flops / 1e9:.3g} |" in PAGE


def test_the_bytes_kept_for_the_backward_are_counted_once():
    """A linear layer keeps its input; a ReLU after it what it gave."""
    import torch
    from torch import nn

    job = real_machines.Job(lambda: nn.Sequential(nn.Linear(8, 4), nn.ReLU()), lambda: (torch.randn(2, 8),), 2, 1, 1,
                            {1: 1}, 1.0, 1)  # fmt: skip
    found = real_machines.counted(job)
    assert found.weights == 8 * 4 + 4
    assert found.kept == (prod((2, 8)) + prod((2, 4))) * 4 / 2
    # Forwards, and backwards to the weights: its input needs no gradient.
    assert found.flops == 2 * (2 * 8 * 4)
    assert real_machines.hours(job, found, scale=1, gpus=1) == found.flops / (312e12 * 3600)

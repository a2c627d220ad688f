"""How data comes to the device, and how the ranks share an evaluation."""

import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from recipes.digits import Digits
from recipes.images.cifar10 import Cifar10
from recipes.train import run
from recipes.training import parallel
from recipes.training.loading import AHEAD, MOST, loader, workers_for
from recipes.training.options import Options
from recipes.training.sharing import ALONE, Share


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(64, 8, 7), (96, 1, MOST), (16, 8, 1), (2, 8, 1), (8, 1, 7), (1, 1, 1)]
)
def test_the_cores_are_shared_by_the_processes(cores, processes, workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert workers_for(processes, device=True) == workers
    assert workers_for(processes, device=False) == 0


def test_workers_stay_and_load_ahead(monkeypatch):
    data, order = list(range(6)), [[0, 1], [2, 3], [4, 5]]
    plain, several = loader(data, order, workers=0), loader(data, order, workers=2)
    assert not plain.persistent_workers
    assert (several.num_workers, several.persistent_workers, several.prefetch_factor) == (2, True, AHEAD)
    assert [batch.tolist() for batch in several] == [batch.tolist() for batch in plain] == order
    first = {worker.pid for worker in several._iterator._workers}
    list(several)
    assert {worker.pid for worker in several._iterator._workers} == first
    assert not plain.pin_memory
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert loader(data, order, workers=0).pin_memory


def test_an_evaluation_takes_no_random_number_and_keeps_its_loader():
    task = Digits()
    before = torch.get_rng_state()
    batches = task.tested(task.train_set, [[0, 1], [2]])
    assert [len(labels) for _, labels in batches] == [2, 1]
    assert torch.equal(torch.get_rng_state(), before)
    assert task.tested(task.train_set, [[0, 1], [2]]) is batches
    assert task.tested(task.train_set, [[0, 1]]) is not batches


@pytest.mark.parametrize(("parts", "ranks"), [(7, 3), (6, 3), (1, 4), (5, 1), (2, 2)])
def test_every_part_counts_on_one_rank_and_all_ranks_have_equally_many(parts, ranks):
    shares = [Share(rank, ranks).of(list("abcdefg"[:parts])) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(part for share in shares for part, counts in share if counts) == list("abcdefg"[:parts])


def test_what_is_gathered_has_its_order():
    assert ALONE.gathered([(2, "c"), (0, "a"), (1, "b")]) == ["a", "b", "c"]
    assert ALONE.summed(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]


# ---- what a GPU is told, without one ----


@pytest.mark.parametrize(
    ("precision", "products"), [("fp32", "highest"), ("tf32", "high"), ("bf16", "high"), ("fp16", "high")]
)
def test_kernels_are_tried_out_where_shapes_stay(precision, products, monkeypatch):
    told = {}
    # torch's own test helpers, which other tests import, forbid to set the real flags.
    monkeypatch.setattr(torch.backends, "cudnn", SimpleNamespace(benchmark=None))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda value: told.update(products=value))

    class Net(nn.Module):
        def to(self, device, **more):
            told.update(device=device.type, **more)
            return self

    class Task(Digits):
        one_size, convolutions = False, True

    for task in (Digits, Task):
        told.clear()
        arguments = {"device": torch.device("cuda"), "precision": precision, "fsdp": False}
        parallel.tuned(Net(), task, **arguments)
        assert torch.backends.cudnn.benchmark == task.one_size
        layout = {"memory_format": torch.channels_last} if task.convolutions else {}
        assert told == {"products": products, "device": "cuda", **layout}
    told.clear()
    parallel.tuned(Net(), Task, device=torch.device("cuda"), precision=precision, fsdp=True)
    assert "memory_format" not in told
    told.clear()
    parallel.tuned(Net(), Task, device=torch.device("cpu"), precision=precision, fsdp=False)
    assert told == {"device": "cpu"}


def test_with_the_channels_last_the_training_is_the_same(made, monkeypatch, tmp_path):
    """On the CPU, which has that layout as well: gains, losses, and a checkpoint that the other layout goes on from."""
    options = Options(scale="2", total=8, evaluations=1)
    plain = run(Cifar10(made("cifar10"), tiny=True), options)
    monkeypatch.setattr(parallel, "tuned", lambda net, *_, **__: net.to(memory_format=torch.channels_last))
    task = Cifar10(made("cifar10"), tiny=True)
    nets = []
    task.model = lambda: nets.append(Cifar10.model(task)) or nets[-1]
    last = run(task, Options(**{**options.__dict__, "out": tmp_path}))
    assert nets[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    for key in ("tau", "iterations", "loss", "train_loss", "mean_gain"):
        assert last[key] == pytest.approx(plain[key], rel=1e-3)
    monkeypatch.undo()
    again = run(Cifar10(made("cifar10"), tiny=True), Options(**{**options.__dict__, "out": tmp_path}))
    assert again["loss"] == last["loss"]


def test_images_cross_to_the_device_as_bytes(made):
    """And become the same numbers there: those of the plain formula, in float64."""
    task = Cifar10(made("cifar10"), tiny=True)
    images, _ = next(task.batches(4, seed=0, rank=0, ranks=1))
    assert images.dtype == torch.uint8
    seen = []

    class Net(nn.Module):
        def forward(self, x):
            seen.append(x)
            return torch.zeros(len(x), 10, requires_grad=True)

    task.loss(Net(), (images, torch.zeros(4, dtype=torch.long)))
    for channel, (mean, std) in enumerate([(0.4914, 0.2470), (0.4822, 0.2435), (0.4465, 0.2616)]):
        expected = (images[:, channel].double() / 255 - mean) / std
        torch.testing.assert_close(seen[0][:, channel].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_benchmark_loads_what_the_tasks_do(tmp_path):
    from benchmarks import loader as bench

    bench.write(tmp_path)
    assert 6e4 < (tmp_path / "n0" / "0.jpg").stat().st_size < 1.2e5  # as large as a photograph's
    sets = bench.sets(tmp_path)
    assert [tuple(sets[task][0][0].shape) for task in ("cifar10", "imagenet", "yolo")] == [
        (3, 32, 32),
        (3, 224, 224),
        (3, 416, 416),
    ]
    assert set(bench.models()) == set(sets)
    for data in sets.values():
        assert bench.loading(data, number=2) > 0

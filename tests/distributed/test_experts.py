"""Experts on a mesh of their own: noise of the dense parameters, steps of all, as in a plain loop on one process."""

import functools

import pytest
import torch
from torch.distributed.tensor import Replicate

import anybatch
from anybatch._report.summary import summarise
from distributed import expert_workers as workers
from distributed import launch

DENSE = {
    "FSDP2, each expert on two ranks": {"dense": "FSDP2", "spread": 2, "efsdp": True},
    "FSDP2, each expert on one rank": {"dense": "FSDP2", "spread": 4, "efsdp": True},
    "FSDP2, experts without it": {"dense": "FSDP2", "spread": 4},
    "HSDP": {"dense": "HSDP", "spread": 2, "efsdp": True},
    "FSDP2 x TP": {"dense": "FSDP2 x TP", "spread": 2, "data": 2},
    "DDP": {"dense": "DDP", "spread": 4},
}
LAYOUTS = {
    **DENSE,
    "FSDP2, two backwards": {**DENSE["FSDP2, each expert on two ranks"], "accumulation": 2},
    "FSDP2, Adam's metric": {**DENSE["FSDP2, each expert on two ranks"], "optimizer": "Adam", "steps": 13},
    "DDP, Adam's metric": {**DENSE["DDP"], "optimizer": "Adam", "steps": 13},
    "DDP, an overflow": {**DENSE["DDP"], "overflow": 2},
}
APART = "UnsupportedError: Nothing averages a trained parameter of shape [4, 6, 6]"
ERRORS = {
    "no dense parameter is trained": (
        {**DENSE["FSDP2, each expert on two ranks"], "alone": True},
        "UnsupportedError: All 1 trained parameters are experts",
    ),
    "each expert on two ranks of DDP": ({"dense": "DDP", "spread": 2}, APART),
    "each expert on two ranks without FSDP2": ({"dense": "FSDP2", "spread": 2}, APART),
    "replicated experts": ({"dense": "FSDP2", "spread": 4, "placement": Replicate()}, APART),
    "plain tensors under FSDP2": (
        {"dense": "FSDP2", "spread": 4, "plain": True},
        "UnsupportedError: Under FSDP2 all trained parameters must be sharded",
    ),
    "plain tensors under DDP": (
        {"dense": "DDP", "spread": 4, "plain": True},
        "UsageError: The ranks hold different gradients",
    ),
}


@functools.cache
def ranks(folder):
    layouts = {**LAYOUTS, **{name: layout for name, (layout, _) in ERRORS.items()}}
    return launch.run(workers.train, world=workers.WORLD, args=(layouts, folder))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    return folder, ranks(folder)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "overflow" not in name])
def test_a_layout_trains_as_one_process(found, name):
    layout, (first, *others) = LAYOUTS[name], [each[name] for each in found[1]]
    assert all(each["lines"] == first["lines"] for each in others)
    kind, count = layout.get("optimizer", "SGD"), layout.get("data", workers.WORLD) * layout.get("accumulation", 1)
    gains = [line[2] for line in first["lines"]]
    moments, weights, averages = workers.plain(len(gains), count=count, kind=kind, gains=gains)
    tau = 0.0
    for t, ((v, q), mine) in enumerate(zip(moments, first["lines"], strict=True)):
        seen = mine[:2]
        if t >= workers.READY:
            *metric, weight = first["metric"][t]
            seen = tuple(max(each / weight, 0) for each in metric)
        if name != "FSDP2, Adam's metric" or t < workers.READY:  # by shards that norm is an estimate
            assert seen == pytest.approx((max(v, 0), max(q, 0)), rel=1e-10)
        if kind == "SGD":  # in Adam's metric the gain has moments of its own
            assert mine[2] == pytest.approx(((v + q) / (v / count + q)) ** (1 - 0.5 ** ((t + 2) / 2)), rel=1e-10)
        tau += mine[2]
        assert (mine[3], mine[4]) == (pytest.approx(tau, rel=1e-12), count)
    for each in (first, *others):
        for key in weights:
            torch.testing.assert_close(each["weights"][key], weights[key], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(each["averages"][key], averages[key], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", DENSE)
def test_the_record_has_the_share_and_the_dense_layers(found, name):
    numbers = {key: p.numel() for key, p in workers.made().named_parameters()}
    share = sum(n for key, n in numbers.items() if not workers.is_expert(key)) / sum(numbers.values())
    run = anybatch.read_record(found[0] / f"{name}.jsonl")
    assert run.config["measured_share"] == pytest.approx(share)
    assert f"noise of {share:.3g} of the parameters" in found[1][0][name]["text"]
    (summary,) = summarise([found[0] / f"{name}.jsonl"])
    assert float(summary.facts["measured_share"]) == pytest.approx(share, rel=1e-3)
    layers = run.steps[0].per_layer
    assert set(layers) == {"first", "router", "head"}
    (v, q), *_ = workers.plain(1, count=DENSE[name].get("data", workers.WORLD), gains=[1.0])[0]
    assert sum(each.variance for each in layers.values()) == pytest.approx(v, rel=1e-10)
    assert sum(each.sqnorm for each in layers.values()) == pytest.approx(q, rel=1e-10)


def test_an_overflow_in_an_expert_on_one_rank_is_a_skip_on_all(found):
    for each in found[1]:
        assert each["DDP, an overflow"]["skipped"] == 1
        assert all(bool(p.isfinite().all()) for p in each["DDP, an overflow"]["weights"].values())


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_measured_is_an_error_on_every_rank(found, name):
    for each in found[1]:
        assert isinstance(each[name], str), "no error"
        assert each[name].startswith(ERRORS[name][1])

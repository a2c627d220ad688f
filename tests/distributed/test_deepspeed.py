"""DeepSpeed: moments, gains, clock, weights and averages of stages 0 to 3 are those of a plain float64 loop."""

import functools
import json
import re
from importlib.util import find_spec

import pytest
import torch

import anybatch
from distributed import deepspeed_workers as workers
from distributed import launch

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="needs deepspeed: pip install anybatch[deepspeed]"
)

CLOCK = {"momentum": 0.9, "clock": True, "options": {"rule": anybatch.AdaScale(decays="clock")}}
CONSTANT = {"momentum": 0.9, "options": {"rule": anybatch.AdaScale(decays="constant")}}
BF16 = {"config": {"bf16": {"enabled": True}}, "half": True}
SCALED = {"config": {"fp16": {"enabled": True, "loss_scale": 128}}, "half": True}
DYNAMIC = {"config": {"fp16": {"enabled": True, "initial_scale_power": 7, "hysteresis": 1}}, "half": True}
OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu"}}}
INFINITE = {"infinite": (1, 1, 0)}
# By the stages that have them.
LOOPS = {
    "plain": ({}, "0123"),
    "clipped": ({"clip": 0.05}, "0123"),
    "momentum on the clock": (CLOCK, "0123"),
    "several groups": ({"rates": (0.05, 0.01, 0.1)}, "0123"),
    "bfloat16": (BF16, "0123"),
    "not finite": (INFINITE, "0123"),
    "not finite in bfloat16": ({**INFINITE, **BF16}, "13"),
    "float16": (SCALED, "123"),
    "not finite in float16": ({**INFINITE, **DYNAMIC}, "123"),
    "an average of the weights": ({"ema": True}, "012"),
    "a scheduler": ({"gamma": 0.9}, "013"),
    "momentum": (CONSTANT, "0123"),
    "resumed after attach": ({**CONSTANT, "save": 1, "resume": "after attach"}, "0123"),
    "resumed before attach": ({**CONSTANT, "save": 1, "resume": "before attach"}, "123"),
    "peek": ({"peek": workers.A - 1}, "013"),
    "one step for all backwards": ({"unmanaged": True, "config": {"managed_gradient_accumulation": False}}, "0123"),
    "loss.backward()": ({"torch_style": True}, "123"),
    "offloaded": ({"clip": 0.05, **OFFLOAD}, "123"),
    "parameters offloaded": ({"zero": {**OFFLOAD["zero"], "offload_param": {"device": "cpu"}}}, "3"),
    "sub-groups": ({**CLOCK, "sub_group_size": 30}, "3"),
    "overlap_comm": ({"zero": {"overlap_comm": True}}, "123"),
    "all-reduced": ({"zero": {"reduce_scatter": False}}, "123"),
    "not contiguous": ({"zero": {"contiguous_gradients": False}}, "12"),
    "round-robin": ({"zero": {"round_robin_gradients": True}}, "12"),
    "no norm": ({"zero": {"compute_grad_norm": False}}, "12"),
    "prescaled": ({"config": {"prescale_gradients": True}}, "01"),
    "predivided": ({"config": {"gradient_predivide_factor": 2.0}}, "01"),
    "Accelerate": ({"loop": "accelerated"}, "013"),
    "the Trainer": ({"loop": "trainer"}, "023"),
}
CASES = {
    f"stage {stage}, {name}": {"stage": int(stage), **case}
    for name, (case, stages) in LOOPS.items()
    for stage in stages
}
NUMBER = sum(p.numel() for p in workers.model().parameters())
ERRORS = {
    "another optimizer": ({"other": True}, "InvalidValueError: The optimizer is not that of the DeepSpeed engine"),
    "a sum": ({"options": {"reduction": "sum"}}, "UsageError: .* leave reduction out"),
    "a scaler": ({"options": {"grad_scaler": torch.amp.GradScaler("cpu")}}, "UsageError: .* leave grad_scaler out"),
    "Adam's metric": (
        {"options": {"rule": anybatch.AdaScale(metric="adam")}},
        "UnsupportedError: .*Use metric='euclidean'",
    ),
    "consecutive": (
        {"options": {"rule": anybatch.AdaScale(consecutive=True)}},
        "UnsupportedError: .*gradient_accumulation_steps to 2 or more",
    ),
    "by layer": ({"by_layer": True}, "UnsupportedError: .*leave per_layer out"),
    "a peek too early": ({"peek": 0}, "UsageError: .*are not reduced yet"),
    "an average in stage 3": ({"stage": 3, "ema": True}, "UnsupportedError: ModelEMA does not support ZeRO stage 3"),
    "float16 without ZeRO": ({"stage": 0, **SCALED}, "UnsupportedError: .*float16 without ZeRO"),
    "another version": (
        {"without": ["seq_data_parallel_group"]},
        r"UnsupportedError: DeepSpeed \S+ has no engine.seq_data_parallel_group.*tried with DeepSpeed 0.19.8",
    ),
    "another version's config": (
        {"set": {"_config.zero_config": object()}},
        "UnsupportedError: .* has no object.offload_optimizer.*tried with DeepSpeed 0.19.8",
    ),
    "another class": ({"set": {"optimizer": object()}}, "UnsupportedError: .*trains this model by object"),
}
SETTINGS = {
    "pipeline_parallelism": True,
    "has_moe_layers": True,
    "mp_world_size": 2,
    "sequence_parallel_size": 2,
    "enable_backward_allreduce": False,
    "_config.zero_config.zero_quantized_gradients": True,
    "zenflow": True,
    "torch_autocast_z0_gradscaler": object(),
}
ERRORS |= {name: ({"set": {name: value}}, "UnsupportedError: .*Leave it out") for name, value in SETTINGS.items()}


@functools.cache
def results():
    errors = {name: {"stage": 1, **case} for name, (case, _) in ERRORS.items()}
    return launch.run(workers.train, world=2, args=(CASES | errors,))


def compared(case, ranks, *, world):
    """Compare the ranks with the plain loop, and return that loop's averages."""
    first = ranks[0]
    assert not isinstance(first, str), first
    net, averages, step = workers.plain(
        world, clip=case.get("clip"), momentum=case.get("momentum", 0.0), clock=case.get("clock", False),
        rates=case.get("rates", (workers.LR,)),
    )  # fmt: skip
    half, tau, skipped = case.get("half"), 0.0, 0
    for t, numbers in enumerate(first["steps"]):
        assert numbers.get("reductions", world > 1) == (world > 1)  # one for each step, but in the loops of others
        if "infinite" in case and t == case["infinite"][0]:
            skipped += 1
            assert (numbers["tau"], numbers["skipped"]) == (tau, skipped)
            continue
        variance, sqnorm, n = step(t, numbers["gain"], case.get("gamma", 1.0) ** int(tau))
        assert numbers["moments"] == pytest.approx((variance, sqnorm), rel=0.05 if half else 1e-5)
        assert (numbers["count"], numbers["skipped"]) == (n, skipped)
        tau += numbers["gain"]
        assert numbers["tau"] == pytest.approx(tau, rel=1e-12)
        if numbers.get("norm") and not case.get("clip"):  # DeepSpeed's own, of the same gradient
            assert numbers["norm"] ** 2 == pytest.approx(sqnorm + variance / n, rel=0.02 if half else 1e-5)
    for rank in ranks:
        assert rank["steps"] == first["steps"]
        for mine, plain in zip(rank["weights"], net.parameters(), strict=True):
            torch.testing.assert_close(mine.double(), plain.detach(), rtol=1e-5, atol=5e-3 if half else 1e-6)
    return averages


@pytest.mark.parametrize("name", CASES)
def test_deepspeed_trains_as_one_process(name):
    case, ranks = CASES[name], [found[name] for found in results()]
    averages = compared(case, ranks, world=2)
    if "loop" in case:
        return
    assert ranks[0]["parameters"] == NUMBER  # so a state fits any stage, and one process
    assert ranks[0]["left"] == (False, "StepLR" if "gamma" in case else "NoneType")
    if "gamma" in case:
        assert ranks[0]["held"] == "HeldScheduler"
    if case.get("ema"):
        for mine, plain in zip(ranks[1]["averages"], averages, strict=True):
            torch.testing.assert_close(mine.double(), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in CASES if "resumed" in name])
def test_a_resumed_run_is_the_same_bit_for_bit(name):
    stage = name.split(",")[0]
    for found in results():
        assert found[name]["steps"] == found[f"{stage}, momentum"]["steps"]
        assert all(map(torch.equal, found[name]["weights"], found[f"{stage}, momentum"]["weights"]))


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_measured_is_an_error(name):
    for found in results():
        assert isinstance(found[name], str), found[name]
        assert re.match(ERRORS[name][1], found[name]), found[name]


def test_one_process_its_record_and_check(tmp_path):
    case = {"stage": 2, "record": str(tmp_path / "run.jsonl")}
    cases = {"alone": case, "checked": {"stage": 1, "loop": "checked"}}
    ranks = launch.run(workers.train, world=1, args=(cases,))
    assert re.match("UnsupportedError: check runs your step on copies", ranks[0]["checked"])
    ranks = [found["alone"] for found in ranks]
    compared(case, ranks, world=1)
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line["tau"] for line in lines if "tau" in line] == [numbers["tau"] for numbers in ranks[0]["steps"]]

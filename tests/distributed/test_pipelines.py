"""Pipelines of torch.distributed.pipelining: moments, gains, clock and weights are those of a plain float64 loop."""

import functools

import pytest
import torch
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

import anybatch
from distributed import launch
from distributed import pipeline_workers as workers

ADAM = anybatch.AdaScale(metric="adam", smoothing=0.0, decays="constant")
SUM = {"scale_grads": False, "options": {"reduction": "sum"}}
TWICE = {"parts": 2, "scale_grads": False, "divide": 2 * workers.M}


def layout(schedule, /, **sizes):
    """A case of `schedule` with 2 pipeline ranks, and two stages a rank where the schedule has several."""
    found = {"pp": 2, **sizes}
    if schedule in workers.MULTI:
        found |= {"stages": 2, "v": schedule in workers.V}
    return {"schedule": schedule, "layout": found}


SCHEDULES = {name: layout(name) for name in (*workers.SINGLE, *workers.MULTI)}
LOOPS = {
    "two calls a step": TWICE,
    "two calls, a sum": {**SUM, "parts": 2},
    "clipped": {"clip": 0.5},
    "losses divided": {"scale_grads": False, "divide": workers.M},
    "a sum": SUM,
    "a sum by a number": {"scale_grads": False, "divide": 2, "options": {"reduction": 2}},
    "evaluated": {"eval": True},
    "paused": {"paused": True},
    "discarded": {"discarded": True},
    "zeroed, not cleared": {"zeros": True},
    "peeked": {"peek": True},
    "recorded": {"record": True},
    "an empty group": {"groups": "empty"},
    "a frozen parameter": {"frozen": True},
    "Adam's metric": {"adam": True, "steps": workers.READY + 3, "options": {"rule": ADAM}},
    "a scaler": {"scaler": ShardedGradScaler},
    "a scaler, overflow in one stage": {"scaler": ShardedGradScaler, "overflow": True},
}
ALONE = {
    "by layer": ({"by_layer": True}, "leave per_layer out"),
    "auto": ({"options": {"micro_batch": "auto"}}, "Pass the number of examples of a micro-batch"),
    "two calls, each divides": ({"parts": 2}, "Make the schedule with scale_grads=False"),
    "a sum that is divided": ({"options": {"reduction": "sum"}}, "Leave reduction out, or make the schedule"),
    "a number that is divided": ({"options": {"reduction": 2}}, "Leave reduction out, or make the schedule"),
    "a scaler of one stage": ({"scaler": torch.amp.GradScaler}, "sharded_grad_scaler.ShardedGradScaler"),
    "groups of one stage": ({"groups": "none"}, "group 1 on other ranks"),
    "a backward outside": ({"outside": True}, "add this loss to the schedule's loss_fn"),
}
DDP = {"dp": 2, "style": "ddp"}
FSDP = {"dp": 2, "style": "fsdp"}
SPLIT = ("interleaved zero-bubble", *workers.V)  # the gradients of weights have a backward of their own
CASES = {
    2: {
        **SCHEDULES,
        **{f"1F1B, {name}": {**SCHEDULES["1F1B"], **case} for name, case in LOOPS.items()},
        "zero-bubble, a sum": {**SCHEDULES["interleaved zero-bubble"], **SUM},
        "zero-bubble, Adam's metric": {**SCHEDULES["interleaved zero-bubble"], **LOOPS["Adam's metric"]},
        **{name: {**SCHEDULES["1F1B"], **case} for name, (case, _) in ALONE.items()},
    },
    4: {
        "1F1B on 4 ranks": layout("1F1B", pp=4),
        "1F1B x DDP": layout("1F1B", **DDP),
        **{f"{name} x DDP": layout(name, **DDP, unused=True) for name in SCHEDULES if name != "1F1B"},
        **{f"{name} x FSDP2": layout(name, **FSDP) for name in SCHEDULES},
        "1F1B x TP": layout("1F1B", tp=2),
        "1F1B x TP, Adam's metric": {**layout("1F1B", tp=2), **LOOPS["Adam's metric"]},
        "interleaved zero-bubble x TP": layout("interleaved zero-bubble", tp=2),
        "1F1B x DDP, two calls": {**layout("1F1B", **DDP), **TWICE},
        "1F1B x FSDP2, two calls": {**layout("1F1B", **FSDP), **TWICE},
        "1F1B x FSDP2, a sum": {**layout("1F1B", **FSDP), **SUM},
        "1F1B x FSDP2, a scaler": {**layout("1F1B", **FSDP), "scaler": ShardedGradScaler},
        "not averaged": layout("1F1B", dp=2),
        "one stage of two averaged": layout("interleaved 1F1B", **DDP, bare=True),
        "stages of one rank averaged": layout("1F1B", **DDP, bare_stage=1),
    },
    8: {
        "1F1B x TP x FSDP2": layout("1F1B", **FSDP, tp=2),
        "interleaved zero-bubble x TP x FSDP2": layout("interleaved zero-bubble", **FSDP, tp=2),
    },
}
ERRORS = {
    **{name: (2, text) for name, (_, text) in ALONE.items()},
    "not averaged": (4, "Wrap each stage's module in DistributedDataParallel"),
    "one stage of two averaged": (4, "wrap the module of each stage"),
    "stages of one rank averaged": (4, "Wrap each stage's module in DistributedDataParallel"),
    **{f"{name} x DDP": (4, "Use fully_shard") for name in SPLIT},
}


@functools.cache
def ranks(world):
    return launch.run(workers.train, world=world, args=(CASES[world],))


@pytest.mark.parametrize(("world", "name"), [(w, n) for w, cases in CASES.items() for n in cases if n not in ERRORS])
def test_is_the_plain_loop(world, name):
    case = CASES[world][name]
    found = [each[name] for each in ranks(world)]
    dps, parts, adam = case["layout"].get("dp", 1), case.get("parts", 1), case.get("adam", False)
    net, averages, step = workers.plain(
        parts=parts, dps=dps, clip=case.get("clip"), frozen=case.get("frozen", False), adam=adam
    )
    tau, samples = 0.0, 0
    for t, (variance, sqnorm, gain, clock, count) in enumerate(found[0]["lines"]):
        if case.get("overflow") and t == 1:
            assert clock == tau
            continue
        v, q, n = step(t, gain)
        samples += 1
        if adam and t >= workers.READY:
            *metric, weight = found[0]["metric"][t]
            variance, sqnorm = (each / weight for each in metric)
        assert (variance, sqnorm) == pytest.approx((max(v, 0), max(q, 0)), rel=1e-10, abs=1e-12)
        assert count == n == parts * dps * workers.M
        full = (v + q) / (v / n + q) if q > 0 else n
        assert gain == pytest.approx(full ** (1 - 0.5 ** ((samples + 1) / 2)), rel=1e-9)
        tau += gain
        assert clock == pytest.approx(tau, rel=1e-12)
    averages = dict(enumerate(zip(*[iter(averages)] * 4)))  # four parameters a block
    for each in found:
        assert each["lines"] == found[0]["lines"]
        assert each["metric"] == found[0]["metric"]
        counted = not (case.get("scaler") or case.get("peek"))  # else it is inside of other calls
        assert each["reductions"] == counted
        assert not each["hooked"]
        for layer, weights in each["weights"].items():
            for a, b in zip(weights, net[layer].parameters(), strict=True):
                torch.testing.assert_close(a, b.detach(), rtol=1e-10, atol=1e-12)
            for a, b in zip(each["averages"][layer], averages[layer], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert {layer for each in found for layer in each["weights"]} == set(range(workers.LAYERS))
    if case.get("record"):
        assert found[0]["record"] == [line[2] for line in found[0]["lines"]]


@pytest.mark.parametrize("name", ERRORS)
def test_what_is_not_the_mean_is_an_error_on_every_rank(name):
    world, text = ERRORS[name]
    for each in ranks(world):
        assert isinstance(each[name], str), "no error"
        assert each[name].split(":")[0] in ("InvalidValueError", "UnsupportedError", "UsageError")
        assert text in each[name]


@pytest.mark.parametrize("name", ["1F1B", "interleaved zero-bubble", "1F1B, a frozen parameter"])
def test_a_pipelines_state_continues_on_one_process(name):
    state = ranks(2)[0][name]["state"]
    assert state == ranks(2)[1][name]["state"]
    net, controller = one_process()
    assert state["parameters"] == sum(p.numel() for p in net.parameters())
    controller.load_state_dict(state)
    assert (controller.tau, controller.steps) == (state["tau"], workers.STEPS)


def test_the_state_of_one_process_continues_in_a_pipeline():
    _, controller = one_process()
    before = {**controller.state_dict(), "tau": 7.5, "steps": 5}
    found = launch.run(workers.train, world=2, args=({"resumed": {**SCHEDULES["1F1B"], "state": before, "steps": 1}},))
    for each in found:
        (line,) = each["resumed"]["lines"]
        assert line[3] == pytest.approx(7.5 + line[2], rel=1e-12)
        assert each["resumed"]["state"]["steps"] == 6


def one_process():
    net = torch.nn.Sequential(*workers.blocks())
    optimizer = torch.optim.SGD(net.parameters(), lr=workers.LR)
    sizes = {"base_batch": workers.SIZE, "micro_batch": workers.SIZE}
    return net, anybatch.attach(optimizer, model=net, total=workers.TOTAL, **sizes)

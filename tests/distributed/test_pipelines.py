"""Pipelines of torch.distributed.pipelining: moments, gains, clock and weights are those of a plain float64 loop."""

import functools

import pytest
import torch

import anybatch
from distributed import launch
from distributed import pipeline_workers as workers

TWO = {
    "GPipe": {"schedule": "GPipe", "layout": {"pp": 2}},
    "1F1B": {"schedule": "1F1B", "layout": {"pp": 2}},
    "1F1B, two calls a step": {
        "schedule": "1F1B",
        "layout": {"pp": 2},
        "parts": 2,
        "scale_grads": False,
        "divide": 2 * workers.M,
    },
    "by layer": {"schedule": "1F1B", "layout": {"pp": 2}, "by_layer": True},
    "auto": {"schedule": "1F1B", "layout": {"pp": 2}, "options": {"micro_batch": "auto"}},
    "Adam's metric": {
        "schedule": "1F1B",
        "layout": {"pp": 2},
        "adam": True,
        "options": {"rule": anybatch.AdaScale(metric="adam")},
    },
    "two calls, each divides": {"schedule": "1F1B", "layout": {"pp": 2}, "parts": 2},
    "1F1B, clipped": {"schedule": "1F1B", "layout": {"pp": 2}, "clip": 0.5},
    "1F1B, losses divided": {"schedule": "1F1B", "layout": {"pp": 2}, "scale_grads": False, "divide": workers.M},
    "1F1B, a sum": {"schedule": "1F1B", "layout": {"pp": 2}, "scale_grads": False, "options": {"reduction": "sum"}},
    "interleaved 1F1B": {"schedule": "interleaved 1F1B", "layout": {"pp": 2, "stages": 2}},
    "interleaved zero-bubble": {"schedule": "interleaved zero-bubble", "layout": {"pp": 2, "stages": 2}},
    "looped BFS": {"schedule": "looped BFS", "layout": {"pp": 2, "stages": 2}},
}
FOUR = {
    "1F1B x DDP": {"schedule": "1F1B", "layout": {"pp": 2, "dp": 2, "style": "ddp"}},
    "1F1B x FSDP2": {"schedule": "1F1B", "layout": {"pp": 2, "dp": 2, "style": "fsdp"}},
    "1F1B x TP": {"schedule": "1F1B", "layout": {"pp": 2, "tp": 2}},
    "not averaged": {"schedule": "1F1B", "layout": {"pp": 2, "dp": 2}},
}
EIGHT = {
    "1F1B x TP x FSDP2": {"schedule": "1F1B", "layout": {"pp": 2, "dp": 2, "tp": 2, "style": "fsdp"}},
}
CASES = {2: TWO, 4: FOUR, 8: EIGHT}
ERRORS = {
    "by layer": (2, "leave per_layer out"),
    "auto": (2, "Pass the number of examples of a micro-batch"),
    "Adam's metric": (2, "use metric='euclidean'"),
    "not averaged": (4, "Wrap each stage's module in DistributedDataParallel"),
    "two calls, each divides": (2, "Make the schedule with scale_grads=False"),
}


@functools.cache
def ranks(world):
    return launch.run(workers.train, world=world, args=(CASES[world],))


@pytest.mark.parametrize(("world", "name"), [(w, n) for w, cases in CASES.items() for n in cases if n not in ERRORS])
def test_is_the_plain_loop(world, name):
    case = CASES[world][name]
    found = [each[name] for each in ranks(world)]
    dps, parts = case["layout"].get("dp", 1), case.get("parts", 1)
    net, step = workers.plain(parts=parts, dps=dps, clip=case.get("clip"))
    tau = 0.0
    for t, (variance, sqnorm, gain, clock, count) in enumerate(found[0]["lines"]):
        v, q, n = step(t, gain)
        assert (variance, sqnorm) == pytest.approx((max(v, 0), max(q, 0)), rel=1e-10, abs=1e-12)
        assert count == n == parts * dps * workers.M
        full = (v + q) / (v / n + q) if q > 0 else n
        assert gain == pytest.approx(full ** (1 - 0.5 ** ((t + 2) / 2)), rel=1e-9)
        tau += gain
        assert clock == pytest.approx(tau, rel=1e-12)
    for each in found:
        assert each["lines"] == found[0]["lines"]
        assert each["reductions"] == 1
        for layer, weights in each["weights"].items():
            for a, b in zip(weights, net[layer].parameters(), strict=True):
                torch.testing.assert_close(a, b.detach(), rtol=1e-10, atol=1e-12)
    assert {layer for each in found for layer in each["weights"]} == set(range(workers.LAYERS))


@pytest.mark.parametrize("name", ERRORS)
def test_what_is_not_the_mean_is_an_error_on_every_rank(name):
    world, text = ERRORS[name]
    for each in ranks(world):
        assert each[name].split(":")[0] in ("InvalidValueError", "UnsupportedError", "UsageError")
        assert text in each[name]


def test_a_pipelines_state_continues_on_one_process():
    state = ranks(2)[0]["1F1B"]["state"]
    assert state == ranks(2)[1]["1F1B"]["state"]
    net = torch.nn.Sequential(*workers.blocks())
    optimizer = torch.optim.SGD(net.parameters(), lr=workers.LR)
    sizes = {"base_batch": workers.SIZE, "micro_batch": workers.SIZE}
    controller = anybatch.attach(optimizer, model=net, total=workers.TOTAL, **sizes)
    controller.load_state_dict(state)
    assert (controller.tau, controller.steps) == (state["tau"], workers.STEPS)

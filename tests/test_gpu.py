"""What only a GPU shows: its training is the CPU's, and what cannot be measured there is refused."""

from types import SimpleNamespace

import common
import oracle
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

import anybatch
from anybatch._gradients import check_not_captured

gpu = pytest.mark.gpu


def train(device, *, optimizer, attach, place=lambda model: model, forward=lambda model: model, scaler=None, steps=12):
    """Gains and final weights of steps of three micro-batches."""
    model = place(oracle.make_model(dtype=torch.float32).to(device))
    made = optimizer(model.parameters())
    controller = anybatch.attach(made, model=model, scale="count", total=100, grad_scaler=scaler, **attach)
    net, gains = forward(model), []
    for t in range(steps):
        for i in range(3):
            x, y = (each.to(device) for each in oracle.micro_batch(t, i, dtype=torch.float32))
            loss = oracle.loss_fn(net(x), y) / 3
            (loss if scaler is None else scaler.scale(loss)).backward()
        common.step(made, scaler)
        made.zero_grad()
        gains.append(controller.gain)
    return gains, [getattr(p, "_local_tensor", p).detach().cpu() for p in model.parameters()]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


ROUTES = {
    "exact": {"optimizer": sgd, "attach": {}},
    "every second step": {"optimizer": sgd, "attach": {"rule": anybatch.AdaScale(every=2)}},
    "Adam's metric": {
        "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3),
        "attach": {"rule": anybatch.AdaScale(metric="adam")},
    },
}


def close(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-3)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-4)


@gpu
@pytest.mark.parametrize("name", ROUTES)
def test_a_gpus_training_is_the_cpus(name):
    close(train("cuda", **ROUTES[name]), train("cpu", **ROUTES[name]))


@gpu
def test_fused_adamw_is_adamw():
    rule = {"rule": anybatch.AdaScale(decays="constant")}
    fused, plain = (
        train("cuda", optimizer=lambda p, f=f: torch.optim.AdamW(p, lr=1e-3, fused=f), attach=rule)
        for f in (True, False)
    )
    close(fused, plain)


@gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_trains_alike(mode):
    torch._dynamo.reset()
    compiled = train("cuda", optimizer=sgd, attach={}, forward=lambda model: torch.compile(model, mode=mode))
    close(compiled, train("cuda", optimizer=sgd, attach={}))


@gpu
def test_a_loss_scale_leaves_no_trace():
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    close(train("cuda", optimizer=sgd, attach={}, scaler=scaler), train("cuda", optimizer=sgd, attach={}))


@gpu
@pytest.mark.parametrize("name", ROUTES)
def test_shards_that_lie_on_the_host_are_measured_alike(name, tmp_path):
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cuda", (1,))
        offloaded = lambda model: fully_shard(model, mesh=mesh, offload_policy=CPUOffloadPolicy())  # noqa: E731
        close(train("cuda", place=offloaded, **ROUTES[name]), train("cuda", **ROUTES[name]))
    finally:
        dist.destroy_process_group()


@gpu
def test_a_captured_step_is_refused():
    model = oracle.make_model().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    anybatch.attach(optimizer, model=model, scale="count")
    x, y = (each.cuda() for each in oracle.micro_batch(0, 0))
    with pytest.raises(anybatch.UnsupportedError, match="capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        oracle.loss_fn(model(x), y).backward()


def test_a_capture_is_refused_in_words(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    check_not_captured(torch.ones(1))  # a capture elsewhere: nothing of this tensor's is in it
    with pytest.raises(anybatch.UnsupportedError, match="CUDA graph"):
        check_not_captured(SimpleNamespace(is_cuda=True))

"""The oracle's task for every framework: the same micro-batches, in the order in which W ranks take them."""

import functools
import itertools
import math
import os

import oracle
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import anybatch

SIZE = 4  # examples of a micro-batch, and of the base batch
MICRO_BATCHES = 4  # of a step: on one process, or two on each of two
STEPS = 90  # of which there is data: more than a run needs
TOTAL = 100  # base iterations
KILLED = 15  # steps of two micro-batches before a run is killed
SEEN = 2 * KILLED  # micro-batches that it has seen


@functools.cache
def examples():
    """Of all micro-batches one after another: number 4 t + i is `oracle.micro_batch(t, i)`."""
    parts = [oracle.micro_batch(t, i, size=SIZE) for t in range(STEPS) for i in range(MICRO_BATCHES)]
    return TensorDataset(*(torch.cat(each) for each in zip(*parts)))


def singles():
    """The same in float32."""
    return TensorDataset(*(each.float() for each in examples().tensors))


class Mine(torch.utils.data.Sampler):
    """The examples of the micro-batches of one rank: every W-th from the `first` on."""

    def __init__(self, rank, world, first):
        mine = range(first + rank, STEPS * MICRO_BATCHES, world)
        self.indices = [i for k in mine for i in range(SIZE * k, SIZE * (k + 1))]

    def __iter__(self):
        return iter(self.indices)

    def __len__(self):
        return len(self.indices)


def loader(rank=0, world=1, *, first=0):
    return DataLoader(examples(), batch_size=SIZE, sampler=Mine(rank, world, first))


def short(micro_batches):
    """An epoch of so many of them."""
    return DataLoader(TensorDataset(*examples()[: SIZE * micro_batches]), batch_size=SIZE)


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=oracle.LR, momentum=oracle.MOMENTUM)


def scheduler_of(optimizer, total=TOTAL):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total)


class Trace:
    """Notes each step of a controller."""

    def __init__(self, controller):
        self.controller, self.gains, self.taus = controller, [], []
        self.stop = controller.clock.subscribe(self)

    def __call__(self, _):
        self.gains.append(self.controller.gain)
        self.taus.append(self.controller.tau)


def outcome(trace, model, optimizer):
    """What is compared; the model may be wrapped."""
    return {
        "gains": trace.gains,
        "taus": trace.taus,
        "weights": [p.detach().clone() for p in model.parameters()],
        "lr": optimizer.param_groups[0]["lr"],
        "scale": trace.controller.scale,
    }


def plain(*, clip=None, epoch=STEPS * MICRO_BATCHES, lengths=(), left_out=0, first=0, **options):
    """The plain loop on one process; an epoch of so many micro-batches has what is left in a last, smaller step.

    The first steps have other `lengths`, if some are given, and so many micro-batches are then left out.
    """
    model = oracle.make_model()
    optimizer = optimizer_of(model)
    options = {"scheduler": scheduler_of(optimizer), "base_batch": SIZE, "micro_batch": SIZE, **options}
    controller = anybatch.attach(optimizer, model=model, total=TOTAL, **options)
    trace, batches = Trace(controller), itertools.cycle(list(loader(first=first))[:epoch])
    rest = [MICRO_BATCHES] * (epoch // MICRO_BATCHES) + [epoch % MICRO_BATCHES] * (epoch % MICRO_BATCHES > 0)
    for i, length in enumerate(itertools.chain(lengths, itertools.cycle(rest))):
        if i == len(lengths):
            next(itertools.islice(batches, left_out, left_out), None)
        for x, y in itertools.islice(batches, length):
            (oracle.loss_fn(model(x), y) / length).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        if controller.done:
            break
    return outcome(trace, model, optimizer)


def check(found, expected):
    """Gains and weights to 1e-6; the worst difference of each."""
    assert len(found["gains"]) == len(expected["gains"]) > 25
    gains = max(abs(a - b) for a, b in zip(found["gains"], expected["gains"]))
    weights = max(float((a - b).abs().max()) for a, b in zip(found["weights"], expected["weights"]))
    assert max(gains, weights) < 1e-6
    check_end(found)
    return gains, weights


def check_end(found, total=TOTAL):
    """The run ends where it has to, with the rate of the schedule's end."""
    tau = found["taus"][-1]
    assert total <= tau < total + found["scale"]
    assert found["lr"] == pytest.approx(oracle.LR * (1 + math.cos(math.pi * math.floor(tau) / total)) / 2, abs=1e-9)
    assert found["lr"] < oracle.LR / 100


def scaler_of(precision):
    """With a loss scale at which no step overflows and is left out: the micro-batches of a step are then the same."""
    return torch.amp.GradScaler("cuda", init_scale=256.0) if precision == "fp16" else None


def check_close(found, expected):
    """A run in half precision: to its digits, and not the very same."""
    count = min(map(len, (found["gains"], expected["gains"])))
    assert count > 25
    apart = max(abs(a / b - 1) for a, b in zip(found["gains"], expected["gains"]))
    assert 0 < apart < 0.02
    assert found["taus"][-1] == pytest.approx(expected["taus"][-1], rel=0.02)
    for a, b in zip(found["weights"], expected["weights"], strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=0, atol=0.01)


def check_resumed(before, after, **options):
    """A run killed at scale 2 has gone on at scale 4 from the same tau, as if only its batch had doubled there."""
    assert after["first"] == before["taus"][-1] > KILLED
    assert (before["scale"], after["scale"]) == (2, 4)
    whole = {name: before[name] + after[name] for name in ("gains", "taus")}
    check({**after, **whole}, doubling(**options))


def doubling(steps=KILLED, **options):
    """The plain loop whose batch doubles where the others are killed."""
    return plain(lengths=[2] * steps, **options)


def quality(found):
    """The loss on examples of no run."""
    net, (x, y) = oracle.make_model(), oracle.micro_batch(10**6, 0, size=4000)
    for p, weight in zip(net.parameters(), found["weights"], strict=True):
        p.data.copy_(weight)
    return oracle.loss_fn(net(x), y).item()


def check_logged(steps, found):
    """What a framework's own logger was given, a dictionary for each step: finite, or not there."""
    assert len(steps) == len(found["gains"])
    for values, gain, tau in zip(steps, found["gains"], found["taus"]):
        assert (float(values["anybatch/gain"]), float(values["anybatch/tau"])) == pytest.approx((gain, tau))
        assert all(math.isfinite(float(value)) for value in values.values())
    assert float(steps[-1]["anybatch/noise_scale"]) > 0


def as_launched(rank, world):
    """What frameworks ask of the environment of several processes, as torchrun sets it."""
    if world == 1:
        return
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{world}", LOCAL_WORLD_SIZE=f"{world}")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29400", TORCHELASTIC_RUN_ID="tests", GROUP_RANK="0")

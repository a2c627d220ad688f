"""Ranks with different numbers of batches: an error without Join, the oracle's training with it."""

import contextlib
import os

import oracle
import pytest
import torch
from common import attach_task
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel as DDP

from faults import jobs


def micro_batches(rank, given):
    """A single step whose windows have different lengths."""
    named, model = jobs.parts()
    jobs.step(named, model, rank=rank, accumulation=given[rank])


def steps(rank, given, *, join):
    """As many steps as the rank has batches; the oracle's numbers where all goes well."""
    model = DDP(oracle.make_model())
    optimizer, controller = attach_task(model)
    gains, taus = [], []
    with Join([model, controller], divide_by_initial_world_size=False) if join else contextlib.nullcontext():
        for t in range(given[rank]):
            for a in range(jobs.ACCUMULATION):
                x, y = oracle.micro_batch(t, rank * jobs.ACCUMULATION + a)
                with contextlib.nullcontext() if a == jobs.ACCUMULATION - 1 else model.no_sync():
                    (oracle.loss_fn(model(x), y) / jobs.ACCUMULATION).backward()
            optimizer.step()
            optimizer.zero_grad()
            gains.append(controller.gain)
            taus.append(controller.tau)
    return gains, taus, controller.state_dict(), [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("given", [(1, 2), (3, 2), (2, 2, 1)], ids=str)
def test_windows_of_different_lengths_are_a_typed_error_on_every_rank(faults, processes, given):
    faults.fired()
    for rank, child in enumerate(processes.world(micro_batches, len(given), given)):
        kind, classes, message = child.outcome()
        assert (kind, classes[0]) == ("raised", "UsageError")
        assert f"this rank: {given[rank]}, all {len(given)} ranks: {sum(given)}" in message
    faults.survived()


@pytest.mark.parametrize("given", [(7, 3), (3, 7)], ids=str)
def test_a_rank_that_has_left_is_an_error_of_the_others(faults, processes, given):
    """torch's own, for it comes in DDP's reduction, before ours."""
    world = processes.world(left_alone, 2, given, timeout=5)
    early, late = sorted(range(2), key=lambda rank: given[rank])
    assert world[early].join() == 0
    faults.fired()
    kind, classes, message = world[late].outcome()
    assert (kind, "RuntimeError" in classes) == ("raised", True)
    assert any(word in message for word in ("onnection", "imed out")), message
    faults.survived()


def left_alone(rank, given):
    steps(rank, given, join=False)
    os._exit(0)  # without a word to the others


@pytest.mark.parametrize("given", [(9, 4), (6, 5), (7, 7), (8, 5, 2)], ids=str)
def test_under_join_it_is_the_oracles_training(faults, processes, given):
    """The later a rank, the sooner it is done, so that the micro-batches that are left have the oracle's numbers."""
    counts = [jobs.ACCUMULATION * sum(t < n for n in given) for t in range(given[0])]
    gains, taus, weights = oracle.adascale(steps=given[0], counts=counts, several=True)
    results = processes.results(steps, len(given), given, join=True)
    faults.fired(len(set(given)))
    for rank, (mine, clock, state, parameters) in enumerate(results):
        assert mine == pytest.approx(gains[: given[rank]], rel=1e-6)
        assert clock == pytest.approx(taus[: given[rank]], rel=1e-6)
        assert state["tau"] == pytest.approx(taus[-1], rel=1e-6)
        assert state["steps"] == given[0]
        for p, w in zip(parameters, weights, strict=True):
            torch.testing.assert_close(p, w, rtol=1e-6, atol=1e-6)
        faults.same(state, results[0][2], "the ranks")
        faults.same(parameters, results[0][3], "the ranks")
    faults.survived()

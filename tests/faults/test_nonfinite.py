"""nan and infinity in one rank's loss or gradient: all ranks leave the step out, and it is as if it had never been."""

import contextlib
import math

import oracle
import pytest
import torch

from faults import jobs
from faults.ledger import bits

STEPS, RANKS = 9, 2
PLACES = ("loss, first micro-batch", "loss, last micro-batch", "one entry of one gradient")
VALUES = (math.nan, math.inf, -math.inf)


def job(rank, spoilt, *, guard, leave_out=False):
    """Trains on the batches 0 to 8; at the keys of `spoilt`, `(rank, place, value)` says what is not finite.

    The guard is torch's `GradScaler`, the user's own look at the gradients, or none. With `leave_out` the spoilt
    batches are not trained on at all. Returns the states, how many values were spoilt here, and the last weights.
    """
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6, enabled=guard == "scaler")
    named, model = jobs.parts(grad_scaler=scaler if guard == "scaler" else None)
    optimizer, fired = named["optimizer"], 0
    weight = next(model.parameters())

    def spoil(gradient):
        nonlocal fired
        fired += 1
        gradient = gradient.clone()
        gradient.view(-1)[3] = value
        return gradient

    for t in range(STEPS):
        if leave_out and t in spoilt:
            continue
        spoilt_rank, place, value = spoilt.get(t, (None, "", 0.0))
        for a in range(jobs.ACCUMULATION):
            x, y = oracle.micro_batch(t, rank * jobs.ACCUMULATION + a)
            last = a == jobs.ACCUMULATION - 1
            with contextlib.nullcontext() if last else model.no_sync():
                loss = oracle.loss_fn(model(x), y) / jobs.ACCUMULATION
                handle = None
                if spoilt_rank == rank and place.startswith("loss") and last == ("last" in place):
                    loss = loss * value
                    fired += 1
                elif spoilt_rank == rank and place.startswith("one") and last:
                    handle = weight.register_hook(spoil)
                scaler.scale(loss).backward()
                if handle is not None:
                    handle.remove()
        if guard != "own" or all(p.grad.isfinite().all() for p in model.parameters()):
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    skipped = named["controller"].skipped
    state = jobs.states(named)
    del state["controller"]["skipped"]
    return {"state": state, "fired": fired, "skipped": skipped, "weights": [bits(p) for p in model.parameters()]}


def plan(rng, faults):
    """A fault in each of some batches, the first one and neighbours among them."""
    return {t: (rng.randrange(RANKS), rng.choice(PLACES), rng.choice(VALUES)) for t in rng.sample(range(STEPS), faults)}


def several(rank, plans, **options):
    return [job(rank, spoilt, **options) for spoilt in plans]


@pytest.mark.parametrize("guard", ["scaler", "own"])
def test_a_guarded_step_is_left_out_on_all_ranks_as_if_it_had_never_been(faults, processes, times, rng, guard):
    each = [{t: (t % RANKS, place, value)} for t, (place, value) in enumerate((p, v) for p in PLACES for v in VALUES)]
    plans = each + [plan(rng, 3) for _ in range(times(2, 30))]
    mine = processes.results(several, RANKS, plans, guard=guard)
    without = processes.results(several, RANKS, plans, guard=guard, leave_out=True)
    for i, spoilt in enumerate(plans):
        fired = sum(results[i]["fired"] for results in mine)
        assert fired == len(spoilt)
        faults.fired(fired)
        for results, expected in zip(mine, without, strict=True):
            faults.same(results[i]["state"], expected[i]["state"], f"{guard}, {spoilt}")
        faults.same(mine[0][i]["weights"], mine[1][i]["weights"], "the ranks")
    faults.survived()


def test_an_unguarded_step_is_not_counted_on_any_rank(faults, processes):
    """Clock, averages, schedule and model average stay; the weights are what torch's own step makes of them."""
    plans = [{STEPS - 1: (rank, place, value)} for rank in range(RANKS) for place in PLACES for value in VALUES]
    mine = processes.results(several, RANKS, plans, guard="none")
    without = processes.results(several, RANKS, plans, guard="none", leave_out=True)
    for i in range(len(plans)):
        faults.fired(sum(results[i]["fired"] for results in mine))
        for results, expected in zip(mine, without, strict=True):
            assert results[i]["skipped"] == 1
            for part in ("controller", "scheduler", "ema"):
                faults.same(results[i]["state"][part], expected[i]["state"][part], f"{part}, {plans[i]}")
        faults.same(mine[0][i]["weights"], mine[1][i]["weights"], "the ranks")
    faults.survived()


def test_an_unguarded_step_leaves_the_weights_as_they_were(processes):
    plans = [{STEPS - 1: (0, PLACES[0], math.nan)}]
    mine = processes.results(several, RANKS, plans, guard="none")
    without = processes.results(several, RANKS, plans, guard="none", leave_out=True)
    assert mine[0][0]["weights"] == without[0][0]["weights"]

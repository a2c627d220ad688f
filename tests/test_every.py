"""Which steps are measured: each, or each k-th; and when a window's sum is read, which is once a step."""

import itertools
import math

import oracle
import pytest
import torch

import anybatch

LR = 0.05


class Run:
    """A model with a controller, stepped by hand; `raw` has each step's own variance, nan where it has none."""

    def __init__(self, state=None, total=100, **attach):
        self.model = oracle.make_model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR)
        self.records = []
        self.controller = anybatch.attach(
            self.optimizer, model=self.model, scale="count", total=total, record=self.records.append, **attach
        )
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.controller.load_state_dict(state["controller"])

    def step(self, backwards, change=lambda _: None, factor=1.0):
        number = self.controller.steps + self.controller.skipped
        for i in range(backwards):
            x, y = oracle.micro_batch(number, i)
            (oracle.loss_fn(self.model(x), y) * factor / backwards).backward()
        change(self.model)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.controller.gain

    def state(self):
        return {"model": self.model.state_dict(), "controller": self.controller.state_dict()}

    @property
    def raw(self):
        return [record.get("anybatch/raw_variance", math.nan) for record in self.records]


def clip(model):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)


def clip_without_a_trace(model):
    for p in model.parameters():
        p.grad.data.mul_(0.5)


def clamp_data(model):
    for p in model.parameters():
        p.grad.data.clamp_(-0.01, 0.01)


def replace(model):
    for p in model.parameters():
        p.grad = 0.5 * p.grad


def one_layer(model):
    model[0].weight.grad.mul_(0.5)


# ---- each k-th step ----


@pytest.mark.parametrize("backwards", [2, 8])
@pytest.mark.parametrize("total", [1_000, 100_000, None])
@pytest.mark.parametrize("smoothing", [None, "paper", 0.99])
def test_auto_keeps_sixteen_samples_in_both_memories(backwards, total, smoothing):
    """By a plain walk: measured are the first 16, and those that come a sixteenth of a memory after the last one."""
    run = Run(total=total, rule=anybatch.AdaScale(every="auto", smoothing=smoothing))
    steps = 100 if smoothing == 0.99 else 1500 // backwards
    memory = 100 if smoothing == 0.99 else 1000 / backwards  # in steps
    horizon = 0.01 * total if smoothing is None and total else math.inf  # on the clock
    wanted, last_step, last_tau = [], 0, 0.0
    for number in range(steps):
        due = number < 16 or number - last_step >= int(memory / 16) or run.controller.tau - last_tau >= horizon / 16
        if due:
            last_step, last_tau = number, run.controller.tau
        wanted.append(due)
        run.step(backwards)
        if total is not None and run.controller.done:
            break
    assert [not math.isnan(raw) for raw in run.raw] == wanted
    if total != 1_000:
        assert sum(wanted) < 0.7 * steps


def test_auto_measures_again_after_a_resume_and_a_change_of_the_scale():
    run = Run(total=None, rule=anybatch.AdaScale(every="auto"))
    for _ in range(40):
        run.step(2)
    assert math.isnan(run.raw[-1])
    for _ in range(40):
        run.step(8)  # a memory of 125 steps: each seventh
    measured = [i for i, raw in enumerate(run.raw) if not math.isnan(raw) and i > 50]
    assert {b - a for a, b in itertools.pairwise(measured)} == {7}
    again = Run(state=run.state(), total=None, rule=anybatch.AdaScale(every="auto"))
    again.step(8)  # the scale of the last step is not in the state
    assert not math.isnan(again.raw[0])


def test_each_kth_step_is_measured():
    run = Run(total=10_000, rule=anybatch.AdaScale(every=3))
    gains = [run.step(4) for _ in range(9)]
    assert [not math.isnan(raw) for raw in run.raw] == [True, False, False] * 3
    assert len(set(gains)) == 3
    assert run.controller.steps == 9


def test_the_measured_gains_are_those_of_a_plain_loop():
    """The measured steps alone, with averages that fade by the clock: what each shows is summed up by hand."""
    run, seen, tau, gains = Run(total=10_000, rule=anybatch.AdaScale(every=2)), [], 0.0, []
    plain = oracle.make_model()
    for t in range(8):
        grads = []
        for i in range(4):
            x, y = oracle.micro_batch(t, i)
            grads.append(torch.autograd.grad(oracle.loss_fn(plain(x), y), list(plain.parameters())))
        mean = [sum(g) / 4 for g in zip(*grads)]
        if t % 2 == 0:
            spread = sum(oracle.norm2([a - b for a, b in zip(g, mean)]) for g in grads) / 3
            seen.append((spread, oracle.norm2(mean) - spread / 4, tau))
        thetas = [math.exp(-1 / 100), *(math.exp((a[2] - b[2]) / 100) for a, b in itertools.pairwise(seen))]
        thetas = [min(theta, (1 - 4 / 1000) ** (2 if k else 1)) for k, theta in enumerate(thetas)]
        weights = [(1 - theta) * math.prod(thetas[k + 1 :]) for k, theta in enumerate(thetas)]
        v, q = (sum(w * x[k] for w, x in zip(weights, seen)) / sum(weights) for k in (0, 1))
        v, q = max(v, 0.0), max(q, 0.0)
        gain = (v + q) / (v / 4 + q)
        gain = gain ** (1 - math.sqrt(0.5) ** (len(seen) + 1)) if gain > 1 else gain
        gains.append(gain)
        with torch.no_grad():
            for p, g in zip(plain.parameters(), mean):
                p -= LR * gain * g
        tau += gain
    assert [run.step(4) for _ in range(8)] == pytest.approx(gains, rel=1e-12)


def test_a_short_memory_gets_its_samples():
    """Of 24 base iterations, by steps of about 2: one is measured as soon as the clock has moved by 6."""
    run, moved = Run(total=2400, rule=anybatch.AdaScale(every=1000)), 0.0
    for _ in range(12):
        due = moved >= 6 or not run.records
        run.step(4)
        assert math.isnan(run.raw[-1]) != due
        moved = (0.0 if due else moved) + run.controller.iterations
    assert 3 <= sum(not math.isnan(raw) for raw in run.raw) <= 8


@pytest.mark.parametrize("total", [1000, 10_000])
def test_a_resumed_run_measures_the_steps_that_an_undisturbed_one_does(total):
    rule = anybatch.AdaScale(every=3)
    whole = Run(total=total, rule=rule)
    gains = [whole.step(4) for _ in range(8)]
    first = Run(total=total, rule=rule)
    assert [first.step(4) for _ in range(4)] == gains[:4]
    second = Run(first.state(), total=total, rule=rule)
    assert [second.step(4) for _ in range(4)] == gains[4:]


def test_a_skipped_step_is_made_up_for():
    run = Run(total=10_000, rule=anybatch.AdaScale(every=2))
    for factor in (1.0, 1.0, math.nan, 1.0, 1.0):
        run.step(4, factor=factor)
    assert [not math.isnan(raw) for raw in run.raw] == [True, False, False, True, False]
    assert run.controller.skipped == 1


@pytest.mark.parametrize("every", [0, -1, 1.5, "2", True])
def test_every_is_a_number_of_steps(every):
    with pytest.raises(anybatch.InvalidValueError, match="every is a number of steps"):
        anybatch.AdaScale(every=every)


def test_consecutive_gradients_are_measured_at_each_step():
    with pytest.raises(anybatch.InvalidValueError, match="consecutive"):
        anybatch.AdaScale(consecutive=True, every=2)


# ---- one read of the sum ----


@pytest.mark.parametrize("change", [lambda _: None, clip], ids=["left alone", "clipped"])
def test_a_longer_window_is_measured(change):
    run = Run()
    for backwards in (2, 3, 3, 5):
        run.step(backwards, change)
    assert not any(map(math.isnan, run.raw))


@pytest.mark.parametrize("change", [lambda _: None, clip, clip_without_a_trace, clamp_data, replace, one_layer])
def test_a_shorter_window_is_counted_and_not_measured(change):
    run = Run()
    run.step(5)
    before = run.controller.variance, run.controller.sqnorm
    run.step(3, change)
    assert math.isnan(run.raw[-1])
    assert (run.controller.variance, run.controller.sqnorm) == before
    assert 1 <= run.controller.gain <= 3
    run.step(3, change)  # from now on three are usual
    assert not math.isnan(run.raw[-1])


def test_what_is_not_finite_is_skipped_all_the_same():
    run = Run()
    run.step(5)
    weights = [p.detach().clone() for p in run.model.parameters()]
    run.step(3, clip, factor=math.inf)
    assert run.controller.skipped == 1
    assert all(map(torch.equal, weights, run.model.parameters()))
    run.step(4, clip)
    assert math.isnan(run.raw[-1])  # a step that did not count tells nothing of the next: five are usual


def test_a_resumed_run_leaves_out_what_an_undisturbed_one_does():
    windows = [5, 5, 3, 3, 4]
    whole = Run()
    gains = [whole.step(n, clip) for n in windows]
    first = Run()
    assert [first.step(n, clip) for n in windows[:2]] == gains[:2]
    second = Run(first.state())
    assert [second.step(n, clip) for n in windows[2:]] == gains[2:]
    assert math.isnan(second.raw[0])

"""fairscale's AdaScale: its own golden gains, its loops, its states, and an oracle of its estimator."""

import copy
import doctest
import gc
import weakref

import numpy as np
import pytest
import torch
from distributed import launch
from torch.optim.lr_scheduler import LambdaLR

import anybatch
from anybatch.integrations import fairscale
from anybatch.integrations.fairscale import AdaScale, AdaScaleWrapper
from integrations import workers

# fairscale/fair_dev/testing/golden_testing_data.py of 0.4.13: the inputs of two micro-batches, and the gain.
GOLDEN = [
    ([([1.0, 0.0], [0.0, 1.0])] * 2, 4 / 3),
    ([([1.0, 1.0], [1.0, 1.0])] * 2, 1.0000001249999846),
    ([([-1.0, 1.0], [1.0, -1.0])] * 2, 2.0),
    ([([1.0, 4.0], [5.0, 0.5])] * 2, 1.4688796680497926),
    ([([-0.2, 3.0], [5.0, 0.5])] * 2, 1.8472893901708),
    ([([-0.2, 3.3], [5.2, 0.7]), ([1.0, 4.0], [3.1, 0.1])], 1.6720968158031417),
]


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), lr=0.1, **settings)


def backwards(model, inputs, *, share):
    for x in inputs:
        (model(torch.tensor(x)).sum() * share).backward()


@pytest.mark.parametrize(("steps", "gain"), GOLDEN)
@pytest.mark.parametrize("scaled", [True, False])
def test_golden_gains_between_backward_and_step(steps, gain, scaled):
    model = torch.nn.Linear(2, 2)
    optim = AdaScale(sgd(model), num_gradients_to_accumulate=2, is_scaled_loss=scaled)
    assert optim.gain() == 1.0
    for inputs in steps:
        weight = model.weight.detach().clone()
        backwards(model, inputs, share=0.5 if scaled else 1.0)
        if not scaled:
            optim.scale_grad_by_num_grads_to_accum()
        mean = torch.tensor(inputs).mean(0).expand(2, 2)
        torch.testing.assert_close(model.weight.grad, mean)
        coming = optim.gain()
        optim.step()
        optim.zero_grad()
        torch.testing.assert_close(model.weight.detach(), weight - 0.1 * coming * mean)
        assert optim.gain() == coming
    assert coming == pytest.approx(gain, rel=3e-7)


@pytest.mark.parametrize(("scale", "gain"), [(None, 4.0), (4 / 3, 4 / 3), (2.0, 2.0), (4.0, 4.0)])
def test_orthogonal_samples_have_the_gain_of_the_scale(scale, gain):
    model = torch.nn.Linear(4, 2, bias=False)
    optim = AdaScale(sgd(model), num_gradients_to_accumulate=4, scale=scale)
    backwards(model, torch.eye(4).tolist(), share=1.0)
    assert optim.gain() == pytest.approx(gain, rel=1e-6)
    assert optim.scale == gain


def fairscales_gains(samples, *, theta, scale, debias=True):
    """Its estimator in float64, one parameter group: `samples[t][i]` is the gradient of micro-batch i of step t."""
    kept, weight, gains = [0.0, 0.0], 0.0, []
    for count, step in enumerate(samples, 1):
        n = len(step)
        m1 = sum(g.square().sum().item() for g in step) / n
        m2 = (sum(step) / n).square().sum().item()
        variance = max((m1 - m2) * scale / (n - 1), 1e-6)
        new = variance, max(m2 - (m1 - m2) / (n - 1), 0.0)
        share = 1 - theta
        if not debias and count < 1 / (1 - theta):
            share = 1 / count
        kept = [(1 - share) * a + share * b for a, b in zip(kept, new, strict=True)]
        weight = (1 - share) * weight + share
        v, s = kept[0] / weight, kept[1] / weight
        gains.append((v + s) / (v / scale + s))
    return gains


@pytest.mark.parametrize(("smoothing", "scale"), [(None, None), (0.5, None), (0.9, 6.0), (0.0, 1.5)])
def test_gains_of_a_run_are_fairscales(smoothing, scale):
    torch.manual_seed(3)
    model = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
    optim = AdaScale(sgd(model), num_gradients_to_accumulate=3, smoothing=smoothing, scale=scale)
    data = 3 + torch.randn(20, 3, 3, dtype=torch.float64)
    theta = 1 - 3 / 1000 if smoothing is None else smoothing
    expected = fairscales_gains(list(data), theta=theta, scale=scale or 3.0)
    for inputs, gain in zip(data, expected, strict=True):
        for x in inputs:
            (model(x).sum() / 3).backward()
        assert optim.gain() == pytest.approx(gain, rel=2e-7)
        optim.step()
        optim.zero_grad()
    assert min(expected) > 1
    assert max(expected) - min(expected) > 0.01


def test_the_papers_averages_give_the_gain_of_the_steps_before():
    """debias_ewma=False is the paper's Appendix B.3 here: fairscale's own lets each step's gradients into its gain."""
    torch.manual_seed(3)
    model = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
    optim = AdaScale(sgd(model), num_gradients_to_accumulate=2, debias_ewma=False)
    data = torch.randn(6, 2, 3, dtype=torch.float64)
    of_now = fairscales_gains(list(data), theta=0.998, scale=2.0, debias=False)
    gains = []
    for inputs in data:
        for x in inputs:
            (model(x).sum() / 2).backward()
        gains.append(optim.gain())
        optim.step()
        optim.zero_grad()
    assert gains == pytest.approx([1.0, *of_now[:-1]], rel=1e-9)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("n", [3, 6, 9])
def test_another_number_of_gradients_keeps_the_variance_of_a_base_batch(n, scaled):
    """fairscale's test of `set_scale`, without its rescaling of the variance by old / new scale."""
    model = torch.nn.Linear(2, 2, bias=False)
    optim = AdaScale(sgd(model), num_gradients_to_accumulate=2, is_scaled_loss=scaled)

    def step(inputs):
        backwards(model, inputs, share=1 / len(inputs) if scaled else 1.0)
        if not scaled:
            optim.scale_grad_by_num_grads_to_accum()
        gain = optim.gain()
        optim.step()
        optim.zero_grad()
        return gain

    assert step([[0.0, 1.0], [1.0, 0.0]]) == pytest.approx(2.0, rel=1e-6)
    optim.set_scale(float(n))
    optim.set_num_gradients_to_accumulate(n)
    assert optim.smoothing == 1 - n / 1000
    # The first step's variance and sqnorm are 2 and 0, the second's 0 and 2.
    old, new = optim.smoothing * 0.002, 1 - optim.smoothing
    expected = (2 * old + 2 * new + 1e-6) / (2 * old / n + 2 * new + 1e-6)
    assert step([[0.0, 1.0]] * n) == pytest.approx(expected, rel=2e-3)  # the 1e-6 are of the averages over the weight
    assert optim.controller.scale == pytest.approx(n)


def test_a_loop_that_adds_the_gain_before_the_step_and_steps_its_own_scheduler():
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2, bias=False)
    optim = AdaScale(sgd(model), num_gradients_to_accumulate=3)
    scheduler = LambdaLR(optim, lr_lambda=lambda epoch: 0.1**epoch)
    step, epoch = 0.0, 0
    while epoch < 3:
        backwards(model, torch.rand(3, 2).tolist(), share=1 / 3)
        step += optim.gain()
        optim.step()
        optim.zero_grad()
        assert optim.param_groups[0]["lr"] == pytest.approx(0.1 * 0.1**epoch)
        while epoch < int(step // 10):
            scheduler.step()
            epoch += 1
    assert optim.controller.tau == pytest.approx(step)
    assert optim.controller.steps < 30 <= step


def test_a_checkpoint_is_replayed(tmp_path):
    torch.manual_seed(1)
    data = torch.rand(12, 3, 5)

    def made():
        model = torch.nn.Linear(5, 2, bias=False)
        return model, AdaScale(sgd(model, momentum=0.9), num_gradients_to_accumulate=3)

    def train(model, optim, steps):
        for inputs in steps:
            backwards(model, inputs.tolist(), share=1.0)
            optim.step()
            optim.zero_grad()
        return model.weight.detach().clone(), optim.gain()

    model, optim = made()
    train(model, optim, data[:6])
    torch.save({"model": model.state_dict(), "optim": optim.state_dict()}, tmp_path / "checkpoint.pt")
    weight, gain = train(model, optim, data[6:])
    model, optim = made()
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    model.load_state_dict(checkpoint["model"])
    optim.load_state_dict(checkpoint["optim"])
    again, gain_again = train(model, optim, data[6:])
    assert torch.equal(again, weight)
    assert gain_again == gain > 1


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("debias", [True, False])
def test_a_state_of_fairscales_goes_on(debias, scaled):
    """Written as fairscale writes it, arrays by parameter group; two groups become one gain."""
    torch.manual_seed(3)
    model = torch.nn.Linear(3, 1, dtype=torch.float64)
    data = 2 + torch.randn(9, 2, 3, dtype=torch.float64)
    samples = [[torch.cat([x, torch.ones(1, dtype=torch.float64)]) for x in step] for step in data]
    unit = 1 if scaled else 4  # without scaled losses the averages are of sums of two gradients here, of means there
    moments = []
    for step in samples[:8]:  # of weight and bias
        m1 = torch.stack(step).square().mean(0)
        m2 = torch.stack(step).mean(0).square()
        variance = 2 * (m1 - m2)
        moments.append(
            [(part.sum().item()) for part in (variance[:3], variance[3:], m2[:3] - variance[:3] / 2, m2[3:])]
        )
    weights = np.array([0.002 * 0.998**k for k in range(7, -1, -1)])
    table = np.array(moments)
    averages = (weights @ table) / weights.sum() if debias else table.mean(0)
    old = {"grad_var_avg": averages[:2], "grad_sqr_avg": averages[2:]}
    if debias:
        younger = np.array([1.0, 0.25])  # the second group was added later
        old |= {f"grad_{n}_avg_unbias": weights.sum() * younger for n in ("var", "sqr")}
        old |= {f"grad_{n}_avg_biased": old[f"grad_{n}_avg"] * weights.sum() for n in ("var", "sqr")}
    else:
        old |= {f"grad_{n}_avg_count": np.array([8.0]) for n in ("var", "sqr")}
        old |= {f"grad_{n}_avg_total": old[f"grad_{n}_avg"] * 8 for n in ("var", "sqr")}
    inner = sgd(model)
    optim = AdaScale(inner, num_gradients_to_accumulate=2, debias_ewma=debias, is_scaled_loss=scaled)
    bare = sgd(model).state_dict()
    optim.load_state_dict({**bare, "state": {**bare["state"], "adascale": old}})
    assert "adascale" not in inner.state
    v, s = averages[:2].sum(), averages[2:].sum()
    assert optim.controller.state_dict()["weight"] == pytest.approx(weights.sum() if debias else 1.0)
    assert optim.controller.variance == pytest.approx(v * unit)
    assert optim.controller.sqnorm == pytest.approx(s * unit)
    for x in data[8]:
        (model(x).sum() / (2 if scaled else 1)).backward()
    expected = fairscales_gains(samples, theta=0.998, scale=2.0)[-1] if debias else (v + s) / (v / 2 + s)
    assert optim.gain() == pytest.approx(expected, rel=2e-6)


def test_states_that_are_none_are_refused_and_leave_everything():
    model = torch.nn.Linear(2, 1)
    inner = sgd(model)
    optim = AdaScale(inner, num_gradients_to_accumulate=2)
    inner.param_groups[0]["lr"] = 0.3
    bare = {**sgd(model).state_dict()}
    with pytest.raises(anybatch.StateError, match="no state of AdaScale"):
        optim.load_state_dict(bare)
    with pytest.raises(anybatch.StateError, match="Not the state of fairscale"):
        optim.load_state_dict({**bare, "state": {"adascale": {"grad_var_avg_unbias": [1.0]}}})
    assert inner.param_groups[0]["lr"] == 0.3
    optim.load_state_dict(
        {**bare, "state": {"adascale": {"grad_var_avg": [0.0], "grad_sqr_avg": [1.0]}}}
    )  # no step yet
    assert inner.param_groups[0]["lr"] == 0.1
    assert optim.gain() == 1.0


def test_unhook_frees_every_tensor():
    model = torch.nn.Linear(123, 456, bias=False)
    optim = AdaScale(sgd(model), num_gradients_to_accumulate=2)
    backwards(model, torch.rand(2, 123).tolist(), share=0.5)
    optim.gain()
    optim.step()
    weight = weakref.ref(model.weight)
    optim.unhook()
    del model, optim
    gc.collect()
    assert weight() is None
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    assert not any(x.shape == (456, 123) for x in tensors)


def test_groups_added_later_count_from_the_second_step_and_all_have_one_gain():
    torch.manual_seed(0)
    one, two = torch.nn.Linear(2, 2), torch.nn.Linear(2, 3)
    optim = AdaScale(sgd(one), num_gradients_to_accumulate=2)
    optim.add_param_group({"params": two.parameters(), "lr": 0.2})
    gains = []
    for _ in range(2):
        optim.zero_grad()
        samples = []
        for x in torch.tensor([[1.0, 2.0], [3.0, 4.0]]):
            parameters = [*one.parameters(), *two.parameters()]
            grads = torch.autograd.grad(two(one(x)).sum(), parameters)
            samples.append(torch.cat([g.flatten() for g in grads]).double())
            (two(one(x)).sum() / 2).backward()
        before = [p.detach().clone() for p in (one.weight, two.weight)]
        gains.append(optim.gain())
        assert optim.gain(0) == optim.gain(1) == gains[-1]
        optim.step()
        for p, old, lr in zip((one.weight, two.weight), before, (0.1, 0.2), strict=True):
            torch.testing.assert_close(p.detach(), old - lr * gains[-1] * p.grad)
    assert gains == pytest.approx([1.0, *fairscales_gains([samples], theta=0.998, scale=2.0)], rel=1e-6)


def test_a_wrapper_made_like_an_optimizer_takes_closures_and_a_grad_scaler():
    model = torch.nn.Linear(2, 2)
    optim = AdaScaleWrapper(
        model.parameters(), smoothing=0.5, num_gradients_to_accumulate=2, debias_ewma=False, lr=0.1, momentum=0.9
    )
    assert optim.controller.rule.estimator == "paper"
    assert optim.smoothing == 0.5
    assert optim.defaults["momentum"] == 0.9
    assert isinstance(optim, torch.optim.Optimizer)
    assert "momentum: 0.9" in repr(optim)

    def closure():
        optim.zero_grad()
        backwards(model, [[1.0, 0.0], [0.0, 1.0]], share=0.5)
        return 7.0

    assert optim.step(closure) == 7.0
    assert optim.controller.count == 2
    optim.zero_grad()


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_and_a_constant_momentum_leave_torchs_own_update(fused):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2, bias=False)
    optim = AdaScale(sgd(model, momentum=0.9, fused=fused), num_gradients_to_accumulate=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    weight, momentum = model.weight.detach().clone(), torch.zeros(2, 2)
    for inputs in torch.rand(4, 2, 2):
        for x in inputs:
            scaler.scale(model(x).sum() / 2).backward()
        gain = optim.gain()
        scaler.step(optim)
        scaler.update()
        optim.zero_grad()
        momentum = 0.9 * momentum + inputs.mean(0).expand(2, 2)
        weight = weight - 0.1 * gain * momentum
        torch.testing.assert_close(model.weight.detach(), weight)
    assert optim.controller.steps == 4


def test_what_cannot_be_is_an_error_that_says_what_to_do():
    model = torch.nn.Linear(2, 1)
    with pytest.raises(RuntimeError, match="consecutive=True"):
        AdaScale(sgd(model))
    with pytest.raises(anybatch.InvalidValueError, match="1 ranks train together"):
        AdaScale(sgd(model), world_size=4)
    for wrong in (0, 1.5, True):
        with pytest.raises(anybatch.InvalidValueError, match="num_gradients_to_accumulate"):
            AdaScale(sgd(model), num_gradients_to_accumulate=wrong)
    inner = sgd(model)
    with pytest.raises(anybatch.InvalidValueError, match="micro_batch"):
        AdaScale(inner, num_gradients_to_accumulate=2, scale=-1)
    optim = AdaScale(inner, num_gradients_to_accumulate=2, is_scaled_loss=False)  # nothing is left of the one before
    with pytest.raises(anybatch.InvalidValueError, match="smoothing="):
        optim.set_num_gradients_to_accumulate(4, update_smoothing=False)
    backwards(model, [[1.0, 0.0], [0.0, 1.0]], share=1.0)
    with pytest.raises(anybatch.UsageError, match="scale_grad_by_num_grads_to_accum"):
        optim.step()
    optim.scale_grad_by_num_grads_to_accum()
    optim.step()
    optim.zero_grad()
    backwards(model, [[1.0, 0.0], [0.0, 1.0]], share=1.0)
    with pytest.raises(anybatch.UsageError, match="scale_grad_by_num_grads_to_accum"):  # once a step
        optim.step()
    assert not hasattr(AdaScale.__new__(AdaScale), "param_groups")
    with pytest.raises(anybatch.UsageError, match="is_scaled_loss=False"):
        AdaScale(sgd(torch.nn.Linear(1, 1)), num_gradients_to_accumulate=2).scale_grad_by_num_grads_to_accum()
    with pytest.raises(anybatch.UsageError, match="copy the inner"):
        copy.deepcopy(optim)


def test_two_ranks_have_the_golden_gains_and_one_tau():
    golden = [([list(pair) for pair in steps], gain) for steps, gain in GOLDEN]
    for gains, tau, refused in launch.run(workers.fairscale, world=2, args=(golden,)):
        assert gains == pytest.approx([gain for _, gain in GOLDEN], rel=3e-7)
        assert tau == pytest.approx(sum(gains[:1]) * 2, rel=1e-6)
        assert "model=ddp_model" in refused


def test_the_example_runs():
    ran = doctest.testmod(fairscale, extraglobs={"anybatch": anybatch, "torch": torch})
    assert ran.attempted > 5
    assert ran.failed == 0

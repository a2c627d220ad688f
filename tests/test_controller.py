"""attach and the order of one step: what is changed for a step is put back, and what did not happen leaves no trace."""

import copy
import gc
import io
import math
import pickle
import warnings
import weakref

import oracle
import pytest
import torch
from torch import nn

import anybatch

OPTIMIZERS = {
    "SGD": lambda p, **k: torch.optim.SGD(p, lr=k.pop("lr", 0.1), momentum=0.9, weight_decay=0.01, **k),
    "Adam": lambda p, **k: torch.optim.Adam(p, lr=k.pop("lr", 0.1), weight_decay=0.01, **k),
    "AdamW": lambda p, **k: torch.optim.AdamW(p, lr=k.pop("lr", 0.1), weight_decay=0.1, **k),
    "RMSprop": lambda p, **k: torch.optim.RMSprop(p, lr=k.pop("lr", 0.1), **k),
    "Adagrad": lambda p, **k: torch.optim.Adagrad(p, lr=k.pop("lr", 0.1), **k),
}


def attached(make=OPTIMIZERS["SGD"], *, seed=0, scheduler=None, optimizer_options=None, **options):
    model = oracle.make_model(seed)
    optimizer = make(model.parameters(), **(optimizer_options or {}))
    options = options if options.keys() & {"scale", "base_batch"} else {"scale": "count", **options}
    scheduler = scheduler(optimizer) if scheduler else None
    return model, optimizer, anybatch.attach(optimizer, model=model, scheduler=scheduler, **options)


def backwards(model, t=0, n=3, factor=1.0):
    for i in range(n):
        x, y = oracle.micro_batch(t, i)
        (factor * oracle.loss_fn(model(x), y) / n).backward()


def step(model, optimizer, t=0, n=3, factor=1.0):
    backwards(model, t, n, factor)
    optimizer.step()
    optimizer.zero_grad()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- scale one ----


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rule", [anybatch.AdaScale(), anybatch.Linear(), anybatch.Identity(), anybatch.SquareRoot()])
def test_scale_one_is_bitwise_the_bare_optimizer(name, rule):
    bare = oracle.make_model()
    bare_optimizer = OPTIMIZERS[name](bare.parameters())
    model, optimizer, controller = attached(OPTIMIZERS[name], scale=1, rule=rule)
    for t in range(8):
        step(bare, bare_optimizer, t)
        step(model, optimizer, t)
        assert same(weights(bare), weights(model))
        assert controller.tau == t + 1
    controller.detach()  # while it is attached, the optimizer's state carries the controller's
    expected, mine = bare_optimizer.state_dict(), optimizer.state_dict()
    assert expected["param_groups"] == mine["param_groups"]
    for key, state in expected["state"].items():
        assert all(torch.equal(v, mine["state"][key][k]) for k, v in state.items() if torch.is_tensor(v))


def test_fixed_rules_with_a_number_put_no_hook_on_gradients():
    model, optimizer, controller = attached(scale=8, rule=anybatch.Linear())
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    step(model, optimizer)
    assert (controller.tau, controller.lr_factor, controller.count) == (8, 8, 0)
    assert math.isnan(controller.gain)


# ---- the learning rate ----


def learning_rates(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


class Spy(torch.optim.SGD):
    """Records the values that a step really used; raises where asked to."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.used, self.fail = [], False

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.used.append(learning_rates(self))
        if self.fail:
            raise ZeroDivisionError
        super().step()
        return loss


def spy(parameters, **options):
    return Spy(parameters, **{"lr": 0.1, **options})


def test_one_gain_for_all_groups_and_the_base_rates_outside_of_the_step():
    model = oracle.make_model()
    optimizer = spy([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.02}])
    controller = anybatch.attach(optimizer, model=model, scale="count")
    step(model, optimizer)
    assert 1 < controller.gain < 3
    assert optimizer.used[0] == pytest.approx([0.1 * controller.gain, 0.02 * controller.gain])
    assert learning_rates(optimizer) == [0.1, 0.02]


@pytest.mark.parametrize("kind", ["float", "tensor", "0-dim double"])
def test_trap_a_tensor_learning_rate_must_not_compound(kind):
    lr = {"float": 0.1, "tensor": torch.tensor([0.1]), "0-dim double": torch.tensor(0.1, dtype=torch.float64)}[kind]
    model, optimizer, controller = attached(spy, optimizer_options={"lr": lr})
    for t in range(3):
        step(model, optimizer, t)
        assert optimizer.used[t] == pytest.approx([0.1 * controller.gain])
        assert optimizer.param_groups[0]["lr"] is lr  # the same object with its own value
        assert learning_rates(optimizer) == pytest.approx([0.1], rel=1e-7)


@pytest.mark.parametrize("look", ["step", "state_dict", "done", "detach", "controller.state_dict", "load_state_dict"])
@pytest.mark.parametrize("tensor", [True, False])
def test_trap_the_learning_rate_is_restored_when_the_step_raises(look, tensor):
    """No hook runs after a step that raised: the rate is put back at the first opportunity, whatever that is."""
    lr = torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1
    model, optimizer, controller = attached(spy, optimizer_options={"lr": lr}, total=100)
    step(model, optimizer)
    tau, averages, clean = controller.tau, controller.state_dict(), copy.deepcopy(optimizer.state_dict())
    backwards(model, 1)
    optimizer.fail = True
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    optimizer.fail = False
    optimizer.zero_grad()
    if look == "step":
        step(model, optimizer, 1)
        assert optimizer.used[2] == pytest.approx(optimizer.used[1])
        assert controller.steps == 2
        tau = controller.tau
    elif look == "state_dict":
        assert float(optimizer.state_dict()["param_groups"][0]["lr"]) == 0.1
    elif look == "done":
        assert not controller.done
    elif look == "detach":
        controller.detach()
    elif look == "controller.state_dict":
        assert controller.state_dict() == averages
    else:
        optimizer.load_state_dict(clean)
    assert learning_rates(optimizer) == [0.1]
    assert controller.tau == tau


def test_trap_a_closure_runs_before_its_gain_is_known():
    """step(closure): the hook before the step sees stale gradients; the gain must come from the closure's own."""
    model, optimizer, controller = attached(spy)
    gains = []
    for t in range(3):
        reference, reference_optimizer, reference_controller = attached(spy)
        step(reference, reference_optimizer, t)

        def closure():
            optimizer.zero_grad()
            backwards(model, t)
            return torch.tensor(7.0)

        with torch.no_grad():
            for p, w in zip(model.parameters(), oracle.make_model().parameters(), strict=True):
                p.copy_(w)
        loss = optimizer.step(closure) if t % 2 else optimizer.step(closure=closure)
        assert loss == 7
        raw = controller.scale, controller.count
        assert raw == (3, 3)
        gains.append((controller.gain, reference_controller.gain, optimizer.used[-1][0]))
    assert gains[0][0] == pytest.approx(gains[0][1])
    assert all(used == pytest.approx(0.1 * gain) for gain, _, used in gains)


def test_an_empty_first_group_changes_nothing():
    gains = []
    for empty in ([], [{"params": []}]):
        model = oracle.make_model()
        optimizer = torch.optim.SGD([*empty, {"params": list(model.parameters())}], lr=0.1)
        controller = anybatch.attach(optimizer, model=model, scale="count")
        backwards(model)
        optimizer.step()
        gains.append(controller.gain)
    assert gains[0] == gains[1] > 1


def test_groups_added_later_are_scaled():
    model = oracle.make_model()
    optimizer = spy(model[0].parameters())
    controller = anybatch.attach(optimizer, model=model, scale="count")
    step(model, optimizer)
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.05})
    step(model, optimizer)
    step(model, optimizer)
    assert optimizer.used[2] == pytest.approx([0.1 * controller.gain, 0.05 * controller.gain])


# ---- the Adam family, and decays on the clock ----


def used_values(make, rule, *, scale, **options):
    """The group's values during one step."""
    model, optimizer, controller = attached(make, scale=scale, rule=rule, optimizer_options=options)
    seen = {}
    optimizer.register_step_pre_hook(lambda o, *_: seen.update(o.param_groups[0]))
    before = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    step(model, optimizer)
    assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == before
    return seen, controller


def test_adam_on_the_clock():
    seen, controller = used_values(OPTIMIZERS["Adam"], anybatch.AdaScale(), scale=8)
    r = controller.gain
    assert 1 < r < 8
    assert seen["lr"] == pytest.approx(0.1 * r**0.5)
    assert seen["betas"] == pytest.approx((0.9**r, 0.999**r))
    assert controller.tau == r


def test_adamw_moves_lr_times_weight_decay_by_the_iterations():
    seen, controller = used_values(OPTIMIZERS["AdamW"], anybatch.AdaScale(), scale=8)
    assert seen["lr"] * seen["weight_decay"] == pytest.approx(0.1 * 0.1 * controller.gain)


def test_adam_with_constant_decays():
    seen, controller = used_values(OPTIMIZERS["AdamW"], anybatch.AdaScale(decays="constant"), scale=8)
    assert (seen["betas"], seen["weight_decay"]) == ((0.9, 0.999), 0.1)
    assert seen["lr"] == pytest.approx(0.1 * controller.gain**0.5)


def test_square_root_on_adamw_is_the_sde_rule():
    seen, controller = used_values(OPTIMIZERS["AdamW"], anybatch.SquareRoot(), scale=4)
    assert seen["lr"] == pytest.approx(0.2)
    assert seen["betas"] == pytest.approx((0.9**4, 0.999**4))
    assert seen["weight_decay"] == pytest.approx(0.2)
    assert controller.tau == 4


def test_adams_debiasing_counts_base_iterations():
    """Constant gradients and no decay of the gain: after steps of any length the debiased average is the gradient, so
    Adam's first moments agree with base steps bit for bit up to rounding, and `step` reads as tau."""

    class Varying(anybatch.Linear):
        def __call__(self, *, scale, gain, clock, exponent):
            return anybatch.Scaling(1.0, scale * (1 + clock.tau % 3))

    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    controller = anybatch.attach(optimizer, model=model, scale=2.5, rule=Varying(decays="clock"))
    g = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    for _ in range(5):
        model(g).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        state = optimizer.state[model.weight]
        assert float(state["step"]) == pytest.approx(controller.tau, rel=1e-6)
        debiased = state["exp_avg"] / (1 - 0.9 ** float(state["step"]))
        torch.testing.assert_close(debiased, g.view(1, 3), rtol=1e-5, atol=0)


def test_sgd_momentum_on_the_clock_keeps_the_buffer_of_base_iterations():
    """Constant gradient, iterations that change: the buffer after a step of k is that after k base steps."""
    ks = [1.0, 4.0, 2.0, 8.0, 1.0, 3.0]

    class Steps(anybatch.Linear):
        def __call__(self, *, scale, gain, clock, exponent):
            done, n = 0.0, 0
            while n < len(ks) - 1 and done + 1e-9 < clock.tau:
                done, n = done + ks[n], n + 1
            return anybatch.Scaling(ks[n], ks[n])

    g = torch.tensor([1.0, -2.0], dtype=torch.float64)
    for first in (1.0, 5.0):
        ks[0] = first
        model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        anybatch.attach(optimizer, model=model, scale=3, rule=Steps(decays="clock"))
        bare = nn.Linear(2, 1, bias=False, dtype=torch.float64)
        bare_optimizer = torch.optim.SGD(bare.parameters(), lr=0.01, momentum=0.9)
        for k in ks:
            model(g).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            for _ in range(int(k)):
                bare(g).sum().backward()
                bare_optimizer.step()
                bare_optimizer.zero_grad()
            torch.testing.assert_close(
                optimizer.state[model.weight]["momentum_buffer"], bare_optimizer.state[bare.weight]["momentum_buffer"]
            )
        assert optimizer.param_groups[0]["momentum"] == 0.9
        assert optimizer.param_groups[0]["dampening"] == 0


# ---- skips and phantoms ----


@pytest.mark.filterwarnings("ignore:The schedule does not fit total")
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("closure", [True, False])
def test_trap_a_non_finite_gradient_moves_nothing(value, closure):
    model, optimizer, controller = attached(
        total=100, scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)
    )
    step(model, optimizer)
    state, rate, kept = controller.state_dict(), learning_rates(optimizer), weights(model)
    if closure:
        optimizer.step(lambda: backwards(model, 1, factor=value))
    else:
        step(model, optimizer, 1, factor=value)
    optimizer.zero_grad()
    assert controller.skipped == 1
    assert {**controller.state_dict(), "skipped": 0} == state
    assert learning_rates(optimizer) == rate
    with torch.no_grad():
        for p, w in zip(model.parameters(), kept, strict=True):
            p.copy_(w)
    optimizer.state.clear()
    step(model, optimizer, 2)
    assert (controller.steps, controller.skipped) == (2, 1)


def test_trap_a_scaler_that_skips_the_step_moves_nothing():
    """A GradScaler leaves optimizer.step() out after an overflow; the window is thrown away with its gradients."""
    model, optimizer, controller = attached()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def scaled_step(t, factor=1.0):
        for i in range(3):
            x, y = oracle.micro_batch(t, i)
            scaler.scale(factor * oracle.loss_fn(model(x), y) / 3).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    scaled_step(0)
    state = controller.state_dict()
    scaled_step(1, math.inf)
    assert controller.state_dict() == state
    scaled_step(2)
    assert (controller.steps, controller.count) == (2, 3)


def test_trap_a_loss_scale_that_changes_leaves_no_trace_in_consecutive_gradients():
    """It grows between two of them; and what overflowed is the predecessor of none, nor costs the step after it."""
    overflow, gains = 3, {}
    for growth in (None, 1):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=growth or 1, enabled=growth is not None)
        rule = anybatch.AdaScale(consecutive=True)
        model, optimizer, controller = attached(rule=rule, scale=4, grad_scaler=scaler)
        for t in range(7):
            x, y = oracle.micro_batch(t, 0)
            scaler.scale((math.inf if growth and t == overflow else 1.0) * oracle.loss_fn(model(x), y)).backward()
            if growth or t != overflow:
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            gains.setdefault(growth, []).append(controller.gain)
        assert (controller.steps, controller.skipped) == (6, 0)
    assert gains[1] == pytest.approx(gains[None], rel=1e-9)
    assert gains[1][-1] > gains[1][0]


@pytest.mark.parametrize("unscale_first", [True, False])
def test_trap_norms_carry_the_loss_scale_and_the_gradient_is_unscaled_and_clipped(unscale_first):
    """Both norms are taken at the end of the backward: the gain knows neither the loss scale nor the clipping."""
    plain, plain_optimizer, expected = attached()
    step(plain, plain_optimizer)
    model, optimizer, controller = attached()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i in range(3):
        x, y = oracle.micro_batch(0, i)
        scaler.scale(oracle.loss_fn(model(x), y) / 3).backward()
    if unscale_first:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    scaler.step(optimizer)
    scaler.update()
    assert controller.gain == pytest.approx(expected.gain, rel=1e-9)


def test_trap_fused_optimizers_run_their_step_under_a_scaler_that_skips():
    for rule in (anybatch.AdaScale(), anybatch.Linear()):
        model, optimizer, controller = attached(lambda p: torch.optim.Adam(p, lr=0.1, fused=True), rule=rule, total=100)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for t, factor in enumerate((1.0, math.inf, 1.0)):
            for i in range(2):
                x, y = oracle.micro_batch(t, i)
                scaler.scale(factor * oracle.loss_fn(model(x), y) / 2).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert (controller.steps, controller.skipped) == (2, 1)
        assert all(p.isfinite().all() for p in model.parameters())


def test_trap_distributed_checkpoint_primes_the_optimizer_with_a_fake_step():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    for rule, scale in ((anybatch.AdaScale(), "count"), (anybatch.Linear(), "count"), (anybatch.Linear(), 4)):
        model, optimizer, controller = attached(rule=rule, scale=scale, total=50)
        before = controller.state_dict()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            get_optimizer_state_dict(model, optimizer)
        assert controller.state_dict() == before
        step(model, optimizer)
        after = controller.state_dict()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            get_optimizer_state_dict(model, optimizer)
        assert controller.state_dict() == after


def test_a_learning_rate_of_zero_is_still_a_step():
    """A warm-up that starts at 0 must not be taken for a phantom."""
    for rule in (anybatch.AdaScale(), anybatch.Linear()):
        for scale in ("count", 4):
            model, optimizer, controller = attached(rule=rule, scale=scale, optimizer_options={"lr": 0.0})
            step(model, optimizer)
            assert controller.steps == 1


def test_a_step_without_gradients_is_skipped():
    model, optimizer, controller = attached()
    optimizer.step()
    assert (controller.steps, controller.skipped, controller.tau) == (0, 1, 0)


def test_gradients_that_no_hook_saw_are_an_error():
    model, optimizer, controller = attached()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(anybatch.UsageError, match="no backward"):
        optimizer.step()


# ---- what attach refuses ----


def linear():
    model = nn.Linear(2, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"base_batch": 8},
        {"micro_batch": 8},
        {"scale": 2, "base_batch": 8},
        {"scale": 2, "micro_batch": 8},
        {"scale": "count", "base_batch": 8, "micro_batch": 8},
    ],
    ids=str,
)
def test_the_scale_is_said_once_and_the_error_shows_the_three_ways(options):
    model, optimizer = linear()
    with pytest.raises(anybatch.InvalidValueError) as error:
        anybatch.attach(optimizer, model=model, **options)
    for way in ("base_batch=256, micro_batch=64", "scale=16", 'scale="count"'):
        assert way in str(error.value)


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, "many", True])
@pytest.mark.parametrize("name", ["scale", "base_batch", "micro_batch"])
def test_sizes_are_positive_numbers(name, value):
    model, optimizer = linear()
    options = {"scale": value} if name == "scale" else {"base_batch": 4, "micro_batch": 4, name: value}
    with pytest.raises(anybatch.InvalidValueError, match=f"{name} must be"):
        anybatch.attach(optimizer, model=model, **options)


@pytest.mark.parametrize("total", [0, -5, math.inf, math.nan])
def test_total_is_positive(total):
    model, optimizer = linear()
    with pytest.raises(anybatch.InvalidValueError, match="total"):
        anybatch.attach(optimizer, model=model, scale=1, total=total)


def test_a_second_controller_on_one_optimizer_is_refused_until_the_first_is_gone():
    model, optimizer, controller = attached()
    with pytest.raises(anybatch.UsageError, match="detach"):
        anybatch.attach(optimizer, model=model, scale=1)
    controller.detach()
    anybatch.attach(optimizer, model=model, scale=1)


@pytest.mark.parametrize("name", ["Rprop", "LBFGS", "ASGD"])
@pytest.mark.parametrize("rule", [anybatch.AdaScale(exponent=1), anybatch.Linear()])
def test_optimizers_without_theory_are_refused(name, rule):
    model, _ = linear()
    with pytest.raises(anybatch.UnsupportedError, match=name):
        anybatch.attach(getattr(torch.optim, name)(model.parameters(), lr=0.1), model=model, scale=2, rule=rule)


def test_an_unknown_optimizer_asks_for_the_exponent():
    class Mine(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad, alpha=group["lr"])

    model, _ = linear()
    with pytest.raises(anybatch.UnsupportedError, match="exponent"):
        anybatch.attach(Mine(model.parameters()), model=model, scale=2)
    anybatch.attach(Mine(model.parameters()), model=model, scale=2, rule=anybatch.AdaScale(exponent=1)).detach()
    with pytest.raises(anybatch.UnsupportedError, match="constant"):
        anybatch.attach(
            Mine(model.parameters()), model=model, scale=2, rule=anybatch.AdaScale(exponent=1, decays="clock")
        )


def test_models_and_optimizers_that_do_not_fit():
    model, optimizer = linear()
    other, _ = linear()
    with pytest.raises(anybatch.InvalidValueError, match="not in the model"):
        anybatch.attach(optimizer, model=other, scale=1)
    with pytest.raises(anybatch.InvalidValueError, match="Optimizer"):
        anybatch.attach("sgd", model=model, scale=1)
    with pytest.raises(anybatch.InvalidValueError, match="rule"):
        anybatch.attach(optimizer, model=model, scale=1, rule=anybatch.AdaScale)
    with pytest.raises(anybatch.InvalidValueError, match="reduction"):
        anybatch.attach(optimizer, model=model, scale=1, reduction="max")
    with pytest.raises(anybatch.InvalidValueError, match="another optimizer"):
        anybatch.attach(optimizer, model=model, scale=1, scheduler=torch.optim.lr_scheduler.ConstantLR(linear()[1]))
    with pytest.raises(anybatch.InvalidValueError, match="step"):
        anybatch.attach(optimizer, model=model, scale=1, scheduler="cosine")
    with pytest.raises(anybatch.InvalidValueError, match="total"):
        anybatch.attach(optimizer, model=model, scale=1, rule=anybatch.Linear(warmup=0.1))
    model.requires_grad_(False)
    with pytest.raises(anybatch.InvalidValueError, match="requires a gradient"):
        anybatch.attach(optimizer, model=model, scale=1)


def test_micro_batch_may_vary_only_where_it_is_known():
    model, optimizer, controller = attached(base_batch=4, micro_batch=4)
    controller.micro_batch = 2
    assert controller.micro_batch == 2
    with pytest.raises(anybatch.InvalidValueError, match="micro_batch"):
        controller.micro_batch = -1
    _, _, controller = attached(scale="count")
    assert controller.micro_batch is None
    with pytest.raises(anybatch.UsageError, match="micro_batch"):
        controller.micro_batch = 2


def test_done_needs_a_total():
    _, _, controller = attached()
    with pytest.raises(anybatch.UsageError, match="total"):
        _ = controller.done


# ---- a single gradient ----


def test_one_gradient_at_a_large_scale_warns_once_and_names_the_three_ways_out():
    model, optimizer, controller = attached(scale=8)
    with pytest.warns(anybatch.AnybatchWarning) as caught:
        step(model, optimizer, n=1)
        step(model, optimizer, n=1)
    assert len(caught) == 1
    for way in ("Accumulate", "anybatch.split(batch, 2)", "consecutive=True"):
        assert way in str(caught[0].message)
    assert (controller.gain, controller.tau) == (1, 2)


def test_one_gradient_at_a_small_scale_takes_the_careful_end():
    """Nothing is known of the noise: at a scale below 1 linear scaling is never unstable."""
    model, optimizer, controller = attached(base_batch=64, micro_batch=8)
    with pytest.warns(anybatch.AnybatchWarning):
        step(model, optimizer, n=1)
    assert controller.gain == 1 / 8


def test_after_a_shrink_to_one_gradient_the_known_moments_serve():
    model, optimizer, controller = attached(scale=8)
    step(model, optimizer, n=4)
    expected = anybatch.gain(controller.variance, controller.sqnorm, 8) ** 0.5  # of one sample
    with pytest.warns(anybatch.AnybatchWarning, match="last known one"):
        step(model, optimizer, n=1)
    assert controller.gain == pytest.approx(expected)


def test_a_scale_below_one_measures_and_goes_back():
    """Tuned at 64, run at 8 as two micro-batches of 4: the gain is between 1/8 and 1."""
    model, optimizer, controller = attached(base_batch=64, micro_batch=4)
    for t in range(5):
        step(model, optimizer, t, n=2)
    assert controller.scale == 1 / 8
    assert controller.gain == pytest.approx(anybatch.gain(controller.variance, controller.sqnorm, 1 / 8))
    assert 1 / 8 <= controller.gain < 1


# ---- detach, copies, state ----


def test_detach_removes_every_trace(tmp_path):
    schedulers = []

    def scheduler(optimizer):
        schedulers.append(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))
        return schedulers[0]

    model = oracle.make_model()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    made = scheduler(optimizer)
    before = [len(getattr(optimizer, name)) for name in vars(optimizer) if name.endswith("_hooks")]
    controller = anybatch.attach(optimizer, model=model, scheduler=made, scale="count", record=tmp_path / "r.jsonl")
    step(model, optimizer)
    position, tau = made.last_epoch, controller.tau
    controller.detach()
    controller.detach()
    assert before == [len(getattr(optimizer, name)) for name in vars(optimizer) if name.endswith("_hooks")]
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    step(model, optimizer)
    assert (made.last_epoch, controller.tau) == (position, tau)
    assert len(anybatch.read_record(tmp_path / "r.jsonl").steps) == 1


def test_nothing_keeps_a_dropped_optimizer_alive():
    model, optimizer, controller = attached()
    step(model, optimizer)
    reference = weakref.ref(optimizer)
    controller.detach()
    del optimizer, controller
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("rule", [anybatch.AdaScale(), anybatch.Linear()])
def test_trap_hooks_keep_no_dropped_model_alive(rule):
    """Without detach(): torch's collector does not see into the hooks on parameters."""
    model, optimizer, controller = attached(rule=rule)
    step(model, optimizer)
    references = [weakref.ref(p) for p in model.parameters()] + [weakref.ref(optimizer), weakref.ref(controller)]
    del model, optimizer, controller
    gc.collect()
    assert all(reference() is None for reference in references)


def test_a_model_outlives_its_optimizer():
    model, optimizer, controller = attached()
    step(model, optimizer)
    del optimizer, controller
    gc.collect()
    backwards(model)  # the hooks that are left do nothing


def test_copies_of_the_optimizer_are_bare():
    model, optimizer, _ = attached()
    step(model, optimizer)
    for clone in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert not clone.__dict__.get("_optimizer_step_pre_hooks")
        assert clone.param_groups[0]["lr"] == 0.1


def run(seed, steps, *, resume_at=(), name="SGD", counts=(3, 2), smoothing=None):
    """Train; at each step of `resume_at` save everything through torch.save and go on with fresh objects."""

    def build():
        model = oracle.make_model(seed)
        optimizer = OPTIMIZERS[name](model.parameters())
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=60)
        controller = anybatch.attach(
            optimizer, model=model, scheduler=scheduler, scale="count", total=60,
            rule=anybatch.AdaScale(smoothing=smoothing),
        )  # fmt: skip
        return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "controller": controller}

    parts = build()
    for t in range(steps):
        if t in resume_at:
            file = io.BytesIO()
            torch.save({name: part.state_dict() for name, part in parts.items()}, file)
            file.seek(0)
            states = torch.load(file, weights_only=True)
            parts = build()
            order = list(parts) if t % 2 else list(reversed(parts))  # the order of loading does not matter
            for key in order:
                parts[key].load_state_dict(states[key])
        step(parts["model"], parts["optimizer"], t, n=counts[t % len(counts)])
    return weights(parts["model"]), parts["controller"].state_dict(), parts["optimizer"].state_dict()


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("smoothing", [None, "paper"])
def test_resuming_is_bit_exact_also_the_second_and_third_time(name, smoothing):
    whole = run(0, 16, name=name, smoothing=smoothing)
    resumed = run(0, 16, resume_at=(1, 6, 11), name=name, smoothing=smoothing)
    assert same(whole[0], resumed[0])
    assert whole[1] == resumed[1]
    assert whole[2]["param_groups"] == resumed[2]["param_groups"]


def test_the_state_is_flat_numbers():
    _, _, controller = attached()
    assert all(type(v) in (int, float) for v in controller.state_dict().values())


@pytest.mark.parametrize("change", ["newer", "missing", "unknown", "smaller model", "nan", "base batch"])
def test_trap_states_that_do_not_fit_are_refused(change):
    model, optimizer, controller = attached(base_batch=4, micro_batch=4)
    step(model, optimizer)
    state = controller.state_dict()
    if change == "newer":
        state["version"] += 1
    elif change == "missing":
        del state["tau"]
    elif change == "unknown":
        state["momentum"] = 1.0
    elif change == "nan":
        state["tau"] = math.nan
    elif change == "base batch":
        state["base_batch"] = 8.0
    else:
        small = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
        controller = anybatch.attach(optimizer, model=small, base_batch=4, micro_batch=4)
    kept = controller.state_dict()
    with pytest.raises(anybatch.StateError):
        controller.load_state_dict(state)
    assert controller.state_dict() == kept


def test_elastic_change_keeps_the_moments_and_takes_the_new_scale_at_once():
    model, optimizer, controller = attached(total=1000, rule=anybatch.AdaScale(smoothing=0.99))
    for t in range(10):
        step(model, optimizer, t, n=2)
    before = (controller.variance, controller.sqnorm)
    step(model, optimizer, 11, n=6)
    assert controller.scale == 6
    assert (controller.variance, controller.sqnorm) == pytest.approx(before, rel=0.3)
    full = anybatch.gain(controller.variance, controller.sqnorm, 6)
    assert controller.gain == pytest.approx(full ** (1 - 2**-6))  # of the eleventh sample


def test_subscribers_follow_the_steps_that_happened():
    model, optimizer, controller = attached()
    moved, at = [], []
    controller.clock.subscribe(moved.append)
    controller.clock.subscribe(lambda _: at.append(weights(model)))
    step(model, optimizer)
    after = weights(model)
    step(model, optimizer, 1, factor=math.nan)
    assert moved == [controller.gain]
    assert same(at[0], after)  # after the weights have moved

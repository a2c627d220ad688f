"""The hyperparameter maps: their laws, and plain loops of kappa small steps against one large one."""

import math
from decimal import Decimal, getcontext

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import anybatch

getcontext().prec = 60
KAPPAS = st.floats(1 / 64, 64)
ADAM_LIKE = ["adam", "adamw", "nadam", "radam", "rmsprop", "adamax", "sparseadam"]
ALL = [*ADAM_LIKE, "sgd", "adagrad", "adadelta", "muon", "adafactor"]


def after(name, kappa, **values):
    return {key: change.after for key, change in anybatch.scale_hyperparameters(name, kappa, **values).items()}


def optimizer_of(name, **values):
    cls = next(cls for key, cls in vars(torch.optim).items() if key.lower() == name)
    return cls([torch.nn.Parameter(torch.ones(3, 3))], **values)


def numbers(values):
    return [x for value in values.values() for x in (value if isinstance(value, tuple) else (value,))]


# ---- values by hand ----


def test_golden_values_of_adamw():
    new = after("AdamW", 4, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, ema_decay=0.999,
                batch_norm_momentum=0.1)  # fmt: skip
    assert list(new) == ["lr", "betas", "eps", "weight_decay", "ema_decay", "batch_norm_momentum"]
    assert numbers(new) == pytest.approx(
        [2e-3, 0.6561, 0.96059601, 5e-9, (1 - 0.9999**4) / (2 * 1e-3), 0.996005996001, 0.3439], rel=1e-12
    )


def test_golden_values_of_the_papers_first_order_form():
    new = after("adamw", 4, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, betas_rule="sde")
    assert numbers(new) == pytest.approx([2e-3, 0.6, 0.96, 5e-9, 0.2], rel=1e-12)
    new = after("rmsprop", 9, lr=1e-3, alpha=0.99, eps=3e-8, momentum=0.9, betas_rule="sde")
    assert numbers(new) == pytest.approx([3e-3, 0.9, 0.91, 1e-8])


def test_golden_values_of_sgd():
    changes = anybatch.scale_hyperparameters("sgd", 8, lr=0.1, momentum=0.9, weight_decay=1e-4)
    assert {name: (c.before, c.after) for name, c in changes.items()} == {
        "lr": (0.1, 0.8),
        "momentum": (0.9, 0.9),
        "weight_decay": (1e-4, 1e-4),
    }
    assert all(c.why and c.source for c in changes.values())


def test_torchs_defaults_stand_for_what_is_not_given():
    changes = anybatch.scale_hyperparameters("adamw", 2)
    assert changes["betas"].before == (0.9, 0.999)
    assert changes["weight_decay"].before == 1e-2


def test_coupled_weight_decay_stays_and_a_flag_decouples_it():
    assert after("adam", 4, weight_decay=0.1)["weight_decay"] == 0.1
    assert after("adam", 4, weight_decay=0.1, decoupled_weight_decay=True)["weight_decay"] > 0.19


def test_other_classes():
    assert after("nadam", 3)["momentum_decay"] == pytest.approx(3 * 4e-3)
    adagrad = after("adagrad", 4, lr=0.1, lr_decay=1e-3)
    assert adagrad == pytest.approx({"lr": 0.1, "lr_decay": 4e-3, "eps": 1e-10 / 4})
    adamax = anybatch.scale_hyperparameters("adamax", 4)
    assert adamax["betas"].after == adamax["betas"].before
    assert "maximum" in adamax["betas"].why
    assert after("adafactor", 4, lr=1e-2, weight_decay=0.1)["weight_decay"] == pytest.approx(0.2, rel=2e-3)


def test_muon_follows_its_averaged_directions():
    """By hand: (1 + m) / (1 - m) is 39 at .95 and 3 at .5; at .95 ** 4 = .8145 it is 9.782, and sqrt(4 * 39 / 9.782)
    is 3.993, nearly linear; at 0 it is the square root."""
    long, short, none = (after("muon", 4, lr=1e-2, momentum=m, weight_decay=0.1) for m in (0.95, 0.5, 0.0))
    assert long["lr"] == pytest.approx(3.993e-2, rel=1e-3)
    assert long["momentum"] == pytest.approx(0.8145, rel=1e-4)
    assert long["weight_decay"] == pytest.approx(0.1 * 4 / 3.993, rel=2e-3)
    assert short["lr"] == pytest.approx(1e-2 * (4 * 3 / (1.0625 / 0.9375)) ** 0.5)
    assert none["lr"] == pytest.approx(2e-2)


# ---- laws ----


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=25, deadline=None)
@given(kappa=KAPPAS)
def test_kappa_then_its_inverse_is_the_identity(name, kappa):
    try:
        there = after(name, kappa, ema_decay=0.999, batch_norm_momentum=0.1)
    except anybatch.InvalidValueError:
        assert name == "radam"  # beta2 too short
        return
    ema, norm = there.pop("ema_decay"), there.pop("batch_norm_momentum")
    back = after(name, 1 / kappa, ema_decay=ema, batch_norm_momentum=norm, **there)
    assert numbers(back) == pytest.approx(numbers(after(name, 1, ema_decay=0.999, batch_norm_momentum=0.1)), rel=1e-9)


@pytest.mark.parametrize("rule", ["power", "sde"])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop", "muon", "adagrad"])
@settings(max_examples=25, deadline=None)
@given(first=st.floats(1 / 8, 8), second=st.floats(1 / 8, 8))
def test_maps_compose(name, rule, first, second):
    options = {"betas_rule": rule}
    if name in ("adam", "adamw"):
        options["betas"] = (0.99, 0.999)
    base = after(name, 1, lr=0.01, **options)
    once = after(name, first * second, **base, betas_rule=rule)
    twice = after(name, second, **after(name, first, **base, betas_rule=rule), betas_rule=rule)
    assert numbers(twice) == pytest.approx(numbers(once), rel=1e-10)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rule", ["power", "sde"])
def test_kappa_one_changes_nothing_bit_for_bit(name, rule):
    changes = anybatch.scale_hyperparameters(name, 1, ema_decay=0.9999, batch_norm_momentum=0.1, betas_rule=rule)
    assert all(change.before == change.after for change in changes.values())


@settings(max_examples=200, deadline=None)
@given(kappa=st.floats(1, 64), memory=st.floats(100, 1e6))
def test_power_and_sde_agree_to_first_order(kappa, memory):
    beta = 1 - 1 / memory
    power = after("rmsprop", kappa, alpha=beta)["alpha"]
    sde = after("rmsprop", kappa, alpha=beta, betas_rule="sde")["alpha"]
    assert -1e-15 <= power - sde <= (kappa / memory) ** 2 / 2 + 1e-15


@settings(max_examples=200, deadline=None)
@given(kappa=st.floats(1 / 64, 1024), rho=st.floats(0.5, 1 - 1e-9), m=st.floats(1e-9, 0.5))
def test_averages_are_exact(kappa, rho, m):
    """Against 60 decimal digits."""
    new = after("sgd", kappa, ema_decay=rho, batch_norm_momentum=m)
    exact = Decimal(rho) ** Decimal(kappa)
    assert new["ema_decay"] == pytest.approx(float(exact), rel=1e-15 * (1 + kappa))
    assert new["batch_norm_momentum"] == pytest.approx(float(1 - (1 - Decimal(m)) ** Decimal(kappa)), rel=1e-14)


# ---- plain loops: kappa base steps against one step at kappa ----


def test_sgd_goes_as_far_to_first_order_in_the_curvature():
    """w <- w - lr h w, k times, against once at k times the rate: the difference is of second order."""
    h, k, differences = 0.5, 8, []
    for lr in (1e-2, 5e-3):
        new = after("sgd", k, lr=lr)["lr"]
        differences.append(abs((1 - lr * h) ** k - (1 - new * h)))
    assert differences[0] <= (k * 1e-2 * h) ** 2 / 2
    assert differences[1] == pytest.approx(differences[0] / 4, rel=0.05)


@pytest.mark.parametrize(
    ("name", "kappa"),
    [(name, k) for name in ("adam", "adamw", "rmsprop", "nadam") for k in (16, 1 / 16)] + [("radam", 4)],
)
def test_adaptive_steps_drift_as_far_and_eps_follows_the_noise(name, kappa):
    """A small mean gradient under noise as large as eps: what is walked per example is the same at both batches."""
    size, mean, examples, fine = 4000, 0.02, 4096, 16
    torch.manual_seed(0)
    noise = torch.randn(examples, size, dtype=torch.float64) * math.sqrt(fine)  # of the smallest batch, one example
    walked = []
    values = {"eps": 1.0, "weight_decay": 0.0} | ({"alpha": 0.99} if name == "rmsprop" else {"betas": (0.9, 0.99)})
    if name == "radam":
        values["betas"] = (0.9, 0.995)
    base_batch = fine if kappa > 1 else 256
    for batch in (base_batch, int(base_batch * kappa)):
        p = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))
        cls = type(optimizer_of(name))
        new = after(name, batch / base_batch, lr=1e-3, **values)
        optimizer = cls([p], **({"weight_decay": 0.0} | new))
        path = []
        for part in noise.split(batch):
            p.grad = mean + part.mean(0)
            optimizer.step()
            path.append(p.detach().mean().item())
        walked.append(path[-1] - path[len(path) // 2 - 1])  # the second half: the averages have filled
    assert walked[1] == pytest.approx(walked[0], rel=0.06)


@pytest.mark.parametrize("kappa", [2, 7, 50])
def test_the_decoupled_weight_decay_is_exact(kappa):
    """Without a gradient kappa steps of AdamW shrink the weights exactly as one step at kappa."""
    start = torch.full((3,), 2.0, dtype=torch.float64)
    weights = []
    for steps, values in ((kappa, {"lr": 0.01, "weight_decay": 3.0}),
                          (1, after("adamw", kappa, lr=0.01, weight_decay=3.0))):  # fmt: skip
        p = torch.nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW([p], **values)
        for _ in range(steps):
            p.grad = torch.zeros_like(p)
            optimizer.step()
        weights.append(p.detach())
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-12, atol=0)
    first_order = after("adamw", kappa, lr=0.01, weight_decay=0.03, betas=(0.99, 0.999), betas_rule="sde")
    assert first_order["lr"] * first_order["weight_decay"] == pytest.approx(kappa * 0.01 * 0.03)


def test_batch_norm_remembers_as_long():
    x = torch.randn(64, 5, dtype=torch.float64) * 3 + 1
    momentum = after("sgd", 6, batch_norm_momentum=0.1)["batch_norm_momentum"]
    small, large = (torch.nn.BatchNorm1d(5, momentum=m, dtype=torch.float64) for m in (0.1, momentum))
    for _ in range(6):
        small(x)
    large(x)
    torch.testing.assert_close(large.running_mean, small.running_mean)
    torch.testing.assert_close(large.running_var, small.running_var)


def test_the_models_average_remembers_as_long():
    averages = []
    for steps, decay in ((6, 0.95), (1, after("sgd", 6, ema_decay=0.95)["ema_decay"])):
        model = oracle.make_model()
        ema = anybatch.ModelEMA(model, decay)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)
        for _ in range(steps):
            ema.update()
        averages.append(ema.state_dict()["averages"])
    for name, average in averages[0].items():
        torch.testing.assert_close(averages[1][name], average)


# ---- in place ----


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kappa", [8.0, 0.3])
def test_in_place_is_the_plain_function_and_goes_back(name, kappa):
    optimizer = optimizer_of(name)
    before = [dict(group) for group in optimizer.param_groups]
    changes = anybatch.scale_optimizer(optimizer, kappa)
    assert changes == [anybatch.scale_hyperparameters(name, kappa)]
    for key, change in changes[0].items():
        assert optimizer.param_groups[0][key] == change.after
    assert {k for k in before[0] if before[0][k] != optimizer.param_groups[0][k]} <= set(changes[0])
    anybatch.scale_optimizer(optimizer, 1 / kappa)
    for key, value in before[0].items():
        if key in changes[0]:
            value = pytest.approx(value, rel=1e-10)
        if key != "params":
            assert optimizer.param_groups[0][key] == value


def test_every_group_and_shared_tensors_keep_their_identity():
    a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    lr, other = torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)
    beta2 = torch.tensor(0.99, dtype=torch.float64)
    optimizer = torch.optim.Adam([{"params": [a]}, {"params": [b], "weight_decay": 0.1}], lr=lr, capturable=True,
                                 betas=(other, beta2))  # fmt: skip
    optimizer.param_groups[1]["betas"] = (0.5, 0.9)
    anybatch.scale_optimizer(optimizer, 4)
    first, second = optimizer.param_groups
    assert first["lr"] is lr
    assert second["lr"] is lr
    assert lr.item() == 0.2
    assert first["betas"][0] is other
    assert other.item() == pytest.approx(0.9**4)
    assert second["betas"] == (0.5**4, 0.9**4)
    assert second["weight_decay"] == 0.1


def test_counters_go_on_in_the_units_of_the_new_steps():
    optimizer = optimizer_of("adamw", lr=0.1)
    p = optimizer.param_groups[0]["params"][0]
    for _ in range(12):
        p.grad = torch.ones_like(p)
        optimizer.step()
    debias = 1 - 0.9**12
    anybatch.scale_optimizer(optimizer, 4)
    beta1 = optimizer.param_groups[0]["betas"][0]
    assert 1 - beta1 ** float(optimizer.state[p]["step"]) == pytest.approx(debias)
    anybatch.scale_optimizer(optimizer, 0.25)
    assert float(optimizer.state[p]["step"]) == 12


def test_a_group_out_of_range_leaves_every_group_as_it_was():
    a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([{"params": [a], "betas": (0.99, 0.999)}, {"params": [b], "betas": (0.9, 0.999)}])
    before = repr(optimizer.param_groups)
    with pytest.raises(anybatch.InvalidValueError, match="below 10"):
        anybatch.scale_optimizer(optimizer, 20, betas_rule="sde")
    assert repr(optimizer.param_groups) == before


def test_an_optimizer_with_a_controller_is_refused_until_it_is_detached():
    model = oracle.make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = anybatch.attach(optimizer, model=model, scale="count")
    with pytest.raises(anybatch.UsageError, match="controller"):
        anybatch.scale_optimizer(optimizer, 2)
    controller.detach()
    anybatch.scale_optimizer(optimizer, 2)
    assert optimizer.param_groups[0]["lr"] == 0.2


def test_a_derived_class_is_known_and_an_unknown_one_refused():
    class Mine(torch.optim.AdamW):
        pass

    class Own(torch.optim.Optimizer):
        pass

    p = torch.nn.Parameter(torch.zeros(2))
    assert anybatch.scale_optimizer(Mine([p], lr=0.1), 4)[0]["lr"].after == 0.2
    with pytest.raises(anybatch.UnsupportedError, match="Own"):
        anybatch.scale_optimizer(Own([p], {"lr": 0.1}), 4)


def test_a_number_of_numpys_is_a_number():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=np.float32(0.5))
    anybatch.scale_optimizer(optimizer, 4)
    assert optimizer.param_groups[0]["lr"] == 2


# ---- refusals ----


@pytest.mark.parametrize(
    ("betas", "largest"), [((0.9, 0.999), "10"), ((0.95, 0.8), "5"), ((0.9, 0.75), "4"), ((0.0, 0.98), "50")]
)
def test_the_first_order_form_names_the_largest_kappa(betas, largest):
    with pytest.raises(anybatch.InvalidValueError, match=rf"kappa must be below {largest};"):
        after("adam", 60, betas=betas, betas_rule="sde")
    just = float(largest) * (1 - 1e-6)
    assert 0 <= min(after("adam", just, betas=betas, betas_rule="sde")["betas"]) < 1


@pytest.mark.parametrize("rule", ["power", "sde"])
def test_radam_names_its_largest_kappa(rule):
    with pytest.raises(anybatch.InvalidValueError, match="RAdam") as error:
        after("radam", 80, betas=(0.99, 0.99), betas_rule=rule)
    largest = float(str(error.value).split("below ")[1].split(";")[0])
    assert 33 < largest < 41
    assert after("radam", largest * 0.999, betas=(0.99, 0.99), betas_rule=rule)["betas"][1] > 2 / 3


@pytest.mark.parametrize(
    ("kappa", "values", "word"),
    [
        (0, {}, "kappa"),
        (-1, {}, "kappa"),
        (float("nan"), {}, "kappa"),
        (float("inf"), {}, "kappa"),
        (True, {}, "kappa"),
        ("8", {}, "kappa"),
        (2, {"lr": -1.0}, "learning rate"),
        (2, {"lr": float("inf")}, "lr"),
        (2, {"lr": "much"}, "AdamW"),
        (2, {"betas": (0.9, 1.0)}, "beta"),
        (2, {"betas": (0.9,)}, "two"),
        (2, {"betas": 0.9}, "AdamW"),
        (2, {"eps": float("inf")}, "eps"),
        (2, {"momentum": 0.9}, "AdamW has no momentum"),
        (2, {"ema_decay": 1.0}, "ema_decay"),
        (2, {"ema_decay": float("nan")}, "ema_decay"),
        (2, {"batch_norm_momentum": 0.0}, "batch_norm_momentum"),
        (2, {"betas_rule": "linear"}, "betas_rule"),
        (2, {"lr": 1.0, "weight_decay": 1.5}, "weight_decay"),
        (8, {"lr": 1.0, "weight_decay": 0.5, "betas_rule": "sde"}, "below 2;"),
    ],
)
def test_values_out_of_range(kappa, values, word):
    with pytest.raises(anybatch.InvalidValueError, match=word):
        anybatch.scale_hyperparameters("adamw", kappa, **values)


def test_names():
    with pytest.raises(anybatch.InvalidValueError, match=r"adamw.*got 'adamv'"):
        anybatch.scale_hyperparameters("adamv", 2)
    for name in ("lbfgs", "rprop", "asgd"):
        with pytest.raises(anybatch.UnsupportedError, match="cannot be scaled"):
            anybatch.scale_hyperparameters(name, 2)


def test_ends_of_the_ranges():
    new = after("adam", 1000, betas=(0.0, 0.0), ema_decay=0.0, batch_norm_momentum=1.0)
    assert "betas" in new
    assert new["betas"] == (0.0, 0.0)
    assert (new["ema_decay"], new["batch_norm_momentum"]) == (0.0, 1.0)
    assert after("adam", 999, betas=(0.0, 0.999), betas_rule="sde", eps=0)["betas"][0] == 0
    assert after("adamw", 16, lr=0.0, weight_decay=0.1)["weight_decay"] == pytest.approx(0.4)


@pytest.mark.parametrize(("name", "expected"), [("sgd", 0.4), ("adamw", 0.2), ("adagrad", 0.1)])
@pytest.mark.parametrize("held", [float, torch.tensor])
def test_a_scheduler_made_afterwards_starts_from_the_scaled_rate(name, expected, held):
    """Also where an earlier one has left its own base rate in the groups."""
    optimizer = optimizer_of(name, lr=held(0.1))
    torch.optim.lr_scheduler.LinearLR(optimizer)
    anybatch.scale_optimizer(optimizer, 4)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(expected)
    anybatch.scale_optimizer(optimizer, 0.25)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("optimizer", "kappa", "values", "word"),
    [
        (torch.optim.AdamW, 2, {}, "optimizer must be one of"),
        ("sgd", 2, {"ema_decay": "x"}, "ema_decay must be"),
        ("sgd", 2, {"batch_norm_momentum": "x"}, "batch_norm_momentum must be"),
        ("sgd", 1e10, {"lr": 1e300}, "lr at 1e"),
    ],
)
def test_what_is_of_another_kind_is_a_typed_error(optimizer, kappa, values, word):
    with pytest.raises(anybatch.InvalidValueError, match=word):
        anybatch.scale_hyperparameters(optimizer, kappa, **values)

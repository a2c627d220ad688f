"""Every class of torch.optim: what the table says of it, and that a controller at scale 1 changes not one bit."""

import copy
import inspect
import itertools
import math
import pickle
import warnings

import oracle
import pytest
import torch
from torch import nn

import anybatch
from anybatch._scaling.families import _CLASSES, _TABLE, Family
from anybatch._scaling.hyperparameters import Hyperparameters

EXPORTED = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
}
SUPPORTED = [name for name in EXPORTED if isinstance(_TABLE.get(name), Family)]
REFUSED = ["ASGD", "LBFGS", "Rprop"]
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own, in its own sparse steps


def test_every_class_of_torch_optim_stands_in_the_table():
    """A new class in torch fails here: think it through, and give it a row."""
    assert set(EXPORTED) <= set(_TABLE)
    assert {cls: _TABLE[name] for name, cls in EXPORTED.items()} == _CLASSES
    assert sorted(set(EXPORTED) - set(SUPPORTED)) == REFUSED


# ---- scale one: torch's own database of configurations ----


class Dense(nn.Module):
    """Matrices, without or with vectors; one parameter that gets no gradient, and one without elements."""

    def __init__(self, *, vectors, empty, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 5, bias=vectors, dtype=dtype)
        self.second = nn.Linear(5, 3, bias=vectors, dtype=dtype)
        self.unused = nn.Parameter(torch.ones(2, 2, dtype=dtype))
        self.empty = nn.Parameter(torch.ones(0, 3, dtype=dtype)) if empty else None

    def forward(self, t):
        x, y = (v.to(self.first.weight.dtype) for v in oracle.micro_batch(0, t))
        loss = (self.second(torch.tanh(self.first(x))) - y).abs().square().mean()
        return loss if self.empty is None else loss + self.empty.abs().sum()


class Sparse(nn.Module):
    """Two embeddings with sparse gradients; the rows of the first are used now and then, the second never."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used = nn.Embedding(7, 3, sparse=True)
        self.unused = nn.Embedding(2, 3, sparse=True)

    def forward(self, t):
        return (self.used(torch.tensor([t % 7, (3 * t + 1) % 7, t % 7])) - torch.arange(3.0)).square().mean()


def database(name):
    """torch's own record of the class; its import needs the small package expecttest."""
    pytest.importorskip("expecttest", reason="torch.testing's optimizer database needs the package expecttest")
    import hypothesis
    from torch.testing._internal.common_optimizers import optim_db

    hypothesis.settings.load_profile("default")  # that import loads a profile of torch's own
    return next(info for info in optim_db if info.optim_cls is EXPORTED[name])


def problems(name, info):
    if info.only_supports_sparse_grads:
        return {"sparse": Sparse}
    vectors, empty = name != "Muon", name != "Adafactor"  # Adafactor divides by the number of elements
    makers = {"dense": lambda: Dense(vectors=vectors, empty=empty)}
    if info.supports_complex:
        makers["complex"] = lambda: Dense(vectors=True, empty=True, dtype=torch.complex64)
    if info.supports_sparse:
        makers["sparse"] = Sparse
    return makers


def configurations(name, info):
    """Every input of the database, times implementations, times kinds of learning rate."""
    default = inspect.signature(EXPORTED[name]).parameters["lr"].default
    implementations = [{}]
    if "foreach" in info.supported_impls:
        implementations += [{"foreach": True}, {"foreach": False}]
    if "fused" in info.supported_impls and "cpu" in info.supports_fused_on:
        implementations += [{"fused": True}]
    if info.has_capturable_arg:
        implementations += [{"capturable": True}]
    for entry, chosen in itertools.product(info.optim_inputs_func(device="cpu"), implementations):
        lr = float(entry.kwargs.get("lr", default))
        for kind in (float, torch.tensor, lambda value: torch.tensor([value])):
            yield {**entry.kwargs, **chosen, "lr": kind(lr)}


def fresh(options):
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in options.items()}


def attach(optimizer, model, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Adafactor", anybatch.AnybatchWarning)
        return anybatch.attach(optimizer, model=model, **options)


def run(cls, problem, options, *, rule=None, trips=(), steps=6):
    """Train, every third step by a closure; `trips[t]` replaces model and optimizer before step t."""
    model = problem()
    optimizer = cls(model.parameters(), **fresh(options))
    controller = rule and attach(optimizer, model, scale=1, rule=rule)
    for t in range(steps):
        if t in trips:
            model, optimizer = trips[t](model, optimizer, lambda p: cls(p, **fresh(options)))
            controller = rule and attach(optimizer, model, scale=1, rule=rule)

        def closure():
            optimizer.zero_grad()
            for i in range(1 + t % 2):
                loss = model(2 * t + i)
                loss.backward()
            return loss

        if t % 3 == 2:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        # A loaded state carries the controller's, a copy of the optimizer does not.
        copied = max((at for at in trips if at <= t and trips[at] is not by_state_dict), default=0)
        assert controller is None or controller.steps == t + 1 - copied
    if controller:
        controller.detach()
    return [p.detach() for p in model.parameters()], optimizer.state_dict()


def by_state_dict(model, optimizer, make):
    other = make(model.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return model, other


TRIPS = {
    2: by_state_dict,
    3: lambda model, optimizer, _: copy.deepcopy((model, optimizer)),
    5: lambda model, optimizer, _: pickle.loads(pickle.dumps((model, optimizer))),
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        alike = isinstance(b, torch.Tensor) and (a.dtype, a.layout) == (b.dtype, b.layout)
        return alike and torch.equal(a.to_dense(), b.to_dense())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("name", SUPPORTED)
def test_every_configuration_of_torchs_database_at_scale_one_is_bitwise_the_bare_optimizer(name, record_property):
    info = database(name)
    compared = set()
    counts = dict.fromkeys(("compared", "that torch refuses"), 0)
    for options in configurations(name, info):
        for kind, problem in problems(name, info).items():
            try:
                bare = run(EXPORTED[name], problem, options)
            except (RuntimeError, ValueError, AssertionError):  # torch refuses this combination
                counts["that torch refuses"] += 1
                continue
            assert all(p.isfinite().all() for p in bare[0])
            for rule, trips in ((anybatch.AdaScale(), {}), (anybatch.AdaScale(), TRIPS), (anybatch.Linear(), TRIPS)):
                assert same(bare, run(EXPORTED[name], problem, options, rule=rule, trips=trips)), (kind, options)
            counts["compared"] += 1
            compared.add((kind, str({k: v for k, v in options.items() if k != "lr"}), type(options["lr"])))
    plain = {str({k: v for k, v in entry.kwargs.items() if k != "lr"}) for entry in info.optim_inputs_func("cpu")}
    assert {kind for kind, *_ in compared} == set(problems(name, info))
    assert plain <= {entry for _, entry, _ in compared}
    assert {lr for *_, lr in compared} == {float, torch.Tensor}
    for what, count in counts.items():
        record_property(f"number of optimizer configurations {what}", count)


# ---- a scale above one: the values inside of the step ----


def far(r, m):
    """How much further a step of r base iterations goes whose direction is an average of noise with memory m ** r."""
    return (r * (1 + m) / (1 - m) * (1 - m**r) / (1 + m**r)) ** 0.5


EXPECTED = {  # entries of the group as functions of the gain r; all others stay
    "SGD": lambda g, r: {"lr": g["lr"] * r},
    "Adam": lambda g, r: {"lr": g["lr"] * r**0.5, "betas": (0.9**r, 0.999**r)},
    "AdamW": lambda g, r: {
        "lr": g["lr"] * r**0.5, "betas": (0.9**r, 0.999**r), "weight_decay": g["weight_decay"] * r**0.5
    },
    "NAdam": lambda g, r: {"lr": g["lr"] * r**0.5, "betas": (0.9**r, 0.999**r), "momentum_decay": 4e-3 * r},
    "RAdam": lambda g, r: {"lr": g["lr"] * r**0.5, "betas": (0.9**r, 0.999**r)},
    "RMSprop": lambda g, r: {"lr": g["lr"] * r**0.5, "alpha": 0.99**r},
    "Adamax": lambda g, r: {"lr": g["lr"] * r**0.5},
    "Adadelta": lambda g, r: {"lr": g["lr"] * r**0.5},
    "SparseAdam": lambda g, r: {"lr": g["lr"] * r**0.5},
    "Adagrad": lambda g, r: {"lr_decay": g["lr_decay"] * r},
    "Muon": lambda g, r: {
        "lr": g["lr"] * far(r, 0.95), "momentum": 0.95**r, "weight_decay": g["weight_decay"] * r / far(r, 0.95)
    },
    "Adafactor": lambda g, r: {"lr": g["lr"] * r**0.5, "weight_decay": g["weight_decay"] * r**0.5},
}  # fmt: skip
OPTIONS = {
    "SGD": {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-3},
    "Adagrad": {"lr": 0.1, "lr_decay": 1e-3},
    "Adadelta": {"lr": 10.0},
    "Adafactor": {"lr": 0.02, "weight_decay": 1e-3},
    "RMSprop": {"lr": 0.01, "momentum": 0.5, "weight_decay": 1e-3},
    "AdamW": {"lr": 0.02, "weight_decay": 1e-3},
    "SparseAdam": {"lr": 0.05},
}
COUNTED = {"Adam", "AdamW", "NAdam", "RAdam", "Adagrad", "Adafactor"}  # `step` reads as tau


class Regression(nn.Module):
    def __init__(self, *, sparse=False):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Embedding(6, 3, sparse=sparse, dtype=torch.float64)

    def forward(self, t, i):
        x, y = oracle.micro_batch(t, i, size=8)
        return (x @ self.weight(torch.arange(6)) - y).square().mean()


@pytest.mark.parametrize("name", SUPPORTED)
def test_values_inside_of_the_step_are_the_tables_and_are_put_back(name):
    model = Regression(sparse=name == "SparseAdam")
    optimizer = EXPORTED[name](model.parameters(), **OPTIONS.get(name, {"lr": 0.02}))
    controller = attach(optimizer, model, scale="count")
    inside = []
    optimizer.register_step_pre_hook(lambda o, *_: inside.append({**o.param_groups[0]}))
    base = {**optimizer.param_groups[0]}
    losses = []
    for t in range(40):
        micro = [model(t, i) for i in range(4)]
        losses.append(sum(float(loss.detach()) for loss in micro) / 4)
        (sum(micro[:2]) / 4).backward()
        (micro[2] / 4).backward()
        (micro[3] / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
        r = controller.gain
        assert 1 < r < 4
        assert controller.lr_factor == pytest.approx(far(r, 0.95) if name == "Muon" else r ** _TABLE[name].exponent)
        expected = {**base, **EXPECTED[name](base, r)}
        assert inside[-1] == {k: pytest.approx(v) if isinstance(v, float | tuple) else v for k, v in expected.items()}
        assert optimizer.param_groups[0] == base
    state = optimizer.state[model.weight.weight]
    if "step" in state and name != "RMSprop":
        assert float(state["step"]) == pytest.approx(controller.tau if name in COUNTED else 40, rel=1e-5)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def drift(name, k_of, *, exponent=None, base=3000, snr=0.05, **options):
    """How far constant gradients under noise bring `name` in `base` base iterations, the step t of k_of(t) of them."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(24, 100))
    optimizer = EXPORTED[name]([p], **{"lr": 1e-3, **options})
    family = _TABLE[name]
    exponent = family.exponent if exponent is None else exponent
    p.grad = torch.empty_like(p)
    tau, t = 0.0, 0
    while tau < base:
        k = k_of(t)
        p.grad.normal_(snr, k**-0.5)
        with Hyperparameters(optimizer, family, family.decays, None).scaled(lr_factor=k**exponent, iterations=k):
            optimizer.step()
        tau, t = tau + k, t + 1
    return -float(p.detach().mean()) / tau


ROWS = {
    "SGD": {},
    "Adam": {},
    "AdamW": {"weight_decay": 0.0},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.5},
    "Adamax": {"betas": (0.9, 0.9)},
    "Adadelta": {"lr": 1.0},
    "Adafactor": {},
    "Adagrad": {"lr_decay": 1e-3},
    "Muon": {"weight_decay": 0.0, "momentum": 0.0},
}


@pytest.mark.parametrize("name", sorted(set(SUPPORTED) - {"SparseAdam", "Muon"}))
def test_law_noisy_gradients_go_equally_far_per_base_iteration_at_any_batch(name):
    """What the exponent and the clock mean, and why Adagrad's exponent is 0: its own sum does the scaling."""
    bare = drift(name, lambda t: 1.0, **ROWS[name])
    assert drift(name, lambda t: 8.0, **ROWS[name]) == pytest.approx(bare, rel=0.08)
    assert drift(name, lambda t: 8.0, exponent=_TABLE[name].exponent + 0.5, **ROWS[name]) > 2 * bare
    # While the gain grows, averages of squares lag behind, and the steps are up to a sixth too short.
    assert drift(name, lambda t: min(1 + t / 100, 8.0), **ROWS[name]) == pytest.approx(bare, rel=0.18)


def test_law_muon_with_noise_in_its_momentum_follows_the_square_root():
    """Its normalisation comes after the averaging, so that it needs more noise than the others to show the law."""
    options = {"weight_decay": 0.0, "momentum": 0.0, "nesterov": False, "snr": 0.02, "base": 800}
    bare = drift("Muon", lambda t: 1.0, **options)
    assert drift("Muon", lambda t: 8.0, **options) == pytest.approx(bare, rel=0.2)


def test_adagrads_sum_is_one_of_base_iterations_while_the_gain_changes():
    """A step of k base iterations with a gradient of 1/k of the base's square adds k of the base's squares."""
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = torch.optim.Adagrad([p], lr=0.1, lr_decay=0.5)
    tau = 0.0
    for k in (1.0, 4.0, 2.5, 16.0):
        p.grad = torch.full_like(p, k**-0.5)
        before = p.detach().clone()
        with Hyperparameters(optimizer, _TABLE["Adagrad"], "clock", None).scaled(lr_factor=1.0, iterations=k):
            optimizer.step()
        applied = 0.1 / (1 + 0.5 * tau)
        tau += k
        assert float(optimizer.state[p]["sum"][0]) == pytest.approx(tau)
        assert float(optimizer.state[p]["step"]) == pytest.approx(tau, rel=1e-6)
        assert float((before - p.detach())[0]) == pytest.approx(applied * k**0.5 / tau**0.5)


def test_trap_groups_may_share_one_tensor_learning_rate():
    """torch gives every group the very tensor that the constructor got: it must be multiplied once, and come back."""
    model = Regression()
    other = nn.Parameter(torch.ones(2, dtype=torch.float64))
    groups = [{"params": [model.weight.weight]}, {"params": [other], "weight_decay": 0.1}]
    model.register_parameter("other", other)
    optimizer = torch.optim.AdamW(groups, lr=torch.tensor(0.125))
    assert optimizer.param_groups[0]["lr"] is optimizer.param_groups[1]["lr"]
    controller = anybatch.attach(optimizer, model=model, scale=4, rule=anybatch.SquareRoot())
    inside = []
    optimizer.register_step_pre_hook(lambda o, *_: inside.extend(float(g["lr"]) for g in o.param_groups))
    for t in range(3):
        (model(t, 0) + other.sum()).backward()
        optimizer.step()
    assert inside == [0.25] * 6
    assert [float(g["lr"]) for g in optimizer.param_groups] == [0.125] * 2
    assert controller.steps == 3


def test_a_rule_may_stop_the_learning_rate():
    class Still(anybatch.Linear):
        def __call__(self, *, scale, gain, clock, exponent):
            return anybatch.Scaling(0.0, scale)

    model = Regression()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    anybatch.attach(optimizer, model=model, scale=4, rule=Still())
    before = model.weight.weight.detach().clone()
    model(0, 0).backward()
    optimizer.step()
    assert torch.equal(before, model.weight.weight)


# ---- refusals and warnings ----


@pytest.mark.parametrize(
    ("name", "reason"),
    [("ASGD", "one step late"), ("LBFGS", "line search"), ("Rprop", "learning rate after the first")],
)
def test_refused_classes_say_why(name, reason):
    model = Regression()
    with pytest.raises(anybatch.UnsupportedError, match=f"{name} cannot be scaled: .*{reason}"):
        anybatch.attach(EXPORTED[name](model.parameters()), model=model, scale=2)

    class Mine(EXPORTED[name]):
        pass

    with pytest.raises(anybatch.UnsupportedError, match=reason):
        anybatch.attach(Mine(model.parameters()), model=model, scale=2)


def test_adafactor_is_warned_about_where_it_is_attached():
    model = Regression()
    with pytest.warns(anybatch.AnybatchWarning, match="smaller of lr") as caught:
        anybatch.attach(torch.optim.Adafactor(model.parameters()), model=model, scale=2)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(("name", "reason"), [("Adamax", "maximum"), ("Adadelta", "updates"), ("SparseAdam", "row")])
def test_decays_on_the_clock_are_refused_with_a_reason_where_they_cannot_be_right(name, reason):
    model = Regression()
    optimizer = EXPORTED[name](model.parameters())
    with pytest.raises(anybatch.UnsupportedError, match=f"{name}.*{reason}.*decays='constant'"):
        anybatch.attach(optimizer, model=model, scale=2, rule=anybatch.AdaScale(decays="clock"))
    anybatch.attach(optimizer, model=model, scale=2)


def test_trap_radam_would_never_divide_where_its_average_is_too_short():
    model = Regression()
    optimizer = torch.optim.RAdam(model.parameters(), betas=(0.9, 0.9))
    controller = anybatch.attach(optimizer, model=model, scale=5, rule=anybatch.Linear())
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), controller.state_dict()))
    model(0, 0).backward()
    with pytest.raises(anybatch.InvalidValueError, match=r"beta2=0.9 over the 5 .* 0.59; RAdam needs"):
        optimizer.step()
    assert same(before, (model.state_dict(), optimizer.state_dict(), controller.state_dict()))
    controller.detach()
    controller = anybatch.attach(optimizer, model=model, scale=3, rule=anybatch.Linear())
    model(0, 0).backward()
    optimizer.step()
    assert controller.tau == 3


def test_subclasses_have_the_row_of_their_class():
    class Mine(torch.optim.AdamW):
        pass

    model = Regression()
    controller = anybatch.attach(Mine(model.parameters()), model=model, scale="count")
    for i in range(2):
        (model(0, i) / 2).backward()
    controller._optimizers[0].step()
    assert controller.lr_factor == pytest.approx(math.sqrt(controller.gain))


# ---- optimizer in backward ----


def in_backward(rule, scale):
    """An optimizer for each parameter, stepped by a hook inside of the backward, as in PyTorch's tutorial."""
    model = oracle.make_model()
    optimizers = {p: torch.optim.SGD([p], lr=0.1, foreach=False) for p in model.parameters()}
    controllers = [anybatch.attach(o, model=model, scale=scale, rule=rule) for o in optimizers.values()]

    def hook(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    return model, controllers


def test_optimizer_in_backward_works_where_nothing_is_measured():
    model, controllers = in_backward(anybatch.Linear(), 4)
    plain = oracle.make_model()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.4)
    for t in range(3):
        x, y = oracle.micro_batch(t, 0)
        oracle.loss_fn(model(x), y).backward()
        oracle.loss_fn(plain(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [controller.tau for controller in controllers] == [12] * 4
    for p, q in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("rule", [anybatch.AdaScale(), anybatch.Linear()])
def test_optimizer_in_backward_is_a_typed_error(rule):
    """What a step measures is complete only at the end of the backward."""
    model, _ = in_backward(rule, "count")
    x, y = oracle.micro_batch(0, 0)
    with pytest.raises(anybatch.UsageError, match="during a backward"):
        oracle.loss_fn(model(x), y).backward()


# ---- a class of one's own ----


class Own(torch.optim.Optimizer):
    """AdamW, written out; torch knows nothing of it."""

    def __init__(self, parameters, **entries):
        super().__init__(parameters, {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1} | entries)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(
                        step=torch.zeros((), dtype=torch.float64), m=torch.zeros_like(p), v=torch.zeros_like(p)
                    )
                state["step"] += 1
                state["m"].lerp_(p.grad, 1 - beta1)
                state["v"].lerp_(p.grad**2, 1 - beta2)
                p.mul_(1 - lr * group["weight_decay"])
                m, v = (state[k] / (1 - b ** state["step"].item()) for k, b in (("m", beta1), ("v", beta2)))
                p.sub_(lr * m / (v.sqrt() + group["eps"]))


def test_a_class_of_ones_own_that_is_like_adamw_is_scaled_as_it_is():
    runs = []
    for kind, like in ((torch.optim.AdamW, None), (Own, torch.optim.AdamW)):
        model = oracle.make_model()
        entries = {"betas": (0.9, 0.99), "lr": 0.01, "weight_decay": 0.1}
        optimizer = kind(model.parameters(), **entries)
        rule = anybatch.AdaScale(like=like)
        controller = anybatch.attach(optimizer, model=model, total=100, scale="count", rule=rule)
        for t in range(8):
            n = 2 + t % 3
            for i in range(n):
                x, y = oracle.micro_batch(t, i)
                (oracle.loss_fn(model(x), y) / n).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append((controller.tau, controller.lr_factor, [p.detach() for p in model.parameters()]))
    assert runs[0][:2] == pytest.approx(runs[1][:2], rel=1e-8)  # torch counts steps in float32
    assert runs[0][1] == pytest.approx(controller.gain**0.5)
    for theirs, own in zip(runs[0][2], runs[1][2], strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("like", [torch.optim.LBFGS, torch.optim.Muon, Own, "AdamW"])
def test_what_a_class_is_said_to_be_like_must_be_known_and_have_the_entries(like):
    model = oracle.make_model()
    with pytest.raises(anybatch.InvalidValueError, match="like"):
        anybatch.attach(Own(model.parameters()), model=model, scale=2, rule=anybatch.AdaScale(like=like))

"""Every class in the table: what it says of it, and that a controller at scale 1 changes not one bit of torch's own."""

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
from anybatch._scaling.families import _TABLE, Family, family_of
from anybatch._scaling.hyperparameters import Hyperparameters

EXPORTED = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
}
ROW = {name.removeprefix("torch."): row for name, row in _TABLE.items() if name.startswith("torch.")}
SUPPORTED = [name for name in EXPORTED if isinstance(ROW.get(name), Family)]
REFUSED = ["ASGD", "LBFGS", "Rprop"]
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own, in its own sparse steps


def test_every_class_of_torch_optim_stands_in_the_table():
    """A new class in torch fails here: think it through, and give it a row."""
    assert set(EXPORTED) <= set(ROW)
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
        assert controller.lr_factor == pytest.approx(far(r, 0.95) if name == "Muon" else r ** ROW[name].exponent)
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
    family = ROW[name]
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
    assert drift(name, lambda t: 8.0, exponent=ROW[name].exponent + 0.5, **ROWS[name]) > 2 * bare
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
        with Hyperparameters(optimizer, ROW["Adagrad"], "clock", None).scaled(lr_factor=1.0, iterations=k):
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


@pytest.mark.parametrize("like", [torch.optim.LBFGS, torch.optim.Muon, torch.optim.RMSprop, Own, "AdamW"])
def test_what_a_class_is_said_to_be_like_must_be_known_and_have_the_entries(like):
    model = oracle.make_model()
    with pytest.raises(anybatch.InvalidValueError, match="like"):
        anybatch.attach(Own(model.parameters()), model=model, scale=2, rule=anybatch.AdaScale(like=like))


class TwoKinds(torch.optim.Optimizer):
    """Groups with a momentum, and groups with betas."""

    def __init__(self, parameters):
        first, *rest = parameters
        groups = [{"params": [first], "momentum": 0.9}, {"params": rest, "betas": (0.9, 0.99)}]
        super().__init__(groups, {"lr": 0.01})

    def step(self, closure=None):
        """Nothing: attach refuses it."""


def test_groups_of_two_kinds_are_an_error_that_says_to_make_two_optimizers_of_them():
    model = oracle.make_model()
    rule = anybatch.AdaScale(like=torch.optim.Muon)
    with pytest.raises(anybatch.InvalidValueError, match=r"only some of its groups have momentum.*Make two optimizers"):
        anybatch.attach(TwoKinds(model.parameters()), model=model, scale=2, rule=rule)


def test_of_several_optimizers_like_is_about_the_one_that_is_not_torchs():
    """Else the way out of two kinds in one optimizer would be none: a list has one rule."""
    model = oracle.make_model()
    first, *rest = model.parameters()
    own, torchs = Own([first]), torch.optim.SGD(rest, lr=0.01)
    controller = anybatch.attach([own, torchs], model=model, scale=16, rule=anybatch.AdaScale(like=torch.optim.AdamW))
    inside = []
    for optimizer in (own, torchs):
        optimizer.register_step_pre_hook(lambda o, *_: inside.append(o.param_groups[0]["lr"] / 0.01))
    for i in range(2):
        (oracle.loss_fn(*forward(model, i)) / 2).backward()
    own.step()
    torchs.step()
    assert controller.gain > 1
    assert inside == pytest.approx([controller.gain**0.5, controller.gain])


def forward(model, i):
    x, y = oracle.micro_batch(0, i)
    return model(x), y


# ---- where a class counts its steps ----

KS = (3.0, 1.0, 7.5, 2.25, 1.0, 12.0, 5.5)  # base iterations of each step


def of_steps(**options):
    """A rule whose step t is of KS[t] base iterations, with a learning rate times their root."""

    class Steps(anybatch.AdaScale):
        def __call__(self, *, scale, gain, clock, exponent):
            at = next(i for i in range(len(KS)) if math.isclose(sum(KS[:i]), clock.tau, abs_tol=1e-6))
            return anybatch.Scaling(KS[at] ** exponent, KS[at])

    return Steps(**options)


class Counting(torch.optim.Optimizer):
    """Adam, with its count of steps where `place` says, and as `kind` says."""

    def __init__(self, parameters, *, place="state", kind=int, entry="step"):
        super().__init__(parameters, {"lr": 0.01, "betas": (0.9, 0.99)})
        self.place, self.kind, self.entry = place, kind, entry

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(m=torch.zeros_like(p), v=torch.zeros_like(p))
                if p.grad is None and self.place == "state":
                    continue
                holder = {"state": state, "group": group, "global": self.state, "self": vars(self)}[self.place]
                holder.setdefault(self.entry, self.kind(0))
                holder[self.entry] += 1
                if p.grad is None:  # counted all the same, as pytorch-optimizer does
                    continue
                n = float(holder[self.entry])
                state["m"].lerp_(p.grad, 1 - beta1)
                state["v"].lerp_(p.grad.square(), 1 - beta2)
                p.addcdiv_(state["m"] / (1 - beta1**n), (state["v"] / (1 - beta2**n)).sqrt() + 1e-8, value=-group["lr"])


def trained(optimizer_of, rule):
    """The weights after each of the steps KS, whose gradients are the weights plus their number."""
    p = nn.Parameter(torch.tensor([1.5, -0.4], dtype=torch.float64))
    optimizer = optimizer_of([p])
    anybatch.attach(optimizer, model=nn.ParameterList([p]), scale="count", rule=rule)
    weights = []
    for t in range(len(KS)):
        for sign in (-1, 1):
            ((0.5 * p.square().sum() + (t + sign) * p.sum()) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        weights.append(p.detach().clone())
    return torch.stack(weights), optimizer


@pytest.mark.parametrize("place", ["state", "group", "global"])
@pytest.mark.parametrize("kind", [int, float, torch.tensor, lambda n: torch.tensor(n, dtype=torch.float64)])
def test_a_count_of_steps_is_on_the_clock_wherever_and_whatever_it_is(place, kind):
    """Against a plain loop: averages over base iterations, debiased by 1 - beta ** tau."""
    weights, optimizer = trained(lambda p: Counting(p, place=place, kind=kind), of_steps(like=torch.optim.AdamW))
    w, m, v, tau = torch.tensor([1.5, -0.4], dtype=torch.float64), 0.0, 0.0, 0.0
    for t, k in enumerate(KS):
        g = w + t
        m, v, tau = 0.9**k * m + (1 - 0.9**k) * g, 0.99**k * v + (1 - 0.99**k) * g * g, tau + k
        w = w - 0.01 * k**0.5 * (m / (1 - 0.9**tau)) / ((v / (1 - 0.99**tau)).sqrt() + 1e-8)
        torch.testing.assert_close(weights[t], w, rtol=1e-6, atol=1e-9)
    (p,) = optimizer.param_groups[0]["params"]
    holder = {"state": optimizer.state[p], "group": optimizer.param_groups[0], "global": optimizer.state}[place]
    assert float(holder["step"]) == pytest.approx(tau)
    assert type(holder["step"]) in (float, torch.Tensor)


@pytest.mark.parametrize("whole", [lambda n: n % 2, int, lambda n: n // 2, math.floor, round])
def test_who_needs_a_whole_number_of_steps_gets_an_error(whole):
    class Periodic(Counting):
        def step(self, closure=None):
            for state in self.state.values():
                whole(state["step"])
            super().step(closure)

    with pytest.raises(anybatch.UnsupportedError, match=r"whole number of steps.*decays='constant'"):
        trained(Periodic, of_steps(like=torch.optim.AdamW))
    weights, _ = trained(Periodic, of_steps(like=torch.optim.AdamW, decays="constant"))
    assert weights.isfinite().all()


@pytest.mark.parametrize(
    ("place", "entry", "kind"),
    [
        ("state", "t", int),
        ("group", "k", float),
        ("self", "iterations", int),
        ("global", "k", int),
        ("state", "t", torch.tensor),
        ("group", "t", torch.tensor),
    ],
)
def test_a_number_that_a_step_changes_and_that_is_not_on_the_clock_is_an_error(place, entry, kind):
    """A count of another name, or a sum over steps, would be silently wrong."""

    def make(p):
        return Counting(p, place=place, entry=entry, kind=kind)

    with pytest.raises(anybatch.UnsupportedError, match=rf"Counting changes .*{entry}.* in its step.*'step'"):
        trained(make, of_steps(like=torch.optim.AdamW))
    constant, _ = trained(make, of_steps(like=torch.optim.AdamW, decays="constant"))
    other, _ = trained(Counting, of_steps(like=torch.optim.AdamW, decays="constant"))
    assert torch.equal(constant, other)


@pytest.mark.parametrize("place", ["state", "group"])
@pytest.mark.parametrize("before", [0, 2])
def test_a_step_that_is_skipped_is_not_counted(place, before):
    p = nn.Parameter(torch.ones(2))
    optimizer = Counting([p], place=place)
    rule = anybatch.AdaScale(like=torch.optim.AdamW)
    controller = anybatch.attach(optimizer, model=nn.ParameterList([p]), scale=1, rule=rule)
    for factor in [1.0] * before + [math.nan]:
        for _ in range(2):
            (factor * p).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (controller.steps, controller.skipped) == (before, 1)
    holder = optimizer.param_groups[0] if place == "group" else optimizer.state.get(p, {})
    assert holder.get("step", 0) == before


def test_groups_that_share_a_tensor_learning_rate_follow_their_own_momentum():
    """Nesterov's weight of a gradient goes into the learning rate, and it is another one for each momentum."""
    moved = []
    for shared in (True, False):
        ps = nn.ParameterList([nn.Parameter(torch.ones(2)) for _ in range(2)])
        groups = [{"params": [p], "momentum": m} for p, m in zip(ps, (0.9, 0.5))]
        lr = torch.tensor(0.1) if shared else 0.1
        optimizer = torch.optim.SGD(groups, lr=lr, nesterov=True, momentum=0.9)
        anybatch.attach(optimizer, model=ps, scale=8, rule=anybatch.Linear(decays="clock"))
        for _ in range(2):
            (ps[0].square().sum() + ps[1].square().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not shared or all(group["lr"] is lr for group in optimizer.param_groups)
        moved.append(torch.stack([p.detach() for p in ps]))
    torch.testing.assert_close(*moved)


@pytest.mark.parametrize("like", ["Muon", "SGD"])
def test_a_count_that_nothing_uses_is_no_error(like):
    """Most of pytorch-optimizer's classes have one."""
    sign = foreign("pytorch_optimizer.SignSGD")
    weights, optimizer = trained(lambda p: sign(p, lr=0.01), of_steps(like=getattr(torch.optim, like), decays="clock"))
    assert weights.isfinite().all()
    assert optimizer.param_groups[0]["step"] == pytest.approx(sum(KS))


def test_a_count_stays_an_int_at_scale_one():
    p = nn.Parameter(torch.ones(2))
    optimizer = Counting([p])
    rule = anybatch.AdaScale(like=torch.optim.AdamW)
    anybatch.attach(optimizer, model=nn.ParameterList([p]), scale=1, rule=rule)
    p.sum().backward()
    optimizer.step()
    assert type(optimizer.state[p]["step"]) is int


# ---- classes of other packages, by name ----


def stand_in(module, name, base=torch.optim.Optimizer, **members):
    """A class of that name in a module of that name, of a package that need not be installed."""
    return type(name, (base,), {"__module__": module, "step": lambda self, closure=None: None, **members})


class Lion(torch.optim.Optimizer):
    """The algorithm of lion_pytorch, and of bitsandbytes but for the eight bits."""

    def __init__(self, parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(p))
                state["step"] += 1
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * torch.sign(beta1 * state["exp_avg"] + (1 - beta1) * p.grad))
                state["exp_avg"].lerp_(p.grad, 1 - beta2)


class WholeAdam(torch.optim.Optimizer):
    """bitsandbytes' AdamW but for the eight bits: its kernel takes a whole number of steps."""

    def __init__(self, parameters, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0):
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, state1=torch.zeros_like(p), state2=torch.zeros_like(p))
                state["step"] += 1
                n = state["step"]
                assert type(n) is int
                state["state1"].lerp_(p.grad, 1 - beta1)
                state["state2"].lerp_(p.grad.square(), 1 - beta2)
                size = (1 - beta2**n) ** 0.5 / (1 - beta1**n)
                p.addcdiv_(state["state1"], state["state2"].sqrt() + 1e-8, value=-group["lr"] * size)
                p.mul_(1 - group["lr"] * group["weight_decay"])


def foreign(name):
    """The class of that name: the real one where the package is among those for development."""
    package, _, cls = name.partition(".")
    if package == "pytorch_optimizer":
        return getattr(pytest.importorskip("pytorch_optimizer"), cls)
    if package == "transformers":
        return pytest.importorskip("transformers.optimization").Adafactor
    base = {"muon": torch.optim.Muon, "lion_pytorch": Lion}.get(package, Lion if "Lion" in cls else WholeAdam)
    return type(cls, (base,), {"__module__": f"{package}.optim"})


FOREIGN = {  # the class, with what it is made with and how far noise may dominate: signal to noise, base iterations
    "pytorch_optimizer.Lion": ({}, 0.05, 3000),
    "pytorch_optimizer.AdamP": ({}, 0.05, 3000),
    "pytorch_optimizer.StableAdamW": ({}, 0.05, 3000),
    "pytorch_optimizer.AdaBelief": ({}, 0.05, 3000),
    "pytorch_optimizer.SOAP": ({}, 0.01, 4000),
    "transformers.Adafactor": ({"relative_step": False, "scale_parameter": False, "beta1": 0.9}, 0.05, 3000),
    "lion_pytorch.Lion": ({"betas": (0.95, 0.98)}, 0.05, 3000),
    "bitsandbytes.Lion8bit": ({}, 0.05, 3000),
    "bitsandbytes.AdamW8bit": ({}, 0.05, 3000),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_law_classes_of_other_packages_go_equally_far_per_base_iteration(name):
    """The same law as that of torch's own, above."""
    options, snr, base = FOREIGN[name]

    def far(k, wrong=0.0):
        torch.manual_seed(0)
        p = nn.Parameter(torch.zeros(24, 100))
        optimizer = foreign(name)([p], **{"lr": 1e-3, **options})
        values = Hyperparameters(optimizer, family_of(optimizer, exponent=None), "auto", None)
        p.grad = torch.empty_like(p)
        for _ in range(int(base / k)):
            p.grad.normal_(snr, k**-0.5)
            with values.scaled(lr_factor=k ** (values.exponent(k) + wrong), iterations=k):
                optimizer.step()
        return -float(p.detach().mean())

    bare = far(1.0)
    assert far(8.0) == pytest.approx(bare, rel=0.1)
    assert abs(math.log(far(8.0, wrong=0.25) / bare)) > 0.3
    assert abs(math.log(far(8.0, wrong=-0.25) / bare)) > 0.3


def test_rows_of_other_packages_are_run_or_share_the_row_of_one_that_is():
    run = [_TABLE[name] for name in FOREIGN] + list(ROW.values())
    for name, row in _TABLE.items():
        assert isinstance(row, str) or any(
            how_scaled(row) == how_scaled(each) for each in run if isinstance(each, Family)
        ), name


def how_scaled(row):
    """What of a row says how a step is scaled."""
    return row.exponent, row.decays, row.names, row.momentum, row.rates, dict(row.state)


@pytest.mark.parametrize("name", ["lion_pytorch.Lion", "bitsandbytes.PagedLion32bit"])
def test_values_inside_of_a_step_of_lion(name):
    """Its beta1 is a share of the average in a step, and stays; its beta2 is a memory."""
    model = Regression()
    optimizer = foreign(name)(model.parameters(), lr=0.02, weight_decay=0.1)
    controller = anybatch.attach(optimizer, model=model, scale=16)
    inside = []
    optimizer.register_step_pre_hook(lambda o, *_: inside.append({**o.param_groups[0]}))
    for i in range(2):
        (model(0, i) / 2).backward()
    optimizer.step()
    r = controller.gain

    def spread(share, memory):
        """The variance of share * average + (1 - share) * g, summed over 20,000 gradients of variance 1."""
        return (1 - share) ** 2 + sum((share * (1 - memory) * memory**j) ** 2 for j in range(20_000))

    f = (r * spread(0.9, 0.99**r) / spread(0.9, 0.99)) ** 0.5
    assert 2 < r < 16
    assert inside[0]["lr"] == pytest.approx(0.02 * f)
    assert inside[0]["betas"] == pytest.approx((0.9, 0.99**r))
    assert inside[0]["weight_decay"] == pytest.approx(0.1 * r / f)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)


@pytest.mark.parametrize(("fixed", "coupled"), [(False, False), (True, False), (False, True)])
def test_weight_decay_of_pytorch_optimizer_follows_the_clock(fixed, coupled):
    """Decoupled, weights shrink by lr * weight_decay a step, or by weight_decay alone where it is fixed."""
    model = Regression()
    options = {"weight_decay": 0.1, "fixed_decay": fixed, "weight_decouple": not coupled}
    optimizer = foreign("pytorch_optimizer.AdamP")(model.parameters(), lr=0.02, **options)
    controller = anybatch.attach(optimizer, model=model, scale=16)
    inside = []
    optimizer.register_step_pre_hook(lambda o, *_: inside.append({**o.param_groups[0]}))
    for i in range(2):
        (model(0, i) / 2).backward()
    optimizer.step()
    shrinks = inside[0]["weight_decay"] * (1 if fixed or coupled else inside[0]["lr"])
    assert shrinks == pytest.approx(0.1 if coupled else 0.1 * controller.gain * (1 if fixed else 0.02))


REFUSALS = {
    "schedulefree.AdamWScheduleFree": "interpolates.*anybatch.ModelEMA",
    "schedulefree.SGDScheduleFreeClosure": "interpolates.*anybatch.ModelEMA",
    "pytorch_optimizer.ScheduleFreeAdamW": "interpolates.*anybatch.ModelEMA",
    "prodigyopt.Prodigy": "estimates its learning rate.*AdamW",
    "dadaptation.DAdaptAdam": "estimates its learning rate.*AdamW",
    "pytorch_optimizer.DAdaptLion": "estimates its learning rate.*AdamW",
    "muon.MuonWithAuxAdam": r"two laws.*anybatch.attach\(\[muon, adamw\]",
    "muon.SingleDeviceMuonWithAuxAdam": r"two laws.*anybatch.attach\(\[muon, adamw\]",
    "pytorch_optimizer.Muon": r"two laws.*anybatch.attach\(\[muon, adamw\]",
    "sophia.SophiaG": "curvature.*AdamW",
    "torch_optimizer.Lookahead": "once in k steps.*inner optimizer",
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize(
    "rule", [anybatch.AdaScale(), anybatch.AdaScale(like=torch.optim.AdamW), anybatch.AdaScale(exponent=0.5)], ids=str
)
def test_classes_of_other_packages_that_cannot_be_scaled_say_what_to_do(name, rule):
    """Whatever the user says: their steps would be wrong in silence. A class derived from one is one."""
    module, _, cls = name.rpartition(".")
    base = stand_in(f"{module}.some.module", cls)
    for kind in (base, stand_in("mine", "Mine", base)):
        model = Regression()
        optimizer = kind(model.parameters(), {"lr": 0.1, "betas": (0.9, 0.99), "momentum": 0.9})
        with pytest.raises(anybatch.UnsupportedError, match=f"{kind.__name__} cannot be scaled: .*{REFUSALS[name]}"):
            anybatch.attach(optimizer, model=model, scale=2, rule=rule)


def test_a_class_of_the_same_name_elsewhere_is_unknown():
    model = Regression()
    optimizer = stand_in("mine.prodigyopt", "Prodigy")(model.parameters(), {"lr": 0.1})
    with pytest.raises(anybatch.UnsupportedError, match=r"rate of Prodigy .* not known"):
        anybatch.attach(optimizer, model=model, scale=2)


def test_what_is_known_keeps_its_row_whatever_it_is_said_to_be_like():
    model = Regression()
    optimizer = foreign("lion_pytorch.Lion")(model.parameters())
    assert family_of(optimizer, exponent=None, like=torch.optim.AdamW) is _TABLE["lion_pytorch.Lion"]


@pytest.mark.parametrize("rule", [anybatch.AdaScale(), anybatch.AdaScale(exponent=0.5), anybatch.SquareRoot()])
def test_a_learning_rate_that_the_optimizer_sets_by_itself_is_an_error(rule):
    model = Regression()
    optimizer = foreign("transformers.Adafactor")(model.parameters(), lr=None)
    with pytest.raises(anybatch.UnsupportedError, match=r"relative_step=True.*relative_step=False"):
        anybatch.attach(optimizer, model=model, scale=2, rule=rule)


@pytest.mark.parametrize("lr", [None, "auto", True])
def test_a_learning_rate_that_is_no_number_is_an_error(lr):
    model = Regression()
    optimizer = stand_in("mine", "Mine")(model.parameters(), {"lr": lr})
    with pytest.raises(anybatch.UnsupportedError, match=f"Mine has the learning rate lr={lr!r}"):
        anybatch.attach(optimizer, model=model, scale=2, rule=anybatch.AdaScale(exponent=0.5))


def test_sam_is_refused_and_the_optimizer_inside_of_it_is_what_to_attach_to():
    """The gradients at the moved weights are those of the step, so they are what is measured."""
    sam = foreign("pytorch_optimizer.SAM")
    runs = []
    for scaled in (True, False):
        model = oracle.make_model()
        optimizer = sam(model.parameters(), torch.optim.SGD, lr=0.01)
        if scaled:
            with pytest.raises(anybatch.UnsupportedError, match=r"in two halves.*optimizer\.base_optimizer"):
                anybatch.attach(optimizer, model=model, scale=4)
            controller = anybatch.attach(optimizer.base_optimizer, model=model, scale=4, rule=anybatch.AdaScale())
        gradients = []
        for half in (optimizer.first_step, optimizer.second_step):
            for i in range(2):
                if half == optimizer.second_step and not scaled:  # each gradient of the second half by itself
                    g = torch.autograd.grad(oracle.loss_fn(*forward(model, i)), list(model.parameters()))
                    gradients.append(torch.cat([each.flatten() for each in g]).double())
                (oracle.loss_fn(*forward(model, i)) / 2).backward()
            half(zero_grad=True)
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    first, second = gradients
    mean, start = (first + second) / 2, torch.cat([p.detach().flatten() for p in oracle.make_model().parameters()])
    moved = (runs[0] - start).norm() / (runs[1] - start).norm()  # plain SGD: by what the rate was multiplied
    variance = (first - second).square().sum() / 2  # of one micro-batch
    batch = 4 * variance / 2  # two micro-batches at scale 4: a base batch is half of a micro-batch
    assert controller.steps == 1
    assert controller.variance == pytest.approx(float(batch), rel=1e-4)
    assert controller.sqnorm == pytest.approx(max(0.0, float(mean.square().sum() - variance / 2)), rel=1e-4)
    assert float(moved) == pytest.approx(controller.gain, rel=1e-4)


# ---- groups with laws of their own ----


@pytest.mark.parametrize("momenta", [(0.95, 0.5), (0.5, 0.95), (0.0, 0.9)])
@pytest.mark.parametrize(
    "rule", [anybatch.AdaScale(), anybatch.AdaScale(exponent=0.5), anybatch.Linear(), anybatch.SquareRoot()], ids=str
)
def test_each_group_of_muon_follows_its_own_momentum_where_the_rule_does(momenta, rule):
    torch.manual_seed(0)
    ps = nn.ParameterList([nn.Parameter(torch.randn(4, 4)) for _ in momenta])
    groups = [{"params": [p], "momentum": m} for p, m in zip(ps, momenta)]
    optimizer = torch.optim.Muon(groups, lr=torch.tensor(0.01) if momenta[0] == 0.95 else 0.01, weight_decay=0.1)
    controller = anybatch.attach(optimizer, model=ps, scale=16, rule=rule)
    inside = []
    optimizer.register_step_pre_hook(lambda o, *_: inside.extend({**g, "lr": float(g["lr"])} for g in o.param_groups))
    for _ in range(2):
        (sum((p * torch.randn(4, 4)).sum() for p in ps) / 2).backward()
    optimizer.step()
    r = controller.tau
    for group, m in zip(inside, momenta):
        f = {"Linear": 16, "SquareRoot": 4}.get(
            type(rule).__name__, r**0.5 if rule == anybatch.AdaScale(exponent=0.5) else far(r, m)
        )
        assert group["lr"] == pytest.approx(0.01 * f)
        assert group["momentum"] == pytest.approx(m**r)
        assert group["lr"] * group["weight_decay"] == pytest.approx(0.01 * 0.1 * r)


# ---- a variance as a difference of averages ----


@pytest.mark.parametrize("k", [8.0, 128.0, 2000.0])
def test_rmsprops_variance_stays_one_at_any_gain(k):
    """With alpha ** k it was too small at first and, below the rounding, the root of a negative number."""
    far = []
    for r in (1.0, k):
        torch.manual_seed(0)
        p = nn.Parameter(torch.zeros(24, 100))
        optimizer = torch.optim.RMSprop([p], lr=1e-3, centered=True)
        values = Hyperparameters(optimizer, ROW["RMSprop"], "auto", None)
        p.grad = torch.empty_like(p)
        for _ in range(600):
            p.grad.normal_(0.05 * r**-0.5, r**-0.5)  # a mean that the noise dominates alike
            with values.scaled(lr_factor=r**0.5, iterations=r):
                optimizer.step()
        far.append(-float(p.detach().mean()) / r**0.5)
    assert far[1] == pytest.approx(far[0], rel=0.02)


def test_rmsprops_variance_cannot_be_on_the_clock():
    model = Regression()
    optimizer = torch.optim.RMSprop(model.parameters(), centered=True)
    for decays in ("clock", 0.5):
        with pytest.raises(anybatch.UnsupportedError, match=r"RMSprop\(centered=True\).*'constant' or 'auto'"):
            anybatch.attach(optimizer, model=model, scale=2, rule=anybatch.AdaScale(decays=decays))

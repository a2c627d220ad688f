"""Every torch scheduler, driven to floor(tau): after any moves of the clock, the rate of as many single steps."""

import math
import random
import warnings

import pytest
import torch
from torch.optim import lr_scheduler as ls
from torch.optim.swa_utils import SWALR

import anybatch
from anybatch._scaling import ScheduleDriver, drivers_of
from anybatch._scaling.preview import preview

SCHEDULERS = {
    "LambdaLR": lambda o: ls.LambdaLR(o, lambda i: 1 / (1 + i)),
    "MultiplicativeLR": lambda o: ls.MultiplicativeLR(o, lambda i: 0.99),
    "StepLR": lambda o: ls.StepLR(o, 7, 0.5),
    "MultiStepLR": lambda o: ls.MultiStepLR(o, [5, 6, 40], 0.1),
    "ConstantLR": lambda o: ls.ConstantLR(o, 0.3, 9),
    "LinearLR": lambda o: ls.LinearLR(o, 0.1, 1.0, 20),
    "ExponentialLR": lambda o: ls.ExponentialLR(o, 0.97),
    "PolynomialLR": lambda o: ls.PolynomialLR(o, 50, 2.0),
    "CosineAnnealingLR": lambda o: ls.CosineAnnealingLR(o, 60),
    "CosineAnnealingWarmRestarts": lambda o: ls.CosineAnnealingWarmRestarts(o, 7, 2),
    "CyclicLR": lambda o: ls.CyclicLR(o, 0.01, 0.1, 9),
    "OneCycleLR": lambda o: ls.OneCycleLR(o, 0.5, total_steps=61),
    "SequentialLR": lambda o: ls.SequentialLR(o, [ls.LinearLR(o, 0.1, 1.0, 10), ls.CosineAnnealingLR(o, 50)], [10]),
    "ChainedScheduler": lambda o: ls.ChainedScheduler([ls.ConstantLR(o, 0.1, 6), ls.ExponentialLR(o, 0.98)]),
    "nested": lambda o: ls.ChainedScheduler(
        [ls.SequentialLR(o, [ls.ConstantLR(o, 0.1, 4), ls.LinearLR(o, 0.5, 1.0, 9)], [5]), ls.ExponentialLR(o, 0.9)]
    ),
}


class Moves(anybatch.Linear):
    """Moves the clock by whatever the test says."""

    def __call__(self, *, scale, gain, clock, exponent):
        return anybatch.Scaling(1.0, next_move[0])


next_move = [1.0]


def build(make, **options):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = make(optimizer)
    return model, optimizer, scheduler


def step(optimizer):
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.filterwarnings("ignore:The schedule does not fit total")
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_driven_to_the_floor_of_tau(name, seed):
    _, reference, scheduler = build(SCHEDULERS[name])
    rates = []
    for _ in range(61):
        rates.append((reference.param_groups[0]["lr"], reference.param_groups[0]["momentum"]))
        step(reference)
        if len(rates) < 61:
            scheduler.step()
    model, optimizer, scheduler = build(SCHEDULERS[name])
    controller = anybatch.attach(optimizer, model=model, scheduler=scheduler, rule=Moves(), scale=2, total=60)
    moves = random.Random(seed)
    while not controller.done:
        next_move[0] = moves.choice([0.3, 1.0, 2.5, 9.0])
        step(optimizer)
        group = optimizer.param_groups[0]
        expected = rates[min(math.floor(controller.tau + 1e-9), 60)] if controller.tau < 61 else None
        if expected is not None:
            assert (group["lr"], group["momentum"]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("nested", [False, True])
def test_one_cycle_is_held_at_its_end(nested):
    def make(o):
        cycle = ls.OneCycleLR(o, 0.5, total_steps=20)
        return ls.SequentialLR(o, [ls.ConstantLR(o, 1.0), cycle], [5]) if nested else cycle

    model, optimizer, scheduler = build(make)
    anybatch.attach(optimizer, model=model, scheduler=scheduler, rule=Moves(), scale=2)
    next_move[0] = 7.0
    for _ in range(10):
        step(optimizer)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 / 25 / 1e4)


def test_reduce_on_plateau_is_left_alone():
    model, optimizer, scheduler = build(lambda o: ls.ReduceLROnPlateau(o, factor=0.1, patience=0))
    anybatch.attach(optimizer, model=model, scheduler=scheduler, rule=Moves(), scale=2)
    next_move[0] = 4.0
    for _ in range(3):
        step(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.1
    scheduler.step(1.0)
    scheduler.step(2.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    step(optimizer)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize("name", ["CosineAnnealingLR", "SequentialLR", "ChainedScheduler"])
def test_trap_a_scheduler_that_somebody_else_steps_too(name):
    model, optimizer, scheduler = build(SCHEDULERS[name])
    anybatch.attach(optimizer, model=model, scheduler=scheduler, rule=Moves(), scale=2)
    next_move[0] = 2.0
    step(optimizer)
    scheduler.step()
    with pytest.raises(anybatch.UsageError, match=r"remove scheduler.step\(\)"):
        step(optimizer)


def test_trap_the_gain_is_not_baked_into_a_recursive_schedule():
    """Schedules such as ExponentialLR multiply group["lr"]: the rate must be back before they are stepped."""
    model, optimizer, scheduler = build(lambda o: ls.ExponentialLR(o, 0.9))
    anybatch.attach(optimizer, model=model, scheduler=scheduler, rule=anybatch.Linear(), scale=4)
    for i in range(1, 6):
        step(optimizer)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.9 ** (4 * i))


def test_a_resume_that_forgets_the_scheduler_is_an_error():
    model, optimizer, scheduler = build(SCHEDULERS["CosineAnnealingLR"])
    controller = anybatch.attach(optimizer, model=model, scheduler=scheduler, rule=Moves(), scale=2)
    next_move[0] = 3.0
    step(optimizer)
    saved = controller.state_dict()
    model, optimizer, scheduler = build(SCHEDULERS["CosineAnnealingLR"])
    controller = anybatch.attach(optimizer, model=model, scheduler=scheduler, rule=Moves(), scale=2)
    controller.load_state_dict(saved)
    with pytest.raises(anybatch.UsageError, match="load the scheduler's state"):
        step(optimizer)


def test_attaching_in_the_middle_of_a_schedule():
    model, optimizer, scheduler = build(SCHEDULERS["CosineAnnealingLR"])
    for _ in range(10):
        step(optimizer)
        scheduler.step()
    anybatch.attach(optimizer, model=model, scheduler=scheduler, rule=Moves(), scale=2)
    next_move[0] = 5.0
    step(optimizer)
    assert scheduler.last_epoch == 15


# ---- a schedule that ends before the run ----


class Jumping:
    """Of timm's kind: it keeps no position, and every call gives one; at 0 from `end` on."""

    def __init__(self, optimizer, end):
        self.optimizer, self.end, self.calls = optimizer, end, []

    def step(self, epoch):
        raise AssertionError("it counts updates")

    def step_update(self, t):
        self.calls.append(t)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.1 * max(0.0, 1 - t / self.end)


class Inherited(ls.LRScheduler):
    """A user's own: torch's step, and rates by the position."""

    def __init__(self, optimizer, end):
        self.end = end
        super().__init__(optimizer)

    def get_lr(self):
        return [base * max(0.0, 1 - self.last_epoch / self.end) ** 2 for base in self.base_lrs]


class Own(Inherited):
    """A user's own step, which may do anything: no copy of it is stepped."""

    steps = 0

    def step(self, epoch=None):
        Own.steps += 1
        super().step(epoch)


def waved(t, n, warm=0.1):
    """Of a warm-up and half a cosine, as a formula that goes on beyond its end."""
    return t / (warm * n) if t < warm * n else 0.5 + 0.5 * math.cos(math.pi * (t / n - warm) / (1 - warm))


def trapezoid(t, n):
    return max(0.0, min(1.0, 10 * (t + 1) / n, 5 * (1 - t / n)))


def sequence(o, n, last):
    return ls.SequentialLR(o, [ls.LinearLR(o, 0.1, 1.0, n // 10), last], [n // 10])


# Each is made for n steps. Whether a run of 2 n or 4 n steps outlives it: it trains on at 0, or its rate comes back.
ENDS = {
    "warm-up and line": (True, lambda o, n: ls.LambdaLR(o, lambda t: min(10 * t / n, max(0, (1 - t / n) / 0.9)))),
    "warm-up and cosine": (True, lambda o, n: ls.LambdaLR(o, lambda t: waved(t, n))),
    "warm-up, plateau and decay": (True, lambda o, n: ls.LambdaLR(o, lambda t: trapezoid(t, n))),
    "below 0": (True, lambda o, n: ls.LambdaLR(o, lambda t: 1 - t / n)),
    "line": (True, lambda o, n: ls.LinearLR(o, 1.0, 0.0, n)),
    "line to 1e-9": (True, lambda o, n: ls.LinearLR(o, 1.0, 1e-9, n)),
    "line to 1e-6": (True, lambda o, n: ls.LinearLR(o, 1.0, 1e-6, n)),
    "cosine": (True, lambda o, n: ls.CosineAnnealingLR(o, n)),
    "polynomial": (True, lambda o, n: ls.PolynomialLR(o, n, 2.0)),
    "one cycle": (True, lambda o, n: ls.OneCycleLR(o, 0.1, total_steps=n)),
    "multiplied": (True, lambda o, n: ls.MultiplicativeLR(o, lambda t: (n - t) / (n - t + 1) if t < n else 0.0)),
    "sequence, cosine": (True, lambda o, n: sequence(o, n, ls.CosineAnnealingLR(o, n - n // 10))),
    "sequence, line": (True, lambda o, n: sequence(o, n, ls.LinearLR(o, 1.0, 0.0, n - n // 10))),
    "sequence, polynomial": (True, lambda o, n: sequence(o, n, ls.PolynomialLR(o, n - n // 10))),
    "sequence, multiplied": (
        True,
        lambda o, n: sequence(o, n, ls.MultiplicativeLR(o, lambda t: 1 - 12 / n)),
    ),
    "chain, cosine": (True, lambda o, n: ls.ChainedScheduler([ls.LinearLR(o, 0.1), ls.CosineAnnealingLR(o, n)])),
    "chain, lambda": (
        True,
        lambda o, n: ls.ChainedScheduler([ls.LambdaLR(o, lambda t: max(0, 1 - t / n)), ls.ConstantLR(o, 0.5, 5)]),
    ),
    "jumping": (True, Jumping),
    "inherited": (True, Inherited),
    "constant": (False, lambda o, n: ls.LambdaLR(o, lambda t: 1.0)),
    "warm-up alone": (False, lambda o, n: ls.LinearLR(o, 0.01, 1.0, n // 10)),
    "warm-up from 0": (False, lambda o, n: ls.LambdaLR(o, lambda t: min(1.0, 10 * t / n))),
    "late beginning": (False, lambda o, n: ls.LambdaLR(o, lambda t: float(t >= n // 5))),
    "inverse root": (False, lambda o, n: ls.LambdaLR(o, lambda t: (1 + 10 * t / n) ** -0.5)),
    "line to a floor": (False, lambda o, n: ls.LinearLR(o, 1.0, 0.1, n)),
    "cosine to a floor": (False, lambda o, n: ls.LambdaLR(o, lambda t: 0.01 + waved(min(t, n), n))),
    "one milestone": (False, lambda o, n: ls.MultiStepLR(o, [n // 2], 0.1)),
    "three steps": (False, lambda o, n: ls.LambdaLR(o, lambda t: 0.1 ** min(3, 4 * t // n))),
    "warm restarts": (False, lambda o, n: ls.CosineAnnealingWarmRestarts(o, n // 5)),
    "longer restarts": (False, lambda o, n: ls.CosineAnnealingWarmRestarts(o, n // 9, 2)),
    "restarts after a warm-up": (False, lambda o, n: sequence(o, n, ls.CosineAnnealingWarmRestarts(o, n // 4))),
    "hard restarts": (False, lambda o, n: ls.LambdaLR(o, lambda t: waved(t % (n // 4), n // 4, 1e-9))),
    "restarts with warm-ups": (False, lambda o, n: ls.LambdaLR(o, lambda t: waved(t % (n // 4), n // 4))),
    "cycles": (False, lambda o, n: ls.CyclicLR(o, 0.0, 0.1, n // 8, cycle_momentum=False)),
}


def attached(make, n, *, total, groups=1, lr=0.1):
    """The words of the library at attach."""
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(groups)]
    model = torch.nn.ParameterList(parameters)
    optimizer = torch.optim.SGD([{"params": [p], "lr": lr / (i + 1)} for i, p in enumerate(parameters)], momentum=0.9)
    scheduler = make(optimizer, n)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        anybatch.attach(optimizer, model=model, scheduler=scheduler, rule=Moves(), scale=2, total=total).detach()
    return [str(w.message) for w in caught if issubclass(w.category, anybatch.AnybatchWarning)]


@pytest.mark.parametrize("total", [80, 400, 40_000])
@pytest.mark.parametrize("name", ENDS)
def test_a_schedule_that_ends_before_the_run_warns_once(name, total):
    ends, make = ENDS[name]
    assert attached(make, total, total=total) == []
    for part in (2, 4):
        said = attached(make, total // part, total=total, groups=2 if name != "jumping" else 1)
        assert len(said) == ends, said
        assert all("does not fit total" in words and "base iterations" in words for words in said)
        assert all("attach's total, not to len(loader)" in words for words in said)


@pytest.mark.parametrize("part", [1, 2, 4])
@pytest.mark.parametrize(
    "name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "wsd", "constant", "cosine3"]
)
def test_the_schedules_of_transformers(name, part):
    made = pytest.importorskip("transformers.optimization")
    makes = {
        "linear": lambda o, n: made.get_linear_schedule_with_warmup(o, n // 10, n),
        "cosine": lambda o, n: made.get_cosine_schedule_with_warmup(o, n // 10, n),
        "cosine3": lambda o, n: made.get_cosine_schedule_with_warmup(o, n // 10, n, num_cycles=1.5),
        "cosine_with_restarts": lambda o, n: made.get_cosine_with_hard_restarts_schedule_with_warmup(o, n // 10, n, 3),
        "polynomial": lambda o, n: made.get_polynomial_decay_schedule_with_warmup(o, n // 10, n),
        "wsd": lambda o, n: made.get_wsd_schedule(o, n // 10, n // 5, num_training_steps=n),
        "constant": lambda o, n: made.get_constant_schedule_with_warmup(o, n // 10),
    }
    assert len(attached(makes[name], 400 // part, total=400)) == (part > 1 and name != "constant")


def test_a_long_schedule_is_asked_at_few_steps():
    calls = []

    def fraction(t):
        calls.append(t)
        return max(0.0, 1 - t / 10**6)

    (said,) = attached(lambda o, _: ls.LambdaLR(o, fraction), 0, total=10**7)
    assert "is 0 from scheduler step 1" in said
    assert len(calls) < 2000
    calls.clear()
    attached(lambda o, _: ls.MultiplicativeLR(o, lambda t: fraction(t) or 1.0), 0, total=10**7)
    assert not calls  # a recursion of so many steps is not followed


class Heavy:
    """What a lambda may hang on, and no copy of the scheduler may copy."""

    def __init__(self, end):
        self.end, self.model = end, torch.nn.Linear(2, 1)

    def __deepcopy__(self, memo):
        raise AssertionError("copied")

    def fraction(self, t):
        return max(0.0, 1 - t / self.end)


class Counting:
    """A function with a state: of each call it is one further."""

    def __init__(self, end):
        self.calls, self.end = 0, end

    def __call__(self, t):
        self.calls += 1
        return max(0.0, 1 - t / self.end)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
@pytest.mark.parametrize("name", [*SCHEDULERS, "jumping", "method", "object", "fails"])
def test_the_schedule_that_is_asked_stays_as_it_is(name, lr):
    """The copy's rates are those of the schedule, stepped; and nothing of the real one has moved."""
    own = {
        "jumping": lambda o: Jumping(o, 9),
        "method": lambda o: ls.LambdaLR(o, Heavy(9).fraction),
        "object": lambda o: ls.LambdaLR(o, Counting(9)),
        "fails": lambda o: ls.LambdaLR(o, [1.0, 0.5, 0.2].__getitem__),
    }
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    scheduler = {**SCHEDULERS, **own}[name](optimizer)

    def state():
        parts = [p for s in [scheduler] for p in (s, *getattr(s, "_schedulers", ()))]
        values = [{k: v for k, v in vars(p).items() if k not in ("optimizer", "_schedulers")} for p in parts]
        objects = [vars(f) for p in parts for f in getattr(p, "lr_lambdas", ()) if hasattr(f, "__dict__")]
        return repr((values, objects, optimizer.param_groups, optimizer.state))

    before, group = state(), optimizer.param_groups[0]
    length = 40
    asked = preview(scheduler, range(length), optimizer=optimizer, jump="step_update" if name == "jumping" else None)
    assert state() == before
    assert optimizer.param_groups[0] is group
    if name == "fails":
        assert asked is None
        return
    assert [t for t, _ in asked] == list(range(length))
    for t, (rate,) in asked:
        if name == "jumping":
            scheduler.step_update(t)
        assert rate == pytest.approx(float(group["lr"]), rel=1e-5, abs=1e-12)
        if name != "jumping":
            step(optimizer)
            scheduler.step()


def run(scheduler_of, *, total=100, before_step=lambda o, t: None, **options):
    """A run by moves of 1; the words of the library while it lasted."""
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = scheduler_of(optimizer)
    next_move[0] = 1.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        controller = anybatch.attach(
            optimizer, model=model, scheduler=scheduler, rule=Moves(), scale=2, total=total, **options
        )
        t = 0
        while not controller.done:
            before_step(optimizer, t)
            step(optimizer)
            t += 1
    return [str(w.message) for w in caught if issubclass(w.category, anybatch.AnybatchWarning)]


def test_a_scheduler_that_cannot_be_asked_is_looked_at_in_the_run():
    Own.steps = 0
    said = run(lambda o: Own(o, 25))
    assert Own.steps == 101  # one of them when it was made: no copy was stepped
    assert [("is 0 from scheduler step 25 on" in words) for words in said] == [True]
    assert run(lambda o: Own(o, 100)) == []
    assert run(lambda o: Own(o, 10**9)) == []


def test_a_loaded_state_is_asked_as_well():
    """The scheduler was made right, and its checkpoint is of a shorter one."""
    model, optimizer, scheduler = build(lambda o: ls.CosineAnnealingLR(o, 100))
    controller = anybatch.attach(optimizer, model=model, scheduler=scheduler, rule=Moves(), scale=2, total=100)
    saved = controller.state_dict()
    scheduler.load_state_dict({**scheduler.state_dict(), "T_max": 25})
    controller.load_state_dict(saved)
    with pytest.warns(anybatch.AnybatchWarning, match="T_max=25, the run 100") as caught:
        step(optimizer)
        step(optimizer)
    assert len(caught) == 1


# ---- a rate that something else changes ----


def swap(optimizer, t):
    """torch's recipe, beside the schedule that attach was given."""
    if t == 50:
        optimizer.swa = SWALR(optimizer, swa_lr=0.05, anneal_epochs=5)
    if t > 50:
        optimizer.swa.step()


def write(optimizer, t):
    if t >= 50:
        optimizer.param_groups[0]["lr"] = 0.07


def write_in_place(optimizer, t):
    if t == 50:
        optimizer.param_groups[0]["lr"].mul_(2)


def cosine(o):
    return ls.CosineAnnealingLR(o, 100)


def in_tensor(o):
    o.param_groups[0]["lr"] = torch.tensor(0.1, dtype=torch.float64)
    return cosine(o)


def with_plateau(o):
    return [cosine(o), ls.ReduceLROnPlateau(o)]


def halved(o, t):
    if t == 50:
        o.param_groups[0]["lr"] /= 2  # as the plateau does


def added(o, t):
    if t == 50:
        o.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.3})


def loaded(o, t):
    if t == 50:
        state = o.state_dict()
        state["param_groups"][0]["weight_decay"] = 1e-9
        o.load_state_dict(state)


@pytest.mark.parametrize(
    ("scheduler_of", "hand", "warned"),
    [
        (cosine, swap, True),
        (cosine, write, True),
        (in_tensor, write_in_place, True),
        (cosine, lambda o, t: None, False),
        (in_tensor, lambda o, t: None, False),
        (with_plateau, halved, False),
        (lambda o: [ls.LinearLR(o, 0.1, 1.0, 10), cosine(o)], lambda o, t: None, False),
        (lambda o: [ls.LinearLR(o, 0.1, 1.0, 10), cosine(o)], write, True),
        (lambda o: ls.ExponentialLR(o, 0.99), added, False),
        (cosine, loaded, False),
        (lambda o: Jumping(o, 100), write, False),  # the clock's rate holds at every step, whatever a loop makes of it
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_rate_that_something_else_changes_warns_once(scheduler_of, hand, warned):
    said = run(scheduler_of, before_step=hand)
    assert len(said) == warned, said
    assert all("The learning rate was changed from" in words and "SequentialLR" in words for words in said)


def test_a_driver_that_was_stopped_does_nothing():
    model, optimizer, scheduler = build(cosine)
    clock = anybatch.Clock(100)
    driver = ScheduleDriver(scheduler, optimizer=optimizer, clock=clock)
    step(optimizer)
    clock.advance(3)
    assert (driver.position, scheduler.last_epoch, drivers_of(optimizer)) == (3, 3, [driver])
    driver.stop()
    clock.advance(4)
    driver.catch_up()
    optimizer.param_groups[0]["lr"] = 7.0
    driver.check()
    assert (driver.position, scheduler.last_epoch, drivers_of(optimizer)) == (3, 3, [])


def test_a_driver_that_begins_in_the_middle_of_a_run_goes_on_from_there():
    _, optimizer, scheduler = build(lambda o: ls.ExponentialLR(o, 0.9))
    clock = anybatch.Clock(100)
    clock.advance(41.5)
    step(optimizer)
    scheduler.step()
    driver = ScheduleDriver(scheduler, optimizer=optimizer, clock=clock, every=2)
    assert driver.position == 1
    clock.advance(0.5)
    driver.check()
    assert driver.position == 2
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**2)

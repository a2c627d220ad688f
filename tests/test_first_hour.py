"""What a newcomer types in the first hour, and what the library says of it before money is lost."""

import copy
import math
import pickle
import warnings

import oracle
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as ls
from torch.utils.data import DataLoader, DistributedSampler

import anybatch


def build(**options):
    model = oracle.make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if make := options.pop("scheduler", None):
        options["scheduler"] = make(optimizer)
    options = options if {"base_batch", "scale"} & options.keys() else {"scale": "count"} | options
    return model, optimizer, anybatch.attach(optimizer, model=model, **options)


def step(model, optimizer, t=0, *, size=4, n=1, factor=1.0):
    for i in range(n):
        x, y = oracle.micro_batch(t, i, size=size)
        (oracle.loss_fn(model(x), y) / n * factor).backward()
    optimizer.step()
    optimizer.zero_grad()


# ---- a run that goes nowhere ----


def test_a_diverged_run_ends():
    """A rate too high: a finite gradient takes the weights beyond all floats, and the next step but one says so."""
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
    controller = anybatch.attach(optimizer, model=model, total=1000, scale="count")
    with pytest.raises(anybatch.DivergedError, match="weights are not finite"):
        while not controller.done:
            for i in range(2):
                x, y = oracle.micro_batch(0, i, dtype=torch.float32)
                (oracle.loss_fn(model(x), y) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert controller.steps < 10


def test_weights_that_are_not_finite_end_the_run_at_once():
    model, optimizer, controller = build()
    step(model, optimizer, n=2)
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    step(model, optimizer, n=2)
    with pytest.raises(anybatch.DivergedError, match="weights are not finite after step 1, at tau = "):
        step(model, optimizer, n=2)
    assert (controller.steps, controller.skipped) == (1, 1)


@pytest.mark.parametrize("rule", [None, anybatch.Linear()])
def test_weights_that_were_never_finite_are_not_blamed_on_the_rate(rule):
    model, optimizer, controller = build(rule=rule)
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    step(model, optimizer, n=2)
    with pytest.raises(anybatch.DivergedError, match="before the first step") as error:
        step(model, optimizer, n=2)
    assert "check the initialisation" in str(error.value)
    assert "learning rate" not in str(error.value)


@pytest.mark.parametrize("options", [{}, {"rule": anybatch.SquareRoot(), "scale": 4}], ids=["measured", "fixed rule"])
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_steps_that_do_not_count_are_warned_of_and_then_end_the_run(factor, options):
    model, optimizer, controller = build(**options)
    step(model, optimizer)
    kept = [p.detach().clone() for p in model.parameters()]

    def bad():
        step(model, optimizer, n=2, factor=factor)

    def restore():
        optimizer.zero_grad()
        with torch.no_grad():
            for p, k in zip(model.parameters(), kept, strict=True):
                p.copy_(k)

    for _ in range(9):
        bad()
        restore()
    with pytest.warns(anybatch.AnybatchWarning, match="10 steps in a row did not count, because the gradient was not"):
        bad()
    for _ in range(89):
        restore()
        bad()
    restore()
    with pytest.raises(anybatch.DivergedError, match=r"100 steps in a row .* tau|clock stays"):
        bad()
    restore()
    assert (controller.steps, controller.skipped) == (1, 100)


def test_a_step_that_counts_ends_the_row():
    model, optimizer, controller = build()
    for _ in range(12):
        for _ in range(9):
            optimizer.step()  # without a backward
        step(model, optimizer)
    assert (controller.steps, controller.skipped) == (12, 108)


# ---- schedules ----


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda o: ls.StepLR(o, 10), r"StepLR ends the run, 2700 scheduler steps, at 1e-270"),
        (lambda o: ls.CosineAnnealingLR(o, 100), r"T_max=100, the run 2700"),
        (lambda o: ls.CosineAnnealingLR(o, 5400), r"T_max=5400, the run 2700"),
        (lambda o: ls.OneCycleLR(o, 0.1, total_steps=90), r"total_steps=90, the run 2700"),
        (lambda o: ls.PolynomialLR(o, 30), r"total_iters=30, the run 2700"),
        (lambda o: ls.MultiStepLR(o, [1000, 3000]), r"milestone at 3000, the run 2700"),
        (lambda o: ls.ExponentialLR(o, 0.9), r"ExponentialLR ends the run, 2700 scheduler steps, at 1e-124"),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_said(make, said):
    with pytest.warns(anybatch.AnybatchWarning, match=said):
        build(total=2700, scheduler=make)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: ls.StepLR(o, 900),
        lambda o: ls.CosineAnnealingLR(o, 2699),
        lambda o: ls.OneCycleLR(o, 0.1, total_steps=2700),
        lambda o: ls.MultiStepLR(o, [1000, 2000]),
        lambda o: ls.MultiStepLR(o, [1000, 2700]),
        lambda o: ls.ExponentialLR(o, 0.999),
        lambda o: ls.LambdaLR(o, lambda i: 1 / (1 + i)),
    ],
)
def test_a_schedule_that_fits_is_not(make):
    build(total=2700, scheduler=make)


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")  # no optimizer steps here
def test_a_schedule_that_is_taken_over_half_way_fits():
    def half_done(optimizer):
        scheduler = ls.CosineAnnealingLR(optimizer, 100)
        for _ in range(60):
            scheduler.step()
        return scheduler

    build(total=40, scheduler=half_done)


def test_a_schedule_in_epochs_moves_once_an_epoch():
    """30 epochs of 96 examples at a base batch of 8 are 360 base iterations; the rate falls in the tenth and 20th."""
    model, optimizer, controller = build(
        scheduler=lambda o: ls.StepLR(o, 10),
        schedule_every="epoch",
        epochs=30,
        examples=96,
        base_batch=8,
        micro_batch=8,
    )
    assert controller.clock.total == 360
    seen = {}
    t = 0
    while not controller.done:
        seen.setdefault(controller.epoch, controller.base_lr)
        step(model, optimizer, t, size=8, n=2)
        t += 1
    assert set(seen) <= set(range(30))
    for epoch, lr in seen.items():
        assert lr == pytest.approx(0.1 * 0.1 ** (epoch // 10))
    assert len({round(lr, 6) for lr in seen.values()}) == 3


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")  # no optimizer steps here
def test_a_schedule_every_so_many_iterations():
    _, _, controller = build(total=400, scheduler=lambda o: ls.StepLR(o, 1, gamma=0.5), schedule_every=100)
    rates = []
    for _ in range(5):
        rates.append(controller.base_lr)
        controller.clock.advance(99.5)
    assert rates == pytest.approx([0.1, 0.1, 0.05, 0.025, 0.0125])


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 3},
        {"epochs": 3, "total": 5, "examples": 96, "base_batch": 8, "micro_batch": 8},
        {"epochs": 0, "examples": 96, "base_batch": 8, "micro_batch": 8},
        {"schedule_every": "epoch"},
        {"schedule_every": 0},
        {"schedule_every": "step"},
    ],
    ids=str,
)
def test_epochs_and_units_that_cannot_be_are_refused(options):
    with pytest.raises(anybatch.InvalidValueError):
        build(**options)


def test_an_epoch_without_the_size_of_the_data_is_an_error():
    with pytest.raises(anybatch.UsageError, match="examples"):
        _ = build()[2].epoch


def test_a_scheduler_that_was_not_given_is_said_once():
    model, optimizer, _ = build()
    ls.ExponentialLR(optimizer, 0.9)
    with pytest.warns(anybatch.AnybatchWarning, match="a scheduler that was not passed to attach"):
        step(model, optimizer)
    step(model, optimizer)


def test_a_step_after_the_end_is_said_once():
    model, optimizer, controller = build(total=2)
    for _ in range(2):
        step(model, optimizer)
    assert controller.done
    with pytest.warns(anybatch.AnybatchWarning, match="after tau reached total=2"):
        step(model, optimizer)
    step(model, optimizer)


# ---- sizes ----


@pytest.mark.parametrize(("given", "size"), [(16, 128), (128, 16)])
def test_a_size_that_the_forwards_do_not_have_is_said_once(given, size):
    model, optimizer, _ = build(base_batch=16, micro_batch=given, rule=anybatch.Linear())
    with pytest.warns(anybatch.AnybatchWarning, match=f"micro_batch={given}, but each forward .* pass {size}"):
        step(model, optimizer, size=size)
    step(model, optimizer, size=size)


def test_a_size_in_tokens_is_not():
    embedding = nn.Embedding(10, 3)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
    anybatch.attach(optimizer, model=embedding, base_batch=24, micro_batch=24)
    for _ in range(2):
        for _ in range(2):
            (embedding(torch.randint(10, (4, 6))).square().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_two_backwards_for_each_forward_are_said():
    model, optimizer, _ = build()
    _, optimizer, controller = build(base_batch=4, micro_batch=4)
    model = oracle.make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = anybatch.attach(optimizer, model=model, base_batch=4, micro_batch=4)
    for i in range(2):
        x, y = oracle.micro_batch(0, i)
        out = model(x)
        (oracle.loss_fn(out, y) / 2).backward(retain_graph=True)
        (out.square().mean() / 2).backward()
    with pytest.warns(anybatch.AnybatchWarning, match=r"4 backwards after 2 forwards.*together"):
        optimizer.step()
    assert controller.count == 4


def test_the_size_may_be_read_off_the_forwards():
    model, optimizer, controller = build(base_batch=4, micro_batch="auto")
    scales = []
    for size, n in ((4, 2), (12, 2), (12, 1), (6, 4)):
        with torch.no_grad():
            model(torch.zeros(99, 6, dtype=torch.float64))  # an evaluation is not training
        with controller.paused():
            model(torch.zeros(77, 6, dtype=torch.float64))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one gradient shows no variance
            step(model, optimizer, size=size, n=n)
        scales.append(controller.scale)
    assert scales == [2, 6, 3, 6]
    controller.micro_batch = 8  # said is said
    step(model, optimizer, n=2)
    assert controller.scale == 4


@pytest.mark.parametrize("sizes", [(), (4, 8)])
def test_a_size_that_cannot_be_told_is_an_error(sizes):
    model, _, _ = build(base_batch=4, micro_batch="auto")
    outs = [model(torch.ones(size, 6, dtype=torch.float64)).mean() for size in sizes]
    loss = sum(outs) if outs else sum(p.square().sum() for p in model.parameters())
    with pytest.raises(anybatch.UsageError, match="the size is unknown"):
        loss.backward()


@pytest.mark.parametrize("made", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_tells_nothing(made):
    """A teacher, say, that sees other batches."""
    model, optimizer, controller = build(base_batch=4, micro_batch="auto")
    teacher = made(model)
    for i in range(2):
        x, y = oracle.micro_batch(0, i)
        loss = oracle.loss_fn(model(x), y) + 0 * teacher(torch.ones(9, 6, dtype=torch.float64)).mean()
        (loss / 2).backward()
    optimizer.step()
    assert controller.scale == 2


@pytest.mark.parametrize("micro_batch", [4, 24])
def test_forwards_are_read_on_only_where_the_size_is_that_of_their_rows(micro_batch):
    """Then a smaller last batch can be seen at any step; 24 are the features of 4 rows."""
    model, optimizer, controller = build(base_batch=4, micro_batch=micro_batch)
    hooks = []
    for _ in range(4):
        hooks.append(len(model._forward_pre_hooks))
        step(model, optimizer, n=2)
    assert hooks == [1, 1, 1, micro_batch == 4]
    controller.detach()
    assert not model._forward_pre_hooks


# ---- loops ----


def test_a_loop_over_parts_and_passes():
    torch.manual_seed(0)
    data = [oracle.micro_batch(0, i, size=1) for i in range(32)]
    data = [(x[0], y[0]) for x, y in data]
    sampler = DistributedSampler(data, num_replicas=1, rank=0)
    loader = DataLoader(data, batch_size=8, sampler=sampler)
    model, optimizer, controller = build(base_batch=4, micro_batch=4, epochs=4, examples=32)
    orders = set()
    for batch in controller.batches(loader):
        orders.add(sampler.epoch)
        for (x, y), share in controller.parts(batch, 2):
            assert share == 0.5
            (oracle.loss_fn(model(x), y) * share).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert controller.done
    assert 32 <= controller.tau < 34
    assert len(orders) > 4  # every pass in an order of its own


def test_an_empty_loader_is_an_error():
    _, _, controller = build(total=5)
    with pytest.raises(anybatch.InvalidValueError, match="no batch"):
        next(controller.batches([]))


def test_parts_must_divide_before_any_backward():
    _, _, controller = build()
    with pytest.raises(anybatch.InvalidValueError, match="cannot be split"):
        controller.parts(torch.ones(7, 2), 2)
    assert [share for _, share in build(reduction="sum")[2].parts(torch.ones(8, 2), 4)] == [1.0] * 4


# ---- what a controller says of itself ----


def test_a_detached_controller_says_that_its_clock_stands():
    model, optimizer, controller = build(total=2)
    step(model, optimizer)
    controller.detach()
    with pytest.raises(anybatch.UsageError, match="detached at tau = 1 of 2"):
        _ = controller.done
    model, optimizer, controller = build(total=1)
    step(model, optimizer)
    controller.detach()
    assert controller.done


def test_a_misspelt_attribute_is_an_error():
    _, _, controller = build(base_batch=4, micro_batch=4)
    with pytest.raises(AttributeError, match="micro_bacth"):
        controller.micro_bacth = 8
    controller.micro_batch = 8


def test_a_controller_in_one_line():
    model, optimizer, controller = build(total=50)
    assert repr(controller) == "<Controller: tau 0 of 50, 0 steps>"
    step(model, optimizer, n=3)
    words = repr(controller)
    assert words.startswith(f"<Controller: tau {controller.tau:.6g} of 50, 1 steps, scale 3, gain ")
    worth = f"an example is worth {controller.gain / 3:.1%} of one at scale 1"
    assert words.endswith(f", noise scale {controller.noise_scale:.4g}, {worth}>")
    controller.detach()
    assert repr(controller).endswith(", detached>")


def test_a_gradient_that_is_no_mean_is_an_error():
    """Four times the mean, as a sum over ranks is."""
    model, optimizer, _ = build()
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: (p.grad.mul_(2), None)[1])
    x, y = oracle.micro_batch(0, 0)
    for _ in range(3):
        (oracle.loss_fn(model(x), y) / 3).backward()
    with pytest.raises(anybatch.UsageError, match=r"\.grad is not their mean"):
        optimizer.step()


def test_a_step_is_written_whatever_follows_the_clock(tmp_path):
    model, optimizer, controller = build(record=tmp_path / "run.jsonl")

    def fails(_):
        raise RuntimeError("no space for a snapshot")

    controller.clock.subscribe(fails)
    with pytest.raises(RuntimeError, match="no space"):
        step(model, optimizer)
    assert [line.tau for line in anybatch.read_record(tmp_path / "run.jsonl").steps] == [1]

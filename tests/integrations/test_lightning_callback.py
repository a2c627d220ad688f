"""What else Lightning does around a run: limits, epochs, tuning, monitors, precision, averages, several optimizers."""

import doctest
import functools
import inspect
import math
import re

import oracle
import pytest
import torch
from torch.utils.data import DataLoader

import anybatch
from integrations import task

workers = pytest.importorskip("integrations.lightning_workers", exc_type=ModuleNotFoundError)
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner

from anybatch.integrations.lightning import AnyBatch

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore:.*LeafSpec:FutureWarning",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:SWA is currently only supported every epoch",
)


def fit(*callbacks, adapter=None, module=None, loader=None, val=None, ckpt=None, **options):
    """A run of scale 4; the adapter, the module and the trainer."""
    adapter = adapter or AnyBatch(base_batch=task.SIZE)
    module = module or workers.Module()
    trainer = workers.trainer_of(adapter, *callbacks, **options)
    trainer.fit(module, loader or task.loader(), val, ckpt_path=ckpt)
    return adapter, module, trainer


def test_what_is_left_at_the_end_of_an_epoch_is_a_smaller_step():
    """Fifteen batches: steps of 4, 4, 4 and 3, each loss divided by 4."""
    adapter = AnyBatch(base_batch=task.SIZE)
    tracing = workers.Tracing(adapter)
    _, module, trainer = fit(tracing, adapter=adapter, loader=task.short(15))
    task.check(task.outcome(tracing.trace, module, trainer.optimizers[0]), task.plain(epoch=15))


def test_an_accumulation_that_grows():
    """Eight steps of two batches in the first epoch, and four of four in each one after it."""
    adapter = AnyBatch(base_batch=task.SIZE)
    tracing, growing = workers.Tracing(adapter), GradientAccumulationScheduler({0: 2, 1: 4})
    _, module, trainer = fit(growing, tracing, adapter=adapter, loader=task.short(16), accumulation=1)
    expected = task.plain(epoch=16, lengths=[2] * 8)
    task.check(task.outcome(tracing.trace, module, trainer.optimizers[0]), expected)


class Rates(Callback):
    """The rate after each batch, by tau."""

    def __init__(self, adapter):
        self.adapter, self.seen = adapter, {}

    def on_train_batch_end(self, trainer, *_):
        self.seen[self.adapter.controller.tau] = trainer.optimizers[0].param_groups[0]["lr"]


def test_limits_are_the_trainers_again_after_the_run():
    adapter, _, trainer = fit(max_steps=20)
    assert 20 <= adapter.controller.tau < 24
    assert (trainer.max_steps, trainer.max_epochs) == (20, -1)
    with pytest.raises(anybatch.UsageError, match="detached"):
        fit(max_steps=10**6, max_time={"seconds": 1})[0].controller.done  # noqa: B018


@pytest.mark.parametrize("options", [{"min_epochs": 2}, {"min_steps": 100}])
def test_the_least_length_does_not_lead_beyond_the_end(options):
    with pytest.warns(anybatch.AnybatchWarning, match="are ignored"):
        adapter, _, trainer = fit(max_steps=20, **options)
    assert 20 <= adapter.controller.tau < 24
    assert (trainer.min_epochs or 0, trainer.min_steps or 0) != (0, 0)


def test_epochs_are_those_of_the_base_batch():
    """Three passes over 64 examples at a base batch of 4 are 48 base iterations."""
    adapter = AnyBatch(base_batch=task.SIZE, examples=64)
    _, module, _ = fit(adapter=adapter, loader=task.short(16), max_epochs=3)
    assert module.asked == 48
    assert 48 <= adapter.controller.tau < 52
    assert adapter.controller.epoch == 3


def test_a_schedule_by_epoch_is_one_of_the_base_batch():
    adapter = AnyBatch(base_batch=task.SIZE, examples=64)
    rates = Rates(adapter)
    make = lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 2], 0.1)  # noqa: E731
    module = workers.Module(interval="epoch", make=make)
    fit(rates, adapter=adapter, module=module, loader=task.short(16), max_epochs=3)
    for tau, rate in rates.seen.items():
        assert rate == pytest.approx(oracle.LR * 0.1 ** min(math.floor(tau / 16), 2))
    assert len({round(rate, 9) for rate in rates.seen.values()}) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [({"max_epochs": 3}, "Trainer.max_epochs"), ({"max_steps": -1, "max_epochs": -1}, "has no end")],
)
def test_a_run_of_unknown_length_is_an_error(options, said):
    with pytest.raises(anybatch.UsageError, match=said):
        fit(**options)


def test_a_fast_dev_run_is_as_short_as_ever():
    adapter, _, trainer = fit(fast_dev_run=2, max_epochs=3, accumulation=1)
    assert (trainer.global_step, adapter.controller.tau) == (2, 2)


def test_a_schedule_by_epoch_of_unknown_length_is_an_error():
    with pytest.raises(anybatch.UsageError, match='"interval": "step"'):
        fit(module=workers.Module(interval="epoch"))


def test_a_schedules_frequency_counts_base_iterations():
    adapter = AnyBatch(base_batch=task.SIZE)
    rates = Rates(adapter)
    make = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)  # noqa: E731
    fit(rates, adapter=adapter, module=workers.Module(frequency=10, make=make), max_steps=40)
    for tau, rate in rates.seen.items():
        assert rate == pytest.approx(oracle.LR * 0.9 ** math.floor(tau / 10))


def test_plateau_stays_lightnings():
    make = lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0)  # noqa: E731

    class Plateau(workers.Module):
        def configure_optimizers(self):
            made = super().configure_optimizers()
            made["lr_scheduler"] |= {"monitor": "loss", "interval": "epoch"}
            return made

    module = Plateau(make=make)
    _, _, trainer = fit(
        module=module,
        loader=task.short(16),
        val=task.short(2),
        max_steps=60,
        limit_val_batches=1.0,
        check_val_every_n_epoch=1,
    )
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch > 1


def test_numbers_go_to_lightnings_logger_and_to_the_rate_monitor(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    adapter, _, trainer = fit(
        LearningRateMonitor("step"), logger=logger, log_every_n_steps=1, max_steps=40, gradient_clip_val=1.0
    )
    logger.save()
    header, *lines = (tmp_path / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(header.split(","), line.split(","))) for line in lines]
    steps = [row for row in rows if row["anybatch/tau"]]
    assert len(steps) == adapter.controller.steps
    assert float(steps[-1]["anybatch/tau"]) == pytest.approx(adapter.controller.tau)
    assert all(1 <= float(row["anybatch/gain"]) <= 4 and float(row["anybatch/scale"]) == 4 for row in steps)
    assert all(row["anybatch/noise_scale"] == "" or math.isfinite(float(row["anybatch/noise_scale"])) for row in steps)
    rates = [float(row["lr-SGD"]) for row in rows if row.get("lr-SGD")]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == oracle.LR > 10 * rates[-1]


def test_a_number_that_is_not_finite_is_not_logged():
    """At scale 1 there is nothing to measure: no noise scale."""
    _, _, trainer = fit(accumulation=1, max_steps=3)
    assert {"anybatch/gain", "anybatch/scale", "anybatch/tau"} == set(trainer.logged_metrics)


def test_lr_find_runs_before_there_is_a_controller(tmp_path):
    adapter, module = AnyBatch(base_batch=task.SIZE), workers.Module()
    trainer = workers.trainer_of(adapter, max_steps=20, default_root_dir=tmp_path)
    found = Tuner(trainer).lr_find(module, task.loader(), num_training=10, min_lr=1e-4)
    assert len(found.results["lr"]) == 10
    assert adapter.controller is None
    trainer.fit(module, task.loader())
    assert 20 <= adapter.controller.tau < 24
    assert trainer.optimizers[0].param_groups[0]["lr"] < 0.1 * module.lr


@pytest.mark.parametrize("first", [False, True])
def test_a_finder_of_the_rate_that_is_a_callback_itself(first, tmp_path):
    adapter, finder = AnyBatch(base_batch=task.SIZE), LearningRateFinder(1e-3, 0.1, num_training_steps=20)
    module = workers.Module()
    trainer = workers.trainer_of(
        *((finder, adapter) if first else (adapter, finder)), max_steps=20, default_root_dir=tmp_path
    )
    trainer.fit(module, task.loader())
    assert module.lr == finder.optimal_lr.suggestion()
    assert 20 <= adapter.controller.tau < 24
    assert trainer.max_steps == 20


class Diary(Callback):
    """A model average by a plain float64 loop over what the steps left."""

    def __init__(self, adapter, decay):
        self.adapter, self.decay, self.steps = adapter, decay, 0
        self.average, self.tau, self.seen = None, 0.0, []

    def on_train_start(self, trainer, module):
        self.average = [p.detach().clone() for p in module.parameters()]

    def on_train_batch_end(self, trainer, module, *_):
        controller = self.adapter.controller
        if controller.steps > self.steps:
            rho = self.decay ** (controller.tau - self.tau)
            self.average = [rho * a + (1 - rho) * p.detach() for a, p in zip(self.average, module.parameters())]
            self.steps, self.tau = controller.steps, controller.tau
            self.weights = [p.detach().clone() for p in module.parameters()]

    def on_validation_end(self, trainer, module):
        self.seen.append((self.average, self.weights, [p.detach().clone() for p in module.parameters()]))


def same(a, b):
    return all(torch.allclose(x, y, rtol=0, atol=1e-6) for x, y in zip(a, b))


def test_validation_sees_the_average_and_training_its_own_weights():
    adapter = AnyBatch(base_batch=task.SIZE, ema_decay=0.9)
    diary = Diary(adapter, 0.9)
    _, module, _ = fit(
        diary, adapter=adapter, val=task.short(2), max_steps=60, limit_val_batches=1, val_check_interval=24
    )  # fmt: skip
    assert len(module.evaluated) == len(diary.seen) >= 2
    for evaluated, (average, weights, after) in zip(module.evaluated, diary.seen):
        assert same(evaluated, average)
        assert same(weights, after)
        assert not same(weights, average)


def test_a_validation_that_raises_leaves_the_model_its_weights():
    class Fails(workers.Module):
        def validation_step(self, batch, _):
            super().validation_step(batch, _)
            raise ZeroDivisionError

    adapter = AnyBatch(base_batch=task.SIZE, ema_decay=0.9)
    diary, module = Diary(adapter, 0.9), Fails()
    with pytest.raises(ZeroDivisionError):
        fit(diary, adapter=adapter, module=module, val=task.short(2), limit_val_batches=1, val_check_interval=24)
    assert same(module.evaluated[0], diary.average)
    assert same([p.detach() for p in module.parameters()], diary.weights)


def test_a_checkpoint_brings_the_average_back_and_holds_the_training_weights(tmp_path):
    adapter = AnyBatch(base_batch=task.SIZE, ema_decay=0.9)
    diary = Diary(adapter, 0.9)
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
    fit(
        diary, saving, adapter=adapter, val=task.short(2), max_steps=40, limit_val_batches=1, val_check_interval=24,
        enable_checkpointing=True,
    )  # fmt: skip
    average, weights, _ = diary.seen[0]
    path = tmp_path / "step=6.ckpt"  # of the first validation, after 24 batches
    saved = torch.load(path, weights_only=True)
    assert same(list(saved["state_dict"].values()), weights)
    again = AnyBatch(base_batch=task.SIZE, ema_decay=0.9)
    found = {}

    class Looks(Callback):
        def on_train_start(self, trainer, module):
            found["tau"] = again.controller.tau
            with again.ema.applied():
                found["average"] = [p.detach().clone() for p in module.parameters()]

    fit(Looks(), adapter=again, max_steps=40, ckpt=path)
    assert found["tau"] == saved["callbacks"]["AnyBatch"]["controller"]["tau"] > 0
    assert same(found["average"], average)
    with pytest.raises(anybatch.StateError, match="no ema"):
        fit(max_steps=40, ckpt=without(saved, "ema", tmp_path), adapter=AnyBatch(base_batch=4, ema_decay=0.9))
    with pytest.raises(anybatch.StateError, match="no controller"):
        fit(max_steps=40, ckpt=without(saved, "controller", tmp_path))


def without(saved, name, folder):
    callbacks = {"AnyBatch": {k: v for k, v in saved["callbacks"]["AnyBatch"].items() if k != name}}
    torch.save({**saved, "callbacks": callbacks}, folder / "lacking.ckpt")
    return folder / "lacking.ckpt"


def test_a_finished_run_that_is_resumed_ends_at_once(tmp_path):
    adapter, _, trainer = fit(max_steps=20)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again, _, _ = fit(max_steps=20, ckpt=tmp_path / "end.ckpt")
    assert (again.controller.tau, again.controller.steps) == (adapter.controller.tau, adapter.controller.steps)


def test_a_small_batch_takes_more_steps_than_lightning_would_allow():
    adapter, _, trainer = fit(adapter=AnyBatch(base_batch=4 * task.SIZE), accumulation=2, max_steps=20)
    assert adapter.controller.scale == 0.5
    assert trainer.global_step > 20
    assert 20 <= adapter.controller.tau < 21


def test_float16_with_a_grad_scaler():
    class Half(workers.Module):
        def __init__(self):
            super().__init__()
            self.net = self.net.float()

        def training_step(self, batch, _):
            return super().training_step([each.float() for each in batch], _)

    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=4))
    adapter, module, _ = fit(module=Half(), max_steps=40, plugins=[scaled], gradient_clip_val=1.0)
    assert scaled.scaler.get_scale() > 2.0**12  # the averages would mix units, if nobody knew of the scaler
    exact, reference, _ = fit(max_steps=40, gradient_clip_val=1.0)
    assert adapter.controller.variance == pytest.approx(exact.controller.variance, rel=0.02)
    assert 1 < adapter.controller.gain == pytest.approx(exact.controller.gain, rel=0.02)
    assert adapter.controller.tau == pytest.approx(exact.controller.tau, rel=0.02)
    for half, whole in zip(module.parameters(), reference.parameters()):
        assert torch.allclose(half.double(), whole, atol=0.01)


class TwoOptimizers(LightningModule):
    """Muon's place is taken by SGD: matrices by the one, biases by the other."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = oracle.make_model()

    def configure_optimizers(self):
        matrices = [p for p in self.parameters() if p.dim() > 1]
        biases = [p for p in self.parameters() if p.dim() == 1]
        made = [torch.optim.SGD(part, lr=oracle.LR, momentum=oracle.MOMENTUM) for part in (matrices, biases)]
        return made, [{"scheduler": task.scheduler_of(each), "interval": "step"} for each in made]

    def training_step(self, batch, i):
        x, y = batch
        self.manual_backward(oracle.loss_fn(self.net(x), y) / task.MICRO_BATCHES)
        if (i + 1) % task.MICRO_BATCHES == 0:
            for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers()):
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()


def test_two_optimizers_by_hand_train_as_one():
    adapter = AnyBatch(base_batch=task.SIZE)
    tracing = workers.Tracing(adapter)
    _, module, trainer = fit(tracing, adapter=adapter, module=TwoOptimizers(), accumulation=1)
    assert len(trainer.optimizers) == 2
    task.check(task.outcome(tracing.trace, module, trainer.optimizers[1]), task.plain())


def test_schedulers_of_two_units_are_an_error():
    class Mixed(TwoOptimizers):
        def configure_optimizers(self):
            made, (first, second) = super().configure_optimizers()
            return made, [first, {**second, "frequency": 2}]

    with pytest.raises(anybatch.UsageError, match="one interval and frequency"):
        fit(module=Mixed(), accumulation=1)


def test_the_size_of_a_batch_is_seen_or_said():
    class Sizes(workers.Module):
        def training_step(self, batch, _):
            return super().training_step(batch["pair"], _)

    batches = [{"pair": batch, "names": ["a"], "odd": torch.zeros(7)} for batch in task.short(16)]
    loader = DataLoader(batches, batch_size=None)
    with pytest.raises(anybatch.UsageError, match=r"batch_size=lambda"):
        fit(module=Sizes(), loader=loader, max_steps=8)
    adapter = AnyBatch(base_batch=task.SIZE, batch_size=lambda batch: len(batch["pair"][0]))
    fit(adapter=adapter, module=Sizes(), loader=loader, max_steps=8)
    assert adapter.controller.scale == 4


def test_an_optimizer_that_lightning_steps_and_nobody_sees_is_an_error():
    class Elsewhere(workers.Module):
        def optimizer_step(self, epoch, index, optimizer, closure):
            closure()

    with pytest.raises(anybatch.UsageError, match=r"no hook on trainer\.optimizers was called"):
        fit(module=Elsewhere())


def test_two_runs_with_one_callback():
    adapter = AnyBatch(base_batch=task.SIZE)
    taus = [fit(adapter=adapter, max_steps=12)[0].controller.tau for _ in range(2)]
    assert taus[0] == taus[1] >= 12


def test_a_run_that_follows_another_does_not_begin_with_its_state(tmp_path):
    """Lightning saves and loads a checkpoint to look for a rate, before there is a controller of the new run."""
    adapter, module, _ = fit(max_steps=12)
    tracing = workers.Tracing(adapter)
    trainer = workers.trainer_of(adapter, tracing, max_steps=12, default_root_dir=tmp_path)
    Tuner(trainer).lr_find(module, task.loader(), num_training=10, min_lr=1e-4)
    trainer.fit(module, task.loader())
    assert tracing.first == 0
    assert adapter.controller.tau >= 12


def test_a_stop_that_another_callback_asks_for_is_kept():
    class Stops(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, i):
            if i == 11:  # which ends the third step
                trainer.should_stop = True

    adapter = AnyBatch(base_batch=task.SIZE)
    trainer = workers.trainer_of(Stops(), adapter)
    trainer.fit(workers.Module(), task.loader())
    assert adapter.controller.steps == 3


def test_rule_and_record_are_handed_on(tmp_path):
    adapter, *_ = fit(adapter=AnyBatch(task.SIZE, rule=anybatch.Linear(), record=str(tmp_path / "run.jsonl")))
    assert adapter.controller.steps == task.TOTAL / task.MICRO_BATCHES
    assert len(anybatch.read_record(tmp_path / "run.jsonl").steps) == adapter.controller.steps
    adapter, *_ = fit(adapter=AnyBatch(task.SIZE, per_layer=2, record=str(tmp_path / "layers.jsonl")), max_steps=12)
    looked = [bool(step.per_layer) for step in anybatch.read_record(tmp_path / "layers.jsonl").steps]
    assert looked == [i % 2 == 0 for i in range(adapter.controller.steps)]


def test_its_arguments_have_types_for_the_command_line():
    for name, argument in inspect.signature(AnyBatch).parameters.items():
        assert argument.annotation is not inspect.Parameter.empty, name


def test_the_example_of_its_docstring_runs():
    (test,) = doctest.DocTestFinder(recurse=False).find(AnyBatch, "AnyBatch", globs={})
    assert doctest.DocTestRunner().run(test).failed == 0
    assert len(test.examples) == 3


# ---- averages, and schedulers that come later ----


class Used(Callback):
    """The base rate of each step, as the groups have it before the step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, *_):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


class Unscheduled(workers.Module):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


class Normed(workers.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(6).double()

    def forward(self, x):
        return self.net(self.norm(x))


def averaging(*adapter, module=None, accumulation=1, epochs=6, ckpt=None, more=(), **options):
    """A run with Lightning's SWA from its third epoch of 16 batches on; the rates used, and the callback's state."""
    used = Used()
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=3, annealing_epochs=2)
    trainer = workers.trainer_of(swa, used, *adapter, *more, accumulation=accumulation, max_epochs=epochs, **options)
    trainer.fit(module or workers.Module(), task.short(16), ckpt_path=ckpt)
    return used.seen, swa


def cosine_by_step(o):
    return torch.optim.lr_scheduler.CosineAnnealingLR(o, 96)


@pytest.mark.parametrize("make", [lambda: workers.Module(make=cosine_by_step), Unscheduled])
def test_swa_at_the_base_batch_has_the_rates_and_the_weights_that_it_has_without_the_callback(make):
    torch.manual_seed(0)
    plain, reference = averaging(module=make())
    torch.manual_seed(0)
    ours, swa = averaging(AnyBatch(base_batch=task.SIZE, examples=64), module=make())
    assert ours == pytest.approx(plain, rel=1e-12)
    assert plain[-1] == 0.01
    assert int(swa.n_averaged) == int(reference.n_averaged) == 4
    for a, b in zip(swa._average_model.parameters(), reference._average_model.parameters()):
        assert torch.allclose(a, b, rtol=1e-9)


class Passes(Callback):
    """The clock at the beginning of each pass over the data."""

    def __init__(self, adapter):
        self.adapter, self.seen = adapter, []

    def on_train_epoch_start(self, *_):
        self.seen.append(self.adapter.controller.tau)


def test_swa_at_a_larger_batch_is_on_the_clock_and_warns_that_it_counts_passes():
    adapter = AnyBatch(base_batch=task.SIZE, examples=64)
    rates, passes = Rates(adapter), Passes(adapter)
    with pytest.warns(anybatch.AnybatchWarning, match="begins after 2 passes over the data, which are [01].") as caught:
        averaging(adapter, module=workers.Module(make=cosine_by_step), accumulation=4, more=[rates, passes])
    assert len([w for w in caught if issubclass(w.category, anybatch.AnybatchWarning)]) == 1
    begin = passes.seen[2]
    for tau, rate in rates.seen.items():
        cosine = oracle.LR * (0.5 + 0.5 * math.cos(math.pi * math.floor(min(tau, begin)) / 96))
        epochs = math.floor(tau / 16) - math.floor(begin / 16) if tau > begin else 0
        annealed = 0.5 - 0.5 * math.cos(math.pi * min(1, epochs / 2))
        assert rate == pytest.approx(annealed * 0.01 + (1 - annealed) * cosine, rel=1e-6)
    assert rates.seen[adapter.controller.tau] == pytest.approx(0.01)


# Without max_epochs, Lightning takes one batch more of the finished epoch, for which SWA has made no scheduler yet.
@pytest.mark.filterwarnings("ignore:This optimizer has a scheduler that was not passed to attach")
def test_swa_resumed_in_its_midst(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    make = functools.partial(workers.Module, make=cosine_by_step)
    adapter = AnyBatch(base_batch=task.SIZE, examples=64)
    whole, _ = averaging(adapter, module=make(), more=[saving], enable_checkpointing=True)
    again = AnyBatch(base_batch=task.SIZE, examples=64)
    rest, _ = averaging(again, module=make(), ckpt=tmp_path / "epoch=2.ckpt")
    assert rest == pytest.approx(whole[48:], rel=1e-12)
    assert again.controller.tau == adapter.controller.tau


@pytest.mark.parametrize(
    ("callback", "module", "said"),
    [
        (lambda: EMAWeightAveraging(decay=0.9), workers.Module, r"EMAWeightAveraging decays .*ema_decay=.*ModelEMA"),
        (lambda: WeightAveraging(avg_fn=lambda a, b, n: a), workers.Module, "WeightAveraging decays"),
        (lambda: StochasticWeightAveraging(0.01, swa_epoch_start=5), Normed, "update_bn"),
        (WeightAveraging, workers.Module, ""),
        (lambda: StochasticWeightAveraging(0.01, swa_epoch_start=5), workers.Module, ""),
    ],
)
def test_averages_that_count_steps_are_warned_of(callback, module, said, recwarn):
    fit(callback(), module=module(), max_steps=8)
    words = [str(w.message) for w in recwarn if issubclass(w.category, anybatch.AnybatchWarning)]
    assert len(words) == bool(said), words
    for each in words:
        assert re.search(said, each)

"""Lightning: `Trainer(max_steps=T, callbacks=[AnyBatch(base_batch=256)])`, where T counts base iterations."""

import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils._pytree import tree_leaves

import anybatch
from anybatch._scaling import ScheduleDriver, bare_optimizer, drivers_of, held_by
from anybatch.integrations._common import check_whole, close_record, numbers, record_of
from anybatch.integrations._limits import Limits


class AnyBatch(Callback):
    """Trains a LightningModule at any batch size with the hyperparameters of the base batch.

    Limits and schedules are those of the base batch. `Trainer(max_steps=T)` means T base iterations, and `max_epochs`
    with `examples` means passes over the data at the base batch. `trainer.estimated_stepping_batches` in
    `configure_optimizers` is T. The run ends when tau reaches T; `min_steps` and `min_epochs` are ignored.

    Lightning's calls of the schedulers do nothing; `frequency` and `interval` count base iterations, or epochs of them.
    If another callback replaces a scheduler, as `StochasticWeightAveraging` does, the clock drives the new one. Each
    step's finite numbers are logged as `anybatch/gain` and so on. Lightning's checkpoints contain all state. All
    optimizers of the module share one gain and one clock, also in manual optimization. Two optimizers that train
    against each other need a controller each: call `attach` for both.

    Args:
        base_batch: batch size that the hyperparameters were tuned for, over all devices, in examples or tokens.
        rule: `AdaScale()` by default.
        examples: size of the training data, as for `attach`; required by `max_epochs` and schedulers by epoch.
        batch_size: a function from the loader's batch to its size, in the unit of `base_batch`; by default the first
            dimension of the batch's tensors.
        ema_decay: decay of a `ModelEMA` per base iteration, in [0, 1). Validation during `fit` uses the average, which
            is `callback.ema`. By default there is no average.
        record: as for `attach`, a path.
        per_layer: as for `RunRecord`.

    Raises:
        UsageError: at `fit`: no limit, an epoch of unknown length, a batch of unknown size, or a step without a hook.
        StateError: at `fit(ckpt_path=...)`: a checkpoint without this callback's state.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from anybatch.integrations.lightning import AnyBatch
        >>> trainer = Trainer(max_steps=1000, accumulate_grad_batches=8, callbacks=[AnyBatch(base_batch=256)])
    """

    def __init__(
        self,
        base_batch: float,
        *,
        rule: anybatch.Rule | None = None,
        examples: float | None = None,
        batch_size: Callable[[Any], float] | None = None,
        ema_decay: float | None = None,
        record: str | None = None,
        per_layer: int | None = None,
    ) -> None:
        self.base_batch: float = base_batch
        self.rule: anybatch.Rule | None = rule
        self.examples: float | None = examples
        self.batch_size: Callable[[Any], float] | None = batch_size
        self.ema_decay: float | None = ema_decay
        self.record: str | None = record
        self.per_layer: int | None = per_layer
        self.controller: anybatch.Controller | None = None
        self.ema: anybatch.ModelEMA | None = None
        self._total = 0.0
        self._opened: str | anybatch.RunRecord | None = None
        self._loaded: dict[str, Any] = {}
        self._seen = self._first = 0
        self._configs: list[tuple[Any, Any]] = []  # the driven configurations, and their schedulers
        self._drivers: list[ScheduleDriver] = []  # of schedulers that replaced others
        self._applied, self._limits = ExitStack(), Limits(base_batch, examples)

    # ---- the run's limits, and the controller ----

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Count the run's length in base iterations."""
        if stage != "fit":
            return
        self.controller, self.ema, self._loaded = None, None, {}
        self._total = self._limits.take(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Disable Lightning's limit of steps, which counts skipped steps and each optimizer; tau ends the run."""
        trainer.fit_loop.epoch_loop.max_steps = sys.maxsize

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach, after Lightning has wrapped and loaded all parts."""
        if self.ema_decay is not None:
            check_whole(pl_module)
        _warn_of_averages(trainer, pl_module)
        moving = [config for config in trainer.lr_scheduler_configs if not config.reduce_on_plateau]
        units = {(config.interval, config.frequency) for config in moving} or {("step", 1)}
        if len(units) > 1:
            raise anybatch.UsageError(
                f"Schedulers of one run must have one interval and frequency, got {sorted(units)}."
            )
        every = self._every(*units.pop())
        self._opened = record_of(self.record, self.per_layer, first=trainer.is_global_zero)
        if "DeepSpeed" in type(trainer.strategy).__name__:
            raise anybatch.UnsupportedError(
                f"{type(trainer.strategy).__name__} was not tried with anybatch: use ModelParallelStrategy with "
                "fully_shard, or DeepSpeed in a loop of your own, in Accelerate or in the Trainer."
            )
        self.controller = anybatch.attach(
            trainer.optimizers,
            model=pl_module if trainer.model is None else trainer.model,
            rule=self.rule,
            scheduler=trainer.lr_scheduler_configs,
            schedule_every=every,
            total=self._total,
            base_batch=self.base_batch,
            micro_batch="auto",
            examples=self.examples,
            reduction=_divisor(trainer),
            grad_scaler=getattr(trainer.precision_plugin, "scaler", None),
            record=self._opened,
        )
        if self.ema_decay is not None:
            self.ema = anybatch.ModelEMA(pl_module, self.ema_decay, clock=self.controller.clock)
        if self._loaded:
            self.controller.load_state_dict(self._loaded["controller"])
            if self.ema is not None:
                self.ema.load_state_dict(self._loaded["ema"])
        self._configs = [(config, config.scheduler) for config in trainer.lr_scheduler_configs]
        self._seen, self._first = self._taken, trainer.global_step
        trainer.should_stop = self.controller.done

    # ---- replaced schedulers ----

    def _every(self, interval: str, frequency: float) -> float:
        """Base iterations of one scheduler step."""
        return frequency * (self._limits.epoch("A scheduler's interval") if interval == "epoch" else 1.0)

    def _follow(self, trainer: Trainer, controller: anybatch.Controller) -> None:
        """Drive the schedulers that the Trainer has now, and stop driving the others."""
        configs = [(config, config.scheduler) for config in trainer.lr_scheduler_configs]
        same = [a is c and b is d for (a, b), (c, d) in zip(configs, self._configs, strict=False)]
        if len(configs) == len(self._configs) and all(same):
            return
        real = {id(held_by(config)[0]) for config, _ in configs}
        driven = set()
        for driver in [each for optimizer in trainer.optimizers for each in drivers_of(bare_optimizer(optimizer))]:
            if id(driver.scheduler) in real:
                driven.add(id(driver.scheduler))
            else:
                driver.stop()
        for config, _ in configs:
            scheduler = held_by(config)[0]
            if config.reduce_on_plateau or id(scheduler) in driven:
                continue
            every = self._every(config.interval, config.frequency)
            driver = ScheduleDriver(
                config, optimizer=bare_optimizer(scheduler.optimizer), clock=controller.clock, every=every
            )
            driver.hold()
            self._drivers.append(driver)
            if config.interval == "epoch" and abs(controller.tau / every - trainer.current_epoch) > _OFF:
                warnings.warn(
                    f"{type(scheduler).__name__} begins after {trainer.current_epoch} passes over the data, which are "
                    f"{controller.tau / every:.3g} epochs of the base batch, because its callback counts passes. "
                    "For averages and schedules on the clock see docs/swa.md.",
                    anybatch.AnybatchWarning,
                    stacklevel=2,
                )
        self._configs = [(config, config.scheduler) for config in trainer.lr_scheduler_configs]

    # ---- steps ----

    @property
    def _taken(self) -> int:
        return 0 if self.controller is None else self.controller.steps + self.controller.skipped

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the micro-batch's size."""
        if self.controller is not None:
            self._follow(trainer, self.controller)
            for driver in self._drivers:
                driver.check()
            self.controller.micro_batch = _size_of(batch) if self.batch_size is None else self.batch_size(batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the step, if this batch ended one, and end the run when tau reaches its total."""
        controller = self.controller
        if controller is None or self._taken == self._seen:
            if trainer.global_step > self._first and self._taken == 0:
                raise anybatch.UsageError(
                    "Lightning has taken a step, but no hook on trainer.optimizers was called: the strategy "
                    f"{type(trainer.strategy).__name__} steps another optimizer. Use DDP, or ModelParallelStrategy "
                    "with fully_shard."
                )
            return
        self._seen = self._taken
        pl_module.log_dict(numbers(controller), batch_size=1)
        trainer.should_stop = trainer.should_stop or controller.done

    # ---- the average in validation ----

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap the average into the model."""
        if self.ema is not None and trainer.state.fn == TrainerFn.FITTING:
            self._applied.enter_context(self.ema.applied())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the weights, before Lightning saves a checkpoint."""
        self._applied.close()

    # ---- state, and the end ----

    def state_dict(self) -> dict[str, Any]:
        """The states of the controller and the average."""
        if self.controller is None:
            return self._loaded
        state: dict[str, Any] = {"controller": self.controller.state_dict()}
        return state if self.ema is None else {**state, "ema": self.ema.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until `on_train_start` makes the controller."""
        self._loaded = state_dict

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raise if a resumed run would begin at tau = 0 with an advanced schedule."""
        saved = checkpoint.get("callbacks", {}).get(self.state_key, {})
        lacking = {"controller", *(() if self.ema_decay is None else ("ema",))} - saved.keys()
        if trainer.state.fn == TrainerFn.FITTING and checkpoint["global_step"] and lacking:
            raise anybatch.StateError(
                f"The checkpoint has no {' and no '.join(sorted(lacking))} of AnyBatch: it is from a run without it. "
                "Load its weights into the module, and call fit without ckpt_path."
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the model's weights after an error."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the Trainer and the optimizers."""
        self._close()

    def _close(self) -> None:
        self._applied.close()
        self._limits.release()
        for driver in self._drivers:
            driver.stop()
        self._drivers.clear()
        if self.controller is not None:
            self.controller.detach()
        close_record(self._opened)
        if self.ema is not None:
            self.ema.stop()


_OFF = 0.5  # tolerated difference between passes over the data and epochs of the base batch


def _warn_of_averages(trainer: Trainer, module: LightningModule) -> None:
    """Warn about callbacks that average the weights by a count of steps or passes."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # a connector sets it
    for callback in callbacks:
        name = type(callback).__name__
        problem = ""
        if isinstance(callback, WeightAveraging) and {"avg_fn", "multi_avg_fn"} & callback._kwargs.keys():
            problem = (
                f"{name} decays its average once per step, but a step of a larger batch is several base iterations, so "
                "the average's memory is longer than at the base batch. Use AnyBatch(ema_decay=...), or "
                "ModelEMA(model, decay, clock=controller.clock)"
            )
        elif isinstance(callback, StochasticWeightAveraging) and callback.pl_module_contains_batch_norm(module):
            problem = (
                f"{name} updates batch norm's statistics after max_epochs passes, but here tau ends the run. Call "
                "torch.optim.swa_utils.update_bn(loader, model) after fit"
            )
        if problem:
            warnings.warn(f"{problem}: see docs/swa.md.", anybatch.AnybatchWarning, stacklevel=2)


def _divisor(trainer: Trainer) -> int | Literal["mean"]:
    """The number that Lightning divides each loss by, even in a shorter last window of an epoch."""
    by_hand = not trainer.lightning_module.automatic_optimization
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # a connector sets it
    changing = any(isinstance(each, GradientAccumulationScheduler) for each in callbacks)
    return "mean" if by_hand or changing else trainer.accumulate_grad_batches


def _size_of(batch: Any) -> float:
    sizes = {leaf.shape[0] for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() > 0}
    if len(sizes) != 1:
        raise anybatch.UsageError(
            f"The batch has tensors with the first dimensions {sorted(sizes)}, so its size is unknown: give "
            "AnyBatch(batch_size=lambda batch: ...), which returns the size in the unit of base_batch."
        )
    return float(sizes.pop())

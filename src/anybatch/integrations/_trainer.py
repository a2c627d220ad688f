"""The Trainer's callback: limits, schedule, micro-batches, numbers and checkpoints of a run with a controller."""

import json
import math
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback
from transformers.optimization import GreedyLR
from transformers.trainer_utils import get_last_checkpoint, has_length

import anybatch
from anybatch.integrations import _sequences
from anybatch.integrations._common import check_whole, close_record, numbers, record_of

_STATE = "anybatch"  # in a checkpoint's trainer_state.json, among the states of callbacks
_AVERAGE = "anybatch_ema.pt"  # in a checkpoint, beside the model
_ON_METRICS = (torch.optim.lr_scheduler.ReduceLROnPlateau, GreedyLR)  # schedulers that no clock drives


class AnyBatchCallback(TrainerCallback):
    """The callback that `attach` adds to a trainer, with the controller of its run.

    It wraps five methods of the trainer, where no callback has the information: `set_initial_training_values` (the
    length of the run), `get_batch_samples` (the tokens of a step's micro-batches), `training_step` (the size of one),
    `evaluation_loop` (the average), and `train` (the checkpoint to resume from, and the end).

    Args:
        trainer: as for `attach`.
        base_batch: as for `attach`.
        rule: an `anybatch.Rule`.
        ema_decay: as for `attach`.
        record: as for `attach`.
        per_layer: as for `attach`.
    """

    def __init__(
        self,
        trainer: Trainer,
        base_batch: int,
        *,
        rule: anybatch.Rule,
        ema_decay: float | None,
        record: str | None,
        per_layer: int | None,
    ) -> None:
        self.controller: anybatch.Controller | None = None
        self.ema: anybatch.ModelEMA | None = None
        self._trainer: Any = trainer  # its annotations hold only before train()
        self._base_batch, self._rule = base_batch, rule
        self._ema_decay, self._record, self._per_layer = ema_decay, record, per_layer
        self._opened: str | anybatch.RunRecord | None = None
        self._total = 0
        self._examples: float | None = None
        self._checkpoint: str | None = None
        self._seen, self._before = False, 0  # whether this run has taken a step; steps before the run
        self._weights: list[int] = []  # of the next micro-batches of this step
        self._divides: bool | None = None  # whether the model divides its loss by the tokens of the step
        wrapped = ("train", "set_initial_training_values", "get_batch_samples", "training_step", "evaluation_loop")
        for name in wrapped:
            setattr(trainer, name, partial(getattr(self, f"_{name}"), getattr(trainer, name)))

    # ---- around the trainer's own methods ----

    def _train(self, train: Callable[..., Any], resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        found = get_last_checkpoint(self._trainer.args.output_dir) if resume_from_checkpoint is True else None
        self._checkpoint = found or resume_from_checkpoint or None
        try:
            return train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._release()

    def _set_initial_training_values(self, values: Callable[..., Any], args: Any, loader: Any) -> Any:
        self._release()  # the previous run, if a batch exceeded the memory
        _, updates, examples, _, batch, in_epoch, _ = values(args, loader)
        length = args.num_train_epochs * examples / self._base_batch
        self._total = args.max_steps if args.max_steps > 0 else math.ceil(length)
        self._examples = examples if has_length(loader) and examples > self._base_batch else None
        epochs = 0 if self._is_over() else sys.maxsize  # tau ends the run
        return epochs, updates, examples, self._total * batch, batch, in_epoch, self._total

    def _get_batch_samples(self, samples: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        batches, items = samples(*args, **kwargs)
        over_tokens = items is not None and self._trainer.loss_is_scaled_for_ga is not False
        several = len(batches) > 1 or self._trainer.args.world_size > 1
        if over_tokens and several and self._divides is None:
            self._divides = _sequences.divides_by_items(self._trainer, batches[0], items)
            if not self._divides:
                self._divide_losses()
        if self._divides is False:
            over_tokens, items = False, None
        self._weights = _sequences.tokens(batches, shifted=self._trainer._loss_shifts_labels) if over_tokens else []
        return batches, items

    def _training_step(self, step: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.controller is not None:
            self.controller.micro_batch = _sequences.examples(inputs)
            if self._weights:
                self.controller.weight = self._weights.pop(0)
        return step(model, inputs, *args, **kwargs)

    def _evaluation_loop(self, loop: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if self.ema is None else self.ema.applied():
            return loop(*args, **kwargs)

    # ---- methods that the trainer calls ----

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Attach a controller to the trainer's optimizer and scheduler, and load a checkpoint's state."""
        trainer, scheduler = self._trainer, self._trainer.lr_scheduler
        if args.n_gpu > 1:
            raise anybatch.UnsupportedError(
                f"nn.DataParallel over {args.n_gpu} devices hides each device's gradient: start one process for each "
                "device by torchrun or accelerate launch."
            )
        if self._ema_decay is not None:
            check_whole(trainer.model)
        driven = not isinstance(scheduler, _ON_METRICS)
        self._opened = record_of(self._record, self._per_layer, first=args.process_index == 0)
        self.controller = anybatch.attach(
            trainer.optimizer,
            model=trainer.model_wrapped,  # callbacks receive the module inside of DDP
            rule=self._rule,
            scheduler=scheduler if driven else None,
            total=self._total,
            base_batch=self._base_batch,
            micro_batch=args.per_device_train_batch_size,
            examples=self._examples,
            grad_scaler=trainer.accelerator.scaler,
            record=self._opened,
        )
        if driven and trainer.is_deepspeed_enabled:
            # Its engine steps, and with it the schedule, before the step of this wrapper, which does nothing. Without
            # this torch warns of that order.
            trainer.optimizer._opt_called = True
        if driven:
            trainer.lr_scheduler = trainer.callback_handler.lr_scheduler = anybatch.HeldScheduler(scheduler)
        if self._ema_decay is not None:
            self.ema = anybatch.ModelEMA(trainer.model, self._ema_decay, clock=self.controller.clock)
        if state.global_step:
            self._resume(state.stateful_callbacks)
        self._seen, self._before = False, self.controller.steps + self.controller.skipped

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Raise if the first step has no gradient."""
        groups = self._trainer.optimizer.param_groups
        if self._trainer.is_deepspeed_enabled:  # its engine has stepped, and keeps no gradient
            return
        if not self._seen and all(p.grad is None for group in groups for p in group["params"]):
            raise anybatch.UsageError(
                "At the first step no trained parameter has a gradient: check that the loss depends on them. Under "
                "gradient checkpointing a model with frozen embeddings needs model.enable_input_require_grads()."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save the state for the next checkpoint, and end the run when the clock has reached its total."""
        controller = self._running
        if not self._seen and controller.steps + controller.skipped == self._before:
            if self._trainer.accelerator.optimizer_step_was_skipped:  # a GradScaler's first steps
                return
            raise anybatch.UsageError(
                "The trainer has taken a step, but no hook on trainer.optimizer was called: another optimizer steps "
                "the model. Train under DDP or FSDP2, with a torch.optim.Optimizer."
            )
        self._seen = True
        # The optimizer's state has it too, but a sharded checkpoint loads only keys that the new optimizer has.
        state.stateful_callbacks[_STATE] = controller.state_dict()
        # The flow callback runs after this one and ends the run at max_steps.
        state.max_steps = state.global_step if controller.done else max(self._total, state.global_step + 1)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Clear the gradients, and restore the run's length, which the trainer's samples per second depend on."""
        # On data without a length the trainer would add an incomplete last window to the next epoch's first step.
        self._trainer.model_wrapped.zero_grad()
        state.max_steps = self._total

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the last step's finite numbers to the reporters' logs."""
        if self.controller is None:
            return
        for log in (kwargs["logs"], *state.log_history[-1:]):
            log.update(numbers(self.controller))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save the average beside the model."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if self.ema is not None and state.is_world_process_zero:
            torch.save(self.ema.state_dict(), folder / _AVERAGE)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Print the end below the trainer's bar, which shows steps of `max_steps`; warn if the run ended early."""
        if self._running.done and state.is_world_process_zero and not args.disable_tqdm:
            tqdm.write(
                f"anybatch: {state.global_step} steps for {self._total} base iterations, tau = {self._running.tau:g}.",
                file=sys.stderr,
            )
        if not self._running.done:
            warnings.warn(
                f"The training stopped at tau = {self._running.tau:g} of {self._total}, because another callback "
                "stopped it or the data ended: resume from the checkpoint to continue.",
                anybatch.AnybatchWarning,
                stacklevel=2,
            )

    # ---- parts ----

    @property
    def _running(self) -> anybatch.Controller:
        if self.controller is None:
            raise anybatch.UsageError("There is no run: call trainer.train(), which calls on_train_begin.")
        return self.controller

    def _divide_losses(self) -> None:
        """Make the trainer divide each loss by the accumulation."""
        self._trainer.model_accepts_loss_kwargs = False
        warnings.warn(
            f"The loss of {type(self._trainer.model).__name__} is the mean of a micro-batch and ignores "
            "num_items_in_batch, and the Trainer would not divide it by the accumulation. So the gradient would grow "
            "with gradient_accumulation_steps. anybatch has set trainer.model_accepts_loss_kwargs = False: the "
            "gradient is the mean. Set it yourself before train() to have the same without anybatch.",
            anybatch.AnybatchWarning,
            stacklevel=2,
        )

    def _is_over(self) -> bool:
        """Whether the checkpoint is from the end of a run."""
        if self._checkpoint is None:
            return False
        file = Path(self._checkpoint) / "trainer_state.json"
        clock = anybatch.Clock()
        clock.tau = json.loads(file.read_text())["stateful_callbacks"].get(_STATE, {}).get("tau", 0.0)
        return clock.reached(self._total)

    def _resume(self, saved: dict[str, Any]) -> None:
        """Load the states of the controller and the average from a checkpoint."""
        average = Path(self._checkpoint or "") / _AVERAGE
        if _STATE not in saved or (self.ema is not None and not average.is_file()):
            lacking = "no average" if _STATE in saved else "no state"
            raise anybatch.StateError(
                f"The checkpoint has {lacking} of anybatch: it is from a run without it, whose schedule counted steps. "
                "Load its weights into the model, and call train() without resume_from_checkpoint."
            )
        self._running.load_state_dict(saved[_STATE])
        if self.ema is not None:
            self.ema.load_state_dict(torch.load(average, map_location="cpu", weights_only=True))

    def _release(self) -> None:
        """Restore the optimizer and the scheduler; the controller's numbers stay readable."""
        if self.controller is not None:
            self.controller.detach()
        close_record(self._opened)
        scheduler = self._trainer.lr_scheduler
        if isinstance(scheduler, anybatch.HeldScheduler):
            self._trainer.lr_scheduler = self._trainer.callback_handler.lr_scheduler = scheduler.scheduler

"""attach: the one call that a training loop needs."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from anybatch._controller.controller import Controller
from anybatch._controller.settings import Settings
from anybatch._errors import InvalidValueError
from anybatch._gradients import Reduction, is_deepspeed, is_pipeline, stages_of
from anybatch._numbers import shown
from anybatch._record import Destination, destinations
from anybatch._scaling import (
    AdaScale,
    BatchSize,
    Clock,
    Rule,
    bare_optimizer,
    check_positive,
    optimizers_in,
    schedulers_in,
)


def attach(
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    model: nn.Module,
    rule: Rule | None = None,
    scheduler: Any = None,
    schedule_every: float | Literal["epoch"] = 1,
    total: float | Clock | None = None,
    epochs: float | None = None,
    base_batch: float | None = None,
    micro_batch: float | Literal["auto"] | None = None,
    scale: float | Literal["count"] | None = None,
    examples: float | None = None,
    process_group: dist.ProcessGroup | None = None,
    grad_scaler: torch.amp.GradScaler | None = None,
    reduction: Reduction = "mean",
    record: Destination | Sequence[Destination] | None = None,
) -> Controller:
    """Keep the training of `optimizer` the same at any batch size: `rule` scales each `step()`, and the clock follows.

    The optimizer stays the user's own, with the hyperparameters tuned at the base batch. Inside of `optimizer.step()`
    its learning rate is `lr(tau) * lr_factor`; outside it is always `lr(tau)`.

    Args:
        optimizer: Of any class in torch.optim but Rprop, ASGD and LBFGS, or a ZeroRedundancyOptimizer around one. Lion
            and others of docs/hyperparameters.md. For another class pass, for example,
            `rule=AdaScale(like=torch.optim.AdamW)`. Several that train one model, such as Muon for its matrices and
            AdamW for the rest, are a list: one gain, one clock, and a step of each after the last backward. Wrappers
            of Accelerate, Fabric, Lightning and DeepSpeed and the container of torchtitan are supported.
        model: The module that it trains; under DDP and FSDP2 the wrapped one. Each loss is a mean over its examples.
            Experts on a mesh of their own are scaled, and their noise is not measured.
            With `torch.distributed.pipelining` the schedule of this rank, with DeepSpeed its engine.
        rule: `AdaScale()` by default; `Identity`, `Linear`, `SquareRoot` or your own.
        scheduler: A torch scheduler, one of timm's, or a list of them, written for the base batch. The controller moves
            it to `floor(tau)`: never call its `step()`. It may have a wrapper of Accelerate or Lightning, or be in the
            container of torchtitan. Their `step()` then does nothing until `detach()`.
        schedule_every: Base iterations of one scheduler step, where the schedule counts others: 390, or `"epoch"`,
            which is `examples / base_batch`.
        total: Base iterations of the whole run, T_SI. At its end `controller.done` becomes true. It sets the horizon
            of AdaScale's averages. Or the clock of another controller, `other.clock`: this run follows it, with its
            own gain for its own steps, and ends with it.
        epochs: Instead of `total`, which is then `epochs * examples / base_batch`.
        base_batch: Batch that the hyperparameters were tuned for, in examples or tokens.
        micro_batch: Size of each backward on each rank, in the same unit. `controller.micro_batch` may be set before
            any backward. `"auto"` is the first dimension of each forward's input. The scale of a step is
            `S = N * micro_batch / base_batch` for the N backwards counted.
        scale: Instead of the two: a number S, or `"count"`: each backward on each rank is one base batch. `scale=1`
            measures the noise of a training without any change to it. Then `base_batch` is the batch of a step, which
            gives the noise scale in examples.
        examples: Size of the training data, in the unit of `base_batch`, if every epoch has each example once, as with
            a shuffling DataLoader. The examples of a step are then all different, and agree less than independent
            draws. Without a correction by `variance * base_batch / examples`, sqnorm is too small and the gain too
            large, which matters for data of a few hundred base batches. Leave it out for data drawn with replacement,
            or streamed.
        process_group: Ranks whose gradients are averaged; DDP's or FSDP2's own by default.
        grad_scaler: The `GradScaler` of a float16 run. Without it every gain is still right, but the averages mix
            units for a while after the scaler has changed its factor.
        reduction: What `.grad` is at the step: `"mean"` over the micro-batches (each loss divided by their number);
            `"sum"`; or their sum divided by this number. Some trainers divide the few micro-batches at the end of an
            epoch by the full accumulation. The step turns such sums into the mean, in place, so that its length does
            not depend on the accumulation.
        record: Where rank 0 writes every step: a path, a `RunRecord`, a function of a dictionary (`anybatch.sinks` has
            those for TensorBoard, W&B and MLflow), or a list of these. `RunRecord(path, per_layer=100)` has the noise
            of each layer too.

    Returns:
        The controller. If the optimizer's state was loaded from a run with one, it continues at that run's tau.

    Raises:
        InvalidValueError: a value out of range; no scale, or two; a model without trainable parameters, or one that
            this optimizer does not train.
        UnsupportedError: an optimizer class or a kind of parameter without a known scaling.
        StateError: the optimizer's state has that of a controller with another model or base batch.
        UsageError: the optimizer has a controller already; several ranks without DDP, or with other settings.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> controller = anybatch.attach(optimizer, model=model, total=100, base_batch=8, micro_batch=8)
        >>> batch = torch.randn(32, 4)
        >>> for part in anybatch.split(batch, 4):                  # 4 backwards of 8 examples: S = 4
        ...     (model(part).square().mean() / 4).backward()
        >>> optimizer.step()
        >>> controller.scale, 1 <= controller.gain <= 4, controller.tau == controller.gain
        (4.0, True, True)

    Source:
        Johnson et al., AdaScale SGD, ICML 2020, Algorithm 2.
    """
    rule = AdaScale() if rule is None else rule
    optimizers = optimizers_in(optimizer)
    if not isinstance(optimizers, list | tuple) or not all(isinstance(each, Optimizer) for each in optimizers):
        raise InvalidValueError(f"optimizer must be a torch.optim.Optimizer or a list of them, got {shown(optimizer)}.")
    if not optimizers or len({id(bare_optimizer(each)) for each in optimizers}) < len(optimizers):
        raise InvalidValueError(f"Pass at least one optimizer, and each once, got {shown(optimizer)}.")
    if not isinstance(rule, Rule):
        raise InvalidValueError(f"rule must be an anybatch.Rule, such as AdaScale(), got {rule!r}.")
    pipeline = model if is_pipeline(model) else None
    if pipeline is not None:
        model = stages_of(pipeline)
        if micro_batch == "auto":
            raise InvalidValueError(
                "micro_batch='auto' reads forwards of the model, and a pipeline runs its stages. Pass the number of "
                "examples of a micro-batch: those of schedule.step() on this rank, divided by its micro-batches."
            )
    if not isinstance(model, nn.Module):
        raise InvalidValueError(f"model must be the torch.nn.Module that is trained, got {type(model).__name__}.")
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise InvalidValueError(
            f"process_group must be a torch.distributed.ProcessGroup with this rank in it, got {process_group!r}."
        )
    if grad_scaler is not None and not isinstance(grad_scaler, torch.amp.GradScaler):
        raise InvalidValueError(f"grad_scaler must be a torch.amp.GradScaler, got {type(grad_scaler).__name__}.")
    divisor = not isinstance(reduction, bool) and isinstance(reduction, int) and reduction >= 1
    if reduction not in ("mean", "sum") and not divisor:
        raise InvalidValueError(
            f'reduction must be "mean", "sum", or a divisor, a whole number; got {shown(reduction)}.'
        )
    batch = BatchSize(base_batch, micro_batch, scale, examples)
    if schedule_every == "epoch":
        schedule_every = _epoch_of(batch, "schedule_every='epoch'")
    if epochs is not None:
        if total is not None:
            raise InvalidValueError(f"Pass total or epochs, not both: got total={total!r}, epochs={epochs!r}.")
        total = check_positive("epochs", epochs) * _epoch_of(batch, "epochs")
    clock = total if isinstance(total, Clock) else Clock(total)
    settings = Settings(
        rule=rule,
        batch=batch,
        total=clock.total,
        schedule_every=check_positive("schedule_every", schedule_every),
        reduction=reduction,
        grad_scaler=grad_scaler,
        leader=clock if clock is total else None,
        process_group=process_group,
        record=destinations(record),
        pipeline=pipeline,
    )
    schedulers = schedulers_in(scheduler, engine=model if is_deepspeed(model) else None)
    return Controller(optimizers, model=model, schedulers=schedulers, settings=settings)


def _epoch_of(batch: BatchSize, wanted: str) -> float:
    """Base iterations of a pass over the data."""
    if batch.population is None:
        raise InvalidValueError(f"{wanted} needs base_batch and examples=len(data), for the length of an epoch.")
    return batch.population

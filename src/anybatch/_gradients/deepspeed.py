"""DeepSpeed: the engine that `deepspeed.initialize` returns, without ZeRO and with its stages 1 to 3.

[Note: where DeepSpeed keeps gradients] A hook on a parameter, placed after `initialize`, gets each micro-batch's own
gradient of this rank. The engine has divided its loss by the accumulation, and multiplied it by the loss scale. ZeRO
then moves the gradient out of `.grad` into tensors of its own:

    stage 0                 `.grad`, reduced at the end of the last backward of a step; all ranks hold the same
    stages 1 and 2          `averaged_gradients`, this rank's partition of each group
    stage 3                 `averaged_gradients`, this rank's partition of each parameter
    1 to 3 with offload     `.grad` of the float32 partitions

The optimizer has flat float32 partitions in place of the parameters; under stage 3 its groups are empty between steps.
`engine.step()` steps it once for each group, or for each sub-group of stage 3. `_take_model_step` is the one method
around these steps. It is called once for each step of training, in every stage, after the reduction and before the
clip, so that the hooks of a controller are around it. `deepspeed` is not imported here.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from anybatch._errors import InvalidValueError, UnsupportedError, UsageError
from anybatch._gradients.engine import Engine
from anybatch._gradients.hooks import GradientHooks
from anybatch._gradients.parameters import withheld
from anybatch._gradients.probe import Placement
from anybatch._gradients.reduce import Ranks, Reduction
from anybatch._gradients.steps import Handle, Hook, Steps
from anybatch._gradients.window import Window

_TRIED = "0.19.8"  # the versions that the tests have run

# By the class of `engine.optimizer`: where it keeps the parameters, and what else is read of it.
_MEMBERS = {
    "DeepSpeedZeroOptimizer": "bit16_groups",
    "DeepSpeedZeroOptimizer_Stage3": "fp16_groups",
    "FP16_Optimizer": "fp16_groups",
    "FP16_UnfusedOptimizer": "fp16_groups",
}
_READ = {
    "DeepSpeedZeroOptimizer": ("averaged_gradients", "cpu_offload", "single_partition_of_fp32_groups"),
    "DeepSpeedZeroOptimizer_Stage3": ("averaged_gradients", "offload_optimizer", "fp32_partitioned_groups_flat"),
}
_OF_ENGINE = ("_take_model_step", "basic_optimizer", "seq_data_parallel_group", "is_gradient_accumulation_boundary")


def is_deepspeed(model: object) -> bool:
    """Whether `model` is the engine of `deepspeed.initialize`."""
    module = sys.modules.get("deepspeed.runtime.engine")
    return module is not None and isinstance(model, module.DeepSpeedEngine)


def deepspeed_engine(
    engine: Any,
    optimizers: Sequence[Optimizer],
    process_group: dist.ProcessGroup | None,
    *,
    reduction: Reduction,
    grad_scaler: torch.amp.GradScaler | None,
    metric: str,
    consecutive: bool,
) -> tuple[Engine, list[Tensor]]:
    """The engine of a controller for DeepSpeed's, and the parameters that it trains.

    Args:
        engine: DeepSpeed's.
        optimizers: Those of `attach`, without wrappers.
        process_group: As for `attach`.
        reduction: As for `attach`.
        grad_scaler: As for `attach`.
        metric: Of the rule.
        consecutive: Of the rule.

    Raises:
        InvalidValueError: the optimizer is not this engine's.
        UnsupportedError: a setting of DeepSpeed or of the rule that was not measured; a version without what is read.
        UsageError: arguments of `attach` that contradict the engine.
    """
    _check_version(engine)
    try:
        _check_engine(engine)
    except AttributeError as error:
        raise _other_version([f"{type(error.obj).__name__}.{error.name}"]) from None
    if len(optimizers) != 1 or optimizers[0] is not engine.basic_optimizer:
        raise InvalidValueError(
            "The optimizer is not that of the DeepSpeed engine: pass attach the one that deepspeed.initialize returned "
            "with it."
        )
    _check_arguments(process_group, reduction, grad_scaler, metric=metric, consecutive=consecutive)
    zero = ZeroGradients(engine)
    group = engine.seq_data_parallel_group
    size = dist.get_world_size(group)
    ranks = Ranks(group, size, replicated=zero.copies > 1) if size > 1 else Ranks()
    found = Engine(
        ranks,
        place=lambda new: list(map(Placement, new)),
        # Nothing of a step is in `.grad`: `DeepSpeedHooks` reads the mean at the step.
        reduced=lambda: False,
        arrived=lambda: False,
        steps=EngineSteps(engine, zero),
        loss_scale=zero.loss_scale,
    )
    return found, [p for p in zero.members() if p.requires_grad]


def _version() -> str:
    return str(getattr(sys.modules.get("deepspeed"), "__version__", "of unknown version"))


def _check_version(engine: Any) -> None:
    """Raise if this version of DeepSpeed has not what anybatch reads."""
    optimizer, name = engine.optimizer, type(engine.optimizer).__name__
    lacking = [f"engine.{each}" for each in _OF_ENGINE if not hasattr(engine, each)]
    if not lacking and optimizer is not engine.basic_optimizer:
        if name not in _MEMBERS:
            raise UnsupportedError(
                f"DeepSpeed {_version()} trains this model by {name}, from which anybatch reads no gradients. Set "
                '"zero_optimization": {"stage": 1}, 2 or 3.'
            )
        needed = (_MEMBERS[name], *_READ.get(name, ()))
        lacking += [f"{name}.{each}" for each in needed if not hasattr(optimizer, each)]
    if lacking:
        raise _other_version(lacking)


def _other_version(lacking: Sequence[str]) -> UnsupportedError:
    return UnsupportedError(
        f"DeepSpeed {_version()} has no {', '.join(lacking)}, which anybatch reads. It was tried with DeepSpeed "
        f"{_TRIED}: install that version, or a newer anybatch."
    )


def _check_engine(engine: Any) -> None:
    """Raise for settings under which the mean gradient is not where it is read, or is not a mean."""
    zero = engine._config.zero_config
    offload = [zero.offload_optimizer, zero.offload_param]
    found = {
        "float16 without ZeRO, where its engine divides by a scale that the loss does not have": engine.fp16_enabled()
        and engine.zero_optimization_stage() == 0,
        "its pipelines: torch.distributed.pipelining is supported": engine.pipeline_parallelism,
        "mixture-of-experts layers": engine.has_moe_layers,
        "tensor parallelism: torch's parallelize_module is supported": engine.mp_world_size > 1
        or engine.autotp_size() > 1,
        "sequence parallelism, where several ranks share a sequence": engine.sequence_parallel_size > 1,
        "1-bit optimizers, which reduce compressed momenta": not engine.enable_backward_allreduce,
        '"zero_quantized_gradients"': zero.zero_quantized_gradients,
        '"zenflow"': engine.zenflow,
        '"compile": {"deepcompile": true}': engine.is_deepcompile_enabled(),
        "offload to NVMe": any(each is not None and each.device == "nvme" for each in offload),
        "torch_autocast in float16": engine.torch_autocast_z0_gradscaler is not None
        or getattr(engine.optimizer, "torch_autocast_gradscaler", None) is not None,
        "its Muon, which changes the gradients before their norm": any(
            group.get("use_muon") for group in engine.basic_optimizer.param_groups
        ),
    }
    for name, present in found.items():
        if present:
            raise UnsupportedError(f"anybatch does not support, of DeepSpeed, {name}. Leave it out of the config.")


def _check_arguments(
    process_group: dist.ProcessGroup | None,
    reduction: Reduction,
    grad_scaler: torch.amp.GradScaler | None,
    *,
    metric: str,
    consecutive: bool,
) -> None:
    if process_group is not None:
        raise UsageError("The DeepSpeed engine has its own process_group: leave it out of attach.")
    if reduction != "mean":
        raise UsageError(
            f"attach was given reduction={reduction!r}, and DeepSpeed divides each loss by "
            "gradient_accumulation_steps, so the gradient is the mean: leave reduction out."
        )
    if grad_scaler is not None and grad_scaler.is_enabled():
        raise UsageError('DeepSpeed scales the loss by itself, with "fp16" in its config: leave grad_scaler out.')
    if metric != "euclidean":
        raise UnsupportedError(
            f"AdaScale(metric={metric!r}) needs second moments by parameter, and DeepSpeed keeps flat partitions. Use "
            "metric='euclidean'."
        )
    if consecutive:
        raise UnsupportedError(
            "AdaScale(consecutive=True) keeps the gradients of a step, which DeepSpeed moves out of .grad. Set "
            "gradient_accumulation_steps to 2 or more, with a smaller micro-batch."
        )


class ZeroGradients:
    """The gradients of an engine's last reduction; see the note above."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._optimizer = engine.optimizer
        kind = type(engine.optimizer).__name__
        self._sharded = kind in _READ and engine.optimizer is not engine.basic_optimizer
        self._whole = _MEMBERS.get(kind)
        self.copies = 1 if self._sharded else dist.get_world_size(engine.seq_data_parallel_group)

    def members(self) -> list[Tensor]:
        """The parameters of the model that the optimizer trains."""
        if self._whole is None or self._optimizer is self._engine.basic_optimizer:
            groups = [group["params"] for group in self._engine.basic_optimizer.param_groups]
        else:
            groups = getattr(self._optimizer, self._whole)
        return [p for group in groups for p in group]

    def loss_scale(self) -> Tensor | None:
        """The factor on the loss; `None` where it is 1."""
        scale = float(getattr(self._optimizer, "loss_scale", 1.0))
        return None if scale == 1 else torch.tensor(scale, dtype=torch.float64)

    def mean(self) -> list[Tensor]:
        """This rank's parts of the mean gradient, times the loss scale.

        Raises:
            UsageError: the gradients of this step are not reduced yet.
        """
        if not self._engine.is_gradient_accumulation_boundary():
            raise UsageError(
                "The gradients of this step are not reduced yet: DeepSpeed does so in the last of its "
                f"{self._engine.gradient_accumulation_steps()} backwards. Call controller.peek() between the last "
                "backward and engine.step()."
            )
        if not self._sharded:
            return [p.grad for p in self.members() if p.grad is not None]
        zero = self._optimizer
        partitions = getattr(zero, "single_partition_of_fp32_groups", None)
        if partitions is None:
            offload, partitions = zero.offload_optimizer, zero.fp32_partitioned_groups_flat
        else:
            offload = zero.cpu_offload
        if offload:
            return [p.grad for p in partitions if p.grad is not None]
        kept = [parts for parts in zero.averaged_gradients.values() if parts is not None]
        return [part for parts in kept for part in ([parts] if isinstance(parts, Tensor) else parts)]


class EngineSteps(Steps):
    """The steps of the engine; the base optimizer takes several in each."""

    def __init__(self, engine: Any, zero: ZeroGradients) -> None:
        super().__init__()
        self._engine = engine
        self._zero = zero

    def members(self, optimizers: Sequence[Optimizer]) -> list[Tensor]:  # noqa: ARG002
        """The parameters of the model, in place of the flat partitions."""
        return self._zero.members()

    def hook(self, optimizer: Optimizer, before: Hook, after: Hook) -> list[Handle]:
        """Call `before` and `after` around each step of the engine: its `_take_model_step` is replaced until then."""
        engine, take = self._engine, self._engine._take_model_step

        def take_and_count(*args: Any, **kwargs: Any) -> None:
            with self._flat_groups(optimizer):
                before(optimizer, (), {})
            take(*args, **kwargs)
            with self._flat_groups(optimizer):
                after(optimizer, (), {})

        engine._take_model_step = take_and_count
        return [_Restored(engine, take_and_count)]

    def skipped(self, optimizer: Optimizer) -> bool:  # noqa: ARG002
        """Whether the loss scaler has skipped the step that has ended."""
        return bool(getattr(self._engine.optimizer, "overflow", False))

    @contextmanager
    def withheld(self, optimizer: Optimizer) -> Iterator[None]:
        """Hide the gradients in each step of the base optimizer, where the engine has just written them."""
        with ExitStack() as hidden:
            handles = [
                optimizer.register_step_pre_hook(lambda base, *_: hidden.enter_context(withheld(base)) and None),
                optimizer.register_step_post_hook(lambda *_: hidden.close()),
            ]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    @contextmanager
    def _flat_groups(self, optimizer: Optimizer) -> Iterator[None]:
        """Fill the groups that stage 3 empties between steps, and give each partition a gradient of zeros.

        Momentum buffers of the first step are made for parameters with a gradient.
        """
        zero, filled = self._engine.optimizer, False
        if hasattr(zero, "fp32_partitioned_groups_flat"):
            filled = not any(group["params"] for group in optimizer.param_groups)
            if filled:
                zero._set_fp32_optimizer_param_groups()
        members = {id(p) for p in self._zero.members()}
        partitions = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in members]
        given = [p for p in partitions if p.grad is None]
        for p in given:
            p.grad = p.detach().new_zeros(()).expand_as(p)
        try:
            yield
        finally:
            for p in given:
                p.grad = None
            if filled:
                zero._clear_fp32_optimizer_param_groups()


class _Restored:
    """Restores the engine's method."""

    def __init__(self, engine: Any, replaced: Callable[..., None]) -> None:
        self._engine, self._replaced = engine, replaced

    def remove(self) -> None:
        if vars(self._engine).get("_take_model_step") is self._replaced:
            del self._engine._take_model_step


class DeepSpeedHooks(GradientHooks):
    """Hooks on the parameters of an engine; the mean is read at the step, from where DeepSpeed keeps it."""

    def __init__(self, engine: nn.Module, parameters: Callable[[], Sequence[Tensor]], **options: Any) -> None:
        self._zero = ZeroGradients(engine)
        super().__init__(parameters, **options)

    def window(self) -> Window:
        """The open window, with the norm of the engine's mean."""
        if self.pending and self._norms.taken:
            self._norms.euclidean.mean_of(self._zero.mean(), copies=self._zero.copies)
        self._here = True  # only now: earlier, an empty `.grad` does not mean that it was cleared
        try:
            return super().window()
        finally:
            self._here = not self.pending

"""A moving average of a model's weights with a memory in base iterations."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from anybatch._ema.decay import factors, interval_weight, new_weight, scheduled_weight, takes_interval
from anybatch._ema.lerp import Lerp
from anybatch._ema.offload import Offload
from anybatch._ema.state import averages_keys, checked_state, numbers
from anybatch._ema.tensors import Snapshot, Tensors, is_sharded
from anybatch._errors import InvalidValueError, UsageError
from anybatch._numbers import positive, real, shown, whole
from anybatch._scaling import Clock


def _all(_: str) -> bool:
    """Include every name: a function of the module, so that it can be pickled."""
    return True


class ModelEMA:
    """An exponential moving average of a model's parameters on the scale-invariant clock.

        average <- rho**k * average + (1 - rho**k) * weights        for a step of k base iterations

    With a controller's clock the average is updated after each step, except a skipped one. Under `Linear` k is the
    scale, which is the EMA scaling rule. Under `AdaScale` k is the gain: the average is the same function of tau at
    every batch size.

    Averages are stored in float32 or wider; under FSDP2 each rank stores its shards. Shared parameters are averaged
    once. Buffers are not averaged, and `applied()` does not change them. A running statistic is an average already, and
    an average of counters or of power iterations has no meaning.

    Args:
        model: The module whose parameters are averaged. Compile, wrap or shard it first.
        decay: The factor rho per base iteration, in [0, 1), as tuned at the base batch. `half_life(...)` computes it
            from a half-life. Several, as a sequence, are averaged in one pass. `cosine_decay(...)` or another function
            of tau is a decay in (0, 1] that changes along the clock; it is integrated over a step. A function of tau
            and k returns the share in [0, 1] of the average that k base iterations from tau on keep.
        clock: `controller.clock`, or `None` to call `update` yourself. A clock references this object and its model
            until `stop()`.
        include: A function of the name that selects floating or complex parameters; all by default.
        base_batch: The batch size of one base iteration, positive. Only `update(batch_size=...)` needs it.
        update_every: Updates between two changes of the averages, at least 1. A change covers all base iterations since
            the last one, so this saves time and keeps the half-life.
        warmup: Whether base iteration t has the decay min(rho, (1 + t) / (10 + t)), which soon forgets the first
            weights. It is integrated over a step: k base iterations at once equal k steps of one.
        average_statistics: Whether floating `running_mean` and `running_var` are averaged like parameters. Otherwise
            call `torch.optim.swa_utils.update_bn` inside of `applied()` before you evaluate a model with batch norm.
        device: "cpu" to store the averages of a GPU's weights on the CPU. An update copies the weights asynchronously,
            and the next update averages them. By default each average is on its parameter's device.

    Raises:
        InvalidValueError: A value is out of range, or there is no parameter to average.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> clock = anybatch.Clock()
        >>> ema = anybatch.ModelEMA(model, 0.9, clock=clock)
        >>> before = model.weight.detach().clone()
        >>> _ = model.weight.data.zero_()
        >>> clock.advance(4.0)                                     # a step worth four base iterations
        >>> with ema.applied():
        ...     torch.allclose(model.weight, 0.9**4 * before)
        True

    EDM2's power function keeps `(1 - 1/t) ** (gamma + 1)` in base iteration t. The product over k telescopes:

        >>> def power(tau, k, gamma=16.97):                        # 16.97 is EDM2's sigma_rel of 0.05, 6.94 of 0.10
        ...     return (tau / (tau + k)) ** (gamma + 1)
        >>> ema = anybatch.ModelEMA(model, power, clock=clock)

    Source:
        Busbridge et al., How to Scale Your EMA, NeurIPS 2023, Definition 1.2 (rho**kappa); Karras et al., Analyzing and
        Improving the Training Dynamics of Diffusion Models, CVPR 2024, Section 3.1 (the power function).

    Differs from the paper in:
        1. The exponent is the clock's advance: the paper's kappa under linear scaling, the gain under AdaScale.
        2. The weight is `-expm1(k * log(rho))` in double: `1 - rho**k` loses all digits of a decay near 1.
        3. The average uses the weights after a step; the paper's uses the weights before it.
        4. The paper has no warm-up: `(1 + t) / (10 + t)` is TensorFlow's.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float | Sequence[float] | Callable[..., float],
        *,
        clock: Clock | None = None,
        include: Callable[[str], bool] = _all,
        base_batch: float | None = None,
        update_every: int = 1,
        warmup: bool = False,
        average_statistics: bool = False,
        device: str | torch.device | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InvalidValueError(f"model must be a torch.nn.Module, got {shown(model)}.")
        if clock is not None and not isinstance(clock, Clock):
            raise InvalidValueError(f"clock must be controller.clock or None, got {shown(clock)}.")
        if not callable(include):
            raise InvalidValueError(f"include must be a function of a parameter's name, got {shown(include)}.")
        for name, switch in (("warmup", warmup), ("average_statistics", average_statistics)):
            if not isinstance(switch, bool):
                raise InvalidValueError(f"{name} must be True or False, got {shown(switch)}.")
        self._schedule = decay if callable(decay) else None
        self._by_interval = callable(decay) and takes_interval(decay)
        self._decays = (0.0,) if callable(decay) else factors(decay)
        self.decay: float | Sequence[float] | Callable[..., float] = (
            decay if isinstance(decay, Sequence) or callable(decay) else self._decays[0]
        )
        if warmup and self._schedule is not None:
            raise InvalidValueError("A decay that is a function of tau includes its warm-up: remove warmup=True.")
        if base_batch is not None and positive(base_batch) is None:
            raise InvalidValueError(f"base_batch must be positive and finite, got {shown(base_batch)}.")
        every = whole(update_every)
        if every is None or every < 1:
            raise InvalidValueError(f"update_every must be a whole number >= 1, got {shown(update_every)}.")
        try:
            self._device = None if device is None else torch.device(device)
        except (RuntimeError, TypeError, ValueError):
            raise InvalidValueError(f'device must be a torch device, such as "cpu", got {shown(device)}.') from None
        self._base_batch, self._update_every, self._warmup = base_batch, every, warmup
        self._tensors = Tensors(model, include, statistics=average_statistics)
        first = self._tensors.local()
        with torch.inference_mode(False):
            self._averages = [[_first(tensor.detach(), self._device) for tensor in first] for _ in self._decays]
        self.tau: float = 0.0
        self._pending, self._waiting = 0.0, 0
        self._lerp: Lerp | Offload | None = None
        self._addresses: list[int] = []
        self._own: Snapshot | None = None
        self._unsubscribe = None if clock is None else clock.subscribe(self.update)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelEMA":
        """Copy the average and the model; the copy has no clock.

        Raises:
            UsageError: Called inside of `applied()`, or the model is sharded.
        """
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self._portable(), memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Return the pickled state, with the model; the unpickled object has no clock.

        Raises:
            UsageError: Called inside of `applied()`, the model is sharded, or `include` or `decay` cannot be pickled.
        """
        for function in (self._tensors.include, self._schedule):
            if "<" in getattr(function, "__qualname__", ""):  # <lambda>, <locals>: pickle finds functions by name
                raise UsageError(
                    f"{shown(function)} cannot be pickled: pass ModelEMA a function of a module, not a lambda; or save "
                    "state_dict(), which needs no function."
                )
        return self._portable()

    def _portable(self) -> dict[str, Any]:
        """Return the attributes of a copy, without the clock and the prepared lists of this model's tensors."""
        if self._own is not None:
            raise UsageError(
                "No copy is possible inside of applied(): its model would never get its own weights back. Copy after "
                "applied(), or in `with ema.withdrawn():`."
            )
        if self._tensors.sharded:
            raise UsageError(
                "The average of a sharded model cannot be copied: its shards belong to this process group. Save "
                "state_dict() by torch.distributed.checkpoint and load it into a new ModelEMA."
            )
        self._finish()
        return {**self.__dict__, "_unsubscribe": None, "_lerp": None, "_addresses": []}

    def stop(self) -> None:
        """Unsubscribe from the clock."""
        if self._unsubscribe is not None:
            self._unsubscribe()

    def update(self, iterations: float | None = None, *, batch_size: float | None = None) -> None:
        """Update the averages for a step of `iterations` base iterations; a clock calls this for you.

        Args:
            iterations: Base iterations of this step, at least 0; 1 by default.
            batch_size: Examples or tokens of this step, in the unit of `base_batch`, instead of `iterations`.

        Raises:
            InvalidValueError: `iterations` or `batch_size` is negative or not finite, or both are given.
            UsageError: Called inside of `applied()`, `base_batch` is missing, or the model has lost a parameter.
        """
        if self._own is not None:
            raise UsageError("The model has the averages inside of applied(): call update() after it.")
        moved, waiting = self._pending + self._counted(iterations, batch_size), self._waiting + 1
        if waiting >= self._update_every:
            lerp = self._prepared()
            lerp(self._weights(moved))
            self.tau += moved
            moved, waiting = 0.0, 0
        self._pending, self._waiting = moved, waiting

    @contextmanager
    def applied(self, decay: float | None = None) -> Iterator[None]:
        """Copy the averages into the model for the time of a `with`, and restore the model's own weights after it.

        The weights and all buffers are restored also if the body raises or a forward changes buffers. If the body
        changes the model's type or device, they are restored in the new one. Inside, `model.state_dict()` has the
        averages, for export. `state_dict()` of this object raises inside, because a checkpoint would lose the model's
        own weights; write one in `withdrawn()`.

        Args:
            decay: The decay of the averages, if there are several.

        Raises:
            UsageError: Called inside of another `applied()`, or the model's parameters have changed.
            InvalidValueError: `decay` is unknown, or is missing with several decays.
        """
        decay = self._decays[0] if decay is None and len(self._decays) == 1 else decay
        if decay not in self._decays:
            raise InvalidValueError(f"applied() needs one of the decays {self._decays}, got {decay!r}.")
        averages = self._averages[self._decays.index(decay)]
        if self._own is not None:
            raise UsageError("applied() cannot be nested: the model has the averages already. Remove the inner one.")
        self._tensors.check()
        self._prepared()  # raises if the averages do not fit
        self._finish()
        with self._tensors.kept() as own:
            self._own = own
            try:
                for tensor, average in zip(self._tensors.local(), averages, strict=True):
                    tensor.detach().copy_(average)
                yield
            finally:
                self._own = None

    @contextmanager
    def withdrawn(self) -> Iterator[None]:
        """Restore the model's own weights and buffers for the time of a `with` inside of `applied()`.

        Use it to write a checkpoint. Outside of `applied()` it does nothing, so a callback can always use it.
        """
        own = self._own
        if own is None:
            yield
            return
        with self._tensors.kept():  # restores buffers that a forward has changed
            self._tensors.restore(own)
            self._own = None
            try:
                yield
            finally:
                self._own = own

    def state_dict(self) -> dict[str, Any]:
        """Return the averages by parameter name, the decay and the counters, to resume exactly.

        "averages" are those of the first decay, "averages_1" those of the second. Shards of FSDP2 are DTensors, as in
        the model's own state. `torch.distributed.checkpoint` saves and loads them at any world size without a gather.

        Raises:
            UsageError: Called inside of `applied()`, where the model does not have its own weights; or the model's
                parameters have changed.
        """
        if self._own is not None:
            raise UsageError(
                "A checkpoint written inside of applied() loses the model's own weights. Write it after applied(), or "
                "in `with ema.withdrawn():`."
            )
        self._tensors.check()
        self._finish()
        state = numbers(self._decays, tau=self.tau, pending=self._pending, waiting=self._waiting)
        for key, averages in zip(averages_keys(self._decays), self._averages, strict=True):
            state[key] = {n: self._tensors.as_saved(n, a) for n, a in zip(self._tensors.names, averages, strict=True)}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy saved averages into this object's tensors; a single decay remains the one of the constructor.

        Raises:
            StateError: The state has other names, shapes or decays, a newer version or invalid values. This object is
                unchanged.
            UsageError: Called inside of `applied()`, or a parameter has changed its shape.
        """
        if self._own is not None:
            raise UsageError("The model has the averages inside of applied(): call load_state_dict() after it.")
        names = self._tensors.names
        state = checked_state(state, decays=self._decays, names=names)
        saved = [state[key] for key in averages_keys(self._decays)]
        self._prepared()  # raises if the averages do not fit
        self._finish()
        loaded = [[self._tensors.as_held(name, values[name]) for name in names] for values in saved]
        for averages, values in zip(self._averages, loaded, strict=True):
            for average, value in zip(averages, values, strict=True):
                average.copy_(value)
        self.tau, self._pending, self._waiting = state["tau"], state["pending"], state["waiting"]

    def _weights(self, moved: float) -> list[float]:
        """Return for each decay the weight of the newest weights after `moved` base iterations."""
        if self._schedule is not None:
            weight = interval_weight if self._by_interval else scheduled_weight
            return [weight(self._schedule, iterations=moved, tau=self.tau)]
        return [new_weight(d, iterations=moved, tau=self.tau, warmup=self._warmup) for d in self._decays]

    def _counted(self, iterations: float | None, batch_size: float | None) -> float:
        if iterations is not None and batch_size is not None:
            raise InvalidValueError("update() takes iterations or batch_size, not both: remove one.")
        name, value, unit = "iterations", 1.0 if iterations is None else iterations, 1.0
        if batch_size is not None:
            if self._base_batch is None:
                raise UsageError("update(batch_size=...) needs the base batch: pass ModelEMA(base_batch=...).")
            name, value, unit = "batch_size", batch_size, self._base_batch
        number = real(value)
        if number is None or number < 0:
            raise InvalidValueError(f"{name} must be finite and >= 0, got {shown(value)}.")
        return number / unit

    def _prepared(self) -> Lerp | Offload:
        """Return the prepared lists, rebuilt if a tensor has moved in memory."""
        tensors = self._tensors.local()
        addresses = [tensor.data_ptr() for tensor in tensors]
        if self._lerp is not None and addresses == self._addresses:
            return self._lerp
        self._finish()
        with torch.inference_mode(False):  # later updates write to the tensors that are made here
            for averages in self._averages:
                for i, (name, tensor) in enumerate(zip(self._tensors.names, tensors, strict=True)):
                    if averages[i].shape != tensor.shape or is_sharded(tensor):
                        raise UsageError(f"{name} has another shape than in ModelEMA(...): make it after sharding.")
                    averages[i] = averages[i].to(self._device or tensor.device)
            here = all(average.device == tensor.device for average, tensor in zip(averages, tensors, strict=True))
            self._lerp, self._addresses = (Lerp if here else Offload)(tensors, self._averages), addresses
        return self._lerp

    def _finish(self) -> None:
        if isinstance(self._lerp, Offload):
            self._lerp.wait()


def _first(local: Tensor, device: torch.device | None) -> Tensor:
    """Return the average before the first step: a copy in float32 or wider, with the strides of the weights."""
    wide = torch.complex64 if local.is_complex() else torch.float32
    dtype = local.dtype if local.dtype.itemsize >= wide.itemsize else wide
    return torch.empty_like(local, dtype=dtype, device=device or local.device).copy_(local)

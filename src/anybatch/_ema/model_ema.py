"""ModelEMA: a moving average of a model's weights whose memory is counted in base iterations."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from anybatch._ema.decay import factors, new_weight, scheduled_weight, stretch_weight, takes_stretches
from anybatch._ema.lerp import Lerp
from anybatch._ema.offload import Offload
from anybatch._ema.state import averages_keys, checked_state, numbers
from anybatch._ema.tensors import Snapshot, Tensors, is_sharded
from anybatch._errors import InvalidValueError, UsageError
from anybatch._numbers import positive, real, shown, whole
from anybatch._scaling import Clock


def _all(_: str) -> bool:
    """The default of `include`; a function with a name, so that it can be pickled."""
    return True


class ModelEMA:
    """An exponential moving average of a model's parameters on the scale-invariant clock.

        average <- rho**k * average + (1 - rho**k) * weights        for a step of k base iterations

    With a controller's clock the average moves by itself after every step that really happened, and not when a step was
    skipped. Under `Linear` k is the scale, which is the EMA scaling rule; under `AdaScale` k is the gain, so that the
    average is the same function of tau at every batch size.

    Averages are kept in float32 or wider, and under FSDP2 as this rank's shards. Shared parameters are averaged once.
    Buffers are not averaged: `applied()` leaves them as the model has them, for a running statistic is an average
    already, and an average of counters or of power iterations means nothing.

    Args:
        model: the module whose parameters are averaged; make the average after compiling, wrapping or sharding it.
        decay: rho, the factor per base iteration, in [0, 1), as tuned at the base batch; `half_life(...)` gives it from
            a half-life. Several, as a sequence, are averaged in one pass. A function of tau, such as
            `cosine_decay(...)`, is a decay in (0, 1] that changes along the clock; it is integrated over a step. A
            function of tau and k is the share in [0, 1] that k base iterations from tau on keep of the average.
        clock: `controller.clock`; `None` to call `update` yourself. A clock keeps this object, and so the model, until
            `stop()`.
        include: which floating or complex parameters, by name; all by default.
        base_batch: the batch size of one base iteration, positive; needed for `update(batch_size=...)` alone.
        update_every: the averages move at every so many updates, at least 1, by all that the clock has moved since:
            that saves time and keeps the half-life.
        warmup: whether base iteration t has the decay min(rho, (1 + t) / (10 + t)), so that the first weights are soon
            forgotten. It is integrated over a step: k base iterations at once are k steps of one.
        average_statistics: whether floating `running_mean` and `running_var` are averaged like parameters. If not, a
            model with batch norm is best evaluated after `torch.optim.swa_utils.update_bn` inside of `applied()`.
        device: "cpu" to keep the averages off the GPU: the weights are copied at an update, which does not wait for
            that, and averaged at the next. By default each is on its parameter's device.

    Raises:
        InvalidValueError: a value out of range, or no parameter to average.

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

    EDM2's power function keeps `(1 - 1/t) ** (gamma + 1)` in base iteration t. The product over k of them telescopes:

        >>> def power(tau, k, gamma=16.97):                        # 16.97 is EDM2's sigma_rel of 0.05, 6.94 of 0.10
        ...     return (tau / (tau + k)) ** (gamma + 1)
        >>> ema = anybatch.ModelEMA(model, power, clock=clock)

    Source:
        Busbridge et al., How to Scale Your EMA, NeurIPS 2023, Definition 1.2 (rho**kappa); Karras et al., Analyzing and
        Improving the Training Dynamics of Diffusion Models, CVPR 2024, Section 3.1 (the power function).

    Differs from the paper in:
        1. The exponent is how far the clock moved: the paper's kappa under linear scaling, the gain under AdaScale.
        2. The weight is `-expm1(k * log(rho))` in double: `1 - rho**k` loses all digits of a decay near 1.
        3. The average sees the weights that a step ends with, the paper's those that it starts from.
        4. The warm-up, which the paper has not: `(1 + t) / (10 + t)` is TensorFlow's.
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
            raise InvalidValueError(f"model is the torch.nn.Module to average, got {shown(model)}.")
        if clock is not None and not isinstance(clock, Clock):
            raise InvalidValueError(
                f"clock is controller.clock, or None to call update() yourself; got {shown(clock)}."
            )
        if not callable(include):
            raise InvalidValueError(f"include is a function of a parameter's name, got {shown(include)}.")
        for name, switch in (("warmup", warmup), ("average_statistics", average_statistics)):
            if not isinstance(switch, bool):
                raise InvalidValueError(f"{name} is True or False, got {shown(switch)}.")
        self._schedule = decay if callable(decay) else None
        self._stretches = callable(decay) and takes_stretches(decay)
        self._decays = (0.0,) if callable(decay) else factors(decay)
        self.decay: float | Sequence[float] | Callable[..., float] = (
            decay if isinstance(decay, Sequence) or callable(decay) else self._decays[0]
        )
        if warmup and self._schedule is not None:
            raise InvalidValueError("A decay that is a function of tau is its own warm-up: leave out warmup=True.")
        if base_batch is not None and positive(base_batch) is None:
            raise InvalidValueError(f"base_batch must be positive and finite, got {shown(base_batch)}.")
        every = whole(update_every)
        if every is None or every < 1:
            raise InvalidValueError(f"update_every is a number of updates, at least 1, got {shown(update_every)}.")
        try:
            self._device = None if device is None else torch.device(device)
        except (RuntimeError, TypeError, ValueError):
            raise InvalidValueError(f'device is a device of torch, such as "cpu", got {shown(device)}.') from None
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
        """With a copy of the model; it follows no clock.

        Raises:
            UsageError: inside of `applied()`, or the model is sharded.
        """
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self._portable(), memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """What `pickle` writes, the model included; what is read follows no clock.

        Raises:
            UsageError: inside of `applied()`, the model is sharded, or a function given here has no name to find it by.
        """
        for function in (self._tensors.include, self._schedule):
            if "<" in getattr(function, "__qualname__", ""):  # <lambda>, <locals>: not to be found by its name
                raise UsageError(
                    f"{shown(function)} cannot be pickled: give ModelEMA a function with a name in a module, not a "
                    "lambda; or save state_dict(), which needs no function."
                )
        return self._portable()

    def _portable(self) -> dict[str, Any]:
        """What a copy has: no clock, for it could stop this object, and no prepared lists of this model's tensors."""
        if self._own is not None:
            raise UsageError(
                "There is no copy inside of applied(): its model would never get its own weights back. Leave it first, "
                "or copy in `with ema.withdrawn():`."
            )
        if self._tensors.sharded:
            raise UsageError(
                "A sharded model's average is not copied, as its shards belong to this process group: save "
                "state_dict() by torch.distributed.checkpoint, and load it into a new ModelEMA."
            )
        self._finish()
        return {**self.__dict__, "_unsubscribe": None, "_lerp": None, "_addresses": []}

    def stop(self) -> None:
        """Follow the clock no longer."""
        if self._unsubscribe is not None:
            self._unsubscribe()

    def update(self, iterations: float | None = None, *, batch_size: float | None = None) -> None:
        """Move by `iterations` base iterations, at least 0; with a clock this is called for you.

        Args:
            iterations: base iterations of this step; 1 by default.
            batch_size: instead of them the examples or tokens of this step, in the unit of `base_batch`.

        Raises:
            InvalidValueError: `iterations` or `batch_size` is negative or not finite, or both are given.
            UsageError: inside of `applied()`, where the model does not hold its own weights; a `batch_size` without a
                `base_batch`; or a parameter has gone from the model.
        """
        if self._own is not None:
            raise UsageError("The average cannot move inside of applied(): the model holds the average there.")
        moved, waiting = self._pending + self._counted(iterations, batch_size), self._waiting + 1
        if waiting >= self._update_every:
            lerp = self._prepared()
            lerp(self._weights(moved))
            self.tau += moved
            moved, waiting = 0.0, 0
        self._pending, self._waiting = moved, waiting

    @contextmanager
    def applied(self, decay: float | None = None) -> Iterator[None]:
        """Put the averages into the model for the time of a `with`, and the model's own weights back after it.

        The weights come back also when the body raises, and so do all buffers, whatever a forward has made of them. If
        the body changes the type or the device of the model, they come back in the new one.
        `model.state_dict()` holds the averages inside, to export them. A checkpoint to go on from would lose the
        model's own weights there: so `state_dict()` of this object is refused inside, but not in `withdrawn()`.

        Args:
            decay: whose averages, if there are several decays.

        Raises:
            UsageError: inside of another `applied()`; or the model has other parameters than were averaged.
            InvalidValueError: `decay` is not one of those averaged, or is not given though there are several.
        """
        averages = self._averages[self._index(decay)]
        if self._own is not None:
            raise UsageError("applied() is not nested: the model holds the averages already.")
        self._tensors.check()
        self._prepared()  # which raises if the averages do not fit any more
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
        """The model's own weights and buffers, for the time of a `with` inside of `applied()`: to write a checkpoint.

        Outside of `applied()` it does nothing, so that a callback need not know where it is called.
        """
        own = self._own
        if own is None:
            yield
            return
        with self._tensors.kept():  # what a forward has made of the buffers comes back, too
            self._tensors.restore(own)
            self._own = None
            try:
                yield
            finally:
                self._own = own

    def state_dict(self) -> dict[str, Any]:
        """The averages by parameter name, the decay, and what is needed to go on exactly.

        Shards of FSDP2 are DTensors, as in the model's own state: `torch.distributed.checkpoint` saves and loads them
        at any world size without gathering. "averages" are those of the first decay, "averages_1" of the second.

        Raises:
            UsageError: inside of `applied()`, where the model's part of the checkpoint would not be its own weights; or
                the model has other parameters than were averaged.
        """
        if self._own is not None:
            raise UsageError(
                "A checkpoint written inside of applied() loses the model's own weights. Leave it first, or write the "
                "checkpoint in `with ema.withdrawn():`."
            )
        self._tensors.check()
        self._finish()
        state = numbers(self._decays, tau=self.tau, pending=self._pending, waiting=self._waiting)
        for key, averages in zip(averages_keys(self._decays), self._averages, strict=True):
            state[key] = {n: self._tensors.as_saved(n, a) for n, a in zip(self._tensors.names, averages, strict=True)}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take saved averages, copied into this object's own tensors; a single decay stays the one given here.

        Raises:
            StateError: other names, shapes or decays, a newer version, or something that no average has; nothing of it
                was taken then.
            UsageError: inside of `applied()`, or a parameter has another shape than when this object was made.
        """
        if self._own is not None:
            raise UsageError("A state cannot be loaded inside of applied(): the model holds the old averages there.")
        names = self._tensors.names
        state = checked_state(state, decays=self._decays, names=names)
        saved = [state[key] for key in averages_keys(self._decays)]
        self._prepared()  # which raises if the averages do not fit any more
        self._finish()
        loaded = [[self._tensors.as_held(name, values[name]) for name in names] for values in saved]
        for averages, values in zip(self._averages, loaded, strict=True):
            for average, value in zip(averages, values, strict=True):
                average.copy_(value)
        self.tau, self._pending, self._waiting = state["tau"], state["pending"], state["waiting"]

    def _weights(self, moved: float) -> list[float]:
        """How much each average takes of the newest weights, after `moved` base iterations."""
        if self._schedule is not None:
            weight = stretch_weight if self._stretches else scheduled_weight
            return [weight(self._schedule, iterations=moved, tau=self.tau)]
        return [new_weight(d, iterations=moved, tau=self.tau, warmup=self._warmup) for d in self._decays]

    def _index(self, decay: float | None) -> int:
        if decay is None and len(self._decays) == 1:
            return 0
        if decay not in self._decays:
            raise InvalidValueError(f"applied() needs one of the decays {self._decays}, got {decay!r}.")
        return self._decays.index(decay)

    def _counted(self, iterations: float | None, batch_size: float | None) -> float:
        if iterations is not None and batch_size is not None:
            raise InvalidValueError("update() takes iterations or batch_size, not both.")
        name, given, unit = "iterations", 1.0 if iterations is None else iterations, 1.0
        if batch_size is not None:
            if self._base_batch is None:
                raise UsageError(
                    "update(batch_size=...) needs the batch of one base iteration: ModelEMA(base_batch=...)."
                )
            name, given, unit = "batch_size", batch_size, self._base_batch
        value = real(given)
        if value is None or value < 0:
            raise InvalidValueError(f"{name} must be finite and not negative, got {shown(given)}.")
        return value / unit

    def _prepared(self) -> Lerp | Offload:
        """The lists to move, made anew when a tensor has come to lie somewhere else."""
        tensors = self._tensors.local()
        addresses = [tensor.data_ptr() for tensor in tensors]
        if self._lerp is None or addresses != self._addresses:
            self._finish()
            with torch.inference_mode(False):  # an update after it writes to what is made here
                self._lerp, self._addresses = self._made(tensors), addresses
        return self._lerp

    def _made(self, tensors: list[Tensor]) -> Lerp | Offload:
        for averages in self._averages:
            for i, (name, tensor) in enumerate(zip(self._tensors.names, tensors, strict=True)):
                if averages[i].shape != tensor.shape or is_sharded(tensor):
                    raise UsageError(f"{name} has another shape than when ModelEMA was made: make it after sharding.")
                averages[i] = averages[i].to(self._device or tensor.device)
        here = all(average.device == tensor.device for average, tensor in zip(averages, tensors, strict=True))
        return (Lerp if here else Offload)(tensors, self._averages)

    def _finish(self) -> None:
        if isinstance(self._lerp, Offload):
            self._lerp.wait()


def _first(local: Tensor, device: torch.device | None) -> Tensor:
    """The average before the first step: a copy, in float32 at least, with the strides of the weights."""
    wide = torch.complex64 if local.is_complex() else torch.float32
    dtype = local.dtype if local.dtype.itemsize >= wide.itemsize else wide
    return torch.empty_like(local, dtype=dtype, device=device or local.device).copy_(local)

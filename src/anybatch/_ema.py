"""ModelEMA: a moving average of a model's weights whose memory is counted in base iterations."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import expm1, isfinite, log
from typing import Any

import torch
from torch import Tensor, nn

from anybatch._clock import Clock
from anybatch._errors import InvalidValueError, StateError, UsageError

_VERSION = 1
# Half-precision weights are widened through a scratch of this many elements: no copy of the model's size.
_SCRATCH = 1 << 20


class ModelEMA:
    """An exponential moving average of a model's parameters on the scale-invariant clock.

        average <- rho**k * average + (1 - rho**k) * weights        for a step of k base iterations

    With a controller's clock the average moves by itself after every step that really happened, and not when a step was
    skipped. Under `Linear` k is the scale, which is the EMA scaling rule; under `AdaScale` k is the gain, so that the
    average is the same function of tau at every batch size.

    Averages are kept in float32 or wider, each on its parameter's device, and under FSDP2 as this rank's shards. Shared
    parameters are averaged once. Buffers are not averaged: `applied()` leaves them as the model has them, for a running
    statistic is an average already, and an average of counters or of power iterations means nothing.

    Args:
        model: the module whose parameters are averaged.
        decay: rho, the factor per base iteration, in [0, 1); as tuned at the base batch. From a half-life of h base
            iterations: `0.5 ** (1 / h)`.
        clock: `controller.clock`; `None` to call `update` yourself.
        include: which parameters, by name; all that are floating by default.

    Raises:
        InvalidValueError: `decay` out of range, or no parameter to average.

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

    Source:
        Busbridge et al., How to Scale Your EMA, NeurIPS 2023, Definition 1.2 (rho**kappa).

    Differs from the paper in:
        1. The exponent is how far the clock moved: the paper's kappa under linear scaling, the gain under AdaScale.
        2. The weight is `-expm1(k * log(rho))` in double: `1 - rho**k` loses all digits of a decay near 1.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float,
        *,
        clock: Clock | None = None,
        include: Callable[[str], bool] = lambda _: True,
    ) -> None:
        if not (isfinite(decay) and 0 <= decay < 1):
            raise InvalidValueError(f"decay is a factor per base iteration in [0, 1), got {decay!r}.")
        self.decay = decay
        self._parameters = {n: p for n, p in model.named_parameters() if p.is_floating_point() and include(n)}
        if not self._parameters:
            raise InvalidValueError("The model has no floating parameter of the names to include: nothing to average.")
        self._averages = {name: _first(_local(p).detach()) for name, p in self._parameters.items()}
        self._saved: dict[str, Tensor] | None = None
        self._scratch: Tensor | None = None
        self.stop: Callable[[], None] = (lambda: None) if clock is None else clock.subscribe(self.update)

    @torch.no_grad()
    def update(self, iterations: float = 1.0) -> None:
        """Move by `iterations` base iterations, at least 0; with a clock this is called for you.

        Raises:
            InvalidValueError: `iterations` is negative or not finite.
            UsageError: inside of `applied()`, where the model does not hold its own weights.
        """
        if not (isfinite(iterations) and iterations >= 0):
            raise InvalidValueError(f"iterations must be finite and not negative, got {iterations!r}.")
        if self._saved is not None:
            raise UsageError("The average cannot move inside of applied(): the model holds the average there.")
        weight = 1.0 if self.decay == 0 and iterations else -expm1(iterations * log(self.decay or 1.0))
        averages: list[Tensor] = []
        weights: list[Tensor] = []
        for name, p in self._parameters.items():
            average, local = self._averages[name], _local(p)
            if local.dtype == average.dtype:
                averages.append(average)
                weights.append(local)
            else:
                self._lerp_wide(average, local, weight)
        if averages:
            torch._foreach_lerp_(averages, weights, weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages into the model for the time of a `with`, and the model's own weights back after it.

        The weights come back also when the body raises. `state_dict()` of this object holds the averages as ever.

        Raises:
            UsageError: inside of another `applied()`.
        """
        if self._saved is not None:
            raise UsageError("applied() is not nested: the model holds the averages already.")
        locals_ = {name: _local(p).detach() for name, p in self._parameters.items()}
        self._saved = {name: local.clone() for name, local in locals_.items()}
        try:
            for name, local in locals_.items():
                local.copy_(self._averages[name])
            yield
        finally:
            for name, local in locals_.items():
                local.copy_(self._saved[name])
            self._saved = None

    def state_dict(self) -> dict[str, Any]:
        """The averages by parameter name, with the decay and a version."""
        return {"version": _VERSION, "decay": self.decay, "averages": dict(self._averages)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take saved averages, copied into this object's own tensors; the decay stays the one given here.

        Raises:
            StateError: other names or shapes, or a newer version.
        """
        if not isinstance(state, Mapping) or set(state) != {"version", "decay", "averages"}:
            raise StateError("Not the state of a ModelEMA: it needs exactly version, decay and averages.")
        if state["version"] > _VERSION:
            raise StateError(f"The state has version {state['version']}, this anybatch reads up to {_VERSION}.")
        averages = state["averages"]
        odd = sorted(set(averages) ^ set(self._averages))
        if odd:
            raise StateError(f"The state is of another model: {odd[:5]} are missing or unknown.")
        for name, average in self._averages.items():
            if averages[name].shape != average.shape:
                shapes = f"{list(averages[name].shape)} for {list(average.shape)}"
                raise StateError(f"The state is of another model: {name} has shape {shapes}.")
        for name, average in self._averages.items():
            average.copy_(averages[name])

    def _lerp_wide(self, average: Tensor, narrow: Tensor, weight: float) -> None:
        """`lerp_` of a wide average towards a narrow tensor, a scratch at a time."""
        if self._scratch is None or self._scratch.device != average.device:
            self._scratch = torch.empty(_SCRATCH, dtype=torch.float32, device=average.device)
        flat, source = average.view(-1), narrow.reshape(-1)
        for start in range(0, flat.numel(), _SCRATCH):
            part = source[start : start + _SCRATCH]
            wide = self._scratch[: part.numel()].copy_(part)
            flat[start : start + _SCRATCH].lerp_(wide, weight)


def _local(p: Tensor) -> Tensor:
    local: Tensor = getattr(p, "_local_tensor", p)
    return local


def _first(local: Tensor) -> Tensor:
    """The average before the first step: a copy, in float32 at least."""
    if local.dtype.itemsize >= 4:
        return local.clone()
    return local.to(torch.float32, memory_format=torch.contiguous_format)  # `_lerp_wide` goes through it flat

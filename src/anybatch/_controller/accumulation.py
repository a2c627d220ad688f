"""A choice of the accumulation while training: by the statistical efficiency, or by the schedule (Seesaw).

Both only return the number of backwards for the next step. The controller counts the backwards that happen, so tau has
no jump where the number changes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from math import exp, floor, inf, isnan
from typing import Any

from anybatch._controller.controller import Controller
from anybatch._controller.state import checked_numbers
from anybatch._errors import InvalidValueError, StateError, UsageError
from anybatch._numbers import MOST, positive, shown
from anybatch._scaling import Moments, scale_of_efficiency

# Share of the run, in tau, over which this averages the noise, and in which the batch at most doubles. The controller's
# own averages are too short: one low estimate of sqnorm would move the batch to its bound.
_HORIZON = 0.05
_WITHOUT_TOTAL = 1000.0  # base iterations: the memory of the paper's averages is 1000 / S steps


class Accumulation(ABC):
    """The bounds, the present number and the state of both ways."""

    def __init__(self, controller: Controller, *, bounds: tuple[int, int]) -> None:
        if not isinstance(controller, Controller):
            raise InvalidValueError(f"controller must be the result of anybatch.attach, got {shown(controller)}.")
        pair = bounds if isinstance(bounds, tuple | list) and len(bounds) == 2 else (0, 0)
        if any(isinstance(n, bool) or not isinstance(n, int) for n in pair) or not 1 <= pair[0] <= pair[1] <= MOST:
            raise InvalidValueError(f"bounds must be two whole numbers, 1 <= least <= most, got {shown(bounds)}.")
        if not controller._settings.batch.counts:
            raise UsageError(
                "The scale of this controller is a fixed number, so accumulation does not change it. Pass attach "
                'base_batch and micro_batch, or scale="count".'
            )
        self._controller = controller
        self._bounds = bounds
        total = controller.clock.total
        self._horizon = _WITHOUT_TOTAL if total is None else _HORIZON * total
        self._accumulation = float(bounds[0])
        self._state = {"variance": 0.0, "sqnorm": 0.0}
        self._unsubscribe: Callable[[], None] = lambda: None

    @property
    def accumulation(self) -> int:
        """The number of backwards for the next step, on every rank; it changes only with the clock."""
        return floor(self._accumulation + 1e-9)

    def _start(self) -> None:
        """Follow the clock, after a subclass has checked its arguments."""
        self._unsubscribe = self._controller.clock.subscribe(self._follow)

    def stop(self) -> None:
        """Stop following the clock; the number stays as it is."""
        self._unsubscribe()

    def state_dict(self) -> dict[str, float]:
        """A flat dictionary of numbers. It has a scale, so that the ranks and the micro-batch may change."""
        return {"scale": self._accumulation * self._backward(), **self._state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state, within this object's own bounds.

        Raises:
            StateError: other entries, or a value that is not a number or impossible.
        """
        values = checked_numbers(state, whose=f"a {type(self).__name__}")
        names = sorted(self.state_dict())
        if sorted(values) != names:
            raise StateError(f"The state needs exactly {names}, got {shown(sorted(values))}.")
        if values["scale"] <= 0 or values.get("peak", 0.0) < 0:
            raise StateError(f"The state is damaged: scale must be positive and peak not negative, got {values}.")
        self._accumulation = self._within(values.pop("scale") / self._backward())
        self._state = values

    def _follow(self, iterations: float) -> None:
        state, now = self._state, self._controller._run.running.averages.moments
        theta = exp(-iterations / self._horizon)
        if now.finite:
            state["variance"] = theta * state["variance"] + (1 - theta) * now.variance
            state["sqnorm"] = theta * state["sqnorm"] + (1 - theta) * now.sqnorm
        self._accumulation = self._within(self._wanted(iterations))

    def _within(self, accumulation: float) -> float:
        least, most = self._bounds
        return max(least, min(most, accumulation))

    def _noise(self) -> float:
        """The gradient noise scale over the horizon, in base batches; nan while unknown."""
        return Moments(self._state["variance"], self._state["sqnorm"]).noise_scale

    def _backward(self) -> float:
        """The size of one backward on every rank together, in base batches."""
        _, sample = self._controller._settings.batch.of_step(1, 1 / (self._controller.micro_batch or 1.0))
        return self._controller.ranks * sample

    @abstractmethod
    def _wanted(self, iterations: float) -> float:
        """The number before bounds and rounding, after the clock has moved by `iterations`."""


class BatchController(Accumulation):
    """Chooses the accumulation so that the statistical efficiency of a step stays above a target.

    A step of S base batches advances the clock by r base iterations. Its efficiency falls as S grows past the gradient
    noise scale:

        r(S) / S = (variance + sqnorm) / (variance + S * sqnorm)  >=  efficiency.

    The largest S grows and shrinks with the noise scale, and the accumulation with it. Only the batch changes: the
    learning rate and the clock follow the gain as at any batch.

    Args:
        controller: One with `AdaScale`, which measures the noise, and a scale that is counted: `base_batch` and
            `micro_batch`, or `scale="count"`.
        efficiency: The least progress of an example, relative to one of the base batch, in (0, 1).
        bounds: The least and the largest number of backwards of a step on each rank. The micro-batch, which memory
            bounds, does not change. The largest number bounds the time of a step. On one rank the least is 2: one
            gradient shows no noise.

    Raises:
        InvalidValueError: a value out of range.
        UsageError: the controller measures no noise, or its scale is fixed.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> controller = anybatch.attach(optimizer, model=model, total=50, base_batch=8, micro_batch=8)
        >>> batch = anybatch.BatchController(controller, efficiency=0.8, bounds=(2, 16))
        >>> while not controller.done:
        ...     n = batch.accumulation
        ...     for x in torch.randn(n, 8, 4):
        ...         (model(x).square().mean() / n).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> controller.steps < 50
        True

    Source:
        The efficiency is Pollux's (Qiao et al., OSDI 2021, Equation 6); McCandlish et al. 2018, Section 2.3, on growing
        the batch with the noise scale.

    Differs from the paper in:
        1. Pollux maximises throughput times efficiency over jobs and machines. Here `efficiency` is an argument.
        2. The moments are averaged over 5 % of the run, in which the batch at most doubles.
    """

    def __init__(self, controller: Controller, *, efficiency: float = 0.8, bounds: tuple[int, int]) -> None:
        super().__init__(controller, bounds=bounds)
        target = positive(efficiency)
        if target is None or target >= 1:
            raise InvalidValueError(f"efficiency must be in (0, 1), got {shown(efficiency)}.")
        measurement = controller._settings.measurement
        if measurement is None:
            raise UsageError("The rule of this controller measures no noise: pass attach rule=anybatch.AdaScale().")
        if bounds[0] == controller.ranks == 1 and not measurement.consecutive:
            raise InvalidValueError(
                "One gradient a step shows no noise: on one rank the lower bound must be at least 2."
            )
        self._efficiency = target
        self._start()

    def _wanted(self, iterations: float) -> float:
        noise, now = self._noise(), self._accumulation
        if isnan(noise):
            return now
        largest = scale_of_efficiency(self._efficiency, noise=noise) / self._backward()
        return min(largest, now * 2 ** (iterations / self._horizon))


class Seesaw(Accumulation):
    """Replaces a fall of the learning-rate schedule by a larger batch: fewer steps for the same examples.

    Where the schedule has fallen from its peak by a factor a, Seesaw multiplies the batch by a. The learning rate falls
    by sqrt(a) alone:

        accumulation = least * a        a = peak of lr(tau) so far / lr(tau).

    With `rule=anybatch.SquareRoot()`, whose factor is sqrt(S), the learning rate is `peak / sqrt(a)`. With `AdaScale`
    it follows the measured gain. The batch stops growing at the noise scale, beyond which the exchange is not valid.

    Args:
        controller: One with a scheduler, and a scale that is counted.
        bounds: The least and the largest number of backwards of a step on each rank, the least at the peak.

    Raises:
        InvalidValueError: bounds out of range.
        UsageError: the controller's scale is fixed, or it has no scheduler.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=40, gamma=0.25)
        >>> controller = anybatch.attach(optimizer, model=model, rule=anybatch.SquareRoot(), scheduler=scheduler,
        ...                              total=80, base_batch=8, micro_batch=8)
        >>> batch = anybatch.Seesaw(controller, bounds=(1, 16))
        >>> while not controller.done:
        ...     n = batch.accumulation
        ...     for x in torch.randn(n, 8, 4):
        ...         (model(x).square().mean() / n).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> n, controller.steps                                    # 40 steps of one backward, then 10 of four
        (4, 50)

    Source:
        Meterez et al., Seesaw, 2025: for normalised SGD and Adam, below the critical batch.

    Differs from the paper in:
        1. It follows any schedule, step by step, not only at chosen cuts.
        2. Under `AdaScale` the learning rate follows the gain instead of `peak / sqrt(a)`.
    """

    def __init__(self, controller: Controller, *, bounds: tuple[int, int]) -> None:
        super().__init__(controller, bounds=bounds)
        if not controller._drivers:
            raise UsageError("Seesaw follows the schedule, and this controller has none: pass attach the scheduler.")
        self._state["peak"] = controller.base_lr
        self._start()

    def _wanted(self, iterations: float) -> float:  # noqa: ARG002
        rate = self._controller.base_lr
        self._state["peak"] = max(self._state["peak"], rate)
        wanted = self._bounds[0] * self._state["peak"] / rate if rate > 0 else inf
        noise = self._noise()
        return wanted if isnan(noise) else min(wanted, noise / self._backward())

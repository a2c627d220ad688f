"""Optimizer steps by scale with their bands, and the critical scale."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, isfinite, log2

import torch
from torch import Tensor
from torch.nn.functional import pad

from anybatch._forecast.config import RuleConfig
from anybatch._forecast.curve import Samples, curves, resampled
from anybatch._forecast.simulate import simulate
from anybatch._forecast.time import StepTime

_DRAWS = 40
# Share of the bootstrap outside of the band, on each side.
_LEVEL = 0.05
# Bounds of log(actual steps / forecast steps) per (1 + doublings to a larger scale). Each is exceeded in 5 % of the
# cases over 18 tasks of equal weight (benchmarks/forecast_band.py, docs/forecast.md).
DOWN, UP = 0.034, 0.141
_TREND = 2.0  # half of the draws follow this multiple of an unfinished run's trend, the others none
_DOUBLINGS = 20  # range of the search for the critical scale


@dataclass(frozen=True)
class Estimate:
    """A forecast and its band.

    Args:
        value: The forecast; nan if it is unknown.
        low, high: The band.
    """

    value: float
    low: float
    high: float

    def times(self, factor: float) -> "Estimate":
        """Return the estimate and its band, multiplied by `factor`."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor)


class StepForecast:
    """Steps by scale, from the curves of the record (version 0) and of its bootstrap."""

    def __init__(
        self,
        found: Samples,
        scales: Sequence[float],
        *,
        rule: RuleConfig,
        time: StepTime,
        on_clock: bool,
        recorded: float,
    ) -> None:
        self._total, self._time, self._recorded = found.total, time, recorded
        self._scales = list(scales)
        doublings = (time.per_device * 2**k for k in range(_DOUBLINGS))
        self._lattice = [s for s in doublings if s <= 4 * found.total] or [time.per_device]
        generator = torch.Generator().manual_seed(0)
        trend = _TREND * torch.rand(_DRAWS, generator=generator, dtype=torch.float64).round()
        draws = resampled(found, versions=_DRAWS, generator=generator)
        versions = curves(
            found, trend=torch.cat([torch.full_like(trend[:1], 0.5), trend]), draws=pad(draws, (0, 0, 1, 0), value=1.0)
        )
        simulated = simulate(versions, [*self._scales, *self._lattice], rule=rule, on_clock=on_clock)
        self._simulated = dict(zip([*self._scales, *self._lattice], simulated, strict=True))

    def table(self) -> dict[float, Estimate]:
        """Return the steps at each scale, with the band."""
        columns = self._steps(self._scales)
        return {scale: self._estimate(scale, columns[scale].tolist()) for scale in self._scales}

    def critical(self) -> Estimate:
        """Return the scale of the smallest product of wall time and device time, over doublings of the devices."""
        columns = self._steps(self._lattice)
        middle, *ends = [self._critical(columns, which) for which in range(3)]
        value = middle[0]
        bands = [_quantiles(found[1:]) for found in (middle, *ends)]
        return Estimate(value, min(value, *(low for low, _ in bands)), max(value, *(high for _, high in bands)))

    def _critical(self, columns: dict[float, Tensor], which: int) -> list[float]:
        """Return the critical scale of each version, with one of the three times of `StepTime.step`."""
        time, products = self._time, []
        for scale in self._lattice:
            step = time.step(scale)[which] if isfinite(time.per_base) else 1.0
            products.append((columns[scale] ** 2 * step**2 * time.devices(scale)).log2())
        return [self._lattice[0] * 2 ** _lowest(column) for column in torch.stack(products, 1).tolist()]

    def _steps(self, scales: Sequence[float]) -> dict[float, Tensor]:
        """Clamp the steps, so that a larger batch never takes more steps or fewer examples."""
        columns = {1.0: torch.full_like(next(iter(self._simulated.values())), self._total)}
        for side in (sorted(s for s in scales if s > 1), sorted((s for s in scales if s < 1), reverse=True)):
            near = 1.0
            for scale in side:
                bounds = columns[near], columns[near] * near / scale
                columns[scale] = self._simulated[scale].clamp(torch.minimum(*bounds), torch.maximum(*bounds))
                near = scale
        return columns

    def _estimate(self, scale: float, column: Sequence[float]) -> Estimate:
        """Return the wider of the bootstrap's band and the errors on other tasks, within the possible steps."""
        value, (low, high) = column[0], _quantiles(column[1:])
        least, most = sorted((self._total / scale, self._total))
        doublings = log2(scale / self._recorded)
        # To a smaller scale the errors have the other sign. They were measured from one doubling on, where the reach is
        # 1 + d. Below one doubling the band narrows linearly to the record's own scale.
        down, up = (DOWN, UP) if doublings > 0 else (UP, DOWN)
        reach = min(1 + abs(doublings), 2 * abs(doublings))
        low, high = min(low, value * exp(-down * reach)), max(high, value * exp(up * reach))
        return Estimate(value, max(low, least), min(high, most))


def _lowest(values: Sequence[float]) -> float:
    """Return the position of the minimum, interpolated by a parabola through three points."""
    i = min(range(len(values)), key=values.__getitem__)
    if i in (0, len(values) - 1):
        return float(i)
    left, middle, right = values[i - 1 : i + 2]
    bend = left - 2 * middle + right
    return i + (left - right) / (2 * bend) if bend > 0 else float(i)


def _quantiles(values: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(values)
    k = int(_LEVEL * len(ordered))
    return ordered[k], ordered[-1 - k]

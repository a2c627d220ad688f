"""Forecast of a run's cost at every batch size, from the record of one run."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import ceil, isfinite, nan
from os import PathLike, fspath
from typing import Any

from anybatch._errors import InvalidValueError
from anybatch._forecast.bounds import FIELDS, SECONDS, moved, of_header, scale_within, walk, within
from anybatch._forecast.config import RuleConfig, longer_momentum, rule_of
from anybatch._forecast.curve import Samples, samples
from anybatch._forecast.steps import Estimate, StepForecast
from anybatch._forecast.time import StepTime, step_time
from anybatch._html import html_table
from anybatch._numbers import median, positive
from anybatch._record import Columns, Run, iter_record, read_columns
from anybatch._scaling import noise_of_efficiency, scale_of_efficiency

_EFFICIENCY = 0.15  # below it, a note


@dataclass(frozen=True)
class ScaleForecast:
    """The cost of a whole run at one scale.

    Args:
        scale: S.
        devices: Number of devices of a step.
        steps: Optimizer steps.
        examples: Examples of the run in the unit of `base_batch`, or base batches if the record has none.
        efficiency: Statistical efficiency, the mean gain over S.
        step_seconds: Seconds of one step; nan if no time is known. If all timed steps had one other size, it is a range
            from the same time to a time in proportion to the size.
        seconds: Wall time; nan if no time is known. Its band combines those of `steps` and `step_seconds`.
        device_hours: Wall time times devices.
        cost: Device hours times the price; nan without a price.
    """

    scale: float
    devices: int
    steps: Estimate
    examples: Estimate
    efficiency: Estimate
    step_seconds: Estimate
    seconds: Estimate
    device_hours: Estimate
    cost: Estimate

    @property
    def gain(self) -> Estimate:
        """The mean gain over the run, `total / steps`: `scale_hyperparameters` maps constant values by it."""
        return self.efficiency.times(self.scale)

    @property
    def iterations(self) -> Estimate:
        """The old name of `steps`."""
        warnings.warn("ScaleForecast.iterations is now ScaleForecast.steps.", DeprecationWarning, stacklevel=2)
        return self.steps


@dataclass(frozen=True)
class Forecast:
    """The cost of a run at several batch sizes.

    Args:
        scales: A forecast for each scale, in ascending order.
        critical: The scale of the smallest product of wall time and device time. Up to it, a doubling of the devices
            divides the wall time by sqrt(2) or more; beyond it, by less.
        total: Base iterations of the forecast run.
        recorded: The record's own scale, the median of its steps.
        unit: The unit of `examples`.
        notes: Assumptions and limits of the numbers.
    """

    scales: tuple[ScaleForecast, ...]
    critical: Estimate
    total: float
    recorded: float
    unit: str
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the forecast as nested dictionaries."""
        return asdict(self)

    def _repr_html_(self) -> str:
        """The table that a notebook shows."""
        timed = isfinite(self.scales[0].seconds.value)
        header = ["scale", "devices", "steps", self.unit, "efficiency", *(["hours"] if timed else [])]
        rows = []
        for each in self.scales:
            steps, hours = each.steps, each.seconds.times(1 / 3600)
            row = [f"{each.scale:g}", f"{each.devices}", f"{steps.value:,.0f} ({steps.low:,.0f} to {steps.high:,.0f})"]
            row += [f"{each.examples.value:,.0f}", f"{each.efficiency.value:.1%}"]
            rows.append([*row, *([f"{hours.low:.3g} to {hours.high:.3g}"] if timed else [])])
        c = self.critical
        critical = f"Critical scale: {c.value:.3g} ({c.low:.3g} to {c.high:.3g})."
        return html_table(rows, header=header, notes=[critical, *self.notes])


def forecast(
    record: Run | str | PathLike[str],
    scales: Sequence[float],
    *,
    per_device: float | None = None,
    seconds_per_step: float | None = None,
    sync_seconds: float = 0.0,
    price_per_device_hour: float | None = None,
) -> Forecast:
    """Forecast steps, examples, efficiency, wall time and cost at other scales from the record of one run.

        steps(S) = number of steps until the sum of r(S; sigma^2(tau), mu^2(tau)) reaches the total
        examples = steps * S * base_batch         efficiency = total / (steps * S)

    `sigma^2(tau)` and `mu^2(tau)` are the record's raw moments, smoothed along the clock. r is the gain with the rule's
    own averages. Without their memory `steps = T/S + (1 - 1/S) * F`, where F is the integral of
    `mu^2 / (sigma^2 + mu^2)` over tau: the part of the run that no batch shortens. For the wall time, the number of
    devices grows with the batch.

        devices = ceil(S / per_device)      step = gradient of S / devices base batches + sync_seconds if devices > 1

    Steps of one size per device do not show the time of another size. The gradient's time is then a range, from the
    same time to a time in proportion to the size. The forecast is its geometric mean. Record at least 8 steps of each
    of two sizes: a line through both then gives the time.

    A band is the wider of two. One is the record's noise, 90 % of a bootstrap over blocks of tau. The other is the
    error measured on other tasks, for d doublings beyond the record's scale: from `exp(-.034 (1 + d))` to
    `exp(.141 (1 + d))` times the forecast. The band is fitted to contain 90 % of the cases. It contained 88 % on a task
    and 81 % on a kind of data that the fit left out (docs/forecast.md). It does not include the noise of the seconds.

    Args:
        record: A run with `rule=AdaScale()`, or the path of its record. The scale may be any and may change during the
            run. It needs two or more gradients a step.
        scales: Scales to forecast, positive.
        per_device: Base batches of one device in a step, positive; by default those of one rank in the record.
        seconds_per_step: Seconds of a step in which each device has `per_device` base batches, positive. By default the
            record's median. It does not give the time of another size per device.
        sync_seconds: Seconds of synchronisation of a step on more than one device, not negative. A record of several
            ranks includes theirs.
        price_per_device_hour: Price in any currency, not negative.

    Returns:
        A `Forecast` with `scales`, `critical`, `total`, `recorded`, `unit` and `notes`. The notes name assumptions and
        limits, such as an unfinished run. Each of its scales is a `ScaleForecast` with `scale`, `devices`, `steps`,
        `examples`, `efficiency`, `gain`, `seconds`, `device_hours`, `cost` and `step_seconds`. The last eight and
        `critical` are each an `Estimate` with `value`, `low` and `high`.

    Raises:
        InvalidValueError: The record has no step with a variance, a value is out of range, the file is not a record, or
            a step in it is impossible.
        StateError: A newer anybatch wrote the record.

    Example:
        >>> def step(i):                         # a run at S = 2 with sigma^2 = mu^2 = 1 all the time: gain 4/3
        ...     return anybatch.StepRecord(i, 4 / 3 * i, 4 / 3, 2, 2, 1, 1, 1, 1, 4 / 3, 0.1, 4 / 3, 1, 0.5)
        >>> path = tmp_path / "run.jsonl"
        >>> record = anybatch.RunRecord(path, config={"total": 100, "base_batch": 32})
        >>> for i in range(75):
        ...     record.write(step(i + 1))
        >>> record.close()
        >>> found = anybatch.forecast(path, [1, 8])
        >>> [(s.scale, s.steps.value, round(s.efficiency.value, 2)) for s in found.scales]
        [(1.0, 100.0, 1.0), (8.0, 58.0, 0.22)]

    Source:
        Johnson et al., AdaScale SGD, ICML 2020 (the gain). McCandlish et al. 2018, Section 2 (steps against examples:
        their critical batch minimises the product). Qiao et al., Pollux, OSDI 2021, Section 3 (statistical efficiency,
        the time of a step).
    """
    run = record if isinstance(record, Run) else read_columns(record, {*FIELDS, "skipped"})
    name = "The record" if isinstance(record, Run) else f"The record {fspath(record)!r}"
    wanted = sorted({scale_within("scales", scale) for scale in scales})
    if not wanted:
        raise InvalidValueError("scales is empty: pass at least one, such as [1, 8, 64].")
    share = None if per_device is None else scale_within("per_device", per_device)
    full = None if seconds_per_step is None else within("seconds_per_step", seconds_per_step, least=1e-12, most=1e12)
    sync = within("sync_seconds", sync_seconds, least=SECONDS[0], most=SECONDS[1])
    price = nan
    if price_per_device_hour is not None:
        price = within("price_per_device_hour", price_per_device_hour, least=0, most=1e12)
    steps = moved(run) if isinstance(run, Columns) else None
    if steps is None:
        steps = walk(record.steps if isinstance(record, Run) else iter_record(record), record=name)
    total = of_header(run.config, "total", record=name)
    known = total is not None
    total = steps["tau"][-1].item() if total is None else total
    ranks = of_header(run.config, "ranks", record=name) or 1.0
    time = step_time(steps, ranks=ranks, per_device=share, seconds_per_step=full, sync_seconds=sync)
    found = samples(steps, total=total, record=name)
    rule = rule_of(run.config, noise_factor=of_header(run.config, "noise_factor", record=name) or 1.0)
    recorded = median(steps["scale"])
    steps_by_scale = StepForecast(found, wanted, rule=rule, time=time, on_clock=known, recorded=recorded)
    table = steps_by_scale.table()
    unit = of_header(run.config, "base_batch", record=name)
    costs = tuple(_scale(s, table[s], total=total, time=time, unit=unit or 1.0, price=price) for s in wanted)
    return Forecast(
        scales=costs,
        critical=steps_by_scale.critical(),
        total=total,
        recorded=recorded,
        unit="base batches" if unit is None else "examples",
        notes=(*_inefficient(costs, unit), *_notes(run, found, known=known, rule=rule, time=time, scales=wanted)),
    )


def _scale(scale: float, steps: Estimate, *, total: float, time: StepTime, unit: float, price: float) -> ScaleForecast:
    step = Estimate(*time.step(scale))
    seconds = Estimate(steps.value * step.value, steps.low * step.low, steps.high * step.high)
    hours = seconds.times(time.devices(scale) / 3600)
    return ScaleForecast(
        scale=scale,
        devices=time.devices(scale),
        steps=Estimate(*(float(ceil(n - 1e-6)) for n in (steps.value, steps.low, steps.high))),
        examples=steps.times(scale * unit),
        efficiency=Estimate(*(total / (n * scale) for n in (steps.value, steps.high, steps.low))),
        step_seconds=step,
        seconds=seconds,
        device_hours=hours,
        cost=hours.times(price),
    )


def _inefficient(costs: Sequence[ScaleForecast], unit: float | None) -> Iterator[str]:
    """A note on the scales at which an example is worth little."""
    low = [each for each in costs if each.efficiency.value < _EFFICIENCY]
    if not low:
        return
    noise = noise_of_efficiency(low[0].efficiency.value, scale=low[0].scale)
    half = scale_of_efficiency(0.5, noise=noise)
    worth = ", ".join(f"{each.efficiency.value:.1%} at {each.scale:g}" for each in low)
    batch = "" if unit is None else f", a batch of {half * unit:.3g}"
    yield (
        f"An example is worth {worth} of one at scale 1, on average over the run. The largest scale at which it is "
        f"worth 50 % is about {half:.3g}{batch}."
    )


def _notes(
    run: Run | Columns, found: Samples, *, known: bool, rule: RuleConfig, time: StepTime, scales: Sequence[float]
) -> Iterator[str]:
    if not known:
        yield f"The record has no total: the forecast ends at its last tau, {found.end:.6g}."
    elif found.end < 0.999 * found.total:
        yield (
            f"The record ends at {found.end / found.total:.0%} of the run: the moments of its last quarter are "
            "extrapolated with half of their trend, and the bands with none to twice the trend."
        )
    if found.beyond:
        yield f"{found.beyond} steps that began beyond the total of {found.total:g} are left out."
    if longer_momentum(run.config):
        yield (
            "A momentum that is not on the clock has a longer memory at a larger scale, which changes training: runs "
            "there took fewer steps than forecast, at least 0.7 times as many. Use the band's lower end."
        )
    if isinstance(name := run.config.get("optimizer"), str) and "Adam" in name:
        yield (
            "With the Adam family and a learning rate near the largest that trains, larger scales took more steps than "
            "forecast: 1.28 times as many in the median of the measured cases. Use the band's upper end."
        )
    if not rule.adascale:
        yield "The run did not use AdaScale: the forecast is for AdaScale()."
    elif rule.estimator == "paper":
        yield "The paper's estimator clips each step's noise, which is not simulated: small scales take more steps."
    if len(run.ranks) > 1:
        yield (
            f"The run was resumed on another number of ranks ({', '.join(map(str, run.ranks))}): the share of a device "
            "is computed with the last number; give per_device for another share."
        )
    if run.torn:
        yield f"{run.torn} lines of the record could not be read."
    if not isfinite(time.per_base):
        yield "The record has no seconds: give seconds_per_step for wall time and cost."
    elif (positive(run.config.get("ranks")) or 1) > 1:
        yield "The record's seconds include the synchronisation of its own ranks."
    steps = {scale: time.step(scale) for scale in scales}
    if wide := [f"{scale:g}" for scale, (_, low, high) in steps.items() if low < high]:
        yield (
            f"The timed steps have {time.measured:g} base batches per device and do not show the time of other sizes. "
            f"So wall time, device time and cost are ranges at scale {', '.join(wide)}: from a step of the same time "
            "to one in proportion to the size. Record at least 8 steps of a second size in the run."
        )

"""forecast: from one logged run at any small scale, what every other batch size would cost."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil, isfinite, nan
from os import PathLike, fspath
from typing import Any

from anybatch._errors import InvalidValueError
from anybatch._forecast.bounds import FIELDS, SECONDS, as_columns, moved, of_header, scale_within, walk, within
from anybatch._forecast.config import RuleConfig, adam, longer_momentum, rule_of
from anybatch._forecast.curve import Samples, samples
from anybatch._forecast.steps import Estimate, StepForecast
from anybatch._forecast.time import StepTime, step_time
from anybatch._numbers import median, positive
from anybatch._record import Columns, Run, StepRecord, iter_record, read_columns


@dataclass(frozen=True)
class ScaleForecast:
    """What a whole run costs at one scale.

    Args:
        scale: S.
        devices: how many devices a step takes.
        steps: optimizer steps.
        examples: what the run sees, in the unit of `base_batch`; in base batches where the record has none.
        efficiency: statistical efficiency, the mean gain over S.
        step_seconds: seconds of one step; nan where no time is known. Where all steps that were timed had one size and
            these have another, it is a range from the same time to one in proportion to the size.
        seconds: wall time; nan where no time is known. Its band holds that of the steps and of `step_seconds`.
        device_hours: wall time times devices.
        cost: device hours times the price; nan without one.
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
    def iterations(self) -> Estimate:
        """The old name of `steps`."""
        warnings.warn("ScaleForecast.iterations is now ScaleForecast.steps.", DeprecationWarning, stacklevel=2)
        return self.steps


@dataclass(frozen=True)
class Forecast:
    """What every batch size would cost.

    Args:
        scales: a forecast for each scale, in ascending order.
        critical: the scale at which wall time times device time is smallest: up to it a doubling of the devices brings
            the wall time down by 1 / sqrt(2) or more, beyond it by less.
        total: base iterations that were forecast.
        recorded: the record's own scale, the median of its steps.
        unit: what `examples` counts.
        notes: what the numbers rest on, and where they are weak.
    """

    scales: tuple[ScaleForecast, ...]
    critical: Estimate
    total: float
    recorded: float
    unit: str
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self)


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

    where `sigma^2(tau)` and `mu^2(tau)` are the record's raw moments smoothed along the clock, and r is the gain that
    the rule's own averages would give. Without their memory `steps = T/S + (1 - 1/S) * F`, where F is the integral of
    `mu^2 / (sigma^2 + mu^2)` over tau: the part of the run that no batch makes shorter.
    The wall time is that of devices that grow with the batch:

        devices = ceil(S / per_device)      step = gradient of S / devices base batches + sync_seconds if devices > 1

    Steps of one size per device say nothing of the time that another size takes. The gradient of a step then takes from
    the same time to a time in proportion to the size, and the forecast is the middle by ratios. Record steps of two
    sizes, at least 8 of each, for a line through both.

    A band is the wider of two: the record's noise, 90 % of a bootstrap over blocks of tau, and for d doublings beyond
    the record's scale the errors measured on other tasks, from `exp(-.034 (1 + d))` to `exp(.141 (1 + d))` times the
    forecast. They are made to hold in 90 % of the cases; on a task left out from their making they held in 88 %, on a
    kind of data left out in 81 % (docs/forecast.md). They do not hold the noise of the seconds.

    Args:
        record: a run with `rule=AdaScale()`, at any scale, which may change during the run; or the path of its record.
            It needs two or more gradients a step.
        scales: scales to forecast, positive.
        per_device: base batches that one device takes in a step, positive; by default what one rank took in the record.
        seconds_per_step: seconds of a step in which each device takes `per_device`, positive; by default the record's
            own median. Another size per device is not known by it.
        sync_seconds: seconds of synchronisation that a step takes with more than one device, not negative. The seconds
            of a record of several ranks hold theirs already.
        price_per_device_hour: price, in any currency, not negative.

    Returns:
        A `Forecast`: `scales`, `critical`, `total`, `recorded`, `unit`, and `notes`, which say what it rests on, an
        unfinished run among others. Each of its scales is a `ScaleForecast`: `scale`, `devices`, `steps`,
        `examples`, `efficiency`, `seconds`, `device_hours`, `cost` and `step_seconds`. The last seven are each an
        `Estimate` with `value`, `low` and `high`, and so is `critical`.

    Raises:
        InvalidValueError: no step of the record shows a variance, a value is out of range, the file is no record, or a
            step of it is none that a run takes.
        StateError: it was written by a newer anybatch.

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
        Johnson et al., AdaScale SGD, ICML 2020 (the gain); McCandlish et al. 2018, Section 2 (steps against examples:
        their critical batch is where the product of the two is smallest); Qiao et al., Pollux, OSDI 2021, Section 3
        (statistical efficiency, the time of a step).
    """
    run = record if isinstance(record, Run) else read_columns(record, {*FIELDS, "skipped"})
    name = "The record" if isinstance(record, Run) else f"The record {fspath(record)!r}"
    wanted = sorted({scale_within("scales", scale) for scale in scales})
    if not wanted:
        raise InvalidValueError("scales is empty: give at least one, such as [1, 8, 64].")
    share = None if per_device is None else scale_within("per_device", per_device)
    full = None if seconds_per_step is None else within("seconds_per_step", seconds_per_step, least=1e-12, most=1e12)
    sync = within("sync_seconds", sync_seconds, least=SECONDS[0], most=SECONDS[1])
    price = (
        None
        if price_per_device_hour is None
        else within("price_per_device_hour", price_per_device_hour, least=0, most=1e12)
    )
    steps = moved(run) if isinstance(run, Columns) else None
    if steps is None:
        each = record.steps if isinstance(record, Run) else iter_record(record)
        steps = as_columns(walk((step for step in each if isinstance(step, StepRecord)), record=name))
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
    return Forecast(
        scales=tuple(_scale(s, table[s], total=total, time=time, unit=unit or 1.0, price=price) for s in wanted),
        critical=steps_by_scale.critical(),
        total=total,
        recorded=recorded,
        unit="base batches" if unit is None else "examples",
        notes=(*_notes(run, found, known=known, rule=rule, time=time), *_sizes(time, wanted)),
    )


def _scale(
    scale: float, steps: Estimate, *, total: float, time: StepTime, unit: float, price: float | None
) -> ScaleForecast:
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
        cost=hours.times(nan if price is None else price),
    )


def _sizes(time: StepTime, scales: Sequence[float]) -> list[str]:
    """A note on the scales whose steps have a size that was not timed."""
    steps = {scale: time.step(scale) for scale in scales}
    wide = [f"{scale:g}" for scale, (_, low, high) in steps.items() if low < high]
    if not wide:
        return []
    return [
        f"The steps that were timed gave each device {time.measured:g} base batches, which says nothing of other "
        f"sizes. So wall time, device time and cost are ranges at scale {', '.join(wide)}: from a step of the same "
        "time to one in proportion to the size. For a forecast, record 8 steps or more of a second size in the run."
    ]


def _notes(run: Run | Columns, found: Samples, *, known: bool, rule: RuleConfig, time: StepTime) -> list[str]:
    notes = []
    if not known:
        notes.append(f"The record names no total: forecast up to its last tau, {found.end:.6g}.")
    elif found.end < 0.999 * found.total:
        notes.append(
            f"The record ends at {found.end / found.total:.0%} of the run: beyond it, its last quarter's moments go on "
            "with half of their trend, and the bands span none to twice of it."
        )
    if found.beyond:
        notes.append(f"{found.beyond} steps that began beyond the total of {found.total:g} are left out.")
    if longer_momentum(run.config):
        notes.append(
            "A momentum that is not on the clock is a longer memory at a larger scale, which changes training itself: "
            "runs there took fewer steps than forecast, 0.7 times as many at the least. Look at the band's lower end."
        )
    if adam(run.config):
        notes.append(
            "With the Adam family and a rate near the largest that trains, larger scales took more steps than "
            "forecast: 1.28 times as many in the median of what was measured. Look at the band's upper end."
        )
    if not rule.adascale:
        notes.append("The record is not AdaScale's: this is what AdaScale() would take.")
    elif rule.estimator == "paper":
        notes.append("The paper's estimator clips each step's noise, which is not seen here: small scales take more.")
    if len(run.ranks) > 1:
        notes.append(
            f"The run was resumed on another number of ranks ({', '.join(map(str, run.ranks))}): what one device takes "
            "is reckoned with the last number; give per_device where that is not meant."
        )
    if run.torn:
        notes.append(f"{run.torn} lines of the record could not be read.")
    if not isfinite(time.per_base):
        notes.append("The record has no seconds: give seconds_per_step for wall time and cost.")
    elif (positive(run.config.get("ranks")) or 1) > 1:
        notes.append("The record's seconds hold the synchronisation of its own ranks.")
    return notes

"""Progressive scaling: other batches from chosen points of the clock on."""

from collections.abc import Mapping
from typing import Self

from anybatch._errors import InvalidValueError
from anybatch._numbers import positive, real, shown
from anybatch._scaling import Clock

_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


class Progressive:
    """The scale of the batch as a function of tau, constant between chosen points.

        scale(tau) = scales[largest start <= tau]

    Under a controller, accumulate `scale(controller.tau)` micro-batches of the base batch. It counts them, and the
    learning rate, the schedule and the averages follow.

    Args:
        scales: maps each start, in base iterations, to its scale, batch / base batch; one start is 0.

    Raises:
        InvalidValueError: no start at 0, a negative start, or a scale that is not positive.

    Example:
        >>> progressive = anybatch.Progressive({0: 1, 20: 4})
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> controller = anybatch.attach(optimizer, model=model, rule=anybatch.Linear(), total=60, scale="count")
        >>> while not controller.done:
        ...     parts = int(progressive.scale(controller.tau))
        ...     for x in torch.randn(parts, 8, 4):
        ...         (model(x).square().mean() / parts).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> controller.steps, controller.scale                      # 20 steps of one part, 10 of four
        (30, 4.0)

    Source:
        Busbridge et al., How to Scale Your EMA, NeurIPS 2023 (progressive scaling).

    Differs from the paper in:
        1. The points are on the clock, not in epochs.
    """

    def __init__(self, scales: Mapping[float, float]) -> None:
        if not isinstance(scales, Mapping):
            raise InvalidValueError(f"scales maps starts to scales, such as {{0: 1, 20: 4}}; got {shown(scales)}.")
        for start, scale in scales.items():
            if positive(scale) is None:
                raise InvalidValueError(f"A scale is batch / base batch, positive and finite; got {shown(scale)}.")
            _check_tau("A start", start)
        if 0 not in scales:
            raise InvalidValueError(f"scales needs a start at 0, got {sorted(scales)}.")
        self.scales: dict[float, float] = dict(sorted(scales.items()))

    @classmethod
    def parse(cls, schedule: str, *, base_batch: float, tokens: float = 1) -> Self:
        """Read Megatron-LM's `--step-batch-size-schedule`: `"0:768 250B:1536"`.

            start = number / (tokens * base_batch)          scale = batch / base_batch

        A start is then in base iterations of a fixed rule, which advances the clock by the scale. Under `AdaScale` the
        clock advances by less, and the same start comes after more tokens.

        Args:
            schedule: pairs of a number of tokens and a batch in sequences, separated by spaces. A number may end with
                K, M, B or T: 1e3, 1e6, 1e9 or 1e12.
            base_batch: the batch that the hyperparameters were tuned for, in sequences; positive.
            tokens: the length of a sequence, positive. Leave it out if the numbers count sequences.

        Raises:
            InvalidValueError: a pair in another form, a start given twice, or a value out of range.

        Example:
            >>> anybatch.Progressive.parse("0:768 250B:1536", base_batch=768, tokens=4096).scales
            {0.0: 1.0, 79472.85970052083: 2.0}
        """
        for name, value in {"base_batch": base_batch, "tokens": tokens}.items():
            if positive(value) is None:
                raise InvalidValueError(f"{name} must be positive and finite, got {shown(value)}.")
        scales: dict[float, float] = {}
        for pair in schedule.split() if isinstance(schedule, str) else [schedule]:
            number, _, batch = pair.partition(":") if isinstance(pair, str) else ("", "", "")
            unit = _UNITS.get(number[-1:].upper(), 1.0)
            try:
                start = float(number[:-1] if unit > 1 else number) * unit / (tokens * base_batch)
                scale = float(batch) / base_batch
            except ValueError:
                raise InvalidValueError(
                    f'schedule has pairs of tokens and batch, such as "0:768 250B:1536"; got {shown(pair)}.'
                ) from None
            if start in scales:
                raise InvalidValueError(f"schedule has the start {number} twice: {shown(schedule)}.")
            scales[start] = scale
        return cls(scales)

    def scale(self, tau: float) -> float:
        """The scale at `tau`, base iterations, up to the rounding of a long sum.

        Raises:
            InvalidValueError: `tau` is negative, or not a finite number.
        """
        clock = Clock()
        clock.tau = _check_tau("tau", tau)
        return float(next(s for start, s in reversed(self.scales.items()) if clock.reached(start)))


def _check_tau(name: str, value: object) -> float:
    tau = real(value)
    if tau is None or tau < 0:
        raise InvalidValueError(f"{name} is a number of base iterations, at least 0; got {shown(value)}.")
    return tau

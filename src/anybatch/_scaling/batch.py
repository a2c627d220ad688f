"""Base batch, micro-batch, ranks and accumulation: how big a step is, in base batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from anybatch._errors import InvalidValueError
from anybatch._numbers import positive, shown

_THE_THREE_WAYS = (
    "Say the scale of a step in exactly one way:\n"
    "  base_batch=256, micro_batch=64   the batch it was tuned for, and what each backward on each rank sees\n"
    "                                   (both in examples, or both in tokens),\n"
    '                                   or micro_batch="auto": the first dimension of what each forward gets;\n'
    "  scale=16                         every step is 16 base batches;\n"
    "  scale=1                          every step is the base batch, and training is only measured; beside it\n"
    "                                   base_batch=256 says how large that is, for noise scales in examples;\n"
    '  scale="count"                    every backward on every rank is one base batch.'
)


@dataclass(frozen=True)
class BatchSize:
    """How a step's scale is known: exactly one of a pair of sizes, a number, or `"count"`.

    For a step of N micro-batches of `b_i` examples, whose gradients are averaged with equal weights:

        size  = N / sum_i (1 / b_i)                 the micro-batches' harmonic mean, b when all are equal
        sample = size / base_batch                  one sample, in base batches
        scale = N * sample                          S

    With unequal micro-batches the harmonic mean is exact, not a convention: the variance of an equally weighted mean of
    gradients with variances `v / b_i` is `v / (N * size)`. `examples` is the size of the data, if it was said. Beside a
    scale of 1 `base_batch` says no scale, but in what the noise scale is told.
    """

    base_batch: float | None
    micro_batch: float | Literal["auto"] | None
    scale: float | Literal["count"] | None
    examples: float | None = None

    def __post_init__(self) -> None:
        beside = self.base_batch is not None and positive(self.scale) == 1
        pair = (self.base_batch is not None and not beside, self.micro_batch is not None)
        if any(pair) == (self.scale is not None) or (any(pair) and not all(pair)):
            given = ", ".join(f"{n}={shown(v)}" for n, v in vars(self).items() if v is not None and n != "examples")
            raise InvalidValueError(f"Got {given or 'none of base_batch, micro_batch, scale'}. {_THE_THREE_WAYS}")
        for name, value in vars(self).items():
            if value is not None and (name, value) not in (("scale", "count"), ("micro_batch", "auto")):
                check_positive(name, value)
        if self.examples is not None and (self.base_batch is None or self.examples <= self.base_batch):
            raise InvalidValueError(
                f"examples is the size of the data, larger than base_batch and in its unit; got examples="
                f"{self.examples:g}, base_batch={self.base_batch}."
            )

    @property
    def population(self) -> float | None:
        """Base batches of a pass over the data; `None` where the size of the data was not said."""
        return None if self.examples is None or self.base_batch is None else self.examples / self.base_batch

    @property
    def only_measured(self) -> bool:
        """Whether it was said that training is only measured: a scale of 1, and how large that batch is."""
        return self.scale == 1 and self.base_batch is not None

    @property
    def counts(self) -> bool:
        """Whether backwards must be counted to know the scale."""
        return self.scale is None or self.scale == "count"

    def of_step(self, count: int, inverse_sizes: float, *, effective: float | None = None) -> tuple[float, float]:
        """The pair `(scale, sample)` of a step of `count` micro-batches with `inverse_sizes` = sum of `1 / b_i`.

        In a weighted mean a sample is as large as if there were `effective` equal ones.
        """
        share = 1.0 if effective is None else count / effective
        if self.scale == "count":
            return float(count), share
        if self.base_batch is not None and self.scale is None:
            sample = count / inverse_sizes / self.base_batch
            return count * sample, sample * share
        scale = float(self.scale or 1)
        return scale, scale / count * share


def check_positive(name: str, value: object) -> float:
    """`value` as a float, or an error that names it."""
    number = positive(value)
    if number is None:
        raise InvalidValueError(f"{name} must be a positive, finite number, got {shown(value)}.")
    return number


def check_steps(name: str, value: object) -> None:
    """Raise if `value` is no number of steps."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidValueError(f"{name} is a number of steps, at least 1; got {shown(value)}.")


def split(batch: Any, n: int) -> Iterator[Any]:
    """Split a batch into `n` equal micro-batches, so that one device sees the noise of its gradient.

    Every tensor in `batch` is cut along its first dimension into `n` contiguous views; lists, tuples, named tuples and
    dictionaries keep their structure, anything else is repeated as it is. Backward each part with its loss divided by
    `n`; the gradient is that of the whole batch.

    Args:
        batch: a tensor `[B, ...]`, or a list, tuple or dictionary of batches.
        n: number of parts; positive, and a divisor of every first dimension.

    Returns:
        An iterator over the `n` parts.

    Raises:
        InvalidValueError: `n` is not positive, or does not divide a first dimension. Parts of unequal size would
            make the mean of their mean losses another number than the mean loss of the batch.

    Example:
        >>> x, y = torch.arange(6.).view(6, 1), torch.arange(6)
        >>> [part_y.tolist() for part_x, part_y in anybatch.split((x, y), 2)]
        [[0, 1, 2], [3, 4, 5]]
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InvalidValueError(f"n must be a positive integer, got {n!r}.")
    _check_divisible(batch, n)
    return (_part(batch, i, n) for i in range(n))


def _check_divisible(batch: Any, n: int) -> None:
    if isinstance(batch, Tensor):
        if batch.dim() == 0 or batch.shape[0] % n:
            shape = list(batch.shape)
            raise InvalidValueError(
                f"A tensor of shape {shape} cannot be split into {n} equal parts along its first dimension. "
                f"Choose a divisor of the batch, and drop a last, partial batch (drop_last=True)."
            )
    elif isinstance(batch, dict):
        for value in batch.values():
            _check_divisible(value, n)
    elif isinstance(batch, list | tuple):
        for value in batch:
            _check_divisible(value, n)


def _part(batch: Any, i: int, n: int) -> Any:
    if isinstance(batch, Tensor):
        size = batch.shape[0] // n
        return batch[i * size : (i + 1) * size]
    if isinstance(batch, dict):
        return {key: _part(value, i, n) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_part(value, i, n) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_part(value, i, n) for value in batch)
    return batch

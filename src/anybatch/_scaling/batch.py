"""The size of a step in base batches, from base batch, micro-batch, ranks and accumulation."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from anybatch._errors import InvalidValueError
from anybatch._numbers import positive, shown

_THE_THREE_WAYS = (
    "State the scale of a step in exactly one way:\n"
    "  base_batch=256, micro_batch=64   the batch of the tuning, and that of each backward on each rank\n"
    "                                   (both in examples, or both in tokens),\n"
    '                                   or micro_batch="auto": the first dimension of each forward\'s input;\n'
    "  scale=16                         every step is 16 base batches;\n"
    "  scale=1                          every step is the base batch, and training is only measured; base_batch=256\n"
    "                                   may give its size, for noise scales in examples;\n"
    '  scale="count"                    every backward on every rank is one base batch.'
)


@dataclass(frozen=True)
class BatchSize:
    """The source of a step's scale: exactly one of a pair of sizes, a number, or `"count"`.

    A step averages, with equal weights, the gradients of N micro-batches of `b_i` examples:

        S = N * sample        sample = size / base_batch        size = N / sum_i (1 / b_i)

    The harmonic mean `size` is exact. Gradients of variances `v / b_i` have an equally weighted mean of the variance
    `v / (N * size)`. `examples` is the size of the data, or `None`. With `scale=1`, `base_batch` only sets the unit of
    the noise scale.
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
        """Base batches of a pass over the data; `None` where the size of the data is not given."""
        return None if self.examples is None or self.base_batch is None else self.examples / self.base_batch

    @property
    def only_measured(self) -> bool:
        """Whether training is only measured: the scale is 1, and `base_batch` is the size of that batch."""
        return self.scale == 1 and self.base_batch is not None

    @property
    def counts(self) -> bool:
        """Whether backwards must be counted to know the scale."""
        return self.scale is None or self.scale == "count"

    def of_step(self, count: int, inverse_sizes: float, *, effective: float | None = None) -> tuple[float, float]:
        """The pair `(scale, sample)` of a step of `count` micro-batches with `inverse_sizes` = sum of `1 / b_i`.

        A weighted mean has the variance of a mean of `effective` equal samples.
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
    """`value` as a float; an error with its name where it is not positive and finite."""
    number = positive(value)
    if number is None:
        raise InvalidValueError(f"{name} must be a positive, finite number, got {shown(value)}.")
    return number


def check_steps(name: str, value: object) -> None:
    """Raise if `value` is not a number of steps."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidValueError(f"{name} is a number of steps, at least 1; got {shown(value)}.")


def split(batch: Any, n: int, *, batch_dim: int = 0) -> Iterator[Any]:
    """Split a batch into `n` equal micro-batches, so that one device can measure the noise of its gradient.

    Every tensor in `batch` is cut along dimension `batch_dim` into `n` views. Lists, tuples, named tuples and
    dictionaries keep their structure; anything else is repeated. Divide the loss of each part by `n` before its
    backward: the sum of the gradients is then that of the whole batch.

    Args:
        batch: a tensor `[B, ...]`, or a list, tuple or dictionary of batches.
        n: number of parts; positive, and a divisor of dimension `batch_dim` of every tensor.
        batch_dim: the dimension that counts examples, at least 0; 1 for time-first sequences `[T, B, ...]`. Tensors
            of one dimension, such as labels, are cut along it.

    Returns:
        An iterator over the `n` parts.

    Raises:
        InvalidValueError: `n` is not positive, or does not divide that dimension. With parts of unequal size, the
            mean of their mean losses would not be the mean loss of the batch.

    Example:
        >>> x, y = torch.arange(6.).view(6, 1), torch.arange(6)
        >>> [part_y.tolist() for part_x, part_y in anybatch.split((x, y), 2)]
        [[0, 1, 2], [3, 4, 5]]
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InvalidValueError(f"n must be a positive integer, got {n!r}.")
    return iter([_part(batch, i, n, batch_dim) for i in range(n)])


def _part(batch: Any, i: int, n: int, dim: int) -> Any:
    if isinstance(batch, Tensor):
        dim = 0 if batch.dim() == 1 else dim
        if batch.dim() <= dim or batch.shape[dim] % n:
            raise InvalidValueError(
                f"A tensor of shape {list(batch.shape)} cannot be split into {n} equal parts along dimension {dim}. "
                "Choose a divisor of the batch, and drop a last, partial batch (drop_last=True). Where another "
                "dimension counts examples, pass batch_dim."
            )
        size = batch.shape[dim] // n
        return batch.narrow(dim, i * size, size)
    if isinstance(batch, dict):
        return {key: _part(value, i, n, dim) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_part(value, i, n, dim) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_part(value, i, n, dim) for value in batch)
    return batch

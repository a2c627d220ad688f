"""Backwards: what a user says of the next ones, and asks between the last one and the step."""

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from anybatch._controller.step import Stepper
from anybatch._errors import InvalidValueError, UsageError
from anybatch._gradients import Gather, Reduction
from anybatch._numbers import real, shown
from anybatch._scaling import BatchSize, check_positive


class Backwards:
    """Sizes and weights of micro-batches, what is no training, and gradients from elsewhere; `Controller` has it."""

    _gather: Gather | None
    _batch: BatchSize
    _reduction: Reduction
    _stepper: Stepper

    @property
    @abstractmethod
    def gain(self) -> float:
        """The gain of the last step."""

    @property
    def micro_batch(self) -> float | None:
        """What each backward sees; set it before a backward where batches vary."""
        return self._gather.sizes.now if self._gather and self._batch.micro_batch else None

    @micro_batch.setter
    def micro_batch(self, value: float) -> None:
        if self._gather is None or self._batch.micro_batch is None:
            raise UsageError("micro_batch can be set only where attach was given base_batch and micro_batch.")
        self._gather.sizes.set(check_positive("micro_batch", value))

    @property
    def weight(self) -> float | None:
        """The next backward's weight in the step's mean: its tokens, where a loss is a mean over all tokens of a step.

        A step's gradient is then `gbar = sum_i h_i` with `h_i = w_i g_i`, where each loss was divided by the weights of
        the whole step, on all ranks, so that `w_i` adds up to 1. Set the weight before each backward, in any unit:

            Q = sum_i w_i^2 / (sum_i w_i)^2
            variance of gbar = (sum_i ||h_i||^2 - Q ||gbar||^2) / (1 - Q)

        The scale counts the sizes, `S = sum_i b_i / base_batch`: `micro_batch` stays in the unit of `base_batch`.

        Raises:
            InvalidValueError: a weight below 0 or not finite.
            UsageError: at the step, some backwards had a weight and others not, or all are 0; and under a rule that
                neither measures nor counts.

        Example:
            >>> model = torch.nn.Linear(4, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> controller = anybatch.attach(optimizer, model=model, base_batch=1, micro_batch=1)
            >>> sequences = [torch.randn(5, 4), torch.randn(3, 4)]
            >>> for x in sequences:
            ...     controller.weight = len(x)
            ...     (model(x).square().sum() / 8).backward()
            >>> optimizer.step()
            >>> controller.scale
            2.0
        """
        return None if self._gather is None else self._gather.sizes.weight

    @weight.setter
    def weight(self, value: float) -> None:
        if self._gather is None:
            raise UsageError("weight has nothing to tell a rule that neither measures nor counts.")
        number = real(value)
        if number is None or number < 0:
            raise InvalidValueError(f"weight must be a finite number, at least 0; got {shown(value)}.")
        self._gather.sizes.weight = number

    def peek(self) -> float:
        """The gain that `step()` would have now, between the last backward and the step; later backwards change it.

        Where no backward came since the last step it is `gain`, the last step's. It waits for the norms; over several
        ranks it is the step's own all-reduce, ahead of time: call it on every rank.

        Raises:
            UsageError: as `step()` would, such as for gradients that are not averaged over the ranks.

        Example:
            >>> model = torch.nn.Linear(4, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> controller = anybatch.attach(optimizer, model=model, scale="count")
            >>> for x in torch.randn(2, 8, 4):
            ...     (model(x).square().mean() / 2).backward()
            >>> coming = controller.peek()
            >>> optimizer.step()
            >>> controller.gain == coming
            True
        """
        step = self._stepper.peek()
        return self.gain if step is None else step.gain

    def paused(self) -> AbstractContextManager[None]:
        """A context whose backwards are not training: neither counted nor measured."""
        return nullcontext() if self._gather is None else self._gather.paused()

    def together(self) -> AbstractContextManager[None]:
        """A context whose backwards are one micro-batch: several losses with a `backward()` each.

        Their sum is measured, so each parameter's gradient is copied in it.

        Raises:
            UsageError: at `optimizer.step()` or `peek()` inside of it.

        Example:
            >>> model = torch.nn.Linear(4, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> controller = anybatch.attach(optimizer, model=model, scale="count")
            >>> for real, fake in zip(torch.randn(2, 8, 4), torch.randn(2, 8, 4)):      # two micro-batches
            ...     with controller.together():
            ...         (model(real).relu().mean() / 2).backward()
            ...         (-model(fake).mean() / 2).backward()
            >>> optimizer.step()
            >>> controller.count
            2
        """
        return nullcontext() if self._gather is None else self._gather.together()

    def observe(self, gradients: Sequence[Tensor]) -> None:
        """Give one step's micro-batch gradients computed elsewhere, with `torch.func.vmap` say, in place of backwards.

        `.grad` of each parameter becomes the mean over the n micro-batches.

        Args:
            gradients: one tensor `[n, *parameter.shape]` for each trained parameter, in the optimizer's order, each
                micro-batch's own mean gradient, not divided by n.

        Raises:
            InvalidValueError: wrong shapes.
            UsageError: under DDP, after a backward of the same step, or with nothing to measure.
        """
        if self._gather is None:
            raise UsageError("observe() has nothing to tell a rule that neither measures nor counts.")
        if self._reduction != "mean":
            raise UsageError('observe() sets .grad to the mean of the gradients: attach with reduction="mean".')
        self._gather.observe(gradients)

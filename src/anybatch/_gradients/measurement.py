"""Measurement: the norms of one window, of what each micro-batch gave and of their sum, in every metric asked for.

[Note: one read] Which backward is a window's last is known only at the step, when the user may have clipped; so the
norm of the sum is taken at the end of each that may be: on one process, from as many on as the window before had. Where
a window ends before that, the sum is read at the step, if it still is what the last backward left; else the window is
not measured.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from anybatch._errors import UsageError
from anybatch._gradients.consecutive import Consecutive
from anybatch._gradients.layers import Layers
from anybatch._gradients.metric import Metric
from anybatch._gradients.norms import total_squared_norm
from anybatch._gradients.samples import Samples
from anybatch._gradients.trace import Trace
from anybatch._gradients.weighing import Weighing
from anybatch._gradients.window import Pair, Shares, Weighed, Window
from anybatch._gradients.witness import local_of


class Measurement:
    """One window: opened, begun by its first backward, then given gradients and told of each backward's end.

    Args:
        measure: whether norms are ever taken.
        due: asked when a window begins: whether its norms are.
        ranks: whether several share the batch.
        loss_scale: gives the factor on the loss, a tensor of shape `[]`, or `None` where there is none.
        consecutive: keep a copy of the gradient for the one-gradient estimator.
        metric: Adam's, where norms are taken in it too.
        layers: the norms by layer, where steps are looked at.
    """

    def __init__(
        self,
        *,
        measure: bool,
        due: Callable[[], bool],
        ranks: bool,
        loss_scale: Callable[[], Tensor | None],
        consecutive: bool,
        metric: Metric | None,
        layers: Layers | None,
    ) -> None:
        self._measures = measure
        self._due = due
        self._ranks = ranks
        self._loss_scale = loss_scale
        self._consecutive = Consecutive() if consecutive else None
        self._weighing = None if metric is None else Weighing(metric)
        self._layers = layers if measure else None
        self._looking: Layers | None = None  # the same in a window that is looked at
        self.parameters: list[Tensor] = []
        self._waits: list[bool] = []  # for each of them, whether its gradient may
        self._plain = not ranks  # whether `.grad` is the parameters' own, which nothing but the user writes to
        self.samples = Samples()
        self.taken = measure  # whether this window's norms are
        self.spoilt = False  # whether something of this window was missed
        self.usual = 0  # backwards of the last window, where that saves reads
        self.open()

    def follow(self, parameters: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[bool]:
        """Measure these too, from the next window on; for each, whether its gradients may wait. `leaves` are the
        tensors on which they arrive.
        """
        self.parameters.extend(parameters)
        if self._weighing is not None:
            self._weighing.follow(parameters, leaves)
        if self._layers is not None:
            self._layers.follow(parameters, leaves)
        self._plain = self._plain and all(leaf is p for p, leaf in zip(parameters, leaves, strict=True))
        waits = [self._measures and self.samples.admits(leaf) for leaf in leaves]
        self._waits += waits
        self.spoilt = True
        return waits

    @property
    def simple(self) -> bool:
        """Whether a sample's norm is all there is to take of it, and small ones may wait."""
        return not (self._weighing or self._looking) and self.samples.patient

    def grads(self) -> list[Tensor]:
        """This rank's part of every `.grad`."""
        return [local_of(p.grad) for p in self.parameters if p.grad is not None]

    # ---- the window ----

    def open(self) -> None:
        """Nothing of a window is known."""
        self.samples.clear()
        self._observed_square: Tensor | None = None
        self._grad_square: Tensor | None = None
        self._trace: Trace | None = None  # of the sum, where its norm is taken later, if at all
        self._pair: Pair | None = None
        self.scale: Tensor | None = None  # the factor on the loss, as the last backward had it
        if self._weighing is not None:
            self._weighing.clear()
        if self._looking is not None:
            self._looking.clear()
        self._looking = None

    def begin(self) -> None:
        """The first backward comes now: whether norms are taken, and which."""
        look = self._measures and self._layers is not None and self._layers.due()
        self._looking = self._layers if look else None
        self.taken = self._measures and (look or self._due())
        if self._weighing is not None and self.taken:
            self._weighing.open()

    def sample(self, row: int, index: int, grad: Tensor) -> None:
        """What parameter `index` got from micro-batch `row`."""
        if self._waits[index] and self.samples.patient and not grad.is_sparse:
            self.samples.wait(grad)
        else:
            self.samples.take(grad)
        if self._weighing is not None:
            self._weighing.sample(row, index, grad)
        if self._looking is not None:
            self._looking.sample(row, index, grad)

    def observe(self, samples: Sequence[Tensor]) -> None:
        """A whole window at once, one tensor `[n, *shape]` a parameter; their means are in `.grad`."""
        self.begin()
        n = samples[0].shape[0]
        if self.taken:
            self._observed_square = total_squared_norm(samples) / n**2
            if self._weighing is not None:
                self._weighing.samples(samples)
            if self._looking is not None:
                self._looking.samples(samples)
            self._read_sum()
        self.remember(alone=n == 1)

    def scaled(self) -> None:
        """A backward has ended: its loss had the factor of now."""
        scale = self._loss_scale()
        self.scale = None if scale is None else scale.clone()  # the scaler changes its own tensor in place

    def ended(self, backwards: int, *, summed: bool) -> None:
        """The last of so many backwards has ended; `summed` tells whether `.grad` has a sum of several gradients."""
        self._grad_square = self._trace = None
        if not summed:
            return
        if self._plain and backwards < self.usual and (grads := self.grads()):
            self._trace = Trace(grads)
        else:
            self._read_sum()

    def remember(self, *, alone: bool) -> None:
        """Keep the gradient for the next window, where the one-gradient estimator is wanted and it is `alone`."""
        if self._consecutive is None:
            return
        if alone:
            grads = {index: local_of(p.grad) for index, p in enumerate(self.parameters) if p.grad is not None}
            self._pair = self._consecutive.pair(grads, loss_scale=self.scale)
        else:
            self.forget()

    def window(self, backwards: int, fires: Sequence[int], *, shares: Shares) -> Window:
        """What there is to say of so many backwards, in which the parameters got `fires` gradients each."""
        self.samples.measure()
        measured = self.taken and not self.spoilt and self.samples.valid and backwards > 0
        if measured and self._trace is not None and self._grad_square is None:
            if self._trace.left(self.grads()):
                self._read_sum()
            else:  # what is not finite must be known for the step to be skipped
                measured = not bool(self._samples_square(backwards, fires).isfinite())
        weighed = None if self._weighing is None else Weighed()
        layers = None
        # Over several ranks at each step: one that was given another clock is told so by an all-reduce of one size.
        if self._layers is not None and (self._ranks or self._layers.due()):
            layers = self._layers.squares(fires, known=measured and self._looking is not None)
        if not measured:
            return Window(backwards, shares, None, None, None, weighed, layers)
        samples, grad, pair = self._samples_square(backwards, fires), self._grad_square, self._pair
        if grad is None and not self._ranks:  # one backward on one rank: the sample is the sum
            grad = samples
        if self._weighing is not None:
            weighed = self._weighing.squares(fires)
        if self.scale is not None:
            unit = self.scale.to(samples.device, torch.float64).square()
            samples, grad = samples / unit, None if grad is None else grad / unit
            pair = None if pair is None else Pair(pair.mean_square / unit, pair.square_mean / unit)
            weighed = None if weighed is None else weighed.over(unit)
            layers = None if layers is None else layers.over(unit)
        return Window(backwards, shares, samples, grad, pair, weighed, layers)

    def close(self, backwards: int, *, forget: bool) -> None:
        """The step was taken. `forget` drops the previous gradient too: it was not finite."""
        if forget:
            self.forget()
        elif self._plain:
            self.usual = backwards
        self.spoilt = False

    def forget(self) -> None:
        """The next gradient has no predecessor."""
        if self._consecutive is not None:
            self._consecutive.forget()

    def _read_sum(self) -> None:
        self._grad_square = total_squared_norm(self.grads())
        if self._weighing is not None:
            self._weighing.grads()
        if self._looking is not None:
            self._looking.grads()

    def _samples_square(self, backwards: int, fires: Sequence[int]) -> Tensor:
        if self._observed_square is not None:
            return self._observed_square
        if max(fires) > backwards:
            raise UsageError(
                "A parameter got two gradients in one backward: a layer that is used twice inside of re-entrant "
                "checkpoints. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
            )
        return self.samples.total()

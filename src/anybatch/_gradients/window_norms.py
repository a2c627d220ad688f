"""The norms of one window, by every probe.

[Note: one read] The last backward of a window is not known in advance, and at the step the user may already have
clipped. So the norm of `.grad` is taken at the end of each backward that may be the last one. Over several ranks this
is a backward that leaves the average in `.grad`. On one process it is each backward after which the window is at least
as long as the previous one. A shorter window is counted and not measured: the user may have changed `.grad` in a way
that nothing detects, because `.grad.data` changes no version.
"""

from collections.abc import Callable, Sequence
from weakref import ref

import torch
from torch import Tensor

from anybatch._errors import UsageError
from anybatch._gradients.consecutive import ConsecutiveGradients, Pair
from anybatch._gradients.euclidean import EuclideanNorms
from anybatch._gradients.norms import local_of, part_of
from anybatch._gradients.probe import Placement, Probe
from anybatch._gradients.window import PAIR, Norms, Shares, Window


class WindowNorms:
    """One window: `open`, `begin` at its first backward, `sample` for each gradient, `ended` after each backward.

    The arguments are those of `GradientHooks`; `ranks` is whether several ranks share the batch.
    """

    def __init__(
        self,
        *,
        measure: bool,
        due: Callable[[], bool],
        probes: Sequence[Probe],
        ranks: bool,
        loss_scale: Callable[[], Tensor | None],
        consecutive: bool,
    ) -> None:
        self._measures = measure
        self._due = due
        self._probes = probes
        self._active: list[Probe] = []  # the further probes that measure this window
        self._ranks = ranks
        self._loss_scale = loss_scale
        self._consecutive = ConsecutiveGradients() if consecutive else None
        self.euclidean = EuclideanNorms()
        self._parameters: list[ref[Tensor]] = []  # weak: one that left the optimizer is freed
        self._plain = not ranks  # whether only autograd and the user write to `.grad`
        self._sampled = measure  # whether the averages take this window
        self.taken = measure  # whether this window's norms are taken
        self.spoilt = False  # whether a gradient of this window may have been missed
        self.usual = 0  # number of backwards of the last window, where it saves reads
        self.open()

    def follow(self, parameters: Sequence[Tensor], places: Sequence[Placement]) -> None:
        """Measure these parameters as well, from the next window on."""
        self._parameters.extend(map(ref, parameters))
        for probe in (self.euclidean, *self._probes):
            probe.follow(parameters, places)
        self._plain = self._plain and all(place.leaf is p for p, place in zip(parameters, places, strict=True))
        self.spoilt = True

    def drop(self) -> None:
        """Drop all parameters; the open window is not measured."""
        self._parameters.clear()
        for probe in (self.euclidean, *self._probes):
            probe.drop()
        self.forget()
        self.spoilt = True

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each probe, by its name; empty where norms are never taken."""
        return {probe.name: probe.size for probe in (self.euclidean, *self._probes)} if self._measures else {}

    def measured_by(self, name: str) -> bool:
        """Whether the further probe of this name measures the window."""
        return any(probe.name == name for probe in self._active)

    def alive(self) -> list[Tensor | None]:
        """The measured parameters in order; `None` for one that was freed."""
        return [each() for each in self._parameters]

    @property
    def parameters(self) -> list[Tensor]:
        """The measured parameters that still exist."""
        return [p for p in self.alive() if p is not None]

    @property
    def simple(self) -> bool:
        """Whether only Euclidean norms are taken, and small gradients may be queued."""
        return not self._active and self.euclidean.patient

    def grads(self) -> list[Tensor]:
        """This rank's part of every `.grad`."""
        return [local_of(p.grad) for p in self.parameters if p.grad is not None]

    # ---- the window ----

    def open(self) -> None:
        """Begin an empty window."""
        self.euclidean.clear()
        self._observed = False
        self.interrupted = False  # whether a backward of the window raised half way
        self._pair: Pair | None = None
        self._active = []
        self.scale: Tensor | None = None  # the factor on the loss of the last backward

    def begin(self) -> None:
        """Decide at the first backward which norms are taken."""
        self._sampled = self._measures and self._due()
        self._active = [probe for probe in self._probes if self._measures and probe.open(sampled=self._sampled)]
        self.taken = self._sampled or bool(self._active)

    def sample(self, row: int, index: int, grad: Tensor) -> None:
        """Measure the gradient of parameter `index` from micro-batch `row`."""
        parameter = self._parameters[index]()
        if parameter is not None:
            held = self.euclidean.holds(index, grad)
            for probe in (self.euclidean, *self._active):
                probe.sample(row, index, parameter, grad, held=held)

    def measure(self) -> None:
        """Measure the gradients that are held, at the end of a backward."""
        for probe in (self.euclidean, *self._active):
            probe.measure()

    def observe(self, samples: Sequence[Tensor]) -> None:
        """Measure a whole window at once, one tensor `[n, *shape]` a parameter; their means are in `.grad`."""
        self.begin()
        self._observed = True
        if self.taken:
            for probe in (self.euclidean, *self._active):
                probe.samples(self.parameters, samples)
            self._read_mean()

    def scaled(self) -> None:
        """Note the factor on the loss of the backward that has ended."""
        scale = self._loss_scale()
        self.scale = None if scale is None else scale.clone()  # the scaler changes its own tensor in place

    def ended(self, backwards: int, *, summed: bool) -> None:
        """Read `.grad` at the end of a backward if it may be the last; `summed`: whether it sums several gradients."""
        for probe in (self.euclidean, *self._active):
            probe.forget_mean()
        if summed and not (self._plain and backwards < self.usual):
            self._read_mean()

    def remember(self, *, alone: bool, inverse_size: float) -> None:
        """Keep the gradient for the one-gradient estimator, if it is `alone` in this window."""
        if self._consecutive is None:
            return
        if alone:
            grads = {index: part_of(p.grad, p) for index, p in enumerate(self.parameters) if p.grad is not None}
            self._pair = self._consecutive.pair(grads, loss_scale=self.scale, inverse_size=inverse_size)
        else:
            self.forget()

    def window(self, backwards: int, fires: Sequence[int], *, shares: Shares) -> Window:
        """The norms of the window, in which the parameters got `fires` gradients each."""
        self.measure()
        found: dict[str, Norms] = {}
        if self.taken and not self.spoilt and self.euclidean.valid and backwards > 0:
            self._check_fires(backwards, fires)
            for probe in (self.euclidean, *self._active):
                norms = probe.norms(fires)
                if norms is None:
                    continue
                if norms.mean is None and not self._ranks and backwards == 1:
                    norms = Norms(norms.samples, norms.samples)  # of one backward the sample is the mean
                found[probe.name] = norms
        pair = self._pair if found else None
        if pair is not None:
            found[PAIR] = pair.norms
        if self.scale is not None:
            unit = self.scale.to(torch.float64).square()
            found = {name: norms.over(unit) for name, norms in found.items()}
        return Window(backwards, shares, self.sizes, found, self._sampled, pair.inverse_size if pair else 0.0)

    def close(self, backwards: int, *, forget: bool) -> None:
        """End the window after its step. `forget` drops the previous gradient too: it was not finite."""
        if forget:
            self.forget()
        elif self._plain:
            self.usual = backwards
        self.spoilt = False

    def forget(self) -> None:
        """Drop the previous gradient of the one-gradient estimator."""
        if self._consecutive is not None:
            self._consecutive.forget()

    def _read_mean(self) -> None:
        parameters = self.parameters
        for probe in (self.euclidean, *self._active):
            probe.mean(parameters)

    def _check_fires(self, backwards: int, fires: Sequence[int]) -> None:
        if not self._observed and max(fires) > backwards:
            if self.interrupted:
                raise UsageError(
                    "A backward of this step raised half way, and .grad holds a part of its gradients: call "
                    "optimizer.zero_grad() after the error, and begin the step again."
                )
            raise UsageError(
                "A parameter got two gradients in one backward: its layer is used twice inside of re-entrant "
                "checkpoints. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
            )

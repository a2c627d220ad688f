"""What DINO is on any images (Caron et al. 2021): the model, its loss, the centre and the teacher's temperature.

Of each image there are two large crops and some small ones. The student says of every crop what the teacher, its EMA,
says of another, large one, both as distributions over K outputs. The teacher's are centred, so that no output wins
everywhere, and sharp, so that not all are equal.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

import anybatch
from recipes.ema.config import Config
from recipes.ema.distillation import GroupBatchNorm
from recipes.ema.train import Batch, Experiment

STUDENT = 0.1  # the student's temperature
CENTRE = 0.9  # the centre's decay per base iteration
CLIP = 3.0  # of each parameter's gradient norm: DINO clips one by one


class Dino(nn.Module):
    """Encoder and head: three layers, a bottleneck of length 1, and cosines with K directions.

    Args:
        encoder: from images to `features`.
        features: how many.
        hidden: width of the head.
        bottleneck: of its third layer.
        outputs: K.
        norms: whether the head normalises over groups of examples: DINO's own option, which a small network needs.
    """

    centre: Tensor

    def __init__(
        self, encoder: nn.Module, features: int, *, hidden: int, bottleneck: int, outputs: int, norms: bool = False
    ) -> None:
        super().__init__()
        self.encoder = encoder
        layers: list[nn.Module] = []
        for inputs in (features, hidden):
            layers += [nn.Linear(inputs, hidden), *([GroupBatchNorm(hidden)] if norms else []), nn.GELU()]
        self.head = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        self.frozen = False  # the last layer
        self.last = nn.Parameter(torch.randn(outputs, bottleneck))
        self.register_buffer("centre", torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Crops of one size, `[n, crops, C, H, W]`, to `[n, crops, K]`."""
        n, crops = x.shape[:2]
        x = x.transpose(0, 1).flatten(0, 1)  # one kind of crop after the other, so that a group is of one kind
        x = normalize(self.head(self.encoder(x)), dim=1)
        last = self.last.detach() if self.frozen else self.last  # no gradient at all, so the optimizer passes it over
        return linear(x, normalize(last, dim=1)).unflatten(0, (crops, n)).transpose(0, 1)


class MultiCrop(Experiment[Dino]):
    """What DINO is, whatever the images; a batch of n has large crops `[n, 2, ...]` and small ones `[n, m, ...]`.

    Args:
        config: see `Config`.
        temperatures: the teacher's at first, and after `warm` base iterations.
        warm: in which it rises linearly.
        frozen: base iterations in which the last layer stays.
        device: where the model and every batch lie.
    """

    teaches = True

    def __init__(
        self, config: Config, *, temperatures: tuple[float, float] = (0.04, 0.04), warm: float = 0.0,
        frozen: float = 0.0, device: str = "cpu",
    ) -> None:  # fmt: skip
        super().__init__(config, device=device)
        self.temperatures, self.warm, self.frozen = temperatures, warm, frozen

    def begin(self, model: Dino, clock: anybatch.Clock) -> None:
        """The centre moves with the clock in every arm: only the teacher's weights are what an arm is about."""
        self._clock = clock
        self._said: list[Tensor] = []  # of each part of the batch, the teacher's mean
        model.frozen = not clock.reached(self.frozen)

        def move(iterations: float) -> None:
            model.centre.lerp_(self._mean, 1 - CENTRE**iterations)
            model.frozen = not clock.reached(self.frozen)

        clock.subscribe(move)

    def targets(self, model: Dino, batch: Batch) -> Batch:
        """The crops, and the teacher's distributions of the large ones, `[n, 2, K]`."""
        large, small = batch
        said = model(large)
        self._said.append(said.mean((0, 1)))
        return large, small, ((said - model.centre) / self.temperature(self._clock.tau)).softmax(-1)

    def temperature(self, tau: float) -> float:
        """The teacher's at `tau`."""
        first, last = self.temperatures
        return first + (last - first) * min(1.0, tau / self.warm) if self.warm else last

    def loss(self, model: Dino, batch: Batch) -> Tensor:
        """The mean cross-entropy over all pairs of a teacher's crop and another one of the student's."""
        large, small, wanted = batch
        said = torch.cat([model(large), model(small)], 1)
        logs = (said / STUDENT).log_softmax(-1)
        pairs = -torch.einsum("ntk,nsk->nts", wanted, logs)
        same = torch.eye(pairs.shape[1], pairs.shape[2], dtype=torch.bool, device=pairs.device)
        return pairs[:, ~same].mean()

    def before_step(self, model: Dino) -> None:
        """The batch is seen: the teacher's mean over it, and the gradients clipped."""
        self._mean, self._said = torch.stack(self._said).mean(0), []
        for parameter in model.parameters():
            if parameter.grad is not None:
                nn.utils.clip_grad_norm_([parameter], CLIP)

"""What BYOL is on any images: the model, its loss, and the probe that measures what was learned."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, one_hot

from recipes.ema.train import Batch, Experiment

GROUP = 8


class GroupBatchNorm(nn.Module):
    """BatchNorm over every `GROUP` consecutive examples, whatever the batch: the same function at every kappa.

    BYOL without statistics of a batch collapses on the digits; with those of the whole batch the network would change
    with the batch size.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """`[n GROUP, width]`."""
        groups = x.view(-1, GROUP, x.shape[1])
        variance, mean = torch.var_mean(groups, 1, keepdim=True, unbiased=False)
        return ((groups - mean) * torch.rsqrt(variance + 1e-5)).view_as(x) * self.weight + self.bias


class Byol(nn.Module):
    """Encoder, projector and predictor; the teacher has no use for the last."""

    def __init__(self, encoder: nn.Module, features: int, *, hidden: int, outputs: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = _head(features, hidden, outputs)
        self.predictor = _head(outputs, hidden, outputs)

    def project(self, x: Tensor) -> Tensor:
        """What the teacher says."""
        return self.projector(self.encoder(x))

    def forward(self, x: Tensor) -> Tensor:
        """What the student predicts."""
        return self.predictor(self.project(x))


class Distillation(Experiment[Byol]):
    """What BYOL is, whatever the images; a batch of n has two views of n images."""

    teaches = True

    def targets(self, model: Byol, batch: Batch) -> Batch:
        """The views, and the teacher's projections of them, each in the place of the other."""
        first, second = batch
        said = model.project(torch.cat([first, second]))
        return first, second, said[len(first) :], said[: len(first)]

    def loss(self, model: Byol, batch: Batch) -> Tensor:
        """The mean of 2 - 2 cos(prediction, target), summed over both ways round."""
        first, second, target, other = batch
        predicted = model(torch.cat([first, second]))
        return (2 - 2 * cosine_similarity(predicted, torch.cat([target, other]))).mean() * 2


def probe(features: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, *, ridge: float = 10.0) -> float:
    """Test accuracy, in percent, of a ridge regression from standardised features to the classes."""
    mean, std = features.mean(0), features.std(0) + 1e-3
    known, unknown = (
        torch.cat([(x - mean) / std, torch.ones(len(x), 1, device=x.device)], 1).double() for x in (features, test)
    )
    wanted = one_hot(labels, int(labels.max()) + 1).double()
    penalty = ridge * torch.eye(known.shape[1], dtype=torch.float64, device=known.device)
    weights = torch.linalg.solve(known.T @ known + penalty, known.T @ wanted)
    return 100 * ((unknown @ weights).argmax(1) == test_labels).double().mean().item()


def _head(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), GroupBatchNorm(hidden), nn.ReLU(), nn.Linear(hidden, outputs))

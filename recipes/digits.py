"""scikit-learn's handwritten digits, embedded: the same network and hyperparameters as `anybatch demo`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import TensorDataset

from anybatch._demo import BASE_BATCH, LAST_RATE, LEARNING_RATE, MOMENTUM, digits, network
from recipes.training.sharing import ALONE, Share
from recipes.training.task import Task


class Digits(Task):
    """1347 images of 8x8 pixels for training and 450 for testing; a multilayer perceptron."""

    name = "digits"
    metric = "accuracy"

    def __init__(self, data: Path | None = None, *, tiny: bool = False) -> None:
        super().__init__(data, tiny=tiny)
        self.base_batch = BASE_BATCH
        self.total = 1000 if tiny else 4000
        x, y, self.x_test, self.y_test = digits()
        self.train_set = TensorDataset(x, y)

    def model(self) -> nn.Module:
        """64-128-128-10."""
        return network(torch.initial_seed())

    def optimizer(self, model: nn.Module) -> Optimizer:
        """SGD with momentum."""
        return SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)

    def scheduler(self, optimizer: Optimizer) -> Any:
        """Exponential decay to 1 %."""
        return ExponentialLR(optimizer, LAST_RATE ** (1 / self.total))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross entropy."""
        x, y = batch
        return cross_entropy(model(x), y)

    def evaluate(self, model: nn.Module, device: torch.device, share: Share = ALONE) -> dict[str, float]:  # noqa: ARG002
        """Test accuracy in percent; 450 small images are not worth sharing, so every rank takes all."""
        y = self.y_test.to(device)
        logits = model(self.x_test.to(device)).float()
        accuracy = 100 * (logits.argmax(1) == y).double().mean()
        return {"accuracy": accuracy.item(), "loss": cross_entropy(logits, y).item()}

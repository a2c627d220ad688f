"""Right answers and losses, added up where the model is: to bring a number to the host is to wait for the device."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from recipes.training.sharing import Share


class Counted:
    """What an evaluation has come to."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # right, loss, number

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """One batch."""
        right = (logits.argmax(1) == labels).sum()
        loss = cross_entropy(logits, labels, reduction="sum")
        number = torch.tensor(len(labels), device=logits.device)
        self.sums += torch.stack([right.double(), loss.double(), number.double()])

    def over(self, share: Share) -> dict[str, float]:
        """Accuracy in percent and the mean loss, over all ranks."""
        right, loss, number = share.summed(self.sums).tolist()
        return {"accuracy": 100 * right / number, "loss": loss / number}

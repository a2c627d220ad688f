"""What the adapters share: the numbers that they log, and what an average cannot be of."""

from math import isfinite

from torch import nn

import anybatch


def numbers(controller: anybatch.Controller) -> dict[str, float]:
    """The last step's numbers that are finite, by the names they are logged under."""
    found = {name: float(getattr(controller, name)) for name in ("gain", "scale", "tau", "noise_scale")}
    return {f"anybatch/{name}": value for name, value in found.items() if isfinite(value)}


def check_whole(model: nn.Module) -> None:
    """Raise if no one process could save an average of `model`.

    Raises:
        UnsupportedError: its parameters are sharded.
    """
    if any(hasattr(p, "device_mesh") for p in model.parameters()):
        raise anybatch.UnsupportedError(
            "ema_decay does not go with sharded parameters: the framework's checkpoints keep what one process has of "
            "the average. Leave it out, make the ModelEMA in a callback of your own once training has begun, and save "
            "it by torch.distributed.checkpoint."
        )

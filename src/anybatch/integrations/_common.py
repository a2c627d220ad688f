"""What the adapters share: the numbers that they log, the record they open, and what an average cannot be of."""

from math import isfinite

from torch import nn

import anybatch


def numbers(controller: anybatch.Controller) -> dict[str, float]:
    """The last step's numbers that are finite, by the names they are logged under."""
    found = {name: float(getattr(controller, name)) for name in ("gain", "scale", "tau", "noise_scale")}
    return {f"anybatch/{name}": value for name, value in found.items() if isfinite(value)}


def record_of(path: str | None, per_layer: int | None, *, first: bool) -> str | anybatch.RunRecord | None:
    """What `attach` is given as record: the path, or on the first rank a `RunRecord` with each layer's noise.

    Raises:
        UsageError: `per_layer` without a path.
    """
    if per_layer is None or (path is not None and not first):
        return path
    if path is None:
        raise anybatch.UsageError(f"per_layer={per_layer} needs record=, the path of the file it is written to.")
    return anybatch.RunRecord(path, per_layer=per_layer)


def close_record(record: str | anybatch.RunRecord | None) -> None:
    """Close what `record_of` opened."""
    if isinstance(record, anybatch.RunRecord):
        record.close()


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

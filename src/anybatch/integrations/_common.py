"""Shared parts of the adapters: logged numbers, the record, and a check of the model for an average."""

from math import isfinite

from torch import nn

import anybatch


def numbers(controller: anybatch.Controller) -> dict[str, float]:
    """The finite numbers of the last step, by the names in logs."""
    found = {name: float(getattr(controller, name)) for name in ("gain", "scale", "tau", "noise_scale")}
    return {f"anybatch/{name}": value for name, value in found.items() if isfinite(value)}


def record_of(path: str | None, per_layer: int | None, *, first: bool) -> str | anybatch.RunRecord | None:
    """The argument `record` of `attach`: the path, or on the first rank a `RunRecord` with `per_layer`."""
    if per_layer is None or (path is not None and not first):
        return path
    if path is None:
        raise anybatch.UsageError(f"per_layer={per_layer} without a record: pass record=, the path of a file.")
    return anybatch.RunRecord(path, per_layer=per_layer)


def close_record(record: str | anybatch.RunRecord | None) -> None:
    """Close a record that `record_of` opened."""
    if isinstance(record, anybatch.RunRecord):
        record.close()


def check_whole(model: nn.Module) -> None:
    """Raise if no single process can save an average of `model`, since its parameters are sharded."""
    if any(hasattr(p, "device_mesh") for p in model.parameters()):
        raise anybatch.UnsupportedError(
            "ema_decay does not support sharded parameters: the framework's checkpoints would keep one process's part "
            "of the average. Omit ema_decay, make a ModelEMA in your own callback after training has begun, and save "
            "it by torch.distributed.checkpoint."
        )

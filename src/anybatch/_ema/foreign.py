"""Averages of other libraries that a training loop still updates, found while they are alive."""

import gc
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anybatch._errors import AnybatchWarning

# Where each class is defined, and under which attribute it holds the average: a module or a list of tensors.
# Lightning's callback comes before the AveragedModel that it holds, so that its own name is in the warning.
_KNOWN = (
    ("lightning.pytorch.callbacks.weight_averaging", "WeightAveraging", "_average_model"),
    ("pytorch_lightning.callbacks.weight_averaging", "WeightAveraging", "_average_model"),
    ("torch.optim.swa_utils", "AveragedModel", "module"),
    ("timm.utils.model_ema", "ModelEma", "ema"),
    ("timm.utils.model_ema", "ModelEmaV2", "module"),
    ("timm.utils.model_ema", "ModelEmaV3", "module"),
    ("ema_pytorch.ema_pytorch", "EMA", "ema_model"),
    ("ema_pytorch.post_hoc_ema", "KarrasEMA", "ema_model"),
    ("diffusers.training_utils", "EMAModel", "shadow_params"),
    ("torch_ema.ema", "ExponentialMovingAverage", "shadow_params"),
)
# Of |average - weights| / |weights|, over the largest parameter. An average stays well below 1. The weights of another
# model with as large ones, drawn independently, are at sqrt(2).
_FAR = 1.0
_ENTRIES = 1 << 20  # of that parameter, which may be on a device


def warn_of_foreign_average(model: nn.Module) -> None:
    """Issue one warning if another library averages `model`: its memory is counted in steps, not in base iterations.

    The objects alive are walked once, so call it once in a run: about 0.1 s for a million of them on a shared CPU core.
    """
    name = foreign_average_of(model)
    if name is not None:
        warnings.warn(
            f"{name} averages this model, and counts its memory in optimizer steps: with another batch it averages "
            "another part of the run. Use anybatch.ModelEMA(model, decay=..., clock=controller.clock) instead; "
            "ema_state_from(...) reads its state. If it is updated once an epoch, or by decay ** k for the k base "
            f'iterations of a step, silence this by warnings.filterwarnings("ignore", "{name}", '
            "anybatch.AnybatchWarning).",
            AnybatchWarning,
            stacklevel=3,
        )


def foreign_average_of(model: nn.Module) -> str | None:
    """The name of a class of another library of which an object averages `model`; `None` if there is none.

    An average has the shapes of the model's parameters, or of a part of it or the model of a part of the average, and
    its largest parameter is near the model's. So an average of another model is not one, even of the same shapes.
    """
    kinds = dict(_loaded())
    if not kinds:
        return None
    order = list(kinds)
    found = [each for each in gc.get_referrers(*kinds) if type(each) in kinds]  # every object refers to its class
    parameters = list(model.parameters())
    for each in sorted(found, key=lambda each: order.index(type(each))):
        held = getattr(each, kinds[type(each)], None)
        if held is not None and _averages(_tensors(held), parameters):
            return type(each).__name__
    return None


def _loaded() -> Iterator[tuple[type, str]]:
    """Those classes that are imported, and their subclasses; nothing is imported here."""
    for where, name, attribute in _KNOWN:
        pending = [getattr(sys.modules.get(where), name, None)]
        while pending:
            kind = pending.pop()
            if isinstance(kind, type):
                yield kind, attribute
                pending += kind.__subclasses__()


def _tensors(held: Any) -> list[Tensor]:
    if isinstance(held, nn.Module):
        return list(held.parameters())
    return [each for each in held if isinstance(each, Tensor)] if isinstance(held, list | tuple) else []


def _averages(average: Sequence[Tensor], parameters: Sequence[Tensor]) -> bool:
    """Whether `average` is one of `parameters`, of those that are trained, or of a part; or holds one of all."""
    trained = [p for p in parameters if p.requires_grad]
    for these in (parameters, trained):
        short, long = sorted((list(average), list(these)), key=len)
        start = _found_in([p.shape for p in short], [p.shape for p in long]) if short else None
        if start is not None:
            pairs = list(zip(short, long[start : start + len(short)], strict=True))
            return _near(*max(pairs, key=lambda pair: pair[0].numel()))
    return False


def _found_in(short: list[torch.Size], long: list[torch.Size]) -> int | None:
    """Where `short` begins in `long`: a part of a model lists its parameters as they stand in the whole."""
    return next((i for i in range(len(long) - len(short) + 1) if long[i : i + len(short)] == short), None)


@torch.no_grad()
def _near(one: Tensor, other: Tensor) -> bool:
    a, b = (getattr(each, "_local_tensor", each) for each in (one, other))  # this rank's shards under FSDP2
    if a.shape != b.shape or a.is_meta or b.is_meta:
        return False
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = (each.detach().reshape(-1)[:_ENTRIES].to("cpu", wide) for each in (a, b))
    return bool((a - b).norm() < _FAR * torch.maximum(a.norm(), b.norm())) or bool(torch.equal(a, b))

"""Detection of live averages of other libraries that a training loop still updates."""

import gc
import sys
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from anybatch._errors import AnybatchWarning

# For each class its module, its name, and the attribute that holds the average: a module or a list of tensors.
# Lightning's callback precedes the AveragedModel that it holds, so the warning names the callback.
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
# Bound on |average - weights| / |weights| over the largest parameter. An average of the model is well below 1.
# Independent weights of the same norm are at sqrt(2).
_FAR = 1.0
_ENTRIES = 1 << 20  # entries of that parameter that are compared; it may be on a device


def warn_of_foreign_average(model: nn.Module) -> None:
    """Issue one warning if another library averages `model`: its memory is counted in steps, not in base iterations.

    Call it once in a run. It visits all live objects: about 0.1 s for a million objects on a shared CPU core.
    """
    name = foreign_average_of(model)
    if name is not None:
        warnings.warn(
            f"{name} averages this model and counts its memory in optimizer steps, so its average depends on the "
            "batch size. Use anybatch.ModelEMA(model, decay=..., clock=controller.clock) instead; ema_state_from(...) "
            "converts its state. If it is updated once an epoch, or by decay ** k for the k base iterations of a step, "
            f'silence this by warnings.filterwarnings("ignore", "{name}", anybatch.AnybatchWarning).',
            AnybatchWarning,
            stacklevel=3,
        )


def foreign_average_of(model: nn.Module) -> str | None:
    """Return the class name of another library's object that averages `model`, or `None`.

    An average has the shapes of the model's parameters, or one of the two is a part of the other. Its largest parameter
    is close to the model's. So an average of another model does not match, even with the same shapes.
    """
    kinds = dict(_imported())
    if not kinds:
        return None
    order = list(kinds)
    found = [each for each in gc.get_referrers(*kinds) if type(each) in kinds]  # every object refers to its class
    parameters = list(model.parameters())
    for each in sorted(found, key=lambda each: order.index(type(each))):
        held = getattr(each, kinds[type(each)], None)
        held = list(held.parameters()) if isinstance(held, nn.Module) else held
        if isinstance(held, list | tuple) and _averages([t for t in held if isinstance(t, Tensor)], parameters):
            return type(each).__name__
    return None


def _imported() -> Iterator[tuple[type, str]]:
    """Yield the known classes that are imported, and their subclasses; import nothing."""
    for where, name, attribute in _KNOWN:
        pending = [getattr(sys.modules.get(where), name, None)]
        while pending:
            kind = pending.pop()
            if isinstance(kind, type):
                yield kind, attribute
                pending += kind.__subclasses__()


def _averages(average: Sequence[Tensor], parameters: Sequence[Tensor]) -> bool:
    """Return whether `average` is close to all parameters, to the trained ones, or to a part, or contains them."""
    trained = [p for p in parameters if p.requires_grad]
    for these in (parameters, trained):
        short, long = sorted((list(average), list(these)), key=len)
        part, shapes = [p.shape for p in short], [p.shape for p in long]
        # A part of a model lists its parameters in the order of the whole.
        starts = (i for i in range(len(long) - len(short) + 1) if shapes[i : i + len(short)] == part)
        start = next(starts, None) if short else None
        if start is not None:
            pairs = list(zip(short, long[start : start + len(short)], strict=True))
            return _near(*max(pairs, key=lambda pair: pair[0].numel()))
    return False


@torch.no_grad()
def _near(one: Tensor, other: Tensor) -> bool:
    a, b = (getattr(each, "_local_tensor", each) for each in (one, other))  # this rank's shards under FSDP2
    if a.shape != b.shape or a.is_meta or b.is_meta:
        return False
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = (each.detach().reshape(-1)[:_ENTRIES].to("cpu", wide) for each in (a, b))
    return bool((a - b).norm() < _FAR * torch.maximum(a.norm(), b.norm())) or bool(torch.equal(a, b))

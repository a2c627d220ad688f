"""Whether gradients are finite, for a rule that takes no norms."""

from collections.abc import Iterable
from math import isfinite

import torch
from torch import Tensor

_EVERY = 100  # steps between reads on a device, where each read synchronises


def finite(parameters: Iterable[Tensor], *, step: int) -> bool:
    """Whether every `.grad` is finite: on the host at each step, on a device at each 100th, from step 0 on.

    Shards are not read, since one rank sees only its own.
    """
    with torch.no_grad():
        grads = [p.grad for p in parameters if p.grad is not None and not hasattr(p, "device_mesh")]
        grads = [grad._values() if grad.is_sparse else grad for grad in grads]
        read = [grad for grad in grads if grad.numel() and (grad.device.type == "cpu" or step % _EVERY == 0)]
        on_device = [grad for grad in read if grad.device.type != "cpu"]
        # The largest entry, since a finite gradient may have a norm that overflows; nan is passed on.
        largest = torch._foreach_norm(read, torch.inf) if read else []
        if on_device:  # one read for each device
            places = {grad.device for grad in read}
            alike = [[each for each in largest if each.device == place] for place in places]
            largest = [torch.stack([each.double() for each in here]).sum() for here in alike]
        return not largest or isfinite(sum(float(each) for each in largest))

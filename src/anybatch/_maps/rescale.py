"""The hyperparameter maps, applied to an optimizer in place."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from anybatch._errors import UsageError
from anybatch._maps.maps import BetasRule, Change, Value, flat, lr_exponent, map_group
from anybatch._scaling import attached, check_positive, local_of, row_of


def scale_optimizer(optimizer: Optimizer, kappa: float, *, betas_rule: BetasRule = "power") -> list[dict[str, Change]]:
    """Edit an optimizer in place for `kappa` times the batch; `1 / kappa` reverses it.

    Every parameter group gets the values of `scale_hyperparameters`. A learning rate held in a tensor is changed in
    place and keeps its identity. If steps were done already, the counters that debias Adam's averages continue in the
    units of the new steps. The averages themselves are unchanged: Adam's second moment needs `1 / (1 - beta2)` steps to
    forget the noise of the old batch.

    Make a scheduler afterwards: an older one computes the learning rate from its own base values and overwrites this.
    `initial_lr`, from which a new one starts, is scaled as well. If the batch changes in the middle of a schedule, use
    `attach`, which scales at each step.

    Args:
        optimizer: of a class in torch.optim, or derived from one; without a controller.
        kappa: new batch / the batch of the tuned values; positive.
        betas_rule: as in `scale_hyperparameters`.

    Returns:
        For each parameter group a `Change` for each value, by name: `before`, `after`, `why` and `source`.

    Raises:
        InvalidValueError: a value out of range; the optimizer is then unchanged.
        UsageError: the optimizer has a controller, which scales by itself.
        UnsupportedError: the optimizer cannot be scaled.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9)
        >>> changes = anybatch.scale_optimizer(optimizer, 8)
        >>> optimizer.param_groups[0]["lr"], changes[0]["momentum"].why
        (0.8, 'unchanged under this rule')

    Source:
        Goyal et al. 2017; Malladi et al. 2022; otherwise as for `scale_hyperparameters`.
    """
    kappa = check_positive("kappa", kappa)
    if optimizer in attached:
        raise UsageError(
            "This optimizer has a controller, which scales it at every step: leave its values as tuned for the base "
            "batch, or detach() the controller first."
        )
    family, local = row_of(optimizer), local_of(optimizer)
    changes = [map_group(group, family, kappa, betas_rule) for group in optimizer.param_groups]
    if kappa == 1:
        return changes
    for group, changed in zip(optimizer.param_groups, changes, strict=True):
        if "initial_lr" in group:
            group["initial_lr"] = group["initial_lr"] * kappa ** lr_exponent(group, family, kappa)
        for name, change in changed.items():
            _write(group, name, change.after)
        states = [local.state[p] for p in group["params"] if p in local.state]
        for name, power in family.state.items():
            if entries := [state[name] for state in states if isinstance(state.get(name), Tensor)]:
                torch._foreach_div_(entries, kappa**power)
    return changes


def _write(group: dict[str, Any], name: str, after: Value) -> None:
    held = group[name] if isinstance(group[name], tuple | list) else (group[name],)
    if isinstance(held[0], Tensor):
        for tensor, number in zip(held, flat(after), strict=True):
            tensor.fill_(number)
    else:
        group[name] = after

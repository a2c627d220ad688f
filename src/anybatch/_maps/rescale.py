"""The hyperparameter maps, applied to an optimizer in place."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from anybatch._errors import UsageError
from anybatch._maps.maps import BetasRule, Change, Value, flat, lr_exponent, map_family, map_group
from anybatch._scaling import Family, attached, check_positive, local_of


def scale_optimizer(optimizer: Optimizer, kappa: float, *, betas_rule: BetasRule = "power") -> list[dict[str, Change]]:
    """Edit an optimizer in place for `kappa` times the batch; `1 / kappa` takes it back.

    Every parameter group becomes what `scale_hyperparameters` says. A learning rate held in a tensor is changed in
    place and keeps its identity. Where steps were done already, the counters that debias Adam's averages go on in the
    units of the new steps. The averages themselves are left: Adam's second moment needs `1 / (1 - beta2)` steps to
    forget the noise of the old batch.

    A scheduler that exists already computes the learning rate from its own base values and overwrites this: make it
    afterwards. `initial_lr`, which one made afterwards starts from, is scaled as well. For a batch that changes in the
    middle of a schedule use `attach`, which scales at each step.

    Args:
        optimizer: of a class in torch.optim, or derived from one; without a controller.
        kappa: new batch / the batch that its values are for; positive.
        betas_rule: as in `scale_hyperparameters`.

    Returns:
        For each parameter group a `Change` for each value, by name: `before`, `after`, `why` and `source`.

    Raises:
        InvalidValueError: a value out of range; nothing was changed.
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
    family = map_family(optimizer)
    changes = [map_group(group, family, kappa, betas_rule) for group in optimizer.param_groups]
    if kappa == 1:
        return changes
    for group, changed in zip(optimizer.param_groups, changes, strict=True):
        if "initial_lr" in group:
            group["initial_lr"] = group["initial_lr"] * kappa ** lr_exponent(group, family, kappa)
        for name, change in changed.items():
            _write(group, name, change.after)
        _rescale_state(local_of(optimizer), group, family, kappa)
    return changes


def _rescale_state(local: Optimizer, group: dict[str, Any], family: Family, kappa: float) -> None:
    """Counters of steps, in the units of the new steps."""
    states = [local.state[p] for p in group["params"] if p in local.state]
    for name, power in family.state.items():
        entries = [state[name] for state in states if isinstance(state.get(name), Tensor)]
        if entries:
            torch._foreach_div_(entries, kappa**power)


def _write(group: dict[str, Any], name: str, after: Value) -> None:
    held = group[name] if isinstance(group[name], tuple | list) else (group[name],)
    if isinstance(held[0], Tensor):
        for tensor, number in zip(held, flat(after), strict=True):
            tensor.fill_(number)
    else:
        group[name] = after

"""The parameters that an optimizer trains, and whether a `step()` of it is a step of training."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.optim import Optimizer

from anybatch._errors import InvalidValueError, UsageError


def trainable(optimizer: Optimizer) -> list[Tensor]:
    """The optimizer's parameters that require a gradient, as its groups are now."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def trained_parameters(optimizer: Optimizer, *, model: nn.Module) -> list[Tensor]:
    """The optimizer's trained parameters, after a look at whether they are the model's.

    Raises:
        InvalidValueError: there are none, or some are not.
    """
    trained = trainable(optimizer)
    if not trained:
        raise InvalidValueError("The optimizer has no parameter that requires a gradient: there is nothing to scale.")
    if any(p.is_meta for p in trained):
        raise InvalidValueError(
            "Trained parameters lie on the meta device, so they have no values yet: materialise the model (to_empty, "
            "load_state_dict(assign=True)), make the optimizer of its new parameters, and attach then."
        )
    mine = {id(p) for p in model.parameters()}
    strangers = sum(id(p) not in mine for p in trained)
    if strangers:
        raise InvalidValueError(
            f"{strangers} of the {len(trained)} trained parameters of this optimizer are not in the model given to "
            "attach. Give the module whose parameters it trains (under DDP the wrapped module)."
        )
    return trained


@contextmanager
def withheld(optimizer: Optimizer) -> Iterator[None]:
    """Hide the gradients: torch's optimizers leave parameters without one as they are, and their state too."""
    kept = [(p, p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    try:
        for p, _ in kept:
            p.grad = None
        yield
    finally:
        for p, grad in kept:
            if p.grad is None:
                p.grad = grad


def check_in_use(optimizer: Optimizer, *, model: nn.Module) -> None:
    """Raise if the model has no longer the parameters that the optimizer trains; asked where a step saw no backward.

    Raises:
        UsageError: it has not.
    """
    mine = {id(p) for p in model.parameters()}
    if not any(id(p) in mine for p in trainable(optimizer)):
        raise UsageError(
            "The model has other parameters than those that this optimizer trains: they were replaced after attach, by "
            "load_state_dict(assign=True) or to_empty() say. Make the optimizer of the model's present parameters, and "
            "attach that one."
        )


def is_phantom(optimizer: Optimizer, *, counted: bool) -> bool:
    """Whether a `step()` before which no backward was seen is not training: distributed checkpoint primes an
    optimizer with zero gradients and a learning rate of zero.

    Args:
        optimizer: as it is before the step.
        counted: whether backwards are counted, so that gradients without one are an error.

    Raises:
        UsageError: there are gradients, but no hook saw the backward that made them.
    """
    grads = [p.grad for p in trainable(optimizer) if p.grad is not None]
    if counted and not grads:
        return False
    idle = all(float(group.get("lr", 1)) == 0 for group in optimizer.param_groups)
    if not counted:
        return idle and not any(bool(g.any()) for g in grads)
    if idle:
        return True
    raise UsageError(
        "optimizer.step() was called with gradients that no backward of the attached model made since the last "
        "step. Is this another optimizer than the one given to attach, were the gradients written by hand (use "
        "controller.observe), was the backward inside of controller.paused(), or is it torch's compiled autograd, "
        "which is not supported?"
    )

"""The parameters that an optimizer trains, and whether its `step()` is a step of training."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.optim import Optimizer

from anybatch._errors import InvalidValueError, UsageError


def trainable(optimizer: Optimizer) -> list[Tensor]:
    """The parameters in the optimizer's present groups that require a gradient."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def trained_parameters(optimizer: Optimizer, *, model: nn.Module) -> list[Tensor]:
    """The optimizer's trained parameters.

    Raises:
        InvalidValueError: there are none, or some are on the meta device or not the model's.
    """
    trained = trainable(optimizer)
    if not trained:
        raise InvalidValueError("The optimizer has no parameter that requires a gradient: pass one that has.")
    if any(p.is_meta for p in trained):
        raise InvalidValueError(
            "Trained parameters are on the meta device, so they have no values yet: materialise the model (to_empty, "
            "load_state_dict(assign=True)), make the optimizer of its new parameters, and attach after that."
        )
    known = {id(p) for p in model.parameters()}
    if strangers := sum(id(p) not in known for p in trained):
        raise InvalidValueError(
            f"{strangers} of the {len(trained)} trained parameters of this optimizer are not in the model given to "
            "attach. Pass the module whose parameters it trains (under DDP the wrapped module, with DeepSpeed the "
            "engine)."
        )
    return trained


def entries_of(parameter: Tensor) -> int:
    """The number of entries of a parameter; ZeRO stage 3 leaves it empty between its forwards."""
    return int(getattr(parameter, "ds_numel", 0)) or parameter.numel()


@contextmanager
def withheld(optimizer: Optimizer) -> Iterator[None]:
    """Hide the gradients: without them torch's optimizers change neither the parameters nor their state."""
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
    """Raise a `UsageError` at a step without a backward if the model no longer has the optimizer's parameters."""
    known = {id(p) for p in model.parameters()}
    if not any(id(p) in known for p in trainable(optimizer)):
        raise UsageError(
            "The model no longer has the parameters that this optimizer trains: they were replaced after attach, for "
            "example by load_state_dict(assign=True) or to_empty(). Make the optimizer of the model's present "
            "parameters, and attach that one."
        )


def is_phantom(optimizer: Optimizer, *, counted: bool) -> bool:
    """Whether a `step()` without a backward is not training.

    Distributed checkpoint primes an optimizer with zero gradients and a learning rate of zero. Where backwards are
    `counted`, gradients without a backward are otherwise a `UsageError`.
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
        "step. Possible causes: another optimizer than the one passed to attach; gradients written by hand (use "
        "controller.observe); a backward inside of controller.paused(); torch's compiled autograd, which is not "
        "supported."
    )

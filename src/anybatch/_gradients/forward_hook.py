"""A hook before each forward of a module that leaves no trace in a pickle or a copy of it."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class _Hooks(OrderedDict[int, Any]):
    """The hooks of a module by their number; those in `own` are left out of pickles and copies."""

    own: frozenset[int] = frozenset()

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter([each for each in self.items() if each[0] not in self.own])


def hook_forward(
    model: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
) -> RemovableHandle:
    """Call `hook(model, args, kwargs)` before each forward of `model`.

    A file of `torch.save(model)` then loads where anybatch is not installed, and with `weights_only=True`. Handles of
    torch refer to the module's dictionary of hooks. It is replaced only while it is empty, so no handle is lost.
    """
    replaced = not model._forward_pre_hooks and not isinstance(model._forward_pre_hooks, _Hooks)
    if replaced:
        model._forward_pre_hooks = _Hooks()
        model._forward_pre_hooks_with_kwargs = _Hooks()
    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    for hooks in (model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs):
        if isinstance(hooks, _Hooks):
            hooks.own |= {handle.id}
    return handle

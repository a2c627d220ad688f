"""What a step costs on any machine: dispatched operations, entries they read, collectives, the host's reads."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# On a GPU these wait for all that was launched before. Reads of one number are dispatched, these two are not.
_HOST_READS = {"tolist", "cpu"}


@dataclass(frozen=True)
class Counts:
    """Of one step.

    Args:
        reads: entries that operations take, in units of the model's parameters once it is `beyond` another.
        syncs: reads of a tensor by the host; inside of a backward, of single numbers alone.
    """

    operations: int
    reads: float
    collectives: int
    syncs: int

    def beyond(self, plain: "Counts", *, unit: int) -> "Counts":
        """What is more than in `plain`."""
        return Counts(
            self.operations - plain.operations,
            (self.reads - plain.reads) / unit,
            self.collectives - plain.collectives,
            self.syncs - plain.syncs,
        )


class Ops(TorchDispatchMode):
    """Counts what is dispatched while it is open."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = self.collectives = self.syncs = 0
        self.reads = 0.0

    @classmethod
    def of(cls, step: Callable[[], object]) -> Counts:
        """The counts of one `step()`."""
        with cls() as ops, _HostReads() as host:
            step()
        return Counts(ops.operations, ops.reads, ops.collectives, ops.syncs + host.reads)

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        self.collectives += str(func).startswith("c10d")
        self.syncs += "_local_scalar_dense" in str(func)
        if not func.is_view:
            given = {id(t): t for t in tree_leaves(args) if isinstance(t, Tensor)}
            self.reads += sum(t.numel() for t in given.values())
        return func(*args, **(kwargs or {}))


class _HostReads(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += getattr(func, "__name__", "") in _HOST_READS
        return func(*args, **(kwargs or {}))

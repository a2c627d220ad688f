"""check: the user's own step at scale 1 and at a larger one, and whether both are one training."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from textwrap import fill
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from anybatch._check.judge import clearing, means, schedule, sizes
from anybatch._check.trial import Step, Trial, run
from anybatch._errors import InvalidValueError, UnsupportedError, UsageError

_CALLS = 2  # of the step: the second one shows what the first left behind


@dataclass(frozen=True)
class Finding:
    """What was found of one part of a step.

    Args:
        part: `"sizes"`, `"means"`, `"schedule"`, `"clearing"`, or `"warning"` for what the library itself said.
        right: whether it is right.
        text: what was seen, and where it is not right, what to do.
    """

    part: str
    right: bool
    text: str


@dataclass(frozen=True)
class Check:
    """What `check` found; printed, a line or a few for each part.

    Args:
        findings: one or more for each part.
    """

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether everything that could be looked at is right."""
        return all(finding.right for finding in self.findings)

    def __str__(self) -> str:
        """A line or a few for each finding, at most 80 characters wide."""
        lines = (fill(f"{'ok' if f.right else 'WRONG':6}{f.part:9} {f.text}", 80, subsequent_indent=" " * 16)
                 for f in self.findings)  # fmt: skip
        return "\n".join(lines)


def check(
    step: Step,
    *,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    batch: Any,
    times: int = 4,
    scheduler: Any = None,
    **options: Any,
) -> Check:
    """Try your own training step on copies, at scale 1 and at a larger one, and say whether both are one training.

    The larger batch is the base batch `times` over, so its mean gradient is that of the base batch whatever the model:

        scale counted = times          gradient at the step = gradient of the base batch

    and where one of these does not hold, sizes or divisions are wrong. Half of a micro-batch against the same half
    twice over tells a sum over examples from a mean. The step is called twice each time, from one seed.

    Args:
        step: the body of your loop, as a function `step(model, optimizer, controller, batch)` that uses its arguments,
            not the names outside, and takes the number of its micro-batches from the batch that it gets. What it
            returns is ignored.
        model: as for `attach`, in one process; it stays as it is.
        optimizer: as for `attach`, before it is attached; a list of them is given to the step as a list.
        batch: one base batch as your step takes it: a tensor, or lists, tuples and dictionaries of tensors whose first
            dimension is that of the examples.
        times: how many base batches the larger batch holds, at least 2.
        scheduler: as for `attach`.
        options: all others of `attach`, such as `base_batch=32, micro_batch=8`; `record` is left out.

    Returns:
        A `Check`: `findings`, each a `Finding` with `part`, `right` and `text`; and `ok`, whether all of them are
        right. `print` it, or `assert anybatch.check(...).ok`.

    Raises:
        InvalidValueError: `times` below 2, or no tensor in the batch.
        UsageError: the step trained the model outside instead of the one that it was given.
        UnsupportedError: several ranks.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> def step(model, optimizer, controller, batch):
        ...     for part in batch.split(8):
        ...         model(part).square().mean().backward()         # not divided by the number of parts
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> batch = torch.randn(8, 4)
        >>> print(anybatch.check(step, model=model, optimizer=optimizer, batch=batch, base_batch=8, micro_batch=8))
        ok    sizes     1 backward counted as scale 1, 4 as scale 4.
        WRONG means     The base batch 4 times over gave 4 times its gradient, in 4
                        backwards: divide each loss by the number of micro-batches, or
                        attach(..., reduction="sum").
        ok    means     Of half of a micro-batch and the same half twice over the
                        gradients are the same: a mean over examples.
        ok    schedule  No scheduler was given.
        ok    clearing  Each step found its own gradients, and only these.

    Note:
        Batch norm, dropout and other chance change gradients by a little; up to a fifth is taken for the same.
        Gradients are compared as they are after the last backward, before clipping. A `GradScaler` in `options` is
        used as it is.
    """
    if isinstance(times, bool) or not isinstance(times, int) or times < 2:
        raise InvalidValueError(f"times is how many base batches the larger one holds, at least 2; got {times!r}.")
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise UnsupportedError("check looks at one process: give it the bare model, without a process group.")
    sizes_of = [t.shape[0] for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim()]
    if not sizes_of:
        raise InvalidValueError("batch holds no tensor whose first dimension is that of the examples.")
    options = {name: value for name, value in options.items() if name != "record"}
    outside = [p._version for p in model.parameters()]  # a look at the weights without a copy of them
    schedulers = [] if scheduler is None else list(scheduler) if isinstance(scheduler, list | tuple) else [scheduler]
    before = [deepcopy(each.state_dict()) for each in schedulers]
    groups = [g for each in ([optimizer] if isinstance(optimizer, Optimizer) else optimizer) for g in each.param_groups]
    rates = [{name: value for name, value in group.items() if name != "params"} for group in groups]

    def trial(data: Any, *, calls: int = _CALLS) -> Trial:
        found = run(step, data, model=model, optimizer=optimizer, scheduler=scheduler, options=options, calls=calls)
        if [p._version for p in model.parameters()] != outside or any(p.grad is not None for p in fresh):
            raise UsageError(
                "The step trained the model outside instead of the one that it was given: use the arguments of "
                "step(model, optimizer, controller, batch), and build the model anew, for it has moved."
            )
        return found

    fresh = [p for p in model.parameters() if p.grad is None]
    base, large = trial(batch), trial(_repeated(batch, times))
    pieces = 2 * max(1, base.forwards[0] or base.backwards[0])
    halves = None
    if min(sizes_of) >= pieces:
        half = tree_map(lambda t: t[: len(t) // pieces] if isinstance(t, Tensor) and t.dim() else t, batch)
        try:
            halves = trial(half, calls=1), trial(_repeated(half, 2), calls=1)
        except UsageError:
            raise
        except Exception:  # a step need not bear so small a batch
            halves = None
    stepped = [each.state_dict() != state for each, state in zip(schedulers, before, strict=True)]
    for each, state in zip(schedulers, before, strict=True):
        each.load_state_dict(state)
    for group, rate in zip(groups, rates, strict=True):
        group.update(rate)
    summed = options.get("reduction") == "sum"
    parts = [
        *(("sizes", *found) for found in sizes(base, large, times=times)),
        *(("means", *found) for found in means(base, large, halves, times=times, summed=summed)),
        ("schedule", *schedule(given=bool(schedulers), stepped=any(stepped))),
        *(("clearing", *found) for found in clearing(base, large)),
        *(("warning", False, said) for said in dict.fromkeys([*base.said, *large.said])),
    ]
    return Check(tuple(Finding(*found) for found in parts))


def _repeated(batch: Any, times: int) -> Any:
    return tree_map(lambda t: torch.cat([t] * times) if isinstance(t, Tensor) and t.dim() else t, batch)

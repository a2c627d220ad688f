"""The user's own step at scale 1 and at a larger scale, and whether both are the same training."""

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
from anybatch._gradients import is_deepspeed

_CALLS = 2  # of the step: the second one shows the gradients that the first one left


@dataclass(frozen=True)
class Finding:
    """The result of `check` for one part of a step.

    Args:
        part: `"sizes"`, `"means"`, `"schedule"`, `"clearing"`, or `"warning"` for a warning or error of the library.
        right: whether the part is right.
        text: what was measured, and where it is wrong, what to do.
    """

    part: str
    right: bool
    text: str


@dataclass(frozen=True)
class Check:
    """The result of `check`; printed, it has a few lines for each part.

    Args:
        findings: one or more for each part.
    """

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether all findings are right."""
        return all(finding.right for finding in self.findings)

    def __str__(self) -> str:
        """A few lines for each finding, at most 80 characters wide."""
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
    """Run your own training step on copies, at scale 1 and at a larger scale, and compare the two.

    The larger batch repeats the base batch `times` times, so its mean gradient is that of the base batch:

        scale counted = times          gradient at the step = gradient of the base batch

    Where one of these does not hold, sizes or divisions are wrong. Half of a micro-batch, once and repeated, separates
    a sum over examples from a mean. The step is called twice each time, from one seed.

    Args:
        step: the body of your loop, as a function `step(model, optimizer, controller, batch)`. It must use its
            arguments, not global names, and compute the number of micro-batches from `batch`. Its result is ignored.
        model: as for `attach`, in one process; it stays unchanged.
        optimizer: as for `attach`, before it is attached; a list is passed to the step as a list.
        batch: one base batch for your step: a tensor, or lists, tuples and dictionaries of tensors whose first
            dimension is that of the examples.
        times: number of base batches in the larger batch, at least 2.
        scheduler: as for `attach`.
        options: other arguments of `attach`, such as `base_batch=32, micro_batch=8`; `record` is ignored.

    Returns:
        A `Check`: `findings`, each a `Finding` with `part`, `right` and `text`; and `ok`, whether all of them are
        right. `print` it, or `assert anybatch.check(...).ok`.

    Raises:
        InvalidValueError: `times` below 2, or no tensor in the batch.
        UsageError: the step trained the original model instead of its argument.
        UnsupportedError: several ranks, or DeepSpeed's engine.

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
        WRONG means     The base batch repeated 4 times gave 4 times its gradient, in 4
                        backwards: divide each loss by the number of micro-batches, or
                        attach(..., reduction="sum").
        ok    means     Half of a micro-batch and the same half twice gave the same
                        gradient: a mean over examples.
        ok    schedule  No scheduler was given.
        ok    clearing  Each step had its own gradients, and only these.

    Note:
        Batch norm, dropout and other randomness change gradients slightly; differences up to a fifth are ignored.
        Gradients are compared after the last backward, before clipping. A `GradScaler` in `options` is not copied.
    """
    if isinstance(times, bool) or not isinstance(times, int) or times < 2:
        raise InvalidValueError(f"times is the number of base batches in the larger one, at least 2; got {times!r}.")
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise UnsupportedError("check needs one process: pass the bare model, without a process group.")
    if is_deepspeed(model):
        raise UnsupportedError(
            "check runs your step on copies of the model, and a DeepSpeed engine has its hooks on the original: pass "
            "the bare model and its optimizer, before deepspeed.initialize."
        )
    first_dimensions = [t.shape[0] for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim()]
    if not first_dimensions:
        raise InvalidValueError("batch has no tensor whose first dimension is that of the examples: pass a base batch.")
    options = {name: value for name, value in options.items() if name != "record"}
    versions = [p._version for p in model.parameters()]  # shows a change of the weights without a copy of them
    without_grad = [p for p in model.parameters() if p.grad is None]
    schedulers = [] if scheduler is None else list(scheduler) if isinstance(scheduler, list | tuple) else [scheduler]
    before = [deepcopy(each.state_dict()) for each in schedulers]
    groups = [g for each in ([optimizer] if isinstance(optimizer, Optimizer) else optimizer) for g in each.param_groups]
    saved = [{name: value for name, value in group.items() if name != "params"} for group in groups]

    def trial(data: Any, *, calls: int = _CALLS) -> Trial:
        found = run(step, data, model=model, optimizer=optimizer, scheduler=scheduler, options=options, calls=calls)
        if [p._version for p in model.parameters()] != versions or any(p.grad is not None for p in without_grad):
            raise UsageError(
                "The step trained the original model instead of its argument: use the arguments of "
                "step(model, optimizer, controller, batch), and build the model again, for its weights have changed."
            )
        return found

    base, large = trial(batch), trial(_repeated(batch, times))
    pieces = 2 * max(1, base.forwards[0] or base.backwards[0])
    halves = None
    if min(first_dimensions) >= pieces:
        half = tree_map(lambda t: t[: len(t) // pieces] if isinstance(t, Tensor) and t.dim() else t, batch)
        try:
            halves = trial(half, calls=1), trial(_repeated(half, 2), calls=1)
        except UsageError:
            raise
        except Exception:  # a step may need a larger batch
            halves = None
    stepped = [each.state_dict() != state for each, state in zip(schedulers, before, strict=True)]
    for each, state in zip(schedulers, before, strict=True):
        each.load_state_dict(state)
    for group, values in zip(groups, saved, strict=True):
        group.update(values)
    summed = options.get("reduction") == "sum"
    verdicts = {
        "sizes": sizes(base, large, times=times),
        "means": means(base, large, halves, times=times, summed=summed),
        "schedule": [schedule(given=bool(schedulers), stepped=any(stepped))],
        "clearing": clearing(base, large),
        "warning": [(False, text) for text in dict.fromkeys([*base.warned, *large.warned])],
    }
    return Check(tuple(Finding(part, *verdict) for part, found in verdicts.items() for verdict in found))


def _repeated(batch: Any, times: int) -> Any:
    return tree_map(lambda t: torch.cat([t] * times) if isinstance(t, Tensor) and t.dim() else t, batch)

"""From what trials saw to what is right and what is not, in words: pairs of a verdict and a sentence."""

from math import inf, isclose, isfinite, log

from anybatch._check.trial import Trial

Verdict = tuple[bool, str]
_SAME = 0.2  # of the logarithm of a ratio: chance in a model is less, a forgotten factor log 2 or more


def sizes(base: Trial, large: Trial, *, times: int) -> list[Verdict]:
    """Whether the steps counted as scale 1 and as scale `times`."""
    if not (base.scales and large.scales):
        return [(False, "No step was taken, so nothing was counted.")]
    one, many = base.scales[0], large.scales[0]
    seen = f"{_backwards(base)} counted as scale {one:g}, {large.backwards[0]} as scale {many:g}."
    if isclose(one, 1, rel_tol=1e-6) and isclose(many, times, rel_tol=1e-6):
        return [(True, seen)]
    if large.forwards[0] and large.backwards[0] == 2 * large.forwards[0]:
        why = (
            f"each forward had 2 backwards ({large.forwards[0]} forwards), and each counts as a micro-batch: put those "
            "of one micro-batch into `with controller.together():`."
        )
    elif isclose(many, times * one, rel_tol=1e-6):
        why = (
            f"all scales are {one:g} times what they are. Is the batch one base batch? micro_batch is what one "
            "backward sees, in the unit of base_batch; micro_batch='auto' reads it."
        )
    else:
        why = (
            "the scale does not follow the batch. Take the number of micro-batches from the batch, in pieces of "
            "micro_batch, or set micro_batch='auto' where the pieces grow."
        )
    return [(False, f"{seen} It should be 1 and {times}: {why}")]


def means(base: Trial, large: Trial, halves: tuple[Trial, Trial] | None, *, times: int, summed: bool) -> list[Verdict]:
    """Whether the gradient at the step is a mean, over micro-batches and over the examples of one."""
    ratio = _ratio(base, large)
    if ratio is None:
        return [(False, "No gradient to compare: no backward reached the weights that the step was given.")]
    more = large.backwards[0] / base.backwards[0]
    due = more if summed else 1.0
    if _same(ratio, due):
        kind = f"a sum over {large.backwards[0]}, as reduction='sum' says" if summed else "the same gradient"
        found = [(True, f"The base batch {times} times over gave {kind} in {_backwards(large)}.")]
    else:
        found = [(False, f"The base batch {times} times over gave {ratio:.3g} times its gradient, "
                         f"in {_backwards(large)}: {_division(ratio, more, summed=summed)}")]  # fmt: skip
    return [*found, _over_examples(*halves or (Trial(), Trial()), summed=summed)]


def _division(ratio: float, more: float, *, summed: bool) -> str:
    if summed:
        return f"with reduction='sum' it should be {more:.3g} times; do not divide the losses, or leave reduction out."
    if more > 1 and _same(ratio, more):
        return 'divide each loss by the number of micro-batches, or attach(..., reduction="sum").'
    return (
        "it should be 1. Divide each loss by the number of micro-batches of this very step, and let each be a mean "
        "over its examples."
    )


def _over_examples(half: Trial, twice: Trial, *, summed: bool) -> Verdict:
    ratio, what = _ratio(half, twice), "Of half of a micro-batch and the same half twice over"
    if ratio is None or (not summed and twice.backwards[0] != half.backwards[0]):
        return True, f"{what} nothing can be told, whether the loss is a mean over its examples."
    if _same(ratio, twice.backwards[0] / half.backwards[0]):
        return True, f"{what} the gradients are the same: a mean over examples."
    why = "the loss is a sum over its examples" if _same(ratio, 2) else "the loss is no mean over its examples"
    return (
        False,
        f"{what} the gradients differ {ratio:.3g} times, in as many backwards: {why}. "
        'Use reduction="mean" in the loss, or divide it by the number of examples.',
    )


def schedule(*, given: bool, stepped: bool) -> Verdict:
    """Whether the clock alone moves the schedule."""
    if stepped:
        return False, "The step calls scheduler.step(): remove it, for anybatch steps the scheduler with the clock."
    return True, "Moved by the clock alone." if given else "No scheduler was given."


def clearing(base: Trial, large: Trial) -> list[Verdict]:
    """Whether each step has its own gradients and no others."""
    found = []
    trials = (base, large)
    if any(any(t.dirty) for t in trials):
        found.append(
            "Gradients of the step before were still there: call optimizer.zero_grad() after optimizer.step()."
        )
    if any(any(t.cleared) for t in trials):
        found.append("The gradients were cleared before optimizer.step(): call optimizer.zero_grad() after it.")
    if any(n != 1 for t in trials for n in t.steps):
        calls = sorted({n for t in trials for n in t.steps})
        found.append(
            f"One call of the step called optimizer.step() {' or '.join(map(str, calls))} times: it should be once for "
            "each optimizer, after the last backward."
        )
    return [(False, each) for each in found] or [(True, "Each step found its own gradients, and only these.")]


def _ratio(one: Trial, other: Trial) -> float | None:
    """By how much the gradient of `other` is larger, along that of `one`; `None` where there is none."""
    square = sum(float(g.square().sum()) for g in one.gradient.values())
    product = sum(float((g * other.gradient[name]).sum()) for name, g in one.gradient.items() if name in other.gradient)
    return product / square if isfinite(product) and 0 < square < inf else None


def _same(ratio: float, due: float) -> bool:
    return ratio > 0 and abs(log(ratio / due)) < _SAME


def _backwards(trial: Trial) -> str:
    n = trial.backwards[0]
    return f"{n} backward{'' if n == 1 else 's'}"

"""Verdicts on trials: pairs of whether a part is right and a text."""

from math import inf, isclose, isfinite, log

from anybatch._check.trial import Trial

Verdict = tuple[bool, str]
_SAME = 0.2  # in the logarithm of a ratio: randomness in a model has less, a forgotten factor log 2 or more


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
            f"all scales are wrong by the factor {one:g}. Pass one base batch. micro_batch is the size of one "
            "backward's batch, in the unit of base_batch; micro_batch='auto' reads it."
        )
    else:
        why = (
            "the scale does not follow the batch. Take the number of micro-batches from the batch, in pieces of "
            "micro_batch, or set micro_batch='auto' where the pieces grow."
        )
    return [(False, f"{seen} It should be 1 and {times}: {why}")]


def means(base: Trial, large: Trial, halves: tuple[Trial, Trial] | None, *, times: int, summed: bool) -> list[Verdict]:
    """Whether the gradient at the step is a mean, over micro-batches and over the examples of each."""
    ratio = _ratio(base, large)
    if ratio is None:
        return [(False, "No gradient to compare: no backward reached the weights of the step's model.")]
    more = large.backwards[0] / base.backwards[0]
    repeated, right = f"The base batch repeated {times} times gave", _same(ratio, more if summed else 1.0)
    if right:
        kind = f"a sum over {large.backwards[0]}, as reduction='sum' states," if summed else "the same gradient"
        text = f"{repeated} {kind} in {_backwards(large)}."
    else:
        if summed:
            why = f"with reduction='sum' it should be {more:.3g} times; do not divide the losses, or omit reduction."
        elif more > 1 and _same(ratio, more):
            why = 'divide each loss by the number of micro-batches, or attach(..., reduction="sum").'
        else:
            why = "it should be 1. Divide each loss, a mean over its examples, by the step's number of micro-batches."
        text = f"{repeated} {ratio:.3g} times its gradient, in {_backwards(large)}: {why}"
    return [(right, text), _over_examples(*halves or (Trial(), Trial()), summed=summed)]


def _over_examples(half: Trial, twice: Trial, *, summed: bool) -> Verdict:
    ratio, what = _ratio(half, twice), "Half of a micro-batch and the same half twice gave"
    if ratio is None or (not summed and twice.backwards[0] != half.backwards[0]):
        return True, f"{what} no evidence whether the loss is a mean over its examples."
    if _same(ratio, twice.backwards[0] / half.backwards[0]):
        return True, f"{what} the same gradient: a mean over examples."
    why = "the loss is a sum over its examples" if _same(ratio, 2) else "the loss is not a mean over its examples"
    return (
        False,
        f"{what} gradients that differ by the factor {ratio:.3g}, in the same number of backwards: {why}. "
        'Use reduction="mean" in the loss, or divide it by the number of examples.',
    )


def schedule(*, given: bool, stepped: bool) -> Verdict:
    """Whether the clock alone steps the schedule."""
    if stepped:
        return False, "The step calls scheduler.step(): remove it, for anybatch steps the scheduler with the clock."
    return True, "Stepped by the clock alone." if given else "No scheduler was given."


def clearing(base: Trial, large: Trial) -> list[Verdict]:
    """Whether each step has its own gradients and no others."""
    found = []
    if any(base.dirty + large.dirty):
        found.append("Gradients of an earlier step were left: call optimizer.zero_grad() after optimizer.step().")
    if any(base.cleared + large.cleared):
        found.append("The gradients were cleared before optimizer.step(): call optimizer.zero_grad() after it.")
    calls = sorted({*base.steps, *large.steps})
    if calls not in ([], [1]):
        found.append(
            f"One call of the step called optimizer.step() {' or '.join(map(str, calls))} times: it should be once for "
            "each optimizer, after the last backward."
        )
    return [(False, each) for each in found] or [(True, "Each step had its own gradients, and only these.")]


def _ratio(one: Trial, other: Trial) -> float | None:
    """The gradient of `other` along that of `one`, relative to it; `None` where there is no gradient."""
    square = sum(float(g.square().sum()) for g in one.gradient.values())
    product = sum(float((g * other.gradient[name]).sum()) for name, g in one.gradient.items() if name in other.gradient)
    return product / square if isfinite(product) and 0 < square < inf else None


def _same(ratio: float, due: float) -> bool:
    return ratio > 0 and abs(log(ratio / due)) < _SAME


def _backwards(trial: Trial) -> str:
    n = trial.backwards[0]
    return f"{n} backward{'' if n == 1 else 's'}"

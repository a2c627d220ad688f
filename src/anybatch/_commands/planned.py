"""A plan: the values at another batch, what its decays remember, and the limits of the theory."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from os import PathLike
from typing import TYPE_CHECKING, Any

import anybatch
from anybatch._commands.static import Recorded, how_good, recorded

if TYPE_CHECKING:
    from anybatch._forecast import Estimate
    from anybatch._maps import Change

_HORIZON = -1 + 0.527  # of AdamW's weight decay, by the number of tokens at a constant model and learning rate
_DECAYS = ("betas", "alpha", "rho", "momentum", "ema_decay")  # of averages: d remembers 1 / (1 - d) steps


@dataclass(frozen=True)
class Memory:
    """What a decay remembers, for each of its numbers."""

    before: list[float]  # steps at the base batch
    after: list[float]  # steps at the new batch
    examples_before: list[float]
    examples_after: list[float]


@dataclass(frozen=True)
class Plan:
    """The hyperparameters for another batch."""

    optimizer: str
    base_batch: float  # the batch that the values were tuned for, examples
    batch: int  # examples
    kappa: float  # batch / base_batch
    changes: "dict[str, Change]"
    memory: dict[str, Memory]  # of each decay in `changes`
    limits: list[str]  # the limits of the theory for this plan, as sentences
    adascale: str  # the alternative with AdaScale
    noise_scale: float | None  # at the end of the recorded run, examples; this and the rest `None` without a record
    gain: "Estimate | None"  # mean gain at the new batch, which maps the values
    steps: "Estimate | None"  # optimizer steps of the recorded run at the new batch
    how_good: str | None  # runs with such values, relative to runs that measured


def planned(
    optimizer: str | None,
    *,
    base_batch: int | None,
    batch: int,
    values: Mapping[str, Any],
    steps: Mapping[str, int],
    horizon: int | None,
    record: str | PathLike[str] | None,
) -> Plan:
    """The plan, with `values` as for `scale_hyperparameters` and `steps` as numbers of steps at the base batch.

    `horizon` is the length of the planned run where it is not `steps["total"]`.
    """
    from anybatch._numbers import MOST, shown

    for name, number in {"base-batch": base_batch, "batch": batch, "horizon": horizon, **steps}.items():
        if number is not None and not 1 <= number <= MOST:
            raise anybatch.InvalidValueError(f"{name} must be from 1 to {MOST}, got {shown(number)}.")
    if horizon is not None and "total" not in steps:
        raise anybatch.InvalidValueError(
            "horizon needs total, the steps of the run that the values were tuned in. With --record leave horizon out: "
            "the gains in a record are those of its own length."
        )
    if record is not None:
        if "total" in steps:
            raise anybatch.InvalidValueError("total is that of the record: leave it out, or plan without --record.")
        return _of_record(
            recorded(record, optimizer=optimizer, base_batch=base_batch, batch=batch), batch, values, steps
        )
    if optimizer is None or base_batch is None or "lr" not in values:
        missing = "optimizer" if optimizer is None else "base-batch" if base_batch is None else "lr"
        raise anybatch.InvalidValueError(f"{missing} is needed, or --record with the record of a run.")
    kappa = batch / base_batch
    changes = anybatch.scale_hyperparameters(optimizer, kappa, **values)
    changes |= _shorter(steps, kappa, "steps / kappa: the same examples", "Goyal et al. 2017")
    if horizon is not None:
        changes = _of_length(changes, optimizer, horizon / steps["total"], ceil(horizon / kappa))
    return _plan(optimizer, base_batch, batch, kappa, changes)


def _of_record(run: Recorded, batch: int, values: Mapping[str, Any], steps: Mapping[str, int]) -> Plan:
    """The plan with the values of the record, where `values` has no other, by the mean gain."""
    from anybatch._maps import Change

    if "lr" not in values and "lr" not in run.groups[0]:
        raise anybatch.InvalidValueError(f"lr is needed: the record has no values of {run.optimizer}.")
    gain = run.gain.value
    first, *others = (anybatch.scale_hyperparameters(run.optimizer, gain, **{**g, **values}) for g in run.groups)
    changes = dict(first)
    for index, group in enumerate(others, 1):
        for name in dict.fromkeys([*first, *group]):
            change = group.get(name, Change(0.0, 0.0, "0 stays 0", "derived"))
            if change != first.get(name):
                changes[f"{name} of group {index}"] = change
    changes |= _shorter(steps, gain, "steps / kappa: the same base iterations", "Johnson et al. 2020")
    changes = {name: replace(change, why=change.why.replace("kappa", "gain")) for name, change in changes.items()}
    why = "steps until the sum of the gains is the total"
    changes["total"] = Change(run.forecast.total, run.steps.value, why, "Johnson et al. 2020")
    plan = _plan(run.optimizer, run.base_batch, batch, gain, changes)
    return replace(
        plan,
        kappa=batch / run.base_batch,
        noise_scale=run.noise_scale,
        gain=run.gain,
        steps=run.steps,
        how_good=how_good(run.optimizer),
    )


def _of_length(changes: "dict[str, Change]", optimizer: str, longer: float, steps: int) -> "dict[str, Change]":
    """The changes for a run that is `longer` times as long, in examples."""
    found = dict(changes)
    found["total"] = replace(found["total"], after=steps, why="horizon / kappa")
    decay = found.get("weight_decay")
    if optimizer.lower() == "adamw" and decay is not None:
        found["weight_decay"] = replace(
            decay,
            after=_number(decay.after) * longer**_HORIZON,
            why=f"{decay.why}, then * (horizon / total) ** {_HORIZON:g}: measured on language models in one pass",
            source=f"{decay.source}; Bergsma et al. 2025, arXiv 2505.13738",
        )
    return found


def _shorter(steps: Mapping[str, int], factor: float, why: str, source: str) -> "dict[str, Change]":
    from anybatch._maps import Change

    after = {name: number if factor == 1 else ceil(number / factor) for name, number in steps.items()}
    return {name: Change(number, after[name], why, source) for name, number in steps.items()}


def _plan(optimizer: str, base_batch: float, batch: int, factor: float, changes: "dict[str, Change]") -> Plan:
    """The plan of a fixed rule, whose step replaces `factor` base iterations."""
    return Plan(
        optimizer=optimizer,
        base_batch=base_batch,
        batch=batch,
        kappa=factor,
        changes=changes,
        memory=_memories(changes, base_batch, batch),
        limits=_limits(optimizer.lower(), factor, changes),
        adascale=_adascale(base_batch, batch / base_batch),
        noise_scale=None,
        gain=None,
        steps=None,
        how_good=None,
    )


def _memories(changes: "Mapping[str, Change]", base: float, batch: float) -> dict[str, Memory]:
    found = {}
    for name, change in changes.items():
        if name.split()[0] in _DECAYS:
            before, after = ([1 / (1 - d) for d in numbers(value)] for value in (change.before, change.after))
            found[name] = Memory(before, after, [n * base for n in before], [n * batch for n in after])
    return found


def _adascale(base_batch: float, kappa: float) -> str:
    least, most = sorted((1.0, kappa))
    return (
        f"AdaScale needs none of this: keep the values for {base_batch:g}, and attach(optimizer, model=model, "
        f"base_batch={base_batch:g}, micro_batch=...). It measures the gain of each step, from {least:g} to {most:g}, "
        "and scales learning rate, schedule and EMA by it."
    )


def _limits(optimizer: str, kappa: float, changes: "Mapping[str, Change]") -> list[str]:
    """The limits of the theory, where a step replaces `kappa` base iterations."""
    limits = []
    if optimizer == "sgd" and kappa > 1:
        limits.append(
            "Linear scaling is stable only while kappa * lr < 2 / beta, with an unknown curvature beta: warm the "
            "learning rate up (anybatch.Linear(warmup=0.055)), or use AdaScale."
        )
    lr, decay = changes.get("lr"), changes.get("weight_decay")
    if optimizer == "sgd" and lr and decay and _number(lr.after) * _number(decay.after) > 1:
        limits.append(
            f"lr * weight_decay would be {_number(lr.after) * _number(decay.after):.4g}: above 1 each step flips the "
            "weights' signs."
        )
    for name in ("betas", "alpha", "ema_decay"):
        change = changes.get(name)
        short = [b for b in numbers(change.before) if b and kappa * (1 - b) >= 1] if change and kappa > 1 else []
        limits += [
            f"{name} {beta:g}: its memory of {1 / (1 - beta):.4g} base iterations is not longer than one step of "
            f"{kappa:g}. The papers' theory needs a small kappa * (1 - beta)."
            for beta in short
            if change and change.after != change.before
        ]
    if kappa < 1:
        limits.append(
            f"A smaller batch takes {1 / kappa:.4g} times as many steps. BatchNorm's statistics are noisier in it, and "
            "no value here corrects that."
        )
    return limits


def numbers(value: float | tuple[float, ...]) -> tuple[float, ...]:
    """The numbers of a value."""
    return value if isinstance(value, tuple) else (value,)


def _number(value: float | tuple[float, ...]) -> float:
    return numbers(value)[0]

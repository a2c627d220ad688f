"""`anybatch plan`: the hyperparameters at another batch, and the limits of the theory."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil, inf
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import anybatch
from anybatch._commands.terminal import failed, in_options, table, words

_OPTIONS = {
    "optimizer": "--optimizer",
    "lr": "--lr",
    "base-batch": "--base-batch",
    "batch": "--batch",
    "betas": "--betas",
    "eps": "--eps",
    "weight_decay": "--weight-decay",
    "momentum": "--momentum",
    "alpha": "--alpha",
    "ema_decay": "--ema",
    "batch_norm_momentum": "--batch-norm-momentum",
    "betas_rule": "--betas-rule",
    "warmup": "--warmup",
    "total": "--total",
}

if TYPE_CHECKING:
    from anybatch._maps import Change


@dataclass(frozen=True)
class Plan:
    """The hyperparameters for another batch."""

    optimizer: str
    base_batch: int  # the batch that the values were tuned for, examples
    batch: int  # examples
    kappa: float  # batch / base_batch
    changes: "dict[str, Change]"
    limits: list[str]  # the limits of the theory for this plan, as sentences
    adascale: str  # the alternative with AdaScale
    noise_scale: float | None  # noise scale at the end of the given run, examples; `None` without a record
    gain: float | None  # AdaScale's gain at the new batch for that noise scale


def plan(
    *,
    optimizer: Annotated[str, typer.Option(help="A class of torch.optim: sgd, adam, adamw, rmsprop, ...")],
    lr: Annotated[float, typer.Option(help="Learning rate, as tuned at the base batch.")],
    base_batch: Annotated[int, typer.Option(help="The batch that the values were tuned for, in examples.")],
    batch: Annotated[int, typer.Option(help="The new batch, in examples.")],
    betas: Annotated[str | None, typer.Option(help="Two numbers, comma-separated.")] = None,
    eps: Annotated[float | None, typer.Option(help="The term that Adam adds to its denominator.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay, as tuned at the base batch.")] = None,
    momentum: Annotated[float | None, typer.Option(help="Momentum, as tuned at the base batch.")] = None,
    alpha: Annotated[float | None, typer.Option(help="RMSprop's decay.")] = None,
    ema: Annotated[float | None, typer.Option(help="Decay of the model's moving average, per step.")] = None,
    batch_norm_momentum: Annotated[float | None, typer.Option(help="PyTorch's momentum of BatchNorm.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps of the warm-up at the base batch.")] = None,
    total: Annotated[int | None, typer.Option(help="Steps of the whole run at the base batch.")] = None,
    betas_rule: Annotated[str, typer.Option(help="power: beta ** kappa; sde: 1 - kappa * (1 - beta).")] = "power",
    record: Annotated[Path | None, typer.Option(help="A run's record, for its noise scale.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print strict JSON.")] = False,
) -> None:
    """Print the hyperparameters for another batch size.

    The table has each value before and after the change, with the rule and its source.
    """
    values = {
        "lr": lr,
        "betas": None if betas is None else _pair(betas),
        "eps": eps,
        "weight_decay": weight_decay,
        "momentum": momentum,
        "alpha": alpha,
        "ema_decay": ema,
        "batch_norm_momentum": batch_norm_momentum,
        "betas_rule": betas_rule,
    }
    try:
        made = planned(
            optimizer,
            base_batch=base_batch,
            batch=batch,
            values=_given(values),
            steps=_given({"warmup": warmup, "total": total}),
            record=record,
        )
    except (anybatch.AnybatchError, OSError) as error:
        raise failed(in_options(str(error), _OPTIONS)) from None
    if as_json:
        from anybatch._record import strict

        typer.echo(json.dumps(strict(asdict(made)), indent=2, allow_nan=False))
    else:
        _show(made)


def planned(
    optimizer: str,
    *,
    base_batch: int,
    batch: int,
    values: Mapping[str, Any],
    steps: Mapping[str, int],
    record: str | PathLike[str] | None,
) -> Plan:
    """The plan, with `values` as for `scale_hyperparameters` and `steps` as numbers of steps at the base batch."""
    from anybatch._maps import Change
    from anybatch._numbers import MOST, shown

    for name, number in {"base-batch": base_batch, "batch": batch, **steps}.items():
        if not 1 <= number <= MOST:
            raise anybatch.InvalidValueError(f"{name} must be from 1 to {MOST}, got {shown(number)}.")
    kappa = batch / base_batch
    changes = anybatch.scale_hyperparameters(optimizer, kappa, **values)
    for name, number in steps.items():
        why = "steps / kappa: the same examples"
        changes[name] = Change(number, number if kappa == 1 else ceil(number / kappa), why, "Goyal et al. 2017")
    noise_scale = None if record is None else _noise_scale(record, base_batch)
    noise = None if noise_scale is None else noise_scale / base_batch
    gain = None if noise is None else kappa if noise == inf else (noise + 1) / (noise / kappa + 1)
    return Plan(
        optimizer=optimizer,
        base_batch=base_batch,
        batch=batch,
        kappa=kappa,
        changes=changes,
        limits=_limits(optimizer.lower(), kappa, batch, changes, noise_scale),
        adascale=_adascale(base_batch, kappa, gain),
        noise_scale=noise_scale,
        gain=gain,
    )


def _noise_scale(record: str | PathLike[str], base_batch: int) -> float:
    """The median noise scale over the last tenth of a run, in examples."""
    from anybatch._numbers import median
    from anybatch._record import read_columns

    run = read_columns(record, ("variance", "sqnorm", "noise_scale", "skipped"))
    infinite = (run["variance"] > 0) & (run["sqnorm"] == 0)  # a record has no number for infinity
    noise = run["noise_scale"].masked_fill(infinite, inf)[run["skipped"] == 0]
    noise = noise[noise >= 0]
    if not len(noise):
        raise anybatch.InvalidValueError(
            f"{record} has no step with a noise scale: give the record of an AdaScale run."
        )
    recent = median(noise[-ceil(len(noise) / 10) :])
    return recent * (1 if run.config.get("base_batch") else base_batch)  # without a base batch it is in base batches


def _adascale(base_batch: int, kappa: float, gain: float | None) -> str:
    least, most = sorted((1.0, kappa))
    text = (
        f"AdaScale needs none of this: keep the values for {base_batch}, and attach(optimizer, model=model, "
        f"base_batch={base_batch}, micro_batch=...). It measures the gain of each step, from {least:g} to {most:g}, "
        "and scales learning rate, schedule and EMA by it."
    )
    return text if gain is None else f"{text} At the noise scale of the given run the gain would be {gain:.4g}."


def _limits(
    optimizer: str, kappa: float, batch: int, changes: "Mapping[str, Change]", noise_scale: float | None
) -> list[str]:
    limits = []
    if noise_scale is not None and batch > noise_scale:
        limits.append(
            f"The batch of {batch} is beyond the run's noise scale of {noise_scale:.4g} examples. These rules assume "
            "that the gradient is mostly noise; beyond the noise scale their steps are too long."
        )
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
        short = [b for b in _numbers(change.before) if b and kappa * (1 - b) >= 1] if change and kappa > 1 else []
        limits += [
            f"{name} {beta:g}: its memory of {1 / (1 - beta):.4g} base iterations is not longer than one step of "
            f"{kappa:g}. The papers' theory needs a small kappa * (1 - beta)."
            for beta in short
            if change and change.after != change.before
        ]
    if kappa < 1:
        limits.append(
            f"A smaller batch: the same examples take {1 / kappa:.4g} times as many steps. BatchNorm's statistics are "
            "noisier in a smaller batch, and no value here corrects that."
        )
    return limits


def _numbers(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _number(value: float | tuple[float, ...]) -> float:
    return _numbers(value)[0]


def _show(made: Plan) -> None:
    from rich.console import Console

    console = Console()
    columns = ("", f"at {made.base_batch}", f"at {made.batch}")
    rows = [(name, _text(change.before), _text(change.after)) for name, change in made.changes.items()]
    console.print(f"{made.optimizer}, {made.batch} examples for {made.base_batch}: kappa = {made.kappa:g}")
    console.print(table(columns, rows), highlight=False)
    for name, change in made.changes.items():
        console.print(f"{name}: {change.why} ({change.source})", soft_wrap=True, highlight=False)
    console.print()
    for limit in made.limits:
        console.print(f"Note: {limit}", style="yellow", soft_wrap=True, highlight=False)
    console.print(made.adascale, soft_wrap=True, highlight=False)


def _text(value: float | tuple[float, ...]) -> str:
    return ", ".join(f"{number:.7g}" for number in _numbers(value))


def _pair(text: str) -> tuple[float, ...]:
    try:
        first, second = map(float, words(text))
    except ValueError:
        raise failed(f"--betas takes two numbers, comma-separated; got {text!r}.") from None
    return first, second


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}

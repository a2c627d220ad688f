"""`anybatch plan`: the hyperparameters at another batch, and the limits of the theory."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import anybatch
from anybatch._commands.terminal import failed, in_options, words

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
    "horizon": "--horizon",
}


def plan(
    *,
    batch: Annotated[int, typer.Option(help="The new batch, in examples or tokens.")],
    optimizer: Annotated[
        str | None, typer.Option(help="A class of torch.optim: sgd, adam, adamw, rmsprop, ...")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate, as tuned at the base batch.")] = None,
    base_batch: Annotated[
        int | None, typer.Option(help="The batch that the values were tuned for, in examples or tokens.")
    ] = None,
    betas: Annotated[str | None, typer.Option(help="Two numbers, comma-separated.")] = None,
    eps: Annotated[float | None, typer.Option(help="The term that Adam adds to its denominator.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay, as tuned at the base batch.")] = None,
    momentum: Annotated[float | None, typer.Option(help="Momentum, as tuned at the base batch.")] = None,
    alpha: Annotated[float | None, typer.Option(help="RMSprop's decay.")] = None,
    ema: Annotated[float | None, typer.Option(help="Decay of the model's moving average, per step.")] = None,
    batch_norm_momentum: Annotated[float | None, typer.Option(help="PyTorch's momentum of BatchNorm.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps of the warm-up at the base batch.")] = None,
    total: Annotated[int | None, typer.Option(help="Steps of the whole run at the base batch.")] = None,
    horizon: Annotated[
        int | None, typer.Option(help="Steps of the planned run at the base batch, if it is not --total.")
    ] = None,
    betas_rule: Annotated[str, typer.Option(help="power: beta ** kappa; sde: 1 - kappa * (1 - beta).")] = "power",
    record: Annotated[
        Path | None, typer.Option(help="A run's record: its values, mapped by the mean gain at the new batch.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print strict JSON.")] = False,
) -> None:
    """Print the hyperparameters for another batch size.

    The table has each value before and after the change, with the rule and its source. With --record the values are
    constants for a trainer in which the gain cannot be measured.
    """
    from anybatch._commands.plan_text import show
    from anybatch._commands.planned import planned

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
            horizon=horizon,
            record=record,
        )
    except (anybatch.AnybatchError, OSError) as error:
        raise failed(in_options(str(error), _OPTIONS)) from None
    if as_json:
        from anybatch._record import strict

        typer.echo(json.dumps(strict(asdict(made)), indent=2, allow_nan=False))
    else:
        show(made)


def _pair(text: str) -> tuple[float, ...]:
    try:
        first, second = map(float, words(text))
    except ValueError:
        raise failed(f"--betas takes two numbers, comma-separated; got {text!r}.") from None
    return first, second


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}

"""`anybatch plan`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import anybatch
from anybatch._commands.plan import Plan
from anybatch._commands.plan import plan as make_plan
from anybatch._commands.terminal import failed, words
from anybatch._record import strict


def plan(
    *,
    optimizer: Annotated[str, typer.Option(help="A class of torch.optim: sgd, adam, adamw, rmsprop, ...")],
    lr: Annotated[float, typer.Option(help="Learning rate, as tuned at the base batch.")],
    base_batch: Annotated[int, typer.Option(help="The batch that it was tuned for, in examples.")],
    batch: Annotated[int, typer.Option(help="The new batch, in examples.")],
    betas: Annotated[str | None, typer.Option(help="Two numbers, comma-separated.")] = None,
    eps: Annotated[float | None, typer.Option()] = None,
    weight_decay: Annotated[float | None, typer.Option()] = None,
    momentum: Annotated[float | None, typer.Option()] = None,
    alpha: Annotated[float | None, typer.Option(help="RMSprop's decay.")] = None,
    ema: Annotated[float | None, typer.Option(help="Decay of the model's moving average, per step.")] = None,
    batch_norm_momentum: Annotated[float | None, typer.Option(help="PyTorch's momentum of BatchNorm.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps of the warm-up at the base batch.")] = None,
    total: Annotated[int | None, typer.Option(help="Steps of the whole run at the base batch.")] = None,
    betas_rule: Annotated[str, typer.Option(help="power: beta ** kappa; sde: 1 - kappa * (1 - beta).")] = "power",
    record: Annotated[Path | None, typer.Option(help="A run's record, for its noise scale.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print strict JSON.")] = False,
) -> None:
    """Print every hyperparameter before and after a change of the batch, and why."""
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
        made = make_plan(
            optimizer,
            base_batch=base_batch,
            batch=batch,
            values=_given(values),
            steps=_given({"warmup": warmup, "total": total}),
            record=record,
        )
    except (anybatch.AnybatchError, OSError) as error:
        raise failed(str(error)) from None
    if as_json:
        typer.echo(json.dumps(strict(asdict(made)), indent=2, allow_nan=False))
    else:
        _show(made)


def _show(made: Plan) -> None:
    console = Console()
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for header in ("", f"at {made.base_batch}", f"at {made.batch}"):
        table.add_column(header, no_wrap=True)
    table.add_column("why (source)")
    for name, change in made.changes.items():
        style = "bright_black" if change.after == change.before else None
        table.add_row(name, _text(change.before), _text(change.after), f"{change.why} ({change.source})", style=style)
    console.print(f"{made.optimizer}, {made.batch} examples for {made.base_batch}: kappa = {made.kappa:g}")
    console.print(table)
    for limit in made.limits:
        console.print(f"Mind: {limit}", style="yellow", soft_wrap=True, highlight=False)
    console.print(made.adascale, soft_wrap=True, highlight=False)


def _text(value: float | tuple[float, ...]) -> str:
    return ", ".join(f"{number:.7g}" for number in (value if isinstance(value, tuple) else (value,)))


def _pair(text: str) -> tuple[float, ...]:
    try:
        first, second = map(float, words(text))
    except ValueError:
        raise failed(f"--betas takes two numbers, comma-separated; got {text!r}.") from None
    return first, second


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}

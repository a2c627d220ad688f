"""`anybatch forecast`."""

import json
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import anybatch
from anybatch._commands.terminal import draw, failed, fits, in_options, table, words

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from anybatch._forecast import Estimate, Forecast

_OPTIONS = {
    "scales": "--scales",
    "per_device": "--per-device",
    "seconds_per_step": "--seconds-per-step",
    "sync_seconds": "--sync-seconds",
    "price_per_device_hour": "--price-per-device-hour",
}


def forecast(
    *,
    record: Annotated[Path, typer.Argument(help="The record of a run: attach(..., record='run.jsonl').")],
    scales: Annotated[str, typer.Option(help="Scales, comma-separated.")] = "1,2,4,8,16,32,64,128,256",
    per_device: Annotated[
        float | None, typer.Option(help="Base batches a step on one device; by default as in the record.")
    ] = None,
    seconds_per_step: Annotated[
        float | None, typer.Option(help="Seconds of such a step; by default the record's own.")
    ] = None,
    sync_seconds: Annotated[
        float, typer.Option(help="Seconds of synchronisation a step, with more than one device.")
    ] = 0.0,
    price_per_device_hour: Annotated[float | None, typer.Option(help="Price, in any currency.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
    out: Annotated[Path | None, typer.Option(help="Draw the forecast into this PNG, PDF or SVG file.")] = None,
) -> None:
    """Forecast steps, time and cost at other batch sizes.

    It needs the record of one run at any small scale.
    """
    from anybatch._record import strict

    try:
        found = anybatch.forecast(
            record,
            _numbers(scales),
            per_device=per_device,
            seconds_per_step=seconds_per_step,
            sync_seconds=sync_seconds,
            price_per_device_hour=price_per_device_hour,
        )
    except (anybatch.AnybatchError, OSError) as error:
        raise failed(in_options(str(error), _OPTIONS)) from None
    if out is not None:
        from anybatch._report import plot

        draw(plot, found, out, option="--out")
    if as_json:
        typer.echo(json.dumps(strict(found.as_dict()), allow_nan=False, indent=1))
        return
    from rich.console import Console

    console = Console()
    _show(found, console)
    console.print(_sentence(found), soft_wrap=True)
    for note in found.notes:
        console.print(in_options(note, _OPTIONS), style="bright_black", soft_wrap=True, markup=False)


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in words(text)]
    except ValueError:
        raise failed(f"--scales takes positive numbers, comma-separated; got {text!r}.") from None


def _show(found: "Forecast", console: "Console") -> None:
    """Print one table, or two if the terminal is too narrow."""
    from anybatch._report import duration

    columns = {
        "scale": [f"{s.scale:g}" for s in found.scales],
        "devices": [f"{s.devices}" for s in found.scales],
        "steps": [_with_band(s.steps) for s in found.scales],
        found.unit: [f"{s.examples.value:,.0f}" for s in found.scales],
        "efficiency": [f"{s.efficiency.value:.1%}" for s in found.scales],
    }
    costs = {"scale": columns["scale"]}
    if isfinite(found.scales[0].seconds.value):
        ranges = [s.step_seconds.low < s.step_seconds.high for s in found.scales]  # else the band is the steps'

        def cells(values: "list[Estimate]", words: Callable[[float], str]) -> list[str]:
            return [
                f"{words(v.low)} to {words(v.high)}" if wide else words(v.value)
                for v, wide in zip(values, ranges, strict=True)
            ]

        costs["wall time"] = cells([s.seconds for s in found.scales], duration)
        costs["device time"] = cells([s.device_hours.times(3600) for s in found.scales], duration)
        if isfinite(found.scales[0].cost.value):
            costs["cost"] = cells([s.cost for s in found.scales], lambda value: f"{value:,.4g}")
    whole = columns | costs
    for part in [whole] if len(costs) == 1 or fits(_table(whole), console) else [columns, costs]:
        console.print(_table(part), highlight=False)
    console.print(f"{found.total:g} base iterations, from a record at scale {found.recorded:g}.", highlight=False)


def _table(columns: dict[str, list[str]]) -> "Table":
    return table(list(columns), list(zip(*columns.values(), strict=True)), left=0)


def _with_band(value: "Estimate") -> str:
    exact = value.low == value.high
    return f"{value.value:,.0f}" + ("" if exact else f" ({value.low:,.0f} to {value.high:,.0f})")


def _sentence(found: "Forecast") -> str:
    c = found.critical
    return (
        f"Doubling the devices pays up to scale {c.value:.3g} ({c.low:.3g} to {c.high:.3g}), where wall time times "
        "device time is smallest. Above it, each doubling saves less than 29 % of the time."
    )

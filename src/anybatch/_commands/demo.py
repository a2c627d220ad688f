"""`anybatch demo`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from anybatch._commands.terminal import failed, table, words


def demo(
    *,
    scales: Annotated[
        str,
        typer.Option(
            help="Scales, comma-separated; 1 is always trained. With 32 and 128 the batch also changes during a run."
        ),
    ] = "1,8,32,128",
    rules: Annotated[str, typer.Option(help="Rules, comma-separated: adascale, lsw, lsw+.")] = "adascale,lsw,lsw+",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 3,
    total: Annotated[int, typer.Option(min=40, help="Base iterations of a run.")] = 4000,
    ranks: Annotated[int, typer.Option(min=1, max=8, help="Processes that share each step, under DDP.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for records, figures and report.html.")] = Path("anybatch-demo"),
) -> None:
    """Train the digits at many batch sizes.

    It takes about a minute.
    """
    try:
        from anybatch._demo import COLUMNS, RULES, Plan, cells, distances, run, summarise, write
    except ImportError as error:
        raise failed(f"The demo needs {error.name}: pip install 'anybatch[demo]'") from None
    chosen = tuple(rule for rule in RULES if rule in words(rules))
    unknown = sorted(set(words(rules)) - set(RULES))
    if unknown or "adascale" not in chosen:
        raise failed(f"--rules takes adascale, optionally with lsw and lsw+; got {rules!r}.")
    plan = Plan(_scales(scales), chosen, seeds, total, ranks, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise failed(f"--out: cannot write to {out}: {error.strerror}.") from None

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    start, results = time.perf_counter(), []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("training", total=plan.runs)
        for result in run(plan):
            results.append(result)
            progress.update(bar, advance=1, description=f"S={result.task.name} {result.task.rule}")
    seconds = time.perf_counter() - start
    rows = summarise(results)
    console.print(table(COLUMNS, [cells(row) for row in rows], left=2), highlight=False)
    console.print("* significantly below scale 1 (one-sided Welch test, 0.95)", highlight=False)
    for name, (accuracy, loss) in distances(results).items():
        console.print(
            f"AdaScale at {name} stays within {accuracy:.2f} points of accuracy and {loss:.4f} of test loss of scale 1 "
            "at equal tau, after the first quarter.",
            soft_wrap=True,
        )
    report = write(plan, results, rows, seconds=seconds)
    console.print(f"{plan.runs} trainings in {seconds:.0f} s. The report: {report}", soft_wrap=True)


def _scales(text: str) -> tuple[int, ...]:
    try:
        values = {int(word) for word in words(text)} | {1}
    except ValueError:
        values = {0}
    if min(values) < 1 or max(values) > 1024:
        raise failed(f"--scales takes whole numbers from 1 to 1024, comma-separated; got {text!r}.")
    return tuple(sorted(values))

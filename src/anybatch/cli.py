"""The `anybatch` command."""

import sys
from typing import Annotated

try:
    import typer

    from anybatch._commands import branch, demo, forecast, plan, report
except ImportError as _missing:  # pragma: no cover
    sys.exit(f"The anybatch command needs {_missing.name}: pip install 'anybatch[cli]'")

import anybatch

app: typer.Typer = typer.Typer(
    help="Tune once, train at any batch size.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(*, version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Tune once, train at any batch size."""
    if version:
        typer.echo(f"anybatch {anybatch.__version__}")
        raise typer.Exit


app.command()(branch)
app.command()(demo)
app.command()(forecast)
app.command()(plan)
app.command()(report)


def main() -> None:
    """Run the command."""
    app()

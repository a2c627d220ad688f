"""`anybatch report`."""

import json
import os
import secrets
from pathlib import Path
from typing import Annotated

import typer

import anybatch
from anybatch._commands.terminal import failed

_START = b"<!doctype html>"


def report(
    records: Annotated[list[Path] | None, typer.Argument(help="Records: attach(..., record='run.jsonl').")] = None,
    *,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the page's numbers as JSON, and write no page.")
    ] = False,
) -> None:
    """Write one HTML page about recorded runs.

    The page has a table, curves, forecasts and differences, and needs no other file.
    """
    from anybatch._record import strict
    from anybatch._report import in_numbers
    from anybatch._report import report as make_page

    if not records:
        raise failed("No record was given: give one or more, such as runs/*.jsonl.")
    if not as_json:
        _check(out)
    try:
        if as_json:
            found = in_numbers(records, warn=lambda sentence: typer.echo(f"Left out: {sentence}", err=True))
            typer.echo(json.dumps(strict(found), allow_nan=False, indent=1))
            return
        text = make_page(records, warn=lambda sentence: typer.echo(f"Not on the page: {sentence}", err=True))
    except ImportError as error:
        raise failed(f"The report needs {error.name}: pip install 'anybatch[report]'") from None
    except (anybatch.AnybatchError, OSError) as error:
        raise failed(str(error)) from None
    try:
        _replace(out, text.encode())
    except OSError as error:
        raise failed(f"--out: cannot write {str(out)!r}: {error.strerror}.") from None
    typer.echo(f"The report: {ascii(str(out))[1:-1] if not str(out).isprintable() else out}")


def _check(out: Path) -> None:
    """Fail if `out` exists and is not a page: with `--out runs/*.jsonl` the first record would be the output."""
    try:
        if not out.exists():
            return
        if out.is_file():
            with out.open("rb") as file:
                start = file.read(len(_START))
            if not start or start.lower() == _START:
                return
    except (OSError, ValueError) as error:
        raise failed(f"--out: cannot write {str(out)!r}: {getattr(error, 'strerror', None) or error}.") from None
    raise failed(f"--out: {str(out)!r} exists and is not a page, so it was not changed: give another name.")


def _replace(out: Path, data: bytes) -> None:
    """Replace the file at once, so that it is never half written."""
    part = out.with_name(f".anybatch-{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(out)
    except BaseException:
        part.unlink(missing_ok=True)
        raise

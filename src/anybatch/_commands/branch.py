"""`anybatch branch`."""

import importlib
import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import anybatch
from anybatch._commands.terminal import draw, failed, in_options, words

_OPTIONS = {name: f"--{name}" for name in ("factors", "examples", "tolerance", "seeds", "out")}


def branch(
    parts: Annotated[str, typer.Argument(help="FILE.py:FUNCTION, which returns the arguments of anybatch.branch.")],
    *,
    factors: Annotated[str | None, typer.Option(help="Batches over the base batch, comma-separated.")] = None,
    examples: Annotated[int | None, typer.Option(help="Examples of each branch.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="Difference of loss that counts as none.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Branches of each batch.")] = None,
    out: Annotated[Path, typer.Option(help="File of the finished branches; a later call continues it.")] = Path(
        "branch.jsonl"
    ),
    figure: Annotated[Path | None, typer.Option(help="Draw the result into this PNG, PDF or SVG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Measure the critical batch by short trainings from one checkpoint.

    FUNCTION takes no arguments and returns a dictionary: step, model, optimizer, batches, loss, base_batch, examples.
    """
    from anybatch._record import strict

    given = dict(_parts(parts))
    options = {"examples": examples, "tolerance": tolerance, "seeds": seeds, "factors": _integers(factors)}
    given |= {name: value for name, value in options.items() if value is not None}
    try:
        found = anybatch.branch(**given, out=out)
    except TypeError as error:
        raise failed(f"{parts}: {error}") from None
    except (anybatch.AnybatchError, OSError) as error:
        raise failed(in_options(str(error), _OPTIONS)) from None
    if figure is not None:
        from anybatch._report import plot_branch

        draw(plot_branch, found, figure, option="--figure")
    typer.echo(json.dumps(strict(asdict(found)), allow_nan=False, indent=1) if as_json else str(found))


def _integers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(word) for word in words(text)]
    except ValueError:
        raise failed(f"--factors takes integers, comma-separated; got {text!r}.") from None


def _parts(name: str) -> Mapping[str, Any]:
    """The arguments that the user's function returns."""
    file, _, function = name.rpartition(":")
    if not file:
        raise failed(f"{name!r} names no function: give FILE.py:FUNCTION.")
    path = Path(file)
    if not path.is_file():
        raise failed(f"{file!r} is no file: give FILE.py:FUNCTION.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise failed(f"{file!r} is no Python file: give FILE.py:FUNCTION.")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # as for a script, so that it finds its neighbours
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    made = getattr(module, function, None)
    if not callable(made):
        raise failed(f"{file!r} has no function {function!r}.")
    found = made()
    if not isinstance(found, Mapping):
        raise failed(f"{name} must return a dictionary with the arguments of anybatch.branch, got {type(found)}.")
    return found

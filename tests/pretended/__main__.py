"""Runs cases and rows by their names and writes what each showed: `python -m pretended FILE NAME...`."""

import json
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

from pretended import device  # noqa: F401  # before torch starts the threads of autograd

# isort: split
from pretended import counts, trainings
from pretended.cases import CASES


def main(path, *names):
    found = {}
    for name in names:
        try:
            found[name] = asdict(trainings.found(CASES[name])) if name in CASES else counts.found(name)
        except Exception:  # the test of this case shows it, and the others go on
            found[name] = {"error": traceback.format_exc()}
    Path(path).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The experiments of the EMA paper by their names.

    python -m recipes.ema byol [--out docs/figures]

What follows the name is the experiment's own: `python -m recipes.ema byol --help`.
"""

import argparse
from collections.abc import Callable, Sequence

from recipes.ema import byol, dino, lars, parabola, pseudo, supervised

EXPERIMENTS: dict[str, Callable[[Sequence[str]], object]] = {
    "parabola": parabola.main,
    "supervised": supervised.main,
    "pseudo": pseudo.main,
    "byol": byol.main,
    "dino": dino.main,
    "lars": lars.main,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: an experiment, and what is the experiment's own."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.ema", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="the experiment's own")
    given = parser.parse_args(arguments)
    EXPERIMENTS[given.experiment](given.options)


if __name__ == "__main__":
    main()

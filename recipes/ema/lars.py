"""BYOL on the digits under LARS, at any batch size: which fixed rule LARS wants, and the EMA's with it.

    python -m recipes.ema.lars [--out docs/figures]

`recipes/ema/optimizers.py` derives that LARS follows the batch by the square root of the gain; "linear" is what most
who train with it scale by (You et al. 2017; Grill et al. 2020).
"""

from collections.abc import Sequence
from dataclasses import replace

from recipes.ema import byol, runs
from recipes.ema.config import Config

CONFIGS = {
    "small": Config(
        base_batch=64, total=1024, decay=0.998, rate=0.1, optimizer="lars", momentum=0.9, trust=0.1, scales=(1, 8)
    )
}
STUDY = replace(
    byol.STUDY,
    name="lars",
    description=__doc__,
    configs=CONFIGS,
    scales={"rule": None, "off": None, "adascale": None, "linear": None},
    compared=(("rule", 8), ("off", 8), ("adascale", 8), ("linear", 8)),
    progressive=(),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    runs.main(STUDY, arguments)


if __name__ == "__main__":
    main()

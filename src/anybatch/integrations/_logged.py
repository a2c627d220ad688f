"""What the adapters add to their framework's own log."""

from math import isfinite

import anybatch


def numbers(controller: anybatch.Controller) -> dict[str, float]:
    """The last step's numbers that are finite, by the names they are logged under."""
    found = {name: float(getattr(controller, name)) for name in ("gain", "scale", "tau", "noise_scale")}
    return {f"anybatch/{name}": value for name, value in found.items() if isfinite(value)}

"""Values as strict JSON has them."""

from collections.abc import Mapping
from math import isfinite
from typing import Any


def strict(value: Any) -> Any:
    """The value with non-finite floats as None, for JSON has no nan, and what JSON does not know as its text."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [strict(v) for v in value]
    return value if isinstance(value, str | int | bool | None) else str(value)

"""Values as strict JSON has them."""

import json
from collections.abc import Mapping
from math import isfinite
from typing import Any


def strict(value: Any) -> Any:
    """The value with non-finite floats as None, for JSON has no nan, and what JSON does not know as its text.

    A lone surrogate, which no UTF-8 file may hold and which many readers refuse even when escaped, becomes its escape
    as text: six plain characters.
    """
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {_text(str(k)): strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [strict(v) for v in value]
    if isinstance(value, int | bool | None):
        return value
    return _text(value if isinstance(value, str) else str(value))


def json_line(value: Mapping[str, Any]) -> bytes:
    """One line of a file of JSON lines: ASCII, so that no value can end the line or leave UTF-8."""
    return (json.dumps(strict(value), allow_nan=False) + "\n").encode("ascii")


def _text(value: str) -> str:
    return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode()

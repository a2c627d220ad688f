"""Values as strict JSON."""

import json
from collections.abc import Mapping
from math import isfinite
from typing import Any


def strict(value: Any) -> Any:
    """The value as strict JSON: non-finite floats become None, and other types become their text.

    A lone surrogate becomes its escape as six plain characters. UTF-8 has no surrogates, and many readers refuse even
    escaped ones.
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
    """One line of a file of JSON lines, in ASCII, so that no value contains a newline or invalid UTF-8."""
    return (json.dumps(strict(value), allow_nan=False) + "\n").encode("ascii")


def _text(value: str) -> str:
    return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode()

"""Parsing a line of a record: a step, a metric or a header.

[Note: plain lines] The lines of steps that `RunRecord` writes differ only in their numbers. One regular expression
reads such a line in half the time of a JSON parser. It matches no text that JSON refuses, and none that JSON reads as
another value. The JSON parser reads all other lines.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import partial
from math import isfinite, nan
from operator import index
from typing import Any

from anybatch._numbers import real
from anybatch._record.layers import from_json
from anybatch._record.record import MetricRecord, StepRecord
from anybatch._scaling import Moments

HEADER_START = b'{"kind": "header"'
STEP_START = b'{"kind": "step"'
METRIC_START = b'{"kind": "metric"'

Groups = tuple[bytes | None, ...]  # the texts of some fields of a plain line; None for an absent field


def parsed(text: bytes) -> StepRecord | MetricRecord | dict[str, Any] | None:
    """The line as a step, a metric or a header; `None` for anything else."""
    try:
        plain = _PLAIN(text)
        if plain is not None:
            return _step(plain.groups())
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass  # the layers are invalid
    try:
        line = json.loads(text)
        kind = line["kind"]
        if kind == "step":
            return StepRecord(**{name: convert(line[name]) for name, convert in _CONVERT.items() if name in line})
        if kind == "metric":
            values = {name: _number(value) for name, value in line["values"].items()}
            return MetricRecord(_count(line["step"]), _number(line["tau"]), values)
        if kind == "header" and isinstance(line["config"], dict):
            return {**line, "version": _count(line["version"])}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        pass
    return None


def matcher(names: Collection[str], *, layers: bool = False) -> Callable[[bytes], "re.Match[bytes] | None"]:
    """A function that matches a plain line of a step; its groups are `names` in the fields' order."""
    pattern = re.escape(STEP_START)
    for each in fields(StepRecord):
        if layers or each.type in (float, int, bool):
            value = b"(" if each.name in names else b"(?:"
            found = b', "%s": %s%s)' % (each.name.encode(), value, _KINDS[each.type][1])
            pattern += b"(?:%s)?" % found if each.name in _DEFAULTS else found
    return re.compile(pattern + rb"\}\n?").fullmatch


def numbers(name: str, column: Sequence[bytes | None]) -> list[float]:
    """The values of one field as floats, from the texts of many plain lines; true becomes 1, false 0."""
    try:
        return list(map(float, column))  # type: ignore[arg-type]
    except (ValueError, TypeError):
        words = {**_WORDS, None: _DEFAULTS[name]() if name in _DEFAULTS else nan}
        return [float(words.get(text, text)) for text in column]  # type: ignore[arg-type]


def _step(texts: Groups) -> StepRecord:
    values: list[Any] = list(texts)
    for i, default in _OPTIONAL:
        if values[i] is None:
            values[i] = default()
    for i in _FLOATS:
        text = values[i]
        values[i] = _WORDS[text] if text in _WORDS else float(text)
    for i, read in _OTHERS:
        if type(values[i]) is bytes:
            values[i] = read(values[i])
    return StepRecord(*values)


def _number(value: Any) -> float:
    """A number; nan for null, and for the non-finite numbers of other programs."""
    unknown = value is None or (isinstance(value, float) and not isfinite(value))
    number = nan if unknown else real(value)
    if number is None:
        raise ValueError
    return number


def _count(value: Any) -> int:
    if isinstance(value, bool) or index(value) < 0:
        raise ValueError
    return index(value)


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


_layers = partial(from_json, number=_number)
# For each type of a field: the conversion from JSON, and the pattern of its text in a plain line. The pattern excludes
# -0, which is 0 in JSON and -0.0 as a float, and exponents that a float may not have. It does not backtrack.
_KINDS: dict[Any, tuple[Callable[[Any], Any], bytes]] = {
    float: (_number, rb"(?:-(?!0[,}]))?+(?:0|[1-9]\d{0,17}+)(?:\.\d++)?+(?:e(?:-\d{1,3}|\+\d\d))?+|null"),
    int: (_count, rb"0|[1-9]\d{0,14}+"),
    bool: (_truth, rb"true|false"),
    Mapping[str, Moments]: (_layers, rb"\{.*\}"),
}
_WORDS: dict[Any, Any] = {b"null": nan, b"true": True, b"false": False}
_READ: dict[Any, Callable[[bytes], Any]] = {
    int: int,
    bool: _WORDS.__getitem__,
    Mapping[str, Moments]: lambda text: _layers(json.loads(text)),
}
_CONVERT = {each.name: _KINDS[each.type][0] for each in fields(StepRecord)}
# The fields that a line of an older version may lack.
_DEFAULTS: dict[str, Callable[[], Any]] = {
    each.name: each.default_factory if each.default is MISSING else lambda value=each.default: value  # type: ignore[misc]
    for each in fields(StepRecord)
    if each.default is not MISSING or each.default_factory is not MISSING
}
_FLOATS = [i for i, each in enumerate(fields(StepRecord)) if each.type is float]
_OTHERS = [(i, _READ[each.type]) for i, each in enumerate(fields(StepRecord)) if each.type is not float]
_OPTIONAL = [(i, _DEFAULTS[each.name]) for i, each in enumerate(fields(StepRecord)) if each.name in _DEFAULTS]
_PLAIN = matcher(_CONVERT, layers=True)

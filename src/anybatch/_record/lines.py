"""A line of a record, from its bytes: a step, a metric or a header.

[Note: plain lines] The lines of steps that `RunRecord` writes differ in nothing but their numbers. One regular
expression reads such a line in half the time that a JSON parser takes. It matches no text that JSON refuses, and none
that JSON reads as another value. All other lines go through the JSON parser.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, fields
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

Groups = tuple[bytes | None, ...]  # the texts of some fields of a plain line; None for one that is not in it


def parsed(text: bytes) -> StepRecord | MetricRecord | dict[str, Any] | None:
    """A step, a metric or a header; `None` for what is none of them."""
    try:
        plain = _PLAIN(text)
        if plain is not None:
            return _step(plain.groups())
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass  # layers that are none
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


def matcher(names: Collection[str]) -> Callable[[bytes], "re.Match[bytes] | None"]:
    """A function that matches a plain line of a step without layers; the groups are `names` in the fields' order."""
    return _pattern(names, without=_LAYERS).fullmatch


def in_order(names: Collection[str]) -> list[str]:
    """The fields `names` of a step in their order."""
    return [name for name in _CONVERT if name in names]


def numbers(name: str, column: Sequence[bytes | None]) -> list[float]:
    """The values of one field as floats, from the texts of many plain lines; true is 1, false 0."""
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


def _pattern(names: Collection[str], *, without: Collection[str] = ()) -> "re.Pattern[bytes]":
    """Of a plain line: a group for each field of `names`, and no field of `without`."""
    pattern = re.escape(STEP_START)
    for each in fields(StepRecord):
        if each.name not in without:
            value = b"(" if each.name in names else b"(?:"
            found = b', "%s": %s%s)' % (each.name.encode(), value, _KINDS[each.type][1])
            pattern += b"(?:%s)?" % found if each.name in _DEFAULTS else found
    return re.compile(pattern + rb"\}\n?")


def _number(value: Any) -> float:
    """A number; nan where the file has null, or what another program writes for numbers that are not finite."""
    unknown = value is None or (isinstance(value, float) and not isfinite(value))
    number = nan if unknown else real(value)
    if number is None:
        raise ValueError
    return number


def _count(value: Any) -> int:
    if isinstance(value, bool) or index(value) < 0:
        raise ValueError
    return index(value)


def _layers(value: Any) -> dict[str, Moments]:
    return from_json(value, number=_number)


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


# For each type of a field: what makes a value of JSON one of it, and its text in a plain line. In JSON -0 is 0, for a
# float it is -0.0, so it is not plain; nor is a number whose exponent may be beyond a float's. Nothing is tried twice.
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
# What a line may lack, because it is older than the field.
_DEFAULTS: dict[str, Callable[[], Any]] = {
    each.name: each.default_factory if each.default is MISSING else lambda value=each.default: value  # type: ignore[misc]
    for each in fields(StepRecord)
    if each.default is not MISSING or each.default_factory is not MISSING
}
_LAYERS = [each.name for each in fields(StepRecord) if each.type == Mapping[str, Moments]]
_FLOATS = [i for i, each in enumerate(fields(StepRecord)) if each.type is float]
_OTHERS = [(i, _READ[each.type]) for i, each in enumerate(fields(StepRecord)) if each.type is not float]
_OPTIONAL = [(i, _DEFAULTS[each.name]) for i, each in enumerate(fields(StepRecord)) if each.name in _DEFAULTS]
_PLAIN = _pattern(_CONVERT).fullmatch

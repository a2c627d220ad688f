"""Numbers, durations and long names as text for an axis or a table."""

from math import isfinite

LONG = 64  # characters of a shown value


def short_number(value: float, digits: int = 4) -> str:
    """A number as text with at most `digits` digits: 12500 is 12.5k."""
    size = abs(value)
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if max(unit, 1e4) <= size < 1e15:
            return f"{value / unit:.{digits}g}{letter}"
    text = f"{value:.{digits}g}"
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else text


def duration(seconds: float) -> str:
    """Three digits, in the largest unit that is at most half of the time; a dash if the time is not finite."""
    if not isfinite(seconds):
        return "–"
    unit, name = next((u for u in ((86_400, "d"), (3600, "h"), (60, "min")) if seconds >= 2 * u[0]), (1, "s"))
    return f"{short_number(float(f'{seconds / unit:.3g}'))} {name}"


def shorten(text: str, length: int = LONG) -> str:
    """A long text without its middle."""
    return text if len(text) <= length else f"{text[: 2 * length // 3]}…{text[-length // 4 :]}"


def written(value: object) -> str:
    """A value of a header as text."""
    try:
        return value if isinstance(value, str) else str(value)
    except RecursionError:
        return "(too deep to be shown)"

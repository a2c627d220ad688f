"""The picture of a forecast: steps against the scale, and what time costs."""

from collections.abc import Mapping
from math import isfinite
from pathlib import Path

from matplotlib import figure as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from anybatch._forecast import Forecast

_BLUE, _ORANGE, _GREY, _INK = "#2166ac", "#d6604d", "#98a2b3", "#344054"


def plot(found: Forecast, path: str | Path, *, real: Mapping[float, float] | None = None, title: str = "") -> Path:
    """Draw `found` into the file `path`, with dots for the steps of runs really made, by scale."""
    figure = mpl.Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _steps(left, found, real or {})
    _tradeoff(right, found)
    for axes in (left, right):
        axes.grid(which="major", color="#e4e7ec", lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_GREY)
        axes.tick_params(colors=_INK, length=3)
        axes.xaxis.label.set_color(_INK)
        axes.yaxis.label.set_color(_INK)
    if title:
        figure.suptitle(title, color=_INK, fontsize=12)
    figure.savefig(path, dpi=150)
    return Path(path)


def _steps(axes: Axes, found: Forecast, real: Mapping[float, float]) -> None:
    scales = [s.scale for s in found.scales]
    steps = [s.iterations for s in found.scales]
    axes.fill_between(scales, [n.low for n in steps], [n.high for n in steps], color=_BLUE, alpha=0.18, lw=0)
    axes.plot(scales, [n.value for n in steps], color=_BLUE, lw=2, marker="o", ms=3.5, label="forecast, with its band")
    axes.plot(scales, [found.total / s for s in scales], color=_GREY, lw=1.2, ls="--", label="if doubling were free")
    if real:
        axes.plot(
            list(real), list(real.values()), ls="", marker="o", ms=7, mfc="white", mec=_ORANGE, mew=1.8,
            label="runs really made", zorder=5,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="scale S (batch / base batch)", ylabel="optimizer steps of a run")
    _critical(axes, found, scales)
    _ticks(axes, scales)
    _labels(axes.yaxis)
    axes.legend(frameon=False, fontsize=9, loc="lower left", labelcolor=_INK)


def _critical(axes: Axes, found: Forecast, scales: list[float]) -> None:
    critical = found.critical
    if not scales[0] < critical.value < scales[-1]:
        return
    axes.axvspan(max(critical.low, scales[0]), min(critical.high, scales[-1]), color=_ORANGE, alpha=0.12, lw=0)
    axes.axvline(critical.value, color=_ORANGE, lw=1.4)
    right = critical.value**2 < scales[0] * scales[-1]  # beside the line, where there is more room
    axes.annotate(
        f"doubling pays\nup to S ≈ {critical.value:.3g}",
        ((critical.high if right else critical.low), 0.98), xycoords=("data", "axes fraction"),
        xytext=(6 if right else -6, 0), textcoords="offset points", color=_ORANGE, fontsize=9, va="top",
        ha="left" if right else "right",
    )  # fmt: skip


def _ticks(axes: Axes, scales: list[float]) -> None:
    shown = scales if len(scales) <= 10 else scales[:: -(-len(scales) // 10)]
    axes.set_xticks(shown, [f"{s:g}" for s in shown])
    axes.xaxis.set_minor_locator(NullLocator())


def _labels(axis: Axis) -> None:
    """Plain numbers at 1, 2 and 5 of each decade."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(NullLocator())


def _tradeoff(axes: Axes, found: Forecast) -> None:
    """Time against what it costs, a point for each scale; steps against examples where no time is known."""
    first = found.scales[0]
    if isfinite(first.seconds.value):
        unit, name = _time_unit(first.seconds.value)
        x = [s.seconds.times(1 / unit) for s in found.scales]
        priced = isfinite(first.cost.value)
        y = [s.cost if priced else s.device_hours for s in found.scales]
        axes.set(xlabel=f"wall time of a run ({name})", ylabel="cost of a run" if priced else "device hours of a run")
    else:
        x, y = [s.iterations for s in found.scales], [s.examples for s in found.scales]
        axes.set(xlabel="optimizer steps of a run", ylabel=f"{found.unit} of a run")
    for a, b in zip(x, y, strict=True):
        axes.plot([a.low, a.high], [b.low, b.high], color=_BLUE, alpha=0.25, lw=6, solid_capstyle="round")
    axes.plot([a.value for a in x], [b.value for b in y], color=_BLUE, lw=2, marker="o", ms=4.5)
    for a, b, s in zip(x, y, found.scales, strict=True):
        axes.annotate(
            f"{s.scale:g}", (a.value, b.value), xytext=(6, 5), textcoords="offset points", color=_INK, fontsize=8.5
        )
    axes.set(xscale="log", yscale="log")
    axes.margins(x=0.08, y=0.08)
    for axis in (axes.xaxis, axes.yaxis):
        _labels(axis)
    axes.annotate(
        "numbers: scale S", (0.98, 0.97), xycoords="axes fraction", ha="right", va="top", fontsize=9, color=_INK
    )


def _time_unit(seconds: float) -> tuple[float, str]:
    """The unit in which the longest time is easily read."""
    if seconds > 2 * 86_400:
        return 86_400.0, "days"
    if seconds > 2 * 3600:
        return 3600.0, "hours"
    return (60.0, "minutes") if seconds > 120 else (1.0, "seconds")

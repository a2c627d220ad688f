"""The picture of a forecast: steps against the scale, and cost against time."""

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from anybatch._forecast import Forecast
from anybatch._report.figure import INK, PAPER, RAMP, SOFT, blank, numbers, project_style
from anybatch._report.words import short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _RED = RAMP[0], RAMP[4]


def plot(found: Forecast, path: str | Path, *, real: Mapping[float, float] | None = None, title: str = "") -> Path:
    """Draw `found` into the file `path`; `real` adds dots for the steps of real runs, by scale."""
    with project_style():
        figure, (left, right) = blank(2, width=800, height=330, layout="constrained")
        _steps(left, found, real or {})
        _tradeoff(right, found)
        if title:
            figure.suptitle(title, color=INK)
        figure.savefig(path, dpi=150)
    return Path(path)


def _steps(axes: "Axes", found: Forecast, real: Mapping[float, float]) -> None:
    scales = [s.scale for s in found.scales]
    steps = [s.steps for s in found.scales]
    axes.fill_between(scales, [n.low for n in steps], [n.high for n in steps], color=_BLUE, alpha=0.18, lw=0)
    axes.plot(scales, [n.value for n in steps], color=_BLUE, lw=2, marker="o", ms=3.5, label="forecast, with its band")
    axes.plot(scales, [found.total / s for s in scales], color=SOFT, lw=1.2, ls="--", label="if doubling were free")
    if real:
        axes.plot(
            list(real), list(real.values()), ls="", marker="o", ms=7, mfc=PAPER, mec=_RED, mew=1.8,
            label="runs really made", zorder=5,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="scale S (batch / base batch)", ylabel="optimizer steps of a run")
    _critical(axes, found, scales)
    shown = _apart(scales)
    axes.set_xticks(shown, [short_number(s) for s in shown])
    axes.set_xticks([], minor=True)
    numbers(axes.yaxis, log=True)
    axes.legend(frameon=True, edgecolor="none", fontsize="small", loc="lower left")


def _critical(axes: "Axes", found: Forecast, scales: list[float]) -> None:
    critical = found.critical
    if not scales[0] < critical.value < scales[-1]:
        return
    axes.axvspan(max(critical.low, scales[0]), min(critical.high, scales[-1]), color=_RED, alpha=0.12, lw=0)
    axes.axvline(critical.value, color=_RED, lw=1.4)
    right = critical.value**2 < scales[0] * scales[-1]  # the side of the line with more space
    axes.annotate(
        f"doubling pays\nup to S ≈ {critical.value:.3g}",
        ((critical.high if right else critical.low), 0.98), xycoords=("data", "axes fraction"),
        xytext=(6 if right else -6, 0), textcoords="offset points", color=_RED, fontsize="small", va="top",
        ha="left" if right else "right",
    )  # fmt: skip


def _apart(scales: list[float]) -> list[float]:
    """The scales whose numbers do not overlap."""
    shown = scales[:1]
    for scale in scales:
        if scale >= shown[-1] * (scales[-1] / scales[0]) ** (1 / 12) and scale > shown[-1]:
            shown.append(scale)
    return shown


def _tradeoff(axes: "Axes", found: Forecast) -> None:
    """Draw cost against time, with a point for each scale; examples against steps if no time is known."""
    first = found.scales[0]
    if isfinite(first.seconds.value):
        units = ((86_400.0, "days"), (3600.0, "hours"), (60.0, "minutes"))
        unit, name = next((u for u in units if first.seconds.value > 2 * u[0]), (1.0, "seconds"))
        x = [s.seconds.times(1 / unit) for s in found.scales]
        priced = isfinite(first.cost.value)
        y = [s.cost if priced else s.device_hours for s in found.scales]
        axes.set(xlabel=f"wall time of a run ({name})", ylabel="cost of a run" if priced else "device hours of a run")
    else:
        x, y = [s.steps for s in found.scales], [s.examples for s in found.scales]
        axes.set(xlabel="optimizer steps of a run", ylabel=f"{found.unit} of a run")
    for a, b in zip(x, y, strict=True):
        axes.plot([a.low, a.high], [b.low, b.high], color=_BLUE, alpha=0.25, lw=6, solid_capstyle="round")
    axes.plot([a.value for a in x], [b.value for b in y], color=_BLUE, lw=2, marker="o", ms=4.5)
    shown = _apart([s.scale for s in found.scales])
    for i, s in enumerate(found.scales):
        if s.scale in shown:
            rising = x[max(0, i - 1)].value < x[min(i + 1, len(x) - 1)].value  # the label is on the free side
            axes.annotate(
                f"{s.scale:g}", (x[i].value, y[i].value), xytext=(-5 if rising else 5, 4), textcoords="offset points",
                color=INK, fontsize="small", ha="right" if rising else "left",
            )  # fmt: skip
    axes.set(xscale="log", yscale="log")
    axes.margins(x=0.08, y=0.08)
    for axis in (axes.xaxis, axes.yaxis):
        numbers(axis, log=True)
    axes.set_title("numbers: scale S", loc="right", fontsize="small", fontweight="normal")
    if any(s.step_seconds.low < s.step_seconds.high for s in found.scales):
        axes.set_title("wide: steps of a size not timed", loc="left", fontsize="small", fontweight="normal", color=SOFT)

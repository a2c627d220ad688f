"""The picture of branches: the loss of each batch minus that of the base batch, and the critical batch."""

from math import isfinite
from pathlib import Path

from anybatch._branch import Branch
from anybatch._report.figure import INK, RAMP, SOFT, blank, project_style
from anybatch._report.words import short_number

_BLUE, _RED = RAMP[0], RAMP[4]


def plot_branch(found: Branch, path: str | Path) -> Path:
    """Draw `found` into the file `path`."""
    batches = [each.batch for each in found.batches]
    with project_style():
        figure, (axes,) = blank(1, width=560, height=330, layout="constrained")
        lows, highs = ([getattr(b.difference, end) for b in found.batches] for end in ("low", "high"))
        axes.fill_between(batches, lows, highs, color=_BLUE, alpha=0.18, lw=0)
        means = [each.difference.value for each in found.batches]
        axes.plot(batches, means, color=_BLUE, lw=2, marker="o", ms=4, label="mean, and range over seeds")
        axes.axhline(found.tolerance, color=SOFT, lw=1.2, ls="--", label=f"tolerance, {found.tolerance:g}")
        if isfinite(found.critical.value):
            axes.axvspan(found.critical.low, min(found.critical.high, batches[-1]), color=_RED, alpha=0.12, lw=0)
            axes.axvline(found.critical.value, color=_RED, lw=1.4, label=f"critical batch, {found.critical.value:.3g}")
        if isfinite(found.noise_scale.value):
            axes.axvline(
                found.noise_scale.value, color=INK, lw=1.4, ls=":", label=f"noise scale, {found.noise_scale.value:.3g}"
            )
        axes.set(xscale="log", xlabel="batch (examples)", ylabel="loss minus that of the base batch")
        axes.set_xticks(batches, [short_number(b) for b in batches])
        axes.set_xticks([], minor=True)
        axes.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
        figure.savefig(path, dpi=150)
    return Path(path)

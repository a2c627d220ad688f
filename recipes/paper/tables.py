"""The rows of a table: means over the seeds for each scale and rule, and what is significantly below scale 1."""

from math import isfinite
from statistics import fmean, stdev
from typing import Any

from anybatch._demo import significantly_below
from recipes.paper.runs import Run, Summary


def rows_of(found: dict[Run, Summary], *, metric: str, by_decays: bool = False) -> list[dict[str, Any]]:
    """A row for each scale and rule, or kind of decays."""
    groups: dict[tuple[str, str], list[Summary]] = {}
    for run, summary in found.items():
        compared = str(run.decays) if by_decays and run.scale != "1" else run.rule
        groups.setdefault((run.scale, compared), []).append(summary)
    base = [value_of(s, metric) for s in groups.get(("1", "adascale"), [])]
    order = {rule: i for i, rule in enumerate(("adascale", "constant", "clock", "identity", "linear", "lsw", "lsw+"))}
    rows = []
    for (scale, rule), runs in sorted(groups.items(), key=lambda g: (len(g[0][0]), g[0][0], order[g[0][1]])):
        values = [value_of(s, metric) for s in runs]
        rows.append({
            "scale": scale,
            "rule": rule,
            "metric": fmean(values),
            "spread": stdev(values) if len(values) > 1 else None,
            "worse": significantly_below(values, base) if scale != "1" else False,
            "train_loss": fmean(s["train_loss"] for s in runs),
            "test_loss": fmean(s["loss"] for s in runs),
            "iterations": fmean(s["iterations"] for s in runs),
            "mean_gain": fmean(s["mean_gain"] for s in runs),
            "diverged": sum(s["diverged"] for s in runs),
        })  # fmt: skip
    return rows


def show(rows: list[dict[str, Any]], metric: str) -> None:
    """Print them."""
    print(f"{'scale':>20} {'rule':9} {metric:>15}  {'train loss':>10} {'test loss':>10} {'iterations':>10} {'gain':>6}")
    for row in rows:
        spread = "" if row["spread"] is None else f"± {row['spread']:.1f}"
        value = f"{row['metric']:.1f} {spread}{' *' if row['worse'] else '  '}"
        print(
            f"{row['scale']:>20} {row['rule']:9} {value:>17} {row['train_loss']:10.4f} {row['test_loss']:10.4f} "
            f"{row['iterations']:10.0f} {row['mean_gain']:6.1f}"
        )


def value_of(summary: Summary, metric: str) -> float:
    """The metric of a run, 0 where it is no number."""
    value = summary[metric]
    return 0.0 if value is None or not isfinite(value) else value

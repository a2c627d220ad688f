"""Which trainings each experiment asks for; `lsw+` without steps is as long as AdaScale's, known when that is done."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from recipes.paper.runs import Run

GRID = 13  # of figure 5, first rates and last ones
ELASTIC = ("32,64@0.25,128@0.5", "128,64@0.25,32@0.5")
TRAJECTORIES = 5  # of figure 2, with one gain
POINTS = 12  # where it looks at the true gain


@dataclass(frozen=True)
class Question:
    """What an experiment is asked for.

    Args:
        base: the run at scale 1.
        scales: for the table and the curves, 1 among them.
        scale: for the experiments at one scale.
        seeds: how many.
        rate: the task's learning rate, for figure 5.
    """

    base: Run
    scales: tuple[int, ...]
    scale: int
    seeds: int
    rate: float

    def each(self, **changes: Any) -> list[Run]:
        """The base run with changes, once for each seed."""
        return [replace(self.base, seed=seed, **changes) for seed in range(self.seeds)]

    @property
    def large(self) -> list[str]:
        """The scales but for 1."""
        return [str(s) for s in self.scales if s != 1]

    def all_scales(self) -> list[Run]:
        """AdaScale at every scale."""
        return [run for s in self.scales for run in self.each(scale=str(s))]

    def table2(self) -> list[Run]:
        """Every rule at every scale."""
        linear = [r for s in self.large for rule in ("lsw", "lsw+") for r in self.each(scale=s, rule=rule)]
        return self.all_scales() + linear

    def fig1(self) -> list[Run]:
        """Scale 1, and three rules at one scale."""
        rules = ("adascale", "identity", "linear")
        return self.each(scale="1") + [r for rule in rules for r in self.each(scale=str(self.scale), rule=rule)]

    def fig2(self) -> list[Run]:
        """What costs as much: the run itself, and the trajectories."""
        return [replace(self.base, scale=str(self.scale), seed=seed) for seed in range(1 + TRAJECTORIES)]

    def fig4(self) -> list[Run]:
        """Up and down, by two rules."""
        return self.each(scale="1") + [r for s in ELASTIC for rule in ("adascale", "lsw")
                                       for r in self.each(scale=s, rule=rule)]  # fmt: skip

    def decays(self) -> list[Run]:
        """Constant decays and decays on the clock at every large scale."""
        return self.each(scale="1") + [r for s in self.large for d in ("constant", "clock")
                                       for r in self.each(scale=s, decays=d)]  # fmt: skip

    def fig5(self) -> list[Run]:
        """The grids of all methods."""
        grids = self.grids()
        direct = [replace(run, rule="lsw+") for run in grids[f"LSW, S = {self.scale}"]]
        return [run for runs in grids.values() for run in runs] + direct

    def grids(self) -> dict[str, list[Run]]:
        """The schedules, with each method but the direct search."""
        scale = str(self.scale)
        return {"scale 1": self.at("adascale", "1"), f"AdaScale, S = {scale}": self.at("adascale", scale),
                f"LSW, S = {scale}": self.at("lsw", scale)}  # fmt: skip

    def grid(self) -> tuple[list[float], list[float]]:
        """First rates and last ones, as shares of the first."""
        return [self.rate * 2 ** ((i - GRID // 2) / 2) for i in range(GRID)], [10 ** (-i / 3) for i in range(GRID)]

    def at(self, rule: str, scale: str, *, factor: float = 1.0, **changes: Any) -> list[Run]:
        """Every schedule, its rates times `factor`."""
        rates, lasts = self.grid()
        given = {"rule": rule, "scale": scale, "evaluations": 1, **changes}
        return [run for last in lasts for rate in rates
                for run in self.each(lr=rate * factor, last_rate=last, **given)]  # fmt: skip


WANTED: dict[str, Callable[[Question], list[Run]]] = {
    "table2": Question.table2,
    "decays": Question.decays,
    "fig1": Question.fig1,
    "fig2": Question.fig2,
    "fig3": Question.all_scales,
    "fig4": Question.fig4,
    "fig5": Question.fig5,
}

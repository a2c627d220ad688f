"""A plan as text for a terminal."""

from typing import TYPE_CHECKING

from anybatch._commands.planned import Memory, Plan, numbers
from anybatch._commands.terminal import table

if TYPE_CHECKING:
    from anybatch._forecast import Estimate

_MERRILL = (
    "Merrill et al. 2025 (arXiv 2505.23971) report that it underestimates the critical batch of OLMo 1B and 7B by "
    "several orders of magnitude."
)


def show(made: Plan) -> None:
    """Print the plan."""
    from rich.console import Console

    console = Console()
    columns = ("", f"at {made.base_batch:g}", f"at {made.batch}")
    rows = [(name, _text(change.before), _text(change.after)) for name, change in made.changes.items()]
    title = f"{made.optimizer}, {made.batch} examples for {made.base_batch:g}: kappa = {made.kappa:g}"
    if made.gain is not None and made.steps is not None:
        title += f", mean gain {_banded(made.gain, '.4g')}, {_banded(made.steps, ',.0f')} steps"
    console.print(title, soft_wrap=True, highlight=False)
    console.print(table(columns, rows), highlight=False)
    for name, change in made.changes.items():
        memory = _remembered(made.memory[name]) if name in made.memory else ""
        console.print(f"{name}: {change.why} ({change.source}){memory}", soft_wrap=True, highlight=False)
    console.print()
    if made.noise_scale is not None:
        noise = f"Noise scale: {_short(made.noise_scale)} examples, the median of the run's last tenth. {_MERRILL}"
        console.print(noise, soft_wrap=True, highlight=False)
    for limit in [*made.limits, *([] if made.how_good is None else [made.how_good])]:
        console.print(f"Note: {limit}", style="yellow", soft_wrap=True, highlight=False)
    console.print(made.adascale, soft_wrap=True, highlight=False)


def _text(value: float | tuple[float, ...]) -> str:
    return ", ".join(f"{number:.7g}" for number in numbers(value))


def _banded(value: "Estimate", form: str) -> str:
    exact = value.low == value.high
    return f"{value.value:{form}}" + ("" if exact else f" ({value.low:{form}} to {value.high:{form}})")


def _remembered(memory: Memory) -> str:
    """The memory before and after, as in `10 steps = 5.24M`."""

    def steps(counts: list[float], examples: list[float]) -> str:
        return ", ".join(f"{n:.4g} steps = {_short(e)}" for n, e in zip(counts, examples, strict=True))

    before, after = steps(memory.before, memory.examples_before), steps(memory.after, memory.examples_after)
    return f". Memory: {before} examples; then {after} examples"


def _short(number: float) -> str:
    """A count in three digits from a million on: 2,560, 5.24M, 250B."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(number) >= unit:
            return f"{number / unit:.3g}{letter}"
    return f"{number:,.0f}"

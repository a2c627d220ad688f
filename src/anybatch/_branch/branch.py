"""Short trainings from one checkpoint at several batches, and the largest batch that costs no loss."""

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from math import inf, isfinite, nan
from os import PathLike
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from anybatch._branch.critical import BatchLoss, by_batch, critical_factor
from anybatch._controller import Controller, attach
from anybatch._errors import AnybatchWarning, DivergedError, InvalidValueError, StateError, UnsupportedError
from anybatch._forecast import Estimate
from anybatch._html import html_table
from anybatch._numbers import positive, shown, whole
from anybatch._record import AppendFile, json_line
from anybatch._scaling import AdaScale, Clock, Rule, Scaling

Step = Callable[[Any, Any, Controller, Any], object]
_UNKNOWN = Estimate(nan, nan, nan)


class _Batched(Rule):
    """The fixed rule of each optimizer: the learning rate times S to its exponent; decays on the clock."""

    def __call__(self, *, scale: float, gain: float, clock: Clock, exponent: float) -> Scaling:  # noqa: ARG002
        return Scaling(float(scale**exponent), float(scale))


@dataclass(frozen=True)
class Branch:
    """The result of `branch`; printed, it has a line for each batch.

    Args:
        batches: The branches of each batch, in ascending order.
        tolerance: The difference of loss that counts as none.
        critical: The critical batch in examples, with the range over seeds; infinite if every batch is within the
            tolerance. It lies between two batches by a line over log(batch).
        noise_scale: The measured noise scale in examples, with its range over seeds; nan if it was not measured.
        noise_factor: `critical / noise_scale`: with `AdaScale(noise_factor=...)` the measured noise scale means the
            critical batch.
    """

    batches: tuple[BatchLoss, ...]
    tolerance: float
    critical: Estimate
    noise_scale: Estimate
    noise_factor: Estimate

    def __str__(self) -> str:
        """A line for each batch, and the results."""
        lines = [f"{'batch':>8} {'steps':>7} {'loss':>9} {'minus base':>11} {'range':>19}"]
        for each in self.batches:
            d = each.difference
            mean = sum(each.losses) / len(each.losses)
            lines.append(
                f"{each.batch:>8} {each.steps:>7} {mean:>9.4f} {d.value:>+11.4f} {d.low:>+9.4f} {d.high:>+9.4f}"
            )
        return "\n".join([*lines, *self.sentences()])

    def sentences(self) -> list[str]:
        """The results as sentences."""
        c, n, f = self.critical, self.noise_scale, self.noise_factor
        largest = self.batches[-1].batch
        if isfinite(c.value):
            high = f"{c.high:.3g}" if isfinite(c.high) else f"above {largest}"
            found = [f"The loss is within {self.tolerance:g} up to a batch of {c.value:.3g} ({c.low:.3g} to {high})."]
        else:
            found = [f"The loss is within {self.tolerance:g} at all batches up to {largest}: try larger ones."]
        if isfinite(n.value):
            found.append(f"The noise scale is {n.value:.3g} examples ({n.low:.3g} to {n.high:.3g}).")
        if isfinite(f.value):
            high = f"{f.high:.3g}" if isfinite(f.high) else "unknown"
            found.append(f"noise_factor {f.value:.3g} ({f.low:.3g} to {high}) makes the noise scale this batch.")
        return found

    def _repr_html_(self) -> str:
        """The table that a notebook shows."""
        rows = [[f"{b.batch}", f"{b.steps}", f"{b.difference.value:+.4f}"] for b in self.batches]
        return html_table(rows, header=["batch", "steps", "loss minus base"], notes=self.sentences())


def branch(
    step: Step,
    *,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    batches: Callable[[int, int], Iterable[Any]],
    loss: Callable[[Any], float],
    base_batch: int,
    examples: int,
    factors: Sequence[int] = (1, 2, 4, 8, 16, 32),
    tolerance: float = 0.01,
    seeds: int = 3,
    out: str | PathLike[str] | None = None,
    **options: Any,
) -> Branch:
    """Measure the critical batch by experiment: train from one checkpoint at several batches, for the same examples.

        critical = largest batch k * base_batch with loss(k) <= loss(1) + tolerance, and so for all smaller k

    Each branch starts from copies of model and optimizer. It trains `examples` examples in steps of k * base_batch, at
    the optimizer's present learning rate times `k ** exponent`: 1/2 for the Adam family, 1 for SGD. Decays follow the
    clock. The base branch measures the noise scale as well.

    Args:
        step: The body of your loop, as a function `step(model, optimizer, controller, batch)`. It must use its
            arguments, not global names. Two backwards or more a step show the noise scale.
        model: The model at the checkpoint, in one process; it stays unchanged.
        optimizer: As for `attach`, with its state at the checkpoint, before it is attached; a list is passed to the
            step as a list.
        batches: A function `batches(size, seed)` that returns batches of `size` examples. Equal seeds must give the
            same examples in the same order at each size.
        loss: A function of the model, such as its loss on held-out data.
        base_batch: Examples of the batch that the values were tuned for.
        examples: Examples of a branch; the largest batch needs at least 10 steps.
        factors: The batches over the base batch; 1 is always included.
        tolerance: The difference of loss that counts as none, positive.
        seeds: Branches of each batch, each with other examples.
        out: A file of JSON lines, one for each finished branch. A later call with the same file trains the others.
        options: Other arguments of `attach`, such as `reduction="sum"`.

    Returns:
        A `Branch` with `batches`, `tolerance`, `critical`, `noise_scale` and `noise_factor`; the last three are each an
        `Estimate` with `value`, `low` and `high`. Each of its batches is a `BatchLoss` with `factor`, `batch`, `steps`,
        `losses` and `difference`.

    Raises:
        InvalidValueError: A value out of range, or `batches` returned too few.
        StateError: `out` belongs to another checkpoint or other settings.
        UnsupportedError: Several ranks.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> def batches(size, seed):
        ...     draws = torch.Generator().manual_seed(seed)
        ...     while True:
        ...         x = torch.stack([torch.randn(4, generator=draws) for _ in range(size)])
        ...         yield x, x.sum(1, keepdim=True)
        >>> def step(model, optimizer, controller, batch):
        ...     for x, y in anybatch.split(batch, 2):
        ...         ((model(x) - y).square().mean() / 2).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> x = torch.eye(4)
        >>> def loss(model):
        ...     return (model(x) - 1).square().mean().item()
        >>> found = anybatch.branch(step, model=model, optimizer=optimizer, batches=batches, loss=loss, base_batch=4,
        ...                         examples=320, factors=[1, 2, 4], seeds=2)
        >>> [each.steps for each in found.batches]
        [80, 40, 20]

    Source:
        Merrill et al. 2025 (arXiv 2505.23971), Section 3: branched training. There the critical batch of OLMo 1B and 7B
        was several orders of magnitude above the noise scale.

    Differs from the paper in:
        1. `loss` may be any function of the model; the paper's is the smoothed training loss.
        2. The critical batch lies between two batches by a line over log(batch).
        3. Several seeds give a range.
        4. Adam's betas follow the batch, as `beta ** k`.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise UnsupportedError("branch needs one process: pass the bare model, without a process group.")
    numbers = {"base_batch": base_batch, "examples": examples, "seeds": seeds}
    for name, value in [*numbers.items(), *(("factors", k) for k in factors)]:
        if (whole(value) or 0) < 1:
            raise InvalidValueError(f"{name} takes integers of at least 1, got {shown(value)}.")
    if positive(tolerance) is None:
        raise InvalidValueError(f"tolerance must be positive and finite, got {shown(tolerance)}.")
    wanted = sorted({1, *factors})
    if examples < 10 * wanted[-1] * base_batch:
        raise InvalidValueError(
            f"examples={examples} are {examples // (wanted[-1] * base_batch)} steps of the largest batch, "
            f"{wanted[-1] * base_batch}: use at least {10 * wanted[-1] * base_batch}, or smaller factors."
        )
    settings = {"base_batch": base_batch, "examples": examples, "weights": _checksum(model)}
    done = _Branches(None if out is None else Path(out), settings)
    try:
        for seed in range(seeds):
            for factor in wanted:
                if (factor, seed) not in done.found:
                    found = _train(step, model, optimizer, batches, loss, (base_batch, examples, factor, seed), options)
                    done.add(factor, seed, *found)
    finally:
        done.close()
    losses = {k: [done.found[k, seed][0] for seed in range(seeds)] for k in wanted}
    critical = critical_factor(losses, tolerance).times(base_batch)
    noise = [done.found[1, seed][1] for seed in range(seeds)]
    known = all(isfinite(each) for each in noise)
    scale = Estimate(sum(noise) / seeds, min(noise), max(noise)) if known else _UNKNOWN
    return Branch(
        batches=by_batch(losses, base_batch=base_batch, examples=examples),
        tolerance=tolerance,
        critical=critical,
        noise_scale=scale,
        noise_factor=Estimate(critical.value / scale.value, critical.low / scale.high, critical.high / scale.low)
        if known and scale.low > 0
        else _UNKNOWN,
    )


def _train(
    step: Step,
    model: nn.Module,
    optimizer: Any,
    batches: Callable[[int, int], Iterable[Any]],
    loss: Callable[[Any], float],
    run: tuple[int, int, int, int],
    options: Mapping[str, Any],
) -> tuple[float, float]:
    """The loss at the end of one branch, and its noise scale in examples; nan if it was not measured."""
    base_batch, examples, factor, seed = run
    model, optimizer = deepcopy((model, optimizer))
    steps, size = examples // (factor * base_batch), factor * base_batch
    rule = AdaScale() if factor == 1 else _Batched()
    unit: dict[str, Any] = {"base_batch": base_batch} if factor == 1 else {}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    taken = 0
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        # Then the result has no noise scale, or a loss that is large or infinite.
        warnings.filterwarnings("ignore", "One gradient a step|.* steps in a row did not count", AnybatchWarning)
        torch.manual_seed(seed)
        controller = attach(optimizer, model=model, rule=rule, scale=factor, **unit, **options)
        try:
            for batch in islice(batches(size, seed), steps):
                step(model, optimizer, controller, batch)
                taken += 1
        except DivergedError:
            return inf, nan
        finally:
            noise = controller.noise_scale
            controller.detach()
        if taken < steps:
            raise InvalidValueError(
                f"batches({size}, {seed}) returned {taken} batches, and examples={examples} need {steps}: let it go "
                "through the data again, or use fewer examples."
            )
        return float(loss(model)), noise


class _Branches:
    """The finished branches, in a file too: loss and noise scale by factor and seed."""

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.found: dict[tuple[int, int], tuple[float, float]] = {}
        self._file = None if path is None else AppendFile(path)
        if path is None or self._file is None:
            return
        try:
            lines = [each for each in map(_parsed, path.read_bytes().splitlines()) if each is not None]
            if lines and lines[0].get("settings") != settings:
                raise StateError(
                    f"{str(path)!r} has branches of another checkpoint, base batch or number of examples: give a file "
                    "of its own."
                )
            for line in lines[1:]:
                known = float(line["loss"]) if line["loss"] is not None else inf  # a branch that diverged
                noise = float(line["noise_scale"]) if line["noise_scale"] is not None else nan
                self.found[line["factor"], line["seed"]] = known, noise
        except StateError:
            self.close()
            raise
        except (KeyError, TypeError, ValueError):
            self.close()
            raise StateError(f"{str(path)!r} is not a file of branches: give a new file.") from None
        if not lines:
            self._file.append(json_line({"kind": "branch", "settings": dict(settings)}), needed=True)

    def add(self, factor: int, seed: int, loss: float, noise: float) -> None:
        """Keep one branch."""
        self.found[factor, seed] = (loss if isfinite(loss) else inf), noise
        if self._file is not None:
            self._file.append(json_line({"factor": factor, "seed": seed, "loss": loss, "noise_scale": noise}))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line as a dictionary; `None` for one that a kill has torn."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _checksum(model: nn.Module) -> int:
    """A checksum of the weights."""
    found = 0
    for p in model.parameters():
        found = crc32(p.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes(), found)
    return found

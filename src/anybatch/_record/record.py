"""What a record holds: one strict JSON object a line, a header before the steps of each start.

[Note: one run] A run that was killed and resumed from a checkpoint has taken the steps after it twice, and both are in
the file, which only grows. The steps that count are those that the weights went through: where the first step after a
header has number n, all earlier lines of steps n and above are superseded, and readers pass over them. So a record
reads as one run, whatever happened; a run that starts from nothing in an old file supersedes all of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, nan
from typing import Any

from anybatch._record.layers import averaged
from anybatch._scaling import Moments

RECORD_VERSION = 2  # 2: metrics, and a header with provenance


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. Numbers that are not known or not finite are null in the file and nan here.

    Args:
        step: steps counted so far, this one included.
        tau: the clock after the step, base iterations.
        iterations: how far this step moved the clock.
        scale: S.
        count: N, micro-batches on all ranks; 0 where nothing was counted.
        raw_variance: this step's own estimate of sigma^2, grad^2.
        raw_sqnorm: this step's own estimate of mu^2, grad^2.
        variance: the averaged sigma^2.
        sqnorm: the averaged mu^2.
        gain: r.
        lr: the learning rate applied to the first parameter group.
        lr_factor: its factor on the base learning rate.
        noise_scale: B_simple in examples, or in base batches where no base batch was given.
        seconds: wall time since the previous step.
        skipped: whether the step was not counted, because of a non-finite gradient.
        metric_variance: the averaged sigma^2 in Adam's metric; nan where it was not measured, as in older records.
        metric_sqnorm: the averaged mu^2, likewise.
        per_layer: `raw_variance` and `raw_sqnorm` by layer, which add up to them, at a step that
            `RunRecord(per_layer=...)` measured so; else empty, and then not in the file.
    """

    step: int
    tau: float
    iterations: float
    scale: float
    count: int
    raw_variance: float
    raw_sqnorm: float
    variance: float
    sqnorm: float
    gain: float
    lr: float
    lr_factor: float
    noise_scale: float
    seconds: float
    skipped: bool = False
    metric_variance: float = nan
    metric_sqnorm: float = nan
    per_layer: Mapping[str, Moments] = field(default_factory=dict)


@dataclass(frozen=True)
class MetricRecord:
    """Results of an evaluation, given to `controller.log`.

    Args:
        step: steps counted until then.
        tau: the clock then, base iterations.
        values: the results by their names; nan where they were not finite.
    """

    step: int
    tau: float
    values: dict[str, float]


@dataclass(frozen=True)
class Run:
    """A record that was read.

    Args:
        config: the header's configuration.
        steps: the steps that led to the run's end, in their order; without those that a resume took again.
        torn: lines that could not be read: at most the last one, and one for each time the run was killed.
        metrics: the results of evaluations, likewise.
        header: versions, machine, commit, seed and configuration, as the run ended: the header under which the last
            of these steps was taken.
        ranks: how many processes shared the steps, in ascending order; two or more where a resume changed it.
    """

    config: dict[str, Any]
    steps: list[StepRecord]
    torn: int
    metrics: list[MetricRecord] = field(default_factory=list)
    header: dict[str, Any] = field(default_factory=dict)
    ranks: tuple[int, ...] = ()

    def per_layer(self, begin: float = 0.0, end: float = inf) -> dict[str, Moments]:
        """Variance and sqnorm of each layer, averaged over the steps that were looked at with `begin < tau <= end`.

            variance_l = mean over steps of tr Cov(g_l)         sqnorm_l = mean over steps of ||E g_l||^2

        in the unit of one base batch. Of single steps both are noisy, sqnorm more than variance, and may be negative:
        take a window of ten looks or more. Its noise scale is in base batches; times `config["base_batch"]`, in
        examples. That of the whole is not their mean, but their mean with sqnorm as weights.

        Args:
            begin: where the window begins, base iterations.
            end: where it ends.

        Returns:
            The moments by layer, in the model's order: a module under its name in the model, weight and bias together,
            a parameter of the model itself under its own. Empty where no step was looked at.

        Example:
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            >>> path = tmp_path / "layers.jsonl"
            >>> record = anybatch.RunRecord(path, per_layer=2)
            >>> controller = anybatch.attach(optimizer, model=model, scale=1, record=record)
            >>> for batch in torch.randn(20, 16, 4):
            ...     for part in anybatch.split(batch, 2):
            ...         (model(part).square().mean() / 2).backward()
            ...     optimizer.step()
            ...     optimizer.zero_grad()
            >>> found = anybatch.read_record(path).per_layer()
            >>> list(found), found["2"].variance > 0
            (['0', '2'], True)

        Source:
            McCandlish et al. 2018, Appendix A.1, for each layer by itself.
        """
        return averaged(step.per_layer for step in self.steps if begin < step.tau <= end)

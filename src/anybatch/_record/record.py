"""The content of a record: one strict JSON object a line, with a header before the steps of each start.

[Note: one run] A run that resumes from a checkpoint repeats the steps after the checkpoint, and the file holds them
twice. If the first step after a header has number n, all earlier lines of steps n and above are superseded. Readers
skip superseded lines, so a record reads as one run: the steps that led to the final weights. A run that starts from
nothing in an old file supersedes all of it.
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
    """One optimizer step. Unknown and non-finite numbers are null in the file and nan here.

    Args:
        step: steps counted so far, including this one.
        tau: the clock after the step, base iterations.
        iterations: how far this step advanced the clock.
        scale: S.
        count: N, micro-batches on all ranks; 0 if nothing was counted.
        raw_variance: this step's own estimate of sigma^2, grad^2.
        raw_sqnorm: this step's own estimate of mu^2, grad^2.
        variance: the averaged sigma^2.
        sqnorm: the averaged mu^2.
        gain: r.
        lr: the learning rate applied to the first parameter group.
        lr_factor: its factor on the base learning rate.
        noise_scale: B_simple in examples, or in base batches if no base batch was given.
        seconds: wall time since the previous step.
        skipped: whether the step was skipped, because of a non-finite gradient.
        metric_variance: the averaged sigma^2 in Adam's metric; nan if not measured, as in older records.
        metric_sqnorm: the averaged mu^2, likewise.
        per_layer: `raw_variance` and `raw_sqnorm` split by layer, at a step that `RunRecord(per_layer=...)`
            measured; else empty, and absent from the file.
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
    """Results of an evaluation, passed to `controller.log`.

    Args:
        step: steps counted at the evaluation.
        tau: the clock at the evaluation, base iterations.
        values: the results by name; nan if not finite.
    """

    step: int
    tau: float
    values: dict[str, float]


@dataclass(frozen=True)
class Run:
    """The content of a record.

    Args:
        config: the header's configuration.
        steps: the steps that led to the run's end, in order, without steps that a resume repeated.
        torn: unreadable lines: at most the last one, and one for each kill of the run.
        metrics: the results of evaluations, likewise.
        header: versions, machine, commit, seed and configuration, from the header before the last of these steps.
        ranks: the numbers of processes that shared the steps, in ascending order; several if a resume changed it.
    """

    config: dict[str, Any]
    steps: list[StepRecord]
    torn: int
    metrics: list[MetricRecord] = field(default_factory=list)
    header: dict[str, Any] = field(default_factory=dict)
    ranks: tuple[int, ...] = ()

    def per_layer(self, begin: float = 0.0, end: float = inf) -> dict[str, Moments]:
        """Variance and sqnorm of each layer, averaged over the steps measured by layer with `begin < tau <= end`.

            variance_l = mean over steps of tr Cov(g_l)         sqnorm_l = mean over steps of ||E g_l||^2

        The unit is one base batch. The moments of single steps are noisy, sqnorm more than variance, and may be
        negative: use a window of ten measurements or more. `Moments.noise_scale` is in base batches; multiply it by
        `config["base_batch"]` for examples. The noise scale of the whole model is the mean of the layers' weighted by
        sqnorm.

        Args:
            begin: the window's begin, base iterations.
            end: the window's end, base iterations.

        Returns:
            The moments by layer, in the model's order. A module's weight and bias are one layer, under the module's
            name; a parameter of the model itself has its own name. Empty if no step was measured by layer.

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
            McCandlish et al. 2018, Appendix A.1, applied to each layer.
        """
        return averaged(step.per_layer for step in self.steps if begin < step.tau <= end)

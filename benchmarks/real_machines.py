"""What the papers' tasks take on real machines, computed and not measured: the tables of docs/real-machines.md.

    python -m benchmarks.real_machines

    hours = steps * S * B0 * FLOPs of an example / (GPUs * PEAK * utilisation * 3600),   steps = T / mean gain

FLOPs are counted by torch's own counter, forward and backward, on the full models without memory ("meta"); the mean
gains are those of the AdaScale paper's Table 2; peak and utilisation are assumed. Communication, loading and evaluation
take no time in it, and where a GPU's share of a step is too small there is no number.
`python -m recipes.reproduce ... --plan` measures instead.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from recipes.detection.model import YoloV3
from recipes.images.resnet import cifar_resnet_v2, imagenet_resnet_v1
from recipes.language.model import GPT, SHAPES
from recipes.speech.model import DeepSpeech2
from recipes.translation.model import TransformerModel

PEAK = 312e12  # multiplications and additions a second: an A100's, bfloat16, by its data sheet
LINE = 310  # bytes of a step in a record (docs/findings.md)
GPUS = (1, 8, 64)


@dataclass(frozen=True)
class Job:
    """One task at full size.

    Args:
        model: made on the meta device.
        inputs: of a few examples.
        examples: how many these are, in the unit of the base batch.
        base_batch: B0.
        total: T, base iterations.
        gains: scale to mean gain.
        utilisation: the assumed share of the peak.
        least: the smallest share of a step for which that is assumed.
        state: numbers that the optimizer keeps for each weight.
        device: where one pass is made to be counted.
    """

    model: Callable[[], nn.Module]
    inputs: Callable[[], Sequence[Tensor]]
    examples: float
    base_batch: int
    total: int
    gains: dict[int, float]
    utilisation: float
    least: int
    state: int = 1
    device: str = "meta"


def _images(number: int, side: int) -> Callable[[], Sequence[Tensor]]:
    return lambda: (torch.randn(number, 3, side, side),)


JOBS = {
    "cifar10": Job(lambda: cifar_resnet_v2(10), _images(2, 32), 2, 128, 39_100,
                   {1: 1, 8: 6.68, 16: 11.6, 32: 18.8, 64: 27.7}, 0.15, 64),
    "imagenet": Job(lambda: imagenet_resnet_v1(1000), _images(2, 224), 2, 256, 451_000,
                    {1: 1, 16: 13.6, 128: 61.9}, 0.2, 32),
    # A tenth of 12.3 seconds, on the CPU: its lengths are read.
    "speech": Job(DeepSpeech2, lambda: (torch.randn(1, 123, 161), torch.tensor([123])), 0.1, 32, 84_800,
                  {1: 1, 8: 7.0, 32: 19.8}, 0.1, 16, device="cpu"),
    "transformer": Job(lambda: TransformerModel(37_000),
                       lambda: (torch.zeros(4, 32).long(), torch.zeros(4, 32).long()), 4 * 32, 2048, 1_550_000,
                       {1: 1, 32: 26.3, 128: 72.4}, 0.3, 1024),
    "yolo": Job(lambda: YoloV3(20), _images(2, 416), 2, 16, 207_000, {1: 1, 32: 22.3, 128: 50.9}, 0.2, 8),
    "language": Job(lambda: GPT(50_304, SHAPES["124M"]), lambda: (torch.zeros(1, 1024).long(),), 1024, 2**19, 19_073,
                    {1: 1}, 0.4, 8192, state=2),
}  # fmt: skip


@dataclass(frozen=True)
class Counted:
    """Of an example: FLOPs forwards and backwards, and bytes kept for the backward in float32; and the weights."""

    flops: float
    kept: float
    weights: int


def counted(job: Job) -> Counted:
    """What torch counts."""
    kept: dict[int, Tensor] = {}
    with torch.device(job.device):
        model, inputs = job.model(), job.inputs()
    own = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(*inputs)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
    size = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
    weights = sum(p.numel() for p in model.parameters())
    return Counted(counter.get_total_flops() / job.examples, size / job.examples, weights)


def hours(job: Job, found: Counted, *, scale: int, gpus: int) -> float:
    """The equation above."""
    examples = job.total / job.gains[scale] * scale * job.base_batch
    return examples * found.flops / (gpus * PEAK * job.utilisation * 3600)


def whole(job: Job, found: Counted) -> str:
    """GPU-hours of AdaScale, LSW and LSW+ at the scales above 1, and of scale 1, from five seeds; LSW's gain is S."""
    one = hours(job, found, scale=1, gpus=1)
    large = [hours(job, found, scale=scale, gpus=1) for scale in job.gains if scale > 1]
    return f"{_short(5 * (one + sum(2 * own + one for own in large)))} GPU-hours" if large else "–"


def tables() -> list[str]:
    """The lines of both."""
    found = {name: counted(job) for name, job in JOBS.items()}
    lines = ["| task | S | steps | examples (tokens) | hours on 1 GPU | 8 | 64 |", "|---" * 7 + "|"]
    for name, job in JOBS.items():
        for scale, gain in job.gains.items():
            steps = job.total / gain
            took = " | ".join(
                _short(hours(job, found[name], scale=scale, gpus=n)) if scale * job.base_batch >= n * job.least else "–"
                for n in GPUS
            )
            lines.append(
                f"| {name} | {scale} | {steps:,.0f} | {steps * scale * job.base_batch / 1e6:,.0f} M | {took} |"
            )
    head = ("task", "weights", "GFLOP an example", "utilisation", "weights, gradients, optimizer", "kept an example",
            "checkpoint", "record at scale 1", "Table 2, 5 seeds")  # fmt: skip
    lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, job in JOBS.items():
        n = found[name].weights
        lines.append(
            f"| {name} | {n / 1e6:.1f} M | {found[name].flops / 1e9:.3g} | {job.utilisation:.0%} | "
            f"{4 * (2 + job.state) * n / 1e9:.2g} GB | {found[name].kept / 1e6:.3g} MB | "
            f"{4 * (1 + job.state) * n / 1e9:.2g} GB | {job.total * LINE / 1e6:.0f} MB | {whole(job, found[name])} |"
        )
    return lines


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


if __name__ == "__main__":
    print("\n".join(tables()))

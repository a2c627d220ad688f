"""What a run of an experiment is given: the hyperparameters of the base batch, and the answer to a larger one."""

from dataclasses import dataclass

Scale = float | tuple[float, ...]  # a tuple is progressive: equal shares of the run at each


@dataclass(frozen=True, kw_only=True)
class Config:
    """The hyperparameters of the base batch, and the sizes of the experiment around them.

    Args:
        base_batch: B0, in examples.
        total: base iterations of a run.
        decay: the model EMA's rho per base iteration.
        optimizer: `"sgd"`, whose fixed rule is linear scaling, or `"adam"`, `"adamw"` and `"lars"`, whose is the square
            root (Adam's with the SDE rule's betas).
        rate: learning rate at the base batch, constant unless there is a schedule.
        momentum: of SGD and LARS.
        weight_decay: of any optimizer.
        trust: LARS's trust coefficient.
        warmup: base iterations in which the rate rises linearly.
        cosine: whether it falls by half a cosine after that.
        final_weight_decay: where the weight decay comes to by half a cosine; `None` where it stays.
        final_decay: where rho comes to by half a cosine; `None` where it stays.
        largest: examples that one backward may hold; larger batches are accumulated.
        evaluations: how often a run is evaluated, at equal steps of tau.
        points: length of the stored curves; a divisor of `evaluations`.
        scales: kappa, the batch in base batches.
        seeds: how many.
    """

    base_batch: int
    total: int
    decay: float
    rate: float
    optimizer: str = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    trust: float = 1e-3
    warmup: int = 0
    cosine: bool = False
    final_weight_decay: float | None = None
    final_decay: float | None = None
    largest: int = 1 << 30
    evaluations: int = 16
    points: int = 16
    scales: tuple[float, ...] = (0.25, 0.5, 1, 2, 4, 8, 16, 32)
    seeds: int = 5


@dataclass(frozen=True)
class Arm:
    """One answer to a batch of kappa base batches.

    Args:
        label: as figures and tables have it.
        adascale: the optimizer follows AdaScale's gain; else the fixed rule of its class.
        ema: what the EMA's decay is raised to in a step: `"clock"`, the base iterations done; `"one"`, nothing;
            `"scale"`, kappa, which under the fixed rule is the clock.
        linear: the fixed rule is linear scaling whatever the optimizer.
    """

    label: str
    adascale: bool
    ema: str
    linear: bool = False


ARMS = {
    "rule": Arm("fixed scaling, ρ^κ (the rule)", adascale=False, ema="clock"),
    "off": Arm("fixed scaling, ρ (rule off)", adascale=False, ema="one"),
    "linear": Arm("linear scaling, ρ^κ (the rule)", adascale=False, ema="clock", linear=True),
    "adascale": Arm("AdaScale, ρ^r (ours)", adascale=True, ema="clock"),
    "adascale-off": Arm("AdaScale, ρ (rule off)", adascale=True, ema="one"),
    "adascale-scale": Arm("AdaScale, ρ^κ", adascale=True, ema="scale"),
}

"""Training with a model EMA at any batch size: what the experiments of the EMA paper share.

An experiment says what is trained (`Experiment`), an arm how the batch size is answered (`ARMS`), and `train` is one
run from one seed. Nothing here depends on which experiment it is, or on how big.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import ceil, nan
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

import anybatch
from recipes.training.attempts import Attempts

Batch = tuple[Tensor, ...]
Model = TypeVar("Model", bound=nn.Module)
Scale = float | tuple[float, ...]  # a tuple is progressive: equal shares of the run at each


@dataclass(frozen=True, kw_only=True)
class Config:
    """The hyperparameters of the base batch, and the sizes of the experiment around them.

    Args:
        base_batch: B0, in examples.
        total: base iterations of a run.
        decay: the model EMA's rho per base iteration.
        optimizer: `"sgd"`, whose fixed rule is linear scaling, or `"adamw"`, whose is the SDE's square root.
        rate: learning rate, constant, at the base batch.
        momentum: of SGD.
        weight_decay: of either optimizer.
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
    """

    label: str
    adascale: bool
    ema: str


ARMS = {
    "rule": Arm("fixed scaling, ρ^κ (the rule)", adascale=False, ema="clock"),
    "off": Arm("fixed scaling, ρ (rule off)", adascale=False, ema="one"),
    "adascale": Arm("AdaScale, ρ^r (ours)", adascale=True, ema="clock"),
    "adascale-off": Arm("AdaScale, ρ (rule off)", adascale=True, ema="one"),
    "adascale-scale": Arm("AdaScale, ρ^κ", adascale=True, ema="scale"),
}


class Experiment(ABC, Generic[Model]):
    """What is trained. `config` has its numbers.

    Args:
        config: see `Config`.
        device: where the model and every batch lie.
    """

    teaches = False  # whether the teacher has a say in the loss: whether `targets` is called

    def __init__(self, config: Config, *, device: str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)

    @abstractmethod
    def model(self) -> Model:
        """A new model; the seed is set."""

    @abstractmethod
    def batch(self, examples: int, generator: torch.Generator) -> Batch:
        """The next `examples` training examples, augmented."""

    def targets(self, model: Model, batch: Batch) -> Batch:  # noqa: ARG002
        """The batch with what the teacher says of it; `model` holds the EMA's weights here."""
        return batch

    @abstractmethod
    def loss(self, model: Model, batch: Batch) -> Tensor:
        """The mean loss over the examples."""

    @abstractmethod
    def evaluate(self, model: Model) -> dict[str, float]:
        """`"accuracy"` in percent, and `"loss"` where there is a test loss; without gradients."""


def train(experiment: Experiment[Model], arm: str, *, scale: Scale, seed: int) -> dict[str, Any]:
    """One run: steps, and the curves of the student and of the teacher, its EMA, at equal points of tau.

    The curves of a run that takes no step any more are nan from there on.
    """
    config, how = experiment.config, ARMS[arm]
    torch.manual_seed(seed)
    model = experiment.model().to(experiment.device)
    optimizer = _optimizer(model, config)
    controller = anybatch.attach(
        optimizer,
        model=model,
        rule=_rule(how, config),
        total=config.total,
        base_batch=config.base_batch,
        micro_batch=config.base_batch,
    )
    ema = anybatch.ModelEMA(model, config.decay, clock=controller.clock if how.ema == "clock" else None)
    order = torch.Generator().manual_seed(seed)
    curve = [_evaluate(experiment, model, ema, tau=0.0)]
    attempts = Attempts()
    while not controller.done and not attempts.hopeless:
        kappa = scale_at(scale, controller.tau / config.total)
        examples = round(kappa * config.base_batch)
        batch = experiment.batch(examples, order)
        if experiment.teaches:
            with torch.no_grad(), ema.applied():
                batch = experiment.targets(model, batch)
        parts = backwards(how, kappa, examples, config)
        controller.micro_batch = examples / parts
        for part in anybatch.split(batch, parts):
            (experiment.loss(model, part) / parts).backward()
        try:
            optimizer.step()
        except anybatch.DivergedError:
            attempts.give_up()
            break
        optimizer.zero_grad()
        attempts.count(controller)
        if how.ema != "clock":
            ema.update(1.0 if how.ema == "one" else kappa)
        if controller.clock.reached(len(curve) * config.total / config.evaluations):
            curve.append(_evaluate(experiment, model, ema, tau=controller.tau))
    if attempts.hopeless:
        curve.append({**dict.fromkeys(curve[0], nan), "tau": float(config.total)})
    return {"arm": arm, "scale": scale, "seed": seed, "steps": controller.steps} | _resampled(curve, config)


def scale_at(scale: Scale, share: float) -> float:
    """Kappa when this share of the run is done."""
    if not isinstance(scale, tuple):
        return scale
    return scale[min(int(share * len(scale) + 1e-9), len(scale) - 1)]


def backwards(how: Arm, kappa: float, examples: int, config: Config) -> int:
    """In how many backwards a batch is taken: for AdaScale one for each base batch, but 2 to 8, to see the noise."""
    least = min(max(2, round(kappa)), 8) if how.adascale else 1
    return next(n for n in range(max(least, ceil(examples / config.largest)), examples + 1) if examples % n == 0)


def _optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=config.rate, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        model.parameters(), lr=config.rate, momentum=config.momentum, weight_decay=config.weight_decay
    )


def _rule(how: Arm, config: Config) -> anybatch.Rule:
    if how.adascale:
        return anybatch.AdaScale()
    return anybatch.Linear() if config.optimizer == "sgd" else anybatch.SquareRoot()


def _evaluate(experiment: Experiment[Model], model: Model, ema: anybatch.ModelEMA, *, tau: float) -> dict[str, float]:
    model.eval()
    with torch.no_grad():
        found = {f"student_{name}": value for name, value in experiment.evaluate(model).items()}
        with ema.applied():
            found |= {f"teacher_{name}": value for name, value in experiment.evaluate(model).items()}
    model.train()
    return {"tau": tau} | found


def _resampled(curve: list[dict[str, float]], config: Config) -> dict[str, list[float]]:
    """The curves at `points` equal steps of tau, between two evaluations by a straight line."""
    tau = torch.tensor([point["tau"] for point in curve], dtype=torch.float64)
    at = torch.arange(1, config.points + 1, dtype=torch.float64) * config.total / config.points
    right = torch.searchsorted(tau, at).clamp(1, len(tau) - 1)
    weight = ((at - tau[right - 1]) / (tau[right] - tau[right - 1])).clamp(0, 1)
    curves = {"tau": at.tolist()}
    for name in curve[0].keys() - {"tau"}:
        values = torch.tensor([point[name] for point in curve], dtype=torch.float64)
        curves[name] = values[right - 1].lerp(values[right], weight).tolist()
    return curves

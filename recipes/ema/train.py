"""Training with a model EMA at any batch size: what the experiments of the EMA paper share.

An experiment says what is trained (`Experiment`), an arm how the batch size is answered (`ARMS`), and `train` is one
run from one seed. Nothing here depends on which experiment it is, or on how big.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict
from math import ceil, nan
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

import anybatch
from recipes.ema.config import ARMS, Arm, Config, Scale
from recipes.ema.optimizers import follow_weight_decay, make_optimizer, make_rule, make_scheduler
from recipes.ema.resume import Checkpoint
from recipes.training.attempts import Attempts

Batch = tuple[Tensor, ...]
Model = TypeVar("Model", bound=nn.Module)


class Experiment(ABC, Generic[Model]):
    """What is trained. `config` has its numbers.

    Args:
        config: see `Config`.
        device: where the model and every batch lie.
    """

    teaches = False  # whether the teacher has a say in the loss: whether `targets` is called
    start = 0  # examples that this run has seen before it was killed

    def __init__(self, config: Config, *, device: str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)

    @abstractmethod
    def model(self) -> Model:
        """A new model; the seed is set."""

    @abstractmethod
    def batch(self, examples: int, generator: torch.Generator) -> Batch:
        """The next `examples` training examples, augmented."""

    def begin(self, model: Model, clock: anybatch.Clock) -> None:
        """A run begins; what of the experiment has a rhythm of its own may follow the clock."""

    def before_step(self, model: Model) -> None:
        """The gradients are there, the step is not done."""

    def targets(self, model: Model, batch: Batch) -> Batch:  # noqa: ARG002
        """What one backward gets of a batch, with what the teacher says of it; `model` holds the EMA's weights here."""
        return batch

    @abstractmethod
    def loss(self, model: Model, batch: Batch) -> Tensor:
        """The mean loss over the examples."""

    @abstractmethod
    def evaluate(self, model: Model) -> dict[str, float]:
        """`"accuracy"` in percent, and `"loss"` where there is a test loss; without gradients."""


def train(
    experiment: Experiment[Model], arm: str, *, scale: Scale, seed: int, checkpoint: Checkpoint | None = None
) -> dict[str, Any]:
    """One run: steps, and the curves of the student and of the teacher, its EMA, at equal points of tau.

    The curves of a run that takes no step any more are nan from there on. One that was killed goes on at the last
    evaluation that is in `checkpoint`: the same examples, but for what chance makes of them on a device or in a loader.
    """
    config, how = experiment.config, ARMS[arm]
    torch.manual_seed(seed)
    model = experiment.model().to(experiment.device)
    optimizer = make_optimizer(model, config)
    scheduler = make_scheduler(optimizer, config)
    controller = anybatch.attach(
        optimizer,
        model=model,
        rule=make_rule(how, config),
        scheduler=scheduler,
        total=config.total,
        base_batch=config.base_batch,
        micro_batch=config.base_batch,
    )
    follow_weight_decay(optimizer, controller, config)
    ema = _average(model, config, controller.clock, followed=how.ema == "clock")
    order = torch.Generator().manual_seed(seed)
    kept: dict[str, Any] = {"model": model, "optimizer": optimizer, "ema": ema}
    if scheduler:
        kept["scheduler"] = scheduler
    saved = checkpoint.read() if checkpoint else None
    if saved:
        for name, part in kept.items():
            part.load_state_dict(saved[name])
        order.set_state(saved["order"])
    used = experiment.start = saved["used"] if saved else 0
    experiment.begin(model, controller.clock)
    curve = saved["curve"] if saved else [_evaluate(experiment, model, ema, tau=0.0)]
    attempts = Attempts(**saved["attempts"]) if saved else Attempts()
    if saved:
        torch.set_rng_state(saved["chance"])
    while not controller.done and not attempts.hopeless:
        kappa = scale_at(scale, controller.tau / config.total)
        examples = round(kappa * config.base_batch)
        batch = experiment.batch(examples, order)
        parts = backwards(how, kappa, examples, config)
        controller.micro_batch = examples / parts
        for part in anybatch.split(batch, parts):
            if experiment.teaches:  # as little at a time as of the student, for memory and for what BatchNorm sees
                with torch.no_grad(), ema.applied():
                    part = experiment.targets(model, part)  # noqa: PLW2901
            (experiment.loss(model, part) / parts).backward()
        experiment.before_step(model)
        try:
            optimizer.step()
        except anybatch.DivergedError:
            attempts.give_up()
            break
        optimizer.zero_grad()
        used += examples
        attempts.count(controller)
        if how.ema != "clock":
            ema.update(1.0 if how.ema == "one" else kappa)
        if controller.clock.reached(len(curve) * config.total / config.evaluations):
            curve.append(_evaluate(experiment, model, ema, tau=controller.tau))
            if checkpoint and checkpoint.due:
                own = {"order": order.get_state(), "used": used, "curve": curve, "attempts": asdict(attempts)}
                states = {name: part.state_dict() for name, part in kept.items()}
                checkpoint.write(states | own | {"chance": torch.get_rng_state()})
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


def _average(model: nn.Module, config: Config, clock: anybatch.Clock, *, followed: bool) -> anybatch.ModelEMA:
    """The teacher. One that does not follow the clock still has its rho of tau, but once in a step."""
    if config.final_decay is None:
        return anybatch.ModelEMA(model, config.decay, clock=clock if followed else None)
    rho = anybatch.cosine_decay(config.decay, total=config.total, end=config.final_decay)
    if followed:
        return anybatch.ModelEMA(model, rho, clock=clock)
    return anybatch.ModelEMA(model, lambda _: rho(clock.tau))


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

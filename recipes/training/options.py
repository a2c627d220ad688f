"""What `train.py` is told: the task, the options, their command line, and what follows from them."""

import argparse
import importlib
import inspect
import warnings
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

import anybatch
from recipes.training.once import unfinished
from recipes.training.parallel import Place
from recipes.training.task import DataError, Task

TASKS = {
    "language": "recipes.language.task:Language",
    "digits": "recipes.digits:Digits",
    "cifar10": "recipes.images.cifar10:Cifar10",
    "imagenet": "recipes.images.imagenet:ImageNet",
    "speech": "recipes.speech.task:Speech",
    "transformer": "recipes.translation.task:Transformer",
    "yolo": "recipes.detection.task:Yolo",
}
RULES = ("adascale", "lsw", "lsw+", "linear", "sqrt", "identity")
GROWTHS = ("noise", "seesaw")
POSITIVE = (
    *("base_batch", "micro_batch", "most", "efficiency", "steps"),
    *("total", "lr", "last_rate", "evaluations", "save_every"),
)
OWN = {  # what some tasks let choose within them
    "size": "language: 124M or 350M",
    "optimizer": "language: adamw or muon; transformer: sgd or adamw",
    "schedule": "language: cosine or wsd",
    "vocabulary": "language: tokens to make of a text, or of the .bin files' tokenizer (default: 50257)",
    "sizes": "yolo: one or many sizes of the images, another every ten base batches",
    "mixup": "yolo: mix the images by shares from Beta(MIXUP, MIXUP)",
}
PRECISIONS = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Options:
    """How a task is trained; `python -m recipes.train --help` says what each is. `rule` may be a rule itself."""

    rule: str | anybatch.Rule = "adascale"
    decays: str | float | None = None
    estimator: str | None = None
    smoothing: str | float | None = None
    scale: str = "1"
    base_batch: int | None = None
    micro_batch: int | None = None
    grow: str | None = None
    most: float | None = None
    efficiency: float | None = None
    steps: int | None = None
    seed: int = 0
    total: int | None = None
    lr: float | None = None
    last_rate: float | None = None
    ema: float | None = None
    precision: str = "fp32"
    compile: bool = False
    fsdp: bool = False
    workers: int | None = None
    evaluations: int = 20
    save_every: float | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rule, anybatch.Rule) and self.rule not in RULES:
            raise anybatch.InvalidValueError(f"--rule is one of {', '.join(RULES)}; got {self.rule!r}.")
        if self.precision not in PRECISIONS:
            raise anybatch.InvalidValueError(f"--precision is {', '.join(PRECISIONS)}; got {self.precision!r}.")
        if (self.rule == "lsw+") != (self.steps is not None):
            raise anybatch.InvalidValueError("--steps belongs to --rule lsw+: the number of steps AdaScale took.")
        if self.grow not in (None, *GROWTHS):
            raise anybatch.InvalidValueError(f"--grow is {' or '.join(GROWTHS)}; got {self.grow!r}.")
        if (self.grow is None) != (self.most is None) or (self.grow is not None and len(self.scales) > 1):
            raise anybatch.InvalidValueError("--grow needs --most, the largest scale, and one --scale to begin with.")
        if self.efficiency is not None and self.grow != "noise":
            raise anybatch.InvalidValueError("--efficiency belongs to --grow noise.")
        if self.workers is not None and self.workers < 0:
            raise anybatch.InvalidValueError(f"--workers must not be negative, got {self.workers}.")
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise anybatch.InvalidValueError(f"--{name.replace('_', '-')} must be positive, got {value}.")
        self.scales  # noqa: B018  said now, not in the middle of the run

    @property
    def scales(self) -> list[tuple[float, float]]:
        """`"32,64@0.25"` as pairs of a scale and the share of the run from which on it holds."""
        try:
            words = [word.partition("@") for word in str(self.scale).split(",")]
            found = [(float(scale), float(share) if at else 0.0) for scale, at, share in words]
        except ValueError:
            found = []
        shares = [share for _, share in found]
        if not found or shares[0] != 0 or shares != sorted(set(shares)) or shares[-1] >= 1 or min(found)[0] <= 0:
            raise anybatch.InvalidValueError(f"--scale is like 8, or like 32,64@0.25,128@0.5; got {self.scale!r}.")
        return found

    def scale_at(self, share: float) -> float:
        """The scale in force after this share of the run."""
        return anybatch.Progressive({since: scale for scale, since in self.scales}).scale(share)

    def rule_for_attach(self) -> anybatch.Rule:
        """The rule itself, or by its name; the papers warm linear scaling up over 5.5 % of the run."""
        if isinstance(self.rule, anybatch.Rule):
            return self.rule
        given = {"decays": self.decays, "estimator": self.estimator, "smoothing": self.smoothing}
        arguments: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if self.rule == "adascale":
            return anybatch.AdaScale(**arguments)
        rules: dict[str, anybatch.Rule] = {
            "lsw": anybatch.Linear(warmup=0.055),
            "lsw+": anybatch.Linear(warmup=0.055, steps=self.steps),
            "linear": anybatch.Linear(),
            "sqrt": anybatch.SquareRoot(),
            "identity": anybatch.Identity(),
        }
        return replace(rules[self.rule], **{name: arguments[name] for name in ("decays",) if name in arguments})

    def micro_batch_for(self, task: Task, *, ranks: int) -> int:
        """The one that was given; else a base batch, or a rank's share of the smallest step.

        A batch that grows with the noise begins with two gradients or more: one shows no noise.
        """
        parts = max(2, ranks) if self.grow == "noise" else ranks
        return self.micro_batch or max(1, round(min(1, min(self.scales)[0] / parts) * task.base_batch))

    def accumulation_for(self, scale: float, task: Task, *, ranks: int) -> int:
        """How many micro-batches each rank takes in a step of `scale`.

        Raises:
            InvalidValueError: it is not whole.
        """
        micro_batch = self.micro_batch_for(task, ranks=ranks)
        exact = scale * task.base_batch / (ranks * micro_batch)
        if round(exact) < 1 or abs(exact - round(exact)) > 1e-9:
            raise anybatch.InvalidValueError(
                f"A step of scale {scale:g} is {scale * task.base_batch:g}, and {ranks} rank(s) with micro-batches of "
                f"{micro_batch} take {ranks * micro_batch} at a time: {exact:g} times. Choose --micro-batch so that it "
                "is a whole number."
            )
        return round(exact)

    def identity(self, task: Task) -> dict[str, Any]:
        """What must be the same in a resumed run; the scale, the ranks and the machine may be others."""
        names = ("decays", "estimator", "smoothing", "steps", "seed", "lr", "last_rate", "ema", "precision")
        mine = {name: value for name, value in asdict(self).items() if name in (*names, "base_batch", "grow")}
        return {
            "task": task.name,
            "tiny": task.tiny,
            "total": task.total,
            "rule": str(self.rule),
            **mine,
            **task.variant,
            "train_set": len(task.train_set),  # type: ignore[arg-type]  # which example comes next depends on it
        }


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, Options]:
    """The command line: what chooses the task, and the options."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.train", description="Train a language model, or one of the papers' tasks, at any scale."
    )
    add = parser.add_argument
    add("task", choices=TASKS)
    add("--data", type=Path, help="folder with the data set")
    add("--tiny", action="store_true", help="a small model and a short run")
    add("--make-data", action="store_true", help="write a small made data set to --data if nothing is there")
    add("--rule", default="adascale", choices=RULES, help="how steps are scaled (default: adascale)")
    add("--decays", type=number_or_word, help="of betas and momentum: auto, clock, constant or a number from 0 to 1")
    add("--estimator", choices=("unbiased", "paper"), help="how AdaScale's gain is estimated")
    add("--smoothing", type=number_or_word, help="memory of AdaScale's averages: paper, or a number from 0 to 1")
    add("--scale", default="1", help="batch of a step in base batches; 32,64@0.25 changes at a quarter of the run")
    add("--base-batch", type=int, help="the batch that the learning rate is tuned for, in place of the task's")
    add("--micro-batch", type=int, help="what each rank sees in one backward, in the unit of the base batch")
    add("--grow", choices=GROWTHS, help="a batch that grows from --scale to --most: with the noise, or by Seesaw")
    add("--most", type=float, help="for --grow: the largest scale")
    add("--efficiency", type=float, help="for --grow noise: the least worth of an example (default: 0.8)")
    add("--steps", type=int, help="for lsw+: how many steps the run is stretched to")
    add("--seed", type=int, default=0, help="of the weights and the data (default: 0)")
    add("--total", type=int, help="length of the run in base iterations, in place of the task's")
    add("--lr", type=float, help="learning rate at the base batch, in place of the task's")
    add("--last-rate", type=float, help="in place of the task's schedule: exponential decay to this share of the rate")
    for name, words in OWN.items():
        add(f"--{name}", type=int if name == "vocabulary" else str, help=words)
    add("--ema", type=float, help="evaluate an average of the weights too; its decay per base iteration")
    add(
        "--precision", default="fp32", choices=PRECISIONS, help="autocast, for fp16 a GradScaler; tf32: in products too"
    )
    add("--compile", action="store_true", help="torch.compile the model")
    add("--fsdp", action="store_true", help="shard with FSDP2 in place of DDP")
    add("--workers", type=int, help="processes that load data on each rank (default: by the cores; on a CPU none)")
    add("--evaluations", type=int, default=20, help="at equal steps of tau (default: 20)")
    add("--save-every", type=float, help="base iterations between two checkpoints (default: a twentieth of the run)")
    add(
        "--out",
        type=Path,
        help="folder of checkpoint, record and results; a run found there goes on (default: in runs/)",
    )
    given = parser.parse_args(arguments)
    if given.out is None:
        chosen = [str(value) for name in OWN if (value := getattr(given, name)) is not None]
        task = "-".join([given.task, *(["tiny"] if given.tiny else []), *chosen, given.rule])
        scale = given.scale.replace(",", "-") + (f"-{given.grow}-{given.most:g}" if given.grow and given.most else "")
        given.out = Path("runs") / f"{task}-S{scale}-seed{given.seed}"
    options = Options(**{f.name: getattr(given, f.name) for f in fields(Options)})
    return given, options


def number_or_word(text: str) -> float | str:
    """A number where it is one."""
    try:
        return float(text)
    except ValueError:
        return text


def task_of(given: argparse.Namespace, place: Place) -> Task:
    """The task that was chosen, with its data."""
    source, name = TASKS[given.task].split(":")
    try:
        module: Any = importlib.import_module(source)
    except ImportError as error:
        raise DataError(f"{given.task} needs {error.name}: pip install 'anybatch[recipes]'") from None
    if given.make_data and not hasattr(module, "make"):
        warnings.warn(f"{given.task} has its data embedded: --make-data does nothing.", anybatch.AnybatchWarning, 2)
    elif given.make_data:
        if given.data is None:
            raise DataError("--make-data needs --data, the folder to write to.")
        if place.first and not (given.data.is_file() or (given.data.is_dir() and any(given.data.iterdir()))):
            new = unfinished(given.data)  # a kill leaves no half of a data set where the next call would take it
            module.make(new, size="tiny", seed=0)
            new.replace(given.data)
        place.wait()
    kind = getattr(module, name)
    chosen = {own: value for own in OWN if (value := getattr(given, own)) is not None}
    if strange := chosen.keys() - inspect.signature(kind).parameters.keys():
        raise anybatch.InvalidValueError(f"{given.task} has no --{' and no --'.join(sorted(strange))} to choose.")
    task: Task = kind(given.data, tiny=given.tiny, **chosen)
    return task

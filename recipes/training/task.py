"""What a recipe gives to `train.py`: data, model, loss, metric, and the hyperparameters of its base batch.

The hyperparameters are those of scale 1. No task knows the scale: that is the library's part.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from recipes.training.loading import loader
from recipes.training.sharing import ALONE, Share


class DataError(Exception):
    """Data that cannot be used: the message names the file and says what is wrong with it."""


class Task(ABC):
    """One of the papers' tasks.

    Args:
        data: the folder with the data in its standard on-disk format.
        tiny: a small width and depth of the same model, and a short run, for CI and for a first look.

    Raises:
        DataError: the folder or a file in it is missing or unreadable.
    """

    name: ClassVar[str]
    metric: ClassVar[str]  # what `evaluate` calls the number to compare, higher is better
    base_batch: int  # B0, in examples (transformer: in tokens)
    total: int  # T_SI, base iterations
    train_set: Dataset[Any]
    workers: int = 0  # processes that load data, also for `evaluate`; train.py sets it
    measured: str = ""  # how the metric is computed, where that needs saying beside the number
    clip: float | None = None  # the largest norm of a step's gradient
    convolutions: ClassVar[bool] = False  # of images: their channels lie last on a GPU, where that is faster
    one_size: ClassVar[bool] = True  # whether all batches have the same shape, so that kernels are chosen once
    lockstep: ClassVar[bool] = True  # whether `evaluate` calls the model once for each part of a share
    variant: Mapping[str, Any] = {}  # what was chosen within the task, and must be the same in a resumed run

    def __init__(self, data: Path | None, *, tiny: bool = False) -> None:
        self.data = data
        self.tiny = tiny
        self._tested: tuple[list[list[int]], DataLoader[Any]] | None = None

    @abstractmethod
    def model(self) -> nn.Module:
        """A new model; the caller has set the seed."""

    @abstractmethod
    def optimizer(self, model: nn.Module) -> Optimizer | list[Optimizer]:
        """The optimizer as tuned at the base batch, or several that share the parameters."""

    @abstractmethod
    def scheduler(self, optimizer: Optimizer) -> Any:
        """Its schedule over base iterations; each of several has its own."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss over the examples (or tokens) of `batch`, which lies on the model's device."""

    @abstractmethod
    def evaluate(self, model: nn.Module, device: torch.device, share: Share = ALONE) -> dict[str, float]:
        """The metric, by the name in `metric`, and the test loss as `"loss"`; the model is in eval mode.

        Every rank calls it with its share, and gets the numbers of all.
        """

    def tested(self, data: Dataset[Any], parts: list[list[int]], *, collate: Any = None) -> DataLoader[Any]:
        """Batches of the test set, by workers that stay for the next evaluation."""
        if self._tested is None or self._tested[0] != parts:
            generator = torch.Generator()  # its own: an evaluation takes no random number from the training
            options = {"workers": self.workers, "collate": collate, "generator": generator}
            self._tested = parts, loader(data, parts, **options)
        return self._tested[1]

    def __getstate__(self) -> dict[str, Any]:
        """For a loading process: without loaders of its own."""
        return {**self.__dict__, "_tested": None}

    @property
    def examples(self) -> int | None:
        """Size of an epoch in the unit of `base_batch`; `None` where `batches` does not go once through the data."""
        return len(self.train_set)  # type: ignore[arg-type]  # a Dataset need not have a length, these have

    def collate(self, examples: list[Any]) -> Any:
        """Examples of `train_set` as one batch: tensors, or a list, tuple or dictionary of them."""
        return torch.utils.data.default_collate(examples)

    def size(self, batch: Any) -> int:
        """How many examples (or tokens) `batch` has, in the unit of `base_batch`."""
        first = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
        return len(first)

    def batches(
        self, micro_batch: int, *, seed: int, rank: int, ranks: int, start: int = 0, workers: int = 0
    ) -> Iterator[Any]:
        """Endless micro-batches of this rank; `start` examples were used by all ranks together before.

        Whatever `train_set[i]` draws with torch is a function of the seed and of how many examples came before it: the
        same on any number of ranks and workers, and after a resume.
        """
        order = Shuffled(self.train_set, micro_batch, seed=seed, rank=rank, ranks=ranks, start=start)
        data = Seeded(self.train_set, seed=seed)
        return iter(loader(data, Numbered(order), workers=workers, collate=self.collate))


class Shuffled(Sampler[list[int]]):
    """Endless epochs, each in its own order; the ranks take turns, so it does not depend on their number."""

    def __init__(self, data: Any, micro_batch: int, *, seed: int, rank: int, ranks: int, start: int) -> None:
        self.length = len(data)
        if self.length == 0:
            raise DataError("The training set is empty.")
        self.micro_batch, self.seed, self.rank, self.ranks, self.start = micro_batch, seed, rank, ranks, start

    def __iter__(self) -> Iterator[list[int]]:
        position, epoch, order = self.start + self.rank * self.micro_batch, -1, torch.empty(0)
        while True:
            chosen = []
            for i in range(position, position + self.micro_batch):
                if i // self.length != epoch:
                    epoch = i // self.length
                    generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                    order = torch.randperm(self.length, generator=generator)
                chosen.append(int(order[i % self.length]))
            yield chosen
            position += self.ranks * self.micro_batch


class Numbered(Sampler[list[tuple[int, int]]]):
    """The batches of `order`, each example as the pair `(how many came before it on all ranks, its index)`."""

    def __init__(self, order: Shuffled) -> None:
        self.order = order

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = self.order
        number = order.start + order.rank * order.micro_batch
        for indices in order:
            yield list(enumerate(indices, start=number))
            number += order.ranks * order.micro_batch


class Seeded(Dataset[Any]):
    """Examples of `data`, each with torch's random numbers seeded by its number in the run."""

    def __init__(self, data: Any, *, seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, numbered: tuple[int, int]) -> Any:
        number, index = numbered
        generator = torch.default_generator
        before = generator.get_state()
        generator.manual_seed(self.seed * 1_000_000_007 + number)
        try:
            return self.data[index]
        finally:
            generator.set_state(before)

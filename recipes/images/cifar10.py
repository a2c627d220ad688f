"""CIFAR-10 with ResNet-18 v2: base batch 128, 39,100 base iterations (100 epochs), exponential decay.

The paper gives these, and 94.1 % for scale 1. It does not publish the rest; learning rate 0.1 down to 1 %, momentum
0.9, weight decay 5e-4, crops from 4 pixels of padding and flips are what others train this network with.
"""

import io
import pickle
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import Dataset

from recipes.images import made
from recipes.images.counted import Counted
from recipes.images.resnet import cifar_resnet_v2, standardised
from recipes.training.sharing import ALONE, Share
from recipes.training.task import DataError, Task

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10's training images
LAST_RATE = 0.01
_RECORD = 1 + 3 * 32 * 32  # a label and three planes of 32x32, in bytes
_TRAIN, _TEST = [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]
make = made.cifar10


class Cifar10(Task):
    """60,000 images of 32x32 pixels in ten classes."""

    name = "cifar10"
    metric = "accuracy"
    convolutions = True

    def __init__(self, data: Path | None, *, tiny: bool = False) -> None:
        super().__init__(data, tiny=tiny)
        self.base_batch, self.total, self.rate = (16, 1500, 0.05) if tiny else (128, 39_100, 0.1)
        x, y = read(data, _TRAIN)
        self.train_set = Augmented(x, y)
        self.test_set = read(data, _TEST)

    def model(self) -> nn.Module:
        """ResNet-18 v2; tiny: 8 channels in place of 64, one block in each stage."""
        return cifar_resnet_v2(10, width=8, depths=(1, 1, 1, 1)) if self.tiny else cifar_resnet_v2(10)

    def optimizer(self, model: nn.Module) -> Optimizer:
        """SGD with momentum and weight decay."""
        return SGD(model.parameters(), lr=self.rate, momentum=0.9, weight_decay=5e-4)

    def scheduler(self, optimizer: Optimizer) -> Any:
        """Exponential decay."""
        return ExponentialLR(optimizer, LAST_RATE ** (1 / self.total))

    def collate(self, examples: list[Any]) -> Any:
        """Images in bytes, and labels."""
        images, labels = zip(*examples, strict=True)
        return torch.stack(images), torch.stack(labels)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross entropy; the images become numbers where the model is, for bytes are a quarter of them."""
        x, y = batch
        return cross_entropy(model(standardised(x, mean=MEAN, std=STD)), y)

    def evaluate(self, model: nn.Module, device: torch.device, share: Share = ALONE) -> dict[str, float]:
        """Test accuracy in percent."""
        found = Counted(device)
        parts = list(zip(*(part.split(500) for part in self.test_set), strict=True))
        for (images, y), counts in share.of(parts):
            x = standardised(images.to(device), mean=MEAN, std=STD)
            logits = model(x).float()
            if counts:
                found.add(logits, y.to(device))
        return found.over(share)


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Crops of 32x32 out of the image with 4 pixels of padding on each side, flipped half of the time."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = pad(x, (4, 4, 4, 4)), y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        top, left = torch.randint(0, 9, (2,)).tolist()
        image = self.x[i, :, top : top + 32, left : left + 32]
        return image.flip(2) if torch.rand(()) < 0.5 else image, self.y[i]


def read(data: Path | None, names: list[str]) -> tuple[Tensor, Tensor]:
    """Images `[n, 3, 32, 32]` in bytes and labels `[n]`, of the binary or the python version of CIFAR-10.

    Raises:
        DataError: a file is missing, unreadable or of the wrong size, or a label is out of range.
    """
    if data is None:
        raise DataError("cifar10 needs --data: the folder with data_batch_1.bin (binary version) or data_batch_1.")
    for folder in (data, data / "cifar-10-batches-bin", data / "cifar-10-batches-py"):
        for suffix, reader in ((".bin", _binary), ("", _pickled)):
            if (folder / f"data_batch_1{suffix}").exists():
                parts = [reader(folder / f"{name}{suffix}") for name in names]
                images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
                return images, labels
    raise DataError(f"{data} holds neither data_batch_1.bin (CIFAR-10's binary version) nor data_batch_1 (python).")


def _binary(path: Path) -> tuple[Tensor, Tensor]:
    raw = bytearray(_bytes(path))
    if not raw or len(raw) % _RECORD:
        raise DataError(f"{path} has {len(raw)} bytes, which is not a number of records of {_RECORD} bytes.")
    rows = torch.frombuffer(raw, dtype=torch.uint8).view(-1, _RECORD)
    return _checked(path, rows[:, 1:], rows[:, 0].long())


def _pickled(path: Path) -> tuple[Tensor, Tensor]:
    try:
        content = _Arrays(io.BytesIO(_bytes(path)), encoding="bytes").load()
        values = {key if isinstance(key, bytes) else key.encode(): value for key, value in content.items()}
        pixels, labels = torch.as_tensor(values[b"data"]), torch.as_tensor(values[b"labels"])
    except Exception as error:  # a damaged pickle raises almost anything
        raise DataError(f"{path} is not a batch of CIFAR-10's python version: {error}") from None
    return _checked(path, pixels, labels.long())


def _checked(path: Path, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    n = len(labels)
    if pixels.dtype != torch.uint8 or pixels.shape != (n, _RECORD - 1) or n == 0:
        raise DataError(f"{path} has pixels of shape {list(pixels.shape)} and type {pixels.dtype} for {n} labels.")
    if labels.min() < 0 or labels.max() > 9:
        raise DataError(f"{path} has labels from {labels.min()} to {labels.max()}, where 0 to 9 are CIFAR-10's.")
    return pixels.reshape(n, 3, 32, 32), labels


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


class _Arrays(pickle.Unpickler):
    """Loads numpy arrays and nothing else: a pickle may otherwise run any code."""

    allowed: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),  # how protocol 2 writes bytes
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and will not get it")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)

"""What `instead` trains: ten tasks, and two of them in longer runs.

Five tasks are those of `same_training_tasks`, five are of other kinds, and two of these also have a run ten times as
long. Data is made here or comes with Python and scikit-learn. Each task has held-out data and no other: rates are tuned
on it too.
"""

import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from math import inf, log10
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import Optimizer

from anybatch._demo import digits
from benchmarks import same_training_tasks as earlier


@dataclass(frozen=True)
class Task:
    """A task with its optimizers.

    Args:
        label: data, model and optimizer.
        exponent: of the usual rule: the learning rate is multiplied by S to this power.
        lr: a learning rate near the best of scale 1; it is tuned from there.
        base, total: examples of a base batch, base iterations.
        metric: its name; higher is better.
        model: from a seed.
        batch: of a number of micro-batches, their size and a generator: `x [n, size, ...]` and targets `[n, ...]`.
        loss: of logits or outputs and targets, a mean over examples.
        held_out: a model's loss and metric.
        optimizers: of a model and a learning rate.
        clip: largest norm of a gradient.
    """

    label: str
    exponent: float
    lr: float
    base: int
    total: int
    metric: str
    model: Callable[[int], nn.Module]
    batch: Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    held_out: Callable[[nn.Module], tuple[float, float]]
    optimizers: Callable[[nn.Module, float], list[Optimizer]]
    clip: float = inf


# The tasks of same_training.


def _of_earlier(name: str, label: str, *, total: int) -> Task:
    source, task = earlier.SOURCES[name], earlier.TASKS[name]

    @cache
    def test_set() -> tuple[Tensor, Tensor]:
        x, y = source.held_out()
        if not name.startswith("bytes"):
            return x, y
        return x[::6], y.unflatten(0, (len(x), -1))[::6].flatten()  # a sixth of the text's last tenth

    def optimizers(net: nn.Module, lr: float) -> list[Optimizer]:
        return [earlier.OPTIMIZERS[task.family](earlier.trained(net, task.family), lr)]

    def held_out(net: nn.Module) -> tuple[float, float]:
        return _classified(net, *test_set())

    exponent = 1.0 if task.family == "momentum" else 0.5
    return Task(label, exponent, task.lr, source.base, total, "accuracy", source.model, source.batch,
                cross_entropy, held_out, optimizers)  # fmt: skip


def _classified(net: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    logits = net(x)
    return cross_entropy(logits, y).item(), 100 * (logits.argmax(1) == y).double().mean().item()


# A character LSTM on Python's library.


class Lstm(nn.Module):
    """`[batch, CONTEXT]` bytes to logits `[batch * CONTEXT, 128]`."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.token, self.lstm, self.head = nn.Embedding(128, 32), nn.LSTM(32, 64, batch_first=True), nn.Linear(64, 128)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of the next bytes."""
        found: Tensor = self.head(self.lstm(self.token(x))[0])
        return found.flatten(0, 1)


CONTEXT = 24


@cache
def _library() -> Tensor:
    """The modules at the top of Python's library, in the order of their names, as bytes below 128."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    return torch.from_numpy(np.frombuffer(b"".join(f.read_bytes() for f in files), np.uint8) & 127).long()


def _passages(n: int, size: int, order: torch.Generator) -> tuple[Tensor, Tensor]:
    whole = _library()
    start = torch.randint(9 * len(whole) // 10, (n, size), generator=order)
    return _cut(whole, start)


def _cut(whole: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    found = whole[start[..., None] + torch.arange(CONTEXT + 1)]
    return found[..., :-1], found[..., 1:].flatten(start.dim() - 1)


@cache
def _last_passages() -> tuple[Tensor, Tensor]:
    whole = _library()
    return _cut(whole, torch.linspace(0.91 * len(whole), len(whole) - CONTEXT - 1, 256).long())


def _read(net: nn.Module) -> tuple[float, float]:
    return _classified(net, *_last_passages())


# A denoiser on two photographs.

PATCH = 8
NOISE = 0.5  # in standard deviations of a pixel


@cache
def _photographs() -> Tensor:
    """scikit-learn's two photographs in grey, standardised: `[2, 427, 640]`."""
    from sklearn.datasets import load_sample_images

    grey = torch.as_tensor(np.stack(load_sample_images().images)).float().mean(-1)
    return (grey - grey.mean()) / grey.std()


def _patches(picture: Tensor, row: Tensor, column: Tensor) -> Tensor:
    across = torch.arange(PATCH)
    rows, columns = (row[..., None] + across)[..., :, None], (column[..., None] + across)[..., None, :]
    return _photographs()[picture[..., None, None], rows, columns].flatten(-2)


def _noisy(n: int, size: int, order: torch.Generator) -> tuple[Tensor, Tensor]:
    """From the left three quarters; the right is held out."""
    picture, row, column = (
        torch.randint(high, (n, size), generator=order) for high in (2, 427 - PATCH + 1, 480 - PATCH + 1)
    )
    clean = _patches(picture, row, column)
    return clean + NOISE * torch.randn(clean.shape, generator=order), clean


@cache
def _noisy_test() -> tuple[Tensor, Tensor]:
    order = torch.Generator().manual_seed(0)
    picture, row, column = (torch.randint(high, (512,), generator=order) for high in (2, 427 - PATCH + 1, 152))
    clean = _patches(picture, row, column + 480)
    return clean + NOISE * torch.randn(clean.shape, generator=order), clean


def _denoiser(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64))


def _restored(net: nn.Module) -> tuple[float, float]:
    x, y = _noisy_test()
    loss = mse_loss(net(x), y).item()
    return loss, _decibels(loss)


def _decibels(error: float) -> float:
    return -10 * log10(error) if 0 < error < inf else -inf


# A vision transformer on the digits.


class Vit(nn.Module):
    """One layer over 8 patches of 2 x 4; `[batch, 64]` to ten logits."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.patch, self.place = nn.Linear(8, 32), nn.Parameter(0.02 * torch.randn(8, 32))
        self.block = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=True)
        self.last, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        patches = x.view(-1, 4, 2, 2, 4).transpose(2, 3).reshape(-1, 8, 8)
        found: Tensor = self.head(self.last(self.block(self.patch(patches) + self.place)).mean(1))
        return found


def _smoothed(logits: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(logits, y, label_smoothing=0.1)


def _recognised(net: nn.Module) -> tuple[float, float]:
    _, _, x, y = digits()
    logits = net(x)
    return _smoothed(logits, y).item(), 100 * (logits.argmax(1) == y).double().mean().item()


def _muon_and_adamw(net: nn.Module, lr: float) -> list[Optimizer]:
    """Muon for the matrices of the block, AdamW at a tenth of the learning rate for the rest."""
    matrices = [p for name, p in net.named_parameters() if p.dim() == 2 and name.startswith("block")]
    rest = [p for p in net.parameters() if all(p is not other for other in matrices)]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=lr / 10, betas=(0.9, 0.99), weight_decay=0.01),
    ]


# Matrix factorisation with rows and columns drawn by Zipf's law.

USERS, ITEMS, RANK = 500, 300, 8


@cache
def _ratings() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order = torch.Generator().manual_seed(0)
    users, items = (torch.randn(n, RANK, generator=order) for n in (USERS, ITEMS))
    return users, items, 1 / torch.arange(1.0, USERS + 1), 1 / torch.arange(1.0, ITEMS + 1)


def _rated(n: int, size: int, order: torch.Generator) -> tuple[Tensor, Tensor]:
    users, items, *frequencies = _ratings()
    user, item = (torch.multinomial(f, n * size, True, generator=order) for f in frequencies)
    value = (users[user] * items[item]).sum(-1) / RANK**0.5 + 0.3 * torch.randn(n * size, generator=order)
    return torch.stack((user, item), -1).unflatten(0, (n, size)), value.unflatten(0, (n, size))


class Factors(nn.Module):
    """Two tables of vectors; pairs `[batch, 2]` to their products."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.users, self.items = nn.Embedding(USERS, RANK), nn.Embedding(ITEMS, RANK)
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        """The ratings."""
        found: Tensor = (self.users(x[:, 0]) * self.items(x[:, 1])).sum(-1)
        return found


@cache
def _rated_test() -> tuple[Tensor, Tensor]:
    x, y = _rated(1, 4096, torch.Generator().manual_seed(1))
    return x[0], y[0]


def _explained(net: nn.Module) -> tuple[float, float]:
    x, y = _rated_test()
    loss = mse_loss(net(x), y).item()
    return loss, 100 * (1 - loss / y.var().item())


# An autoencoder on the digits.


def _autoencoder(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8), nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64))


def _images(n: int, size: int, order: torch.Generator) -> tuple[Tensor, Tensor]:
    x = digits()[0]
    rows = torch.randint(len(x), (n, size), generator=order)
    return x[rows], x[rows]


def _rebuilt(net: nn.Module) -> tuple[float, float]:
    x = digits()[2]
    loss = mse_loss(net(x), x).item()
    return loss, _decibels(loss)


def _sgd(momentum: float) -> Callable[[nn.Module, float], list[Optimizer]]:
    return lambda net, lr: [torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum)]


def _adam(net: nn.Module, lr: float) -> list[Optimizer]:
    return [torch.optim.Adam(net.parameters(), lr=lr, betas=(0.9, 0.99))]


def _longer(task: Task) -> Task:
    """Ten times as long, with a base batch a tenth as large; the rate starts from that of the usual rule."""
    return replace(
        task, label=f"{task.label}, ten times as long", base=task.base // 10, total=10 * task.total,
        lr=task.lr / 10**task.exponent,
    )  # fmt: skip


_DENOISER = Task("photographs, denoiser, SGD .9", 1.0, 0.1, 20, 1500, "dB", _denoiser, _noisy, mse_loss, _restored,
                 _sgd(0.9))  # fmt: skip
_AUTOENCODER = Task("digits, autoencoder, Adam", 0.5, 2e-3, 20, 1500, "dB", _autoencoder, _images, mse_loss, _rebuilt,
                    _adam)  # fmt: skip
TASKS: dict[str, Task] = {  # the cheap ones first
    "digits-sgd": _of_earlier("digits-sgd", "digits, MLP, SGD .9", total=3000),
    "digits-adamw": _of_earlier("digits-adamw", "digits, MLP, AdamW", total=1500),
    "denoiser": _DENOISER,
    "factors": Task("matrix factorisation, Zipf, Adam", 0.5, 0.01, 32, 1500, "% explained", Factors, _rated, mse_loss,
                    _explained, _adam),
    "autoencoder": _AUTOENCODER,
    "conv-sgd": _of_earlier("conv-sgd", "digits, conv net, SGD .9", total=1500),
    "digits-muon": _of_earlier("digits-muon", "digits, MLP, Muon", total=1500),
    "lstm": Task("Python's library, LSTM, SGD, clipping", 1.0, 4.0, 8, 800, "accuracy", Lstm, _passages, cross_entropy,
                 _read, _sgd(0.0), clip=1.0),
    "vit": Task("digits, ViT, label smoothing, Muon and AdamW", 0.5, 0.02, 8, 600, "accuracy", Vit,
                earlier.SOURCES["digits-adamw"].batch, _smoothed, _recognised, _muon_and_adamw),
    "bytes-adamw": _of_earlier("bytes-adamw", "Python's help, byte GPT, AdamW", total=1000),
    "denoiser-long": _longer(_DENOISER),
    "autoencoder-long": _longer(_AUTOENCODER),
}  # fmt: skip

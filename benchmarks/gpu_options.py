"""What each option synchronises on a GPU, and what works with CUDA graphs; see `benchmarks.gpu`."""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import anybatch
from benchmarks.gpu_models import Place

Row = dict[str, Any]
STEPS = 15  # the last is counted: Adam's metric is measured from the eleventh on
# For each option the optimizer's and attach's arguments, and the reads in a step that docs/overhead.md has.
READS: dict[str, tuple[Row, Row, int]] = {
    "exact": ({}, {}, 1),
    "between measured steps": ({}, {"rule": anybatch.AdaScale(every=1000, smoothing=0.999)}, 0),
    "a fixed rule": ({}, {"rule": anybatch.Linear()}, 0),
    "Adam's metric": ({"fused": True}, {"rule": anybatch.AdaScale(metric="adam")}, 1),
    "a fused optimizer with a GradScaler": ({"fused": True, "scaler": True}, {}, 1),
    "by layer": ({}, {"per_layer": 1}, 1),
    "a tensor learning rate": ({"fused": True, "tensor_lr": True}, {}, 1),
    "a tensor learning rate and a record": ({"fused": True, "tensor_lr": True}, {"per_layer": None}, 2),
}


def reads(place: Place) -> Iterator[Row]:
    """The synchronisations that each option adds to a step."""
    for option, (made, attach, expected) in READS.items():
        with tempfile.TemporaryDirectory() as folder:
            found = [_synchronised(place, made, each, Path(folder)) for each in (None, attach)]
        yield {"option": option, "reads": found[1] - found[0], "expected": expected}


def _small(place: Place) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(200, 200) for _ in range(6))).to(place.device)


def _adamw(model: nn.Module, *, fused: bool = False, tensor_lr: bool = False) -> Optimizer:
    made = AdamW(model.parameters(), lr=1e-3, fused=fused)
    for group in made.param_groups if tensor_lr else ():
        group["lr"] = torch.tensor(group["lr"], device=group["params"][0].device)
    return made


def _synchronised(place: Place, made: Row, attach: Row | None, folder: Path) -> int:
    """Synchronisations of the last step, as torch warns of them."""
    model = _small(place)
    optimizer = _adamw(model, **{name: value for name, value in made.items() if name != "scaler"})
    scaler = torch.amp.GradScaler(place.device.type, enabled="scaler" in made)
    if attach is not None:
        options = {name: value for name, value in attach.items() if name != "per_layer"}
        if "scaler" in made:
            options["grad_scaler"] = scaler
        if "per_layer" in attach:
            options["record"] = anybatch.RunRecord(folder / "run.jsonl", per_layer=attach["per_layer"])
        anybatch.attach(optimizer, model=model, scale="count", total=1e6, **options)
    x = torch.randn(4, 32, 200, device=place.device)

    def step() -> None:
        for each in x:
            scaler.scale(model(each).square().mean() / 4).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    for _ in range(STEPS - 1):
        step()
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        if place.gpu:
            torch.cuda.set_sync_debug_mode("warn")
        step()
        if place.gpu:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(each.message) for each in shown)


def graphs(place: Place) -> Iterator[Row]:
    """What comes of each way to use CUDA graphs."""
    ways: dict[str, Callable[[nn.Module, Tensor], Any]] = {
        'torch.compile(mode="reduce-overhead")': lambda model, _: place.compiled(model, mode="reduce-overhead"),
        "torch.cuda.make_graphed_callables": lambda model, x: torch.cuda.make_graphed_callables(model, (x,)),
    }
    eager = _gains(place, lambda model, _: model)
    for way, wrap in ways.items():
        try:
            gains = _gains(place, wrap)
        except Exception as error:  # what a user would see
            yield {"way": way, "result": _shortly(error)}
        else:
            off = max(abs(a / b - 1) for a, b in zip(gains, eager, strict=True))
            yield {"way": way, "result": f"the gains differ from the eager ones by at most {off:.1e}"}
    yield {"way": "a backward captured by torch.cuda.graph", "result": _captured(place)}


def _gains(place: Place, wrap: Callable[[nn.Module, Tensor], Any], steps: int = 8) -> list[float]:
    model = _small(place)
    x = torch.randn(steps, 4, 32, 200, generator=torch.Generator().manual_seed(1)).to(place.device)
    optimizer = SGD(model.parameters(), lr=1e-2, momentum=0.9)
    controller = anybatch.attach(optimizer, model=model, scale="count", total=1e6)
    net, gains = wrap(model, x[0, 0]), []
    for window in x:
        for each in window:
            (net(each).square().mean() / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
        gains.append(controller.gain)
    return gains


def _captured(place: Place) -> str:
    model = _small(place)
    anybatch.attach(SGD(model.parameters(), lr=1e-2), model=model, scale="count")
    x = torch.randn(32, 200, device=place.device)
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            model(x).square().mean().backward()
    except anybatch.UnsupportedError:
        return "an UnsupportedError, as documented"
    except Exception as error:  # what a user would see
        return _shortly(error)
    return "no error"


def _shortly(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:200]}"

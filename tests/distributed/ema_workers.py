"""What the processes of test_ema_sharded.py do."""

import io
import warnings
from unittest import mock

import oracle
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP

import anybatch
from distributed.fsdp_workers import shard

DECAYS = (0.9, 0.99)
OPTIONS = {"update_every": 2, "warmup": True, "average_statistics": True}


def make(kind, world, *, seed=0):
    """The oracle's model with batch norm in between; rows that two ranks cannot share evenly."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    if kind == "fsdp":
        return shard(model, mesh=init_device_mesh("cpu", (world,)))
    return DDP(model) if kind == "ddp" else model


def whole(tensor):
    return tensor.full_tensor().detach().clone() if isinstance(tensor, DTensor) else tensor.detach().clone()


def shift(model, t):
    """The same move of the weights for every engine, on whole tensors."""
    for i, p in enumerate(model.parameters()):
        g = torch.Generator().manual_seed(100 * t + i)
        move = torch.randn(p.shape, generator=g, dtype=torch.float64)
        with torch.no_grad():
            if isinstance(p, DTensor):
                move = distribute_tensor(move, p.device_mesh, p.placements, src_data_rank=None)
            p.add_(move)


def numbers(ema):
    state = ema.state_dict()
    found = {k: v for k, v in state.items() if not isinstance(v, dict)}
    return found | {k: {n: whole(a) for n, a in v.items()} for k, v in state.items() if isinstance(v, dict)}


def train(model, ema, steps):
    for t in steps:
        shift(model, t)
        ema.update(1.5)


def save(rank, kind, world, path):
    """Train three steps, save through dcp and go on: the averages when saved and in the end."""
    warnings.simplefilter("ignore")
    model = make(kind, world)
    ema = anybatch.ModelEMA(model, DECAYS, **OPTIONS)
    train(model, ema, range(3))
    with mock.patch.object(DTensor, "full_tensor", side_effect=AssertionError("gathered")):
        dcp.save({"ema": ema}, checkpoint_id=path)
    saved = numbers(ema)
    train(model, ema, range(3, 6))
    return saved, numbers(ema)


def load(rank, kind, world, path):
    """Load what `save` has written in another world and go on: the averages when loaded and in the end."""
    warnings.simplefilter("ignore")
    model = make(kind, world)
    for t in range(3):
        shift(model, t)
    ema = anybatch.ModelEMA(model, DECAYS, **OPTIONS)
    with mock.patch.object(DTensor, "full_tensor", side_effect=AssertionError("gathered")):
        dcp.load({"ema": ema}, checkpoint_id=path)
    loaded = numbers(ema)
    train(model, ema, range(3, 6))
    return loaded, numbers(ema)


def shards(rank, world):
    """Shards are DTensors that share the averages' memory; whole tensors and other libraries' states are split."""
    warnings.simplefilter("ignore")
    model = make("fsdp", world)
    ema = anybatch.ModelEMA(model, 0.9)
    shift(model, 0)
    ema.update()
    state = ema.state_dict()["averages"]
    out = {}
    out["local"] = {n: (tuple(a.to_local().shape), tuple(a.shape)) for n, a in state.items()}
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    fresh = anybatch.ModelEMA(make("fsdp", world, seed=1), 0.9)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    out["through weights_only"] = all(
        torch.equal(a.to_local(), b.to_local())
        for a, b in zip(state.values(), fresh.state_dict()["averages"].values(), strict=True)
    )
    out["names under DDP"] = list(anybatch.ModelEMA(make("ddp", world), 0.9).state_dict()["averages"])
    plain = make("plain", world, seed=2)
    fresh.load_state_dict(anybatch.ModelEMA(plain, 0.9).state_dict())
    out["of whole tensors"] = all(map(torch.equal, numbers(fresh)["averages"].values(), plain.parameters()))
    theirs = make("plain", world, seed=3)
    imported = torch.optim.swa_utils.AveragedModel(theirs).state_dict()
    fresh.load_state_dict(anybatch.ema_state_from(imported, ema=fresh))
    out["imported"] = all(map(torch.equal, numbers(fresh)["averages"].values(), theirs.parameters()))
    listed = {"shadow_params": list(plain.parameters()), "num_updates": 3}
    fresh.load_state_dict(anybatch.ema_state_from(listed, ema=fresh))
    out["listed"] = all(map(torch.equal, numbers(fresh)["averages"].values(), plain.parameters()))
    try:
        anybatch.ModelEMA(plain, 0.9).load_state_dict(ema.state_dict())
    except anybatch.StateError as error:
        out["into a plain model"] = str(error)
    return out


def gathered_parameters(rank, world):
    """FSDP2 keeps the root's parameters gathered after a forward alone: what is written to the shards must be used."""
    warnings.simplefilter("ignore")
    x, _ = oracle.micro_batch(0, 0)
    mesh = init_device_mesh("cpu", (world,))
    outcome = {}
    for keep, early in ((True, True), (True, False), (False, True)):
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        torch.manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                p.normal_()
        fully_shard(model, mesh=mesh, reshard_after_forward=not keep)

        def forward(model=model):
            with torch.no_grad():
                return model(x).clone()

        early_ema = anybatch.ModelEMA(model, 0.5)
        own = forward()  # the parameters stay gathered
        ema = early_ema if early else anybatch.ModelEMA(model, 0.5)  # made in that state
        names = set(ema.state_dict()["averages"])
        model.reshard()
        shift(model, 1)
        moved = forward()
        ema.update()  # in that state, too
        plain = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        plain.load_state_dict({n: whole(a) for n, a in ema.state_dict()["averages"].items()})
        with ema.applied():
            inside = forward()
            with ema.withdrawn():
                withdrawn = forward()
            again = forward()
        after = forward()
        outcome[keep, early] = {
            "names": sorted(names),
            "shards": all(isinstance(a, DTensor) for a in ema.state_dict()["averages"].values()),
            "moved": not torch.allclose(own, moved),
            "inside": torch.allclose(inside, plain(x).detach()) and torch.equal(inside, again),
            "after": torch.equal(after, moved) and torch.equal(withdrawn, moved),
        }
    return outcome


def sharded_too_late(rank, world):
    warnings.simplefilter("ignore")
    model = make("plain", world)
    ema = anybatch.ModelEMA(model, 0.5)
    shard(model, mesh=init_device_mesh("cpu", (world,)))
    messages = []
    for act in (ema.update, lambda: ema.applied().__enter__()):
        try:
            act()
        except anybatch.UsageError as error:
            messages.append(str(error))
    return messages

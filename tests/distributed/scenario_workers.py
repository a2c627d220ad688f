"""What the processes of the random trainings do: every scenario of one engine, one after the other."""

import warnings

import scenarios
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP


def ddp(net, scenario):
    unused = net.branch is not None or net.never is not None
    return DDP(net, find_unused_parameters=unused, gradient_as_bucket_view=scenario.bucket_view)


def fsdp2(net, scenario):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in net.children() if scenario.by_layer else ():
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def training(rank, engine, scenario):
    """What a scenario came to on this rank."""
    warnings.simplefilter("ignore")
    return scenarios.run(scenario, wrap={"DDP": ddp, "FSDP2": fsdp2}[engine], rank=rank)


def trainings(rank, engine, seeds):
    """What each seed's scenario came to."""
    found = {}
    for seed in seeds:
        try:
            found[seed] = training(rank, engine, scenarios.draw(seed, engine=engine, world=2))
        except Exception as error:
            error.add_note(f"{engine}, seed {seed}, rank {rank}")
            raise
    return found

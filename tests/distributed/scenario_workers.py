"""What the processes of the random trainings do: every scenario of one engine, one after the other."""

import warnings

import scenarios
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import anybatch


def ddp(net, scenario):
    unused = net.branch is not None or net.never is not None
    return DDP(net, find_unused_parameters=unused, gradient_as_bucket_view=scenario.bucket_view)


def fsdp2(net, scenario):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in net.children() if scenario.by_layer else ():
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def trainings(rank, engine, cases):
    """What each of the scenarios came to on this rank, or the library's error, which comes on all ranks alike."""
    warnings.simplefilter("ignore")
    found = {}
    for name, scenario in cases.items():
        try:
            found[name] = scenarios.run(scenario, wrap={"DDP": ddp, "FSDP2": fsdp2}[engine], rank=rank)
        except anybatch.AnybatchError as error:
            found[name] = repr(error)
    return found

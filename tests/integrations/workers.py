"""What each process of a test in this folder does."""

import torch
from torch.nn.parallel import DistributedDataParallel

import anybatch
from anybatch.integrations.fairscale import AdaScale


def fairscale(rank, golden):
    """Each case's last gain, read before the step; tau of the first case; what is said without the model."""
    gains, taus = [], []
    for steps, _ in golden:
        model = DistributedDataParallel(torch.nn.Linear(2, 2))
        optim = AdaScale(torch.optim.SGD(model.parameters(), lr=0.1), world_size=2, model=model)
        for inputs in steps:
            model(torch.tensor(inputs[rank])).sum().backward()
            gain = optim.gain()
            optim.step()
            optim.zero_grad()
        gains.append(gain)
        taus.append(optim.controller.tau)
        optim.unhook()
    try:
        AdaScale(torch.optim.SGD(model.parameters(), lr=0.1))
    except anybatch.UsageError as error:
        refused = str(error)
    return gains, taus[0], refused

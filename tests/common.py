"""What the tests of accumulation and of DDP share: the oracle's task, given to the library."""

import oracle
import torch

import anybatch


def attach_task(model, *, sample=1.0, **options):
    """The optimizer and schedule of `oracle.adascale` with a controller; a micro-batch is `sample` base batches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=oracle.LR, momentum=oracle.MOMENTUM)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=int(oracle.TOTAL))
    controller = anybatch.attach(
        optimizer, model=model, scheduler=scheduler, total=oracle.TOTAL, base_batch=4 / sample, micro_batch=4, **options
    )
    return optimizer, controller

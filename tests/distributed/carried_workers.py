"""The oracle's task from a checkpoint that nobody told of a controller."""

import oracle
import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import anybatch


def run(*, wrap=lambda model: model, total=oracle.TOTAL, base_batch=4):
    model = oracle.make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=oracle.LR, momentum=oracle.MOMENTUM)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: oracle.cosine(i) / oracle.LR)
    controller = anybatch.attach(
        optimizer,
        model=wrap(model),
        scheduler=scheduler,
        total=total,
        base_batch=base_batch,
        micro_batch=4,
    )
    return model, optimizer, scheduler, controller


def train(model, optimizer, scheduler, controller, steps, *, start=0, n=2):
    for t in range(start, start + steps):
        for i in range(n):
            x, y = oracle.micro_batch(t, i)
            (oracle.loss_fn(model(x), y) / n).backward()
        optimizer.step()
        optimizer.zero_grad()


def resume(rank, path):
    """One step of two micro-batches a rank, from the checkpoint of one process with two in all."""
    ddp = []
    model, optimizer, scheduler, controller = run(wrap=lambda model: ddp.append(DDP(model)) or ddp[0])
    saved = torch.load(path, weights_only=True)
    for part, name in ((model, "model"), (optimizer, "optimizer"), (scheduler, "scheduler")):
        part.load_state_dict(saved[name])
    state = controller.state_dict()
    for i in range(2):
        x, y = oracle.micro_batch(7, 2 * rank + i)
        with ddp[0].no_sync() if i == 0 else torch.enable_grad():
            (oracle.loss_fn(ddp[0](x), y) / 2).backward()
    optimizer.step()
    return {"state": state, "tau": controller.tau, "scale": controller.scale, "lr": controller.base_lr}

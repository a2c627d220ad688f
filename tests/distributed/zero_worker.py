"""What the processes of test_zero do. In a module of its own, so that spawned processes can import it."""

import oracle
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import anybatch

CLASSES = {
    "SGD": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}, "auto"),
    "SGD on the clock": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}, "clock"),
    "AdamW": (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}, "auto"),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.01}, "auto"),
}


def train(rank, *, zero, cls, options, decays, tensor_lr, by_closure=False, steps=6):
    """Two accumulated micro-batches a rank; halfway the states are handed to a new optimizer and controller."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # its import warns of torch.jit

    model = DDP(oracle.make_model())

    def build():
        kwargs = {**options, "lr": torch.tensor(options["lr"], dtype=torch.float64) if tensor_lr else options["lr"]}
        parameters = [{"params": list(part.parameters())} for part in (model.module[0], model.module[2])]
        optimizer = ZeroRedundancyOptimizer(parameters, cls, **kwargs) if zero else cls(parameters, **kwargs)
        rule = anybatch.AdaScale(decays=decays, smoothing=0.5)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        controller = anybatch.attach(optimizer, model=model, scale="count", rule=rule, scheduler=scheduler)
        return optimizer, scheduler, controller

    def closure():
        optimizer.zero_grad()
        for a in range(2):
            x, y = oracle.micro_batch(t, 2 * rank + a)
            (oracle.loss_fn(model(x), y) / 2).backward()

    optimizer, scheduler, controller = build()
    gains, rates = [], []
    for t in range(steps):
        if t == steps // 2:
            state = [scheduler.state_dict(), controller.state_dict()]
            if zero:
                optimizer.consolidate_state_dict(to=0)
            saved = [optimizer.state_dict() if rank == 0 or not zero else None]
            dist.broadcast_object_list(saved, src=0)
            optimizer, scheduler, controller = build()
            optimizer.load_state_dict(saved[0])
            scheduler.load_state_dict(state[0])
            controller.load_state_dict(state[1])
        if by_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        gains.append(controller.gain)
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
    inner = optimizer.optim if zero else optimizer
    counters = [float(s["step"]) for s in inner.state.values() if "step" in s]
    return {
        "gains": gains,
        "tau": controller.tau,
        "rates": rates,
        "counters": counters,
        "parameters": [p.detach() for p in model.parameters()],
    }


def parity(rank):
    results = {}
    for name, (cls, options, decays) in CLASSES.items():
        for tensor_lr, by_closure in ((False, False), (True, False), (False, True)):
            case = {"cls": cls, "options": options, "decays": decays, "tensor_lr": tensor_lr, "by_closure": by_closure}
            results[name, tensor_lr, by_closure] = [train(rank, zero=zero, **case) for zero in (False, True)]
    return results


def refusals(rank):
    """The messages of what attach refuses."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DDP(oracle.make_model())
    messages = []
    for cls, options in ((torch.optim.ASGD, {}), (torch.optim.SGD, {"overlap_with_ddp": True})):
        optimizer = ZeroRedundancyOptimizer(model.parameters(), cls, lr=0.1, **options)
        try:
            anybatch.attach(optimizer, model=model, scale="count")
        except anybatch.UnsupportedError as error:
            messages.append(str(error))
    return messages

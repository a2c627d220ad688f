"""Training by Lightning, on one process or several. In a module of its own, so that processes can import it."""

import contextlib

import oracle
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from anybatch.integrations.lightning import AnyBatch
from integrations import task


class Module(LightningModule):
    """The oracle's task, as one writes it without anybatch."""

    def __init__(self, *, lr=oracle.LR, momentum=oracle.MOMENTUM, interval="step", frequency=1, make=None):
        super().__init__()
        self.net = oracle.make_model()
        self.lr, self.momentum, self.interval, self.frequency, self.make = lr, momentum, interval, frequency, make
        self.asked, self.evaluated = None, []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        x, y = batch
        return oracle.loss_fn(self(x), y)

    def validation_step(self, batch, _):
        self.evaluated.append([p.detach().clone() for p in self.parameters()])
        self.log("loss", oracle.loss_fn(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        self.asked = self.trainer.estimated_stepping_batches
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)
        scheduler = task.scheduler_of(optimizer, self.asked) if self.make is None else self.make(optimizer)
        moves = {"scheduler": scheduler, "interval": self.interval, "frequency": self.frequency}
        return {"optimizer": optimizer, "lr_scheduler": moves}


class Tracing(Callback):
    """Notes gains and clock, and can stop a run as a kill would: after its checkpoint."""

    def __init__(self, adapter, *, kill=None, path=None):
        self.adapter, self.kill, self.path = adapter, kill, path

    def on_train_start(self, trainer, pl_module):
        self.trace = task.Trace(self.adapter.controller)
        self.first = self.adapter.controller.tau

    def on_train_batch_end(self, trainer, *_):
        if self.kill == self.adapter.controller.steps:
            trainer.save_checkpoint(self.path)
            raise Killed


class Killed(Exception):
    pass


def trainer_of(*callbacks, world=1, accumulation=task.MICRO_BATCHES, **options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "use_distributed_sampler": False,
        "strategy": "ddp" if world > 1 else "auto",
    }
    limits = {} if "max_epochs" in options else {"max_steps": task.TOTAL}
    return Trainer(
        accelerator="cpu",
        devices=world,
        callbacks=list(callbacks),
        accumulate_grad_batches=accumulation,
        **{**quiet, **limits, **options},
    )


def train(rank=0, world=1, *, accumulation=None, module=None, kill=None, path=None, resume=None, **options):
    """Until the run is over, or killed after so many steps."""
    task.as_launched(rank, world)
    adapter = AnyBatch(base_batch=task.SIZE)
    tracing = Tracing(adapter, kill=kill, path=path)
    module = module or Module()
    trainer = trainer_of(
        adapter, tracing, world=world, accumulation=accumulation or task.MICRO_BATCHES // world, **options
    )
    with contextlib.suppress(Killed):
        first = task.SEEN if resume else 0
        trainer.fit(module, task.loader(rank, world, first=first), ckpt_path=resume)
    return {
        **task.outcome(tracing.trace, module, trainer.optimizers[0]),
        "first": tracing.first,
        "asked": module.asked,
    }


class Sharded(Module):
    """The same under Lightning's FSDP2."""

    def configure_model(self):
        for part in (self.net[0], self.net[2], self.net):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


def sharded(rank, world, **options):
    """Weights are gathered, as each rank has a shard of them."""
    task.as_launched(rank, world)
    strategy = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1, process_group_backend="gloo")
    found = train(rank, world, module=Sharded(), strategy=strategy, **options)
    return {**found, "weights": [p.full_tensor() for p in found["weights"]]}


def all_of(rank, world, path):
    """Everything that two processes are asked."""
    return {
        "parity": train(rank, world),
        "clipped": train(rank, world, gradient_clip_val=0.5),
        "resumed": train(rank, world, accumulation=2, resume=path),
        "sharded": sharded(rank, world),
        "sharded, killed": sharded(rank, world, accumulation=1, kill=task.KILLED, path=path.parent / "shards"),
        "sharded, resumed": sharded(rank, world, accumulation=2, resume=path.parent / "shards"),
    }

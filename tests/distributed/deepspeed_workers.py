"""What the ranks of `test_deepspeed` do, and the plain loop of one process that they are compared with."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import contextlib
import functools
import logging
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import anybatch

A, SIZE, STEPS, LR, TOTAL, DECAY = 2, 4, 4, 0.05, 60, 0.9
FEW = 1000  # bytes of a bucket: several reductions a backward
# Warnings that DeepSpeed causes itself; all others are errors.
WARNINGS = (
    ("`torch.jit.script_method` is deprecated", DeprecationWarning),
    ("`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated", FutureWarning),
)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3))


def data(step, number):
    g = torch.Generator().manual_seed(1000 * step + number)
    return torch.randn(SIZE, 8, generator=g, dtype=torch.float64)


def loss_of(output):
    return (output - 1).square().mean() + output.sin().mean()


def plain(ranks, *, clip=None, momentum=0.0, clock=False, rates=(LR,)):
    """A float64 loop over the micro-batches of all ranks, which is given the gain of each step.

    Returns the model, its averages, and the function that takes a step and returns its moments.
    """
    net = model().double()
    parameters = list(net.parameters())
    averages = [p.detach().clone() for p in parameters]
    buffers = [torch.zeros_like(p) for p in parameters]

    def step(t, gain, lr=1.0):
        each = [
            torch.autograd.grad(loss_of(net(data(t, A * rank + i))), parameters)
            for rank in range(ranks)
            for i in range(A)
        ]
        n = len(each)
        mean = [sum(g) / n for g in zip(*each)]
        square = sum(float(g.square().sum()) for g in mean)
        spread = sum(float((a - b).square().sum()) for grads in each for a, b in zip(grads, mean)) / (n - 1)
        factor = min(1.0, clip / (square**0.5 + 1e-6)) if clip else 1.0
        with torch.no_grad():
            for i, (p, g, b) in enumerate(zip(parameters, mean, buffers)):
                decay = momentum**gain if clock else momentum
                b.mul_(decay).add_(g, alpha=factor * (1 - decay) / (1 - momentum))
                p -= lr * rates[i % len(rates)] * gain * b
            for average, p in zip(averages, parameters):
                average.lerp_(p, 1 - DECAY**gain)
        return spread, square - spread / n, n

    return net, averages, step


def config_of(case, stage):
    zero = {"stage": stage, "reduce_bucket_size": FEW, "allgather_bucket_size": FEW, **case.get("zero", {})}
    if stage == 3:
        zero |= {"sub_group_size": case.get("sub_group_size", 10**6), "stage3_param_persistence_threshold": 0}
        zero |= case.get("zero", {})
    return {
        "train_micro_batch_size_per_gpu": SIZE,
        "gradient_accumulation_steps": A,
        "gradient_clipping": case.get("clip", 0.0),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "zero_optimization": zero,
        **case.get("config", {}),
    }


def prepare(rank):
    """DeepSpeed, with the group of the ranks that the test has made."""
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(dist.get_world_size())}
    warnings.simplefilter("error")
    for text, category in WARNINGS:
        warnings.filterwarnings("ignore", text, category)
    import deepspeed

    deepspeed.comm.torch.build_shm_op = lambda: None  # a faster all-reduce, which a compiler would build
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed("gloo", verbose=False)
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True  # torch has it for these few operators
    return deepspeed


def train(rank, cases):
    """Each case on this rank: the numbers of its steps and its weights, or its error."""
    deepspeed, found = prepare(rank), {}
    for name, case in cases.items():
        try:
            found[name] = globals()[case.get("loop", "run")](deepspeed, rank, case)
        except (anybatch.UnsupportedError, anybatch.UsageError, anybatch.InvalidValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
        except BaseException as error:
            error.add_note(f"In the case {name!r}.")
            raise
    return found


def optimizer_of(case, net):
    rates, parameters = case.get("rates", (LR,)), list(net.parameters())
    groups = [{"params": parameters[i :: len(rates)], "lr": rate} for i, rate in enumerate(rates)]
    return torch.optim.SGD(groups, momentum=case.get("momentum", 0.0))


def start(deepspeed, case, *, checkpoint=None):
    """The engine of a case, its controller, the model, and the average of its weights."""
    net = model()
    base = optimizer_of(case, net)
    scheduler = torch.optim.lr_scheduler.StepLR(base, 1, case["gamma"]) if "gamma" in case else None
    engine, optimizer, _, scheduler = deepspeed.initialize(
        model=net, optimizer=base, lr_scheduler=scheduler, config=config_of(case, case["stage"])
    )
    if checkpoint is not None:
        engine.load_checkpoint(checkpoint, tag="one")
    for path, value in case.get("set", {}).items():  # settings that this machine cannot run
        *names, last = path.split(".")
        setattr(functools.reduce(getattr, names, engine), last, value)
    for name in case.get("without", ()):  # as in a version that has renamed it
        del vars(engine)[name]
    if case.get("other"):
        optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    options = {"base_batch": SIZE, "micro_batch": SIZE, "total": TOTAL, **case.get("options", {})}
    if case.get("by_layer") and dist.get_rank() == 0:
        options["record"] = anybatch.RunRecord(Path(tempfile.mkdtemp()) / "run.jsonl", per_layer=1)
    if "record" in case and dist.get_rank() == 0:
        options["record"] = case["record"]
    controller = anybatch.attach(optimizer, model=engine, scheduler=scheduler, **options)
    ema = anybatch.ModelEMA(net, DECAY, clock=controller.clock) if case.get("ema") else None
    return engine, controller, net, ema


def backward(engine, case, x):
    """The backward of one micro-batch, and the engine's step."""
    loss = loss_of(engine(x).float())
    if case.get("torch_style"):
        engine.scale(loss).backward()
    else:
        engine.backward(loss)


def run(deepspeed, rank, case):
    """The steps of one run, the weights and averages at its end, and whether `detach` leaves the engine as it was."""
    begun = time.perf_counter()
    engine, controller, net, ema = start(deepspeed, case)
    steps = []
    for t in range(case.get("steps", STEPS)):
        steps.append(step(engine, controller, net, rank, t, case))
        if t == case.get("save"):
            engine, controller, net, ema = resumed(deepspeed, engine, controller, case)
    result = {"steps": steps, "weights": whole(deepspeed, net), "parameters": controller.state_dict()["parameters"]}
    if ema is not None:
        result["averages"] = [average.clone() for average in averages_of(ema, net)]
    if "gamma" in case:
        result["held"] = type(engine.lr_scheduler).__name__
    controller.detach()
    result["left"] = "_take_model_step" in vars(engine), type(engine.lr_scheduler).__name__
    engine.destroy()
    result["seconds"] = time.perf_counter() - begun
    return result


def step(engine, controller, net, rank, t, case):
    """The numbers of one step."""
    dtype, seen, peeked = next(net.parameters()).dtype, controller.steps + controller.skipped, None
    reductions, reduce = [0], dist.all_reduce

    def counted(tensor, *args, **kwargs):
        reductions[0] += tensor.dtype == torch.float64 and tensor.numel() > 1  # the engine has none like that
        return reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        for i in range(A):
            x = data(t, A * rank + i).to(dtype)
            backward(engine, case, x * float("inf") if case.get("infinite") == (t, rank, i) else x)
            if case.get("peek") == i:
                peeked = controller.peek()
            if not case.get("unmanaged") or i == A - 1:
                engine.step()
    finally:
        dist.all_reduce = reduce
    assert controller.steps + controller.skipped == seen + 1
    assert peeked is None or controller.gain == peeked
    raw = controller._run.last.raw
    return {
        "moments": (raw.variance, raw.sqnorm),
        "gain": controller.gain,
        "tau": controller.tau,
        "count": controller.count,
        "skipped": controller.skipped,
        "lr": engine.get_lr()[0],
        "norm": float(engine.get_global_grad_norm() or 0),
        "reductions": reductions[0],
    }


def resumed(deepspeed, engine, controller, case):
    """Another engine that continues from this one's checkpoint, which is loaded after `attach` or before it."""
    folder = shared_folder()
    engine.save_checkpoint(folder, tag="one")
    controller.detach()
    engine.destroy()
    before = folder if case["resume"] == "before attach" else None
    found = start(deepspeed, case, checkpoint=before)
    if before is None:
        found[0].load_checkpoint(folder, tag="one")
    return found


def shared_folder():
    """A folder that rank 0 makes for all ranks."""
    found = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]


def averages_of(ema, net):
    with ema.applied():
        return [p.detach().clone() for p in net.parameters()]


def whole(deepspeed, net):
    with deepspeed.zero.GatheredParameters(list(net.parameters())):
        return [p.detach().float().clone() for p in net.parameters()]


def checked(deepspeed, rank, case):
    """`anybatch.check` of an engine."""
    engine, controller, net, _ = start(deepspeed, case)
    controller.detach()
    return anybatch.check(lambda *_: None, model=engine, optimizer=engine.basic_optimizer, batch=data(0, 0))


def accelerated(deepspeed, rank, case):
    """The loop of Accelerate with its DeepSpeed plugin."""
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    plugin = DeepSpeedPlugin(hf_ds_config=config_of(case, case["stage"]))
    accelerator = Accelerator(cpu=True, deepspeed_plugin=plugin, gradient_accumulation_steps=A)
    net = model()
    optimizer = optimizer_of(case, net)
    loader = torch.utils.data.DataLoader(torch.zeros(8), batch_size=1)
    engine, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    controller = anybatch.attach(optimizer, model=engine, base_batch=SIZE, micro_batch=SIZE, total=TOTAL)
    steps = []
    for t in range(STEPS):
        for i in range(A):
            with accelerator.accumulate(engine):
                accelerator.backward(loss_of(engine(data(t, A * rank + i).float())))
                optimizer.step()
                optimizer.zero_grad()
        raw = controller._run.last.raw
        steps.append({"moments": (raw.variance, raw.sqnorm), "gain": controller.gain, "tau": controller.tau})
        steps[-1] |= {"count": controller.count, "skipped": controller.skipped}
    controller.detach()
    return {"steps": steps, "weights": whole(deepspeed, net)}


class Stream(torch.utils.data.IterableDataset):
    """The examples of all micro-batches, each step's first ones of both ranks first."""

    def __iter__(self):
        for t in range(TOTAL):
            for i in range(A):
                for rank in range(dist.get_world_size()):
                    yield from ({"x": row.float()} for row in data(t, A * rank + i))


class Wrapped(nn.Module):
    """The model as the Trainer calls it."""

    def __init__(self):
        super().__init__()
        self.net = model()

    def forward(self, x):
        return {"loss": loss_of(self.net(x))}


def trainer(deepspeed, rank, case):
    """The Trainer with a DeepSpeed config, killed after its second step, and another that resumes from there."""
    from transformers import TrainerCallback

    folder, steps = shared_folder(), []

    class Noted(TrainerCallback):
        def __init__(self, adapter, stop):
            self.adapter, self.stop = adapter, stop

        def on_step_end(self, args, state, control, **_):
            controller = self.adapter.controller
            raw = controller._run.last.raw
            steps.append({"moments": (raw.variance, raw.sqnorm), "gain": controller.gain, "tau": controller.tau})
            steps[-1] |= {"count": controller.count, "skipped": controller.skipped}
            control.should_save = len(steps) == self.stop

        def on_save(self, args, state, control, **_):
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        trainer_of(folder, case, lambda adapter: Noted(adapter, 2)).train()
    dist.barrier()  # rank 0 has written the checkpoint
    again = trainer_of(folder, case, lambda adapter: Noted(adapter, 0))
    again.train(resume_from_checkpoint=True)
    return {"steps": steps, "weights": whole(deepspeed, again.model.net), "end": again.state.global_step}


def trainer_of(folder, case, noted):
    from accelerate.state import AcceleratorState, GradientState
    from transformers import Trainer, TrainingArguments

    from anybatch.integrations.transformers import attach

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    net = Wrapped()
    arguments = TrainingArguments(
        folder, use_cpu=True, max_steps=5, per_device_train_batch_size=SIZE, gradient_accumulation_steps=A,
        max_grad_norm=0.0, lr_scheduler_type="constant", learning_rate=LR, logging_strategy="no", save_strategy="no",
        report_to="none", disable_tqdm=True, dataloader_pin_memory=False, remove_unused_columns=False,
        deepspeed=config_of(case, case["stage"]), optim="sgd", weight_decay=0.0,
    )  # fmt: skip
    found = Trainer(net, arguments, train_dataset=Stream())  # with DeepSpeed it would drop an optimizer given here
    found.add_callback(noted(attach(found, base_batch=SIZE)))
    return found

"""Two pretended GPUs: tensors on `cuda:0` and `cuda:1` whose entries are those of CPU tensors.

Torch's own autograd engine runs, with its device threads, streams and callbacks (`guard.cpp`). A `Machine` refuses what
a GPU refuses and counts what it costs:

    a mix of devices              raises, as on a GPU
    a read by the host            is noted, with the line of anybatch that made it
    a launch                      is counted; see `launches`
    an asynchronous copy          is done when its stream is synchronised, and leaves nan until then
    a tensor freed early          is noted: another stream than the one it was made on may still read it

Not pretended: time, NCCL, graphs, what a kernel rounds otherwise. `Machine(meta=True)` has shapes and no entries.
"""

import ctypes
import sys
import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil, nan

from pretended import build

GUARD = ctypes.CDLL(str(build.guard()), mode=ctypes.RTLD_GLOBAL)  # before torch starts autograd's threads
GUARD.pretended_stream.restype = ctypes.c_int64
GUARD.pretended_set_stream.argtypes = [ctypes.c_int, ctypes.c_int64]

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
_READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique", "is_nonzero")
_COPIES = ("copy_", "_to_copy", "_foreach_copy_")
_VIEWS = ("detach", "alias", "lift_fresh")
# Entries of a chunk, chunks of a launch, and tensors of a launch by the number of lists: torch's MultiTensorApply.cuh.
_CHUNK, _CHUNKS, _TENSORS = 65536, 320, {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_INPUTS = 128  # tensors that one launch concatenates: CAT_ARRAY_BATCH_SIZE


@dataclass
class Log:
    """What a part of a training did."""

    launches: int = 0
    operations: Counter = field(default_factory=Counter)
    reads: list = field(default_factory=list)  # of the host, which synchronise: the operation and the line of anybatch
    hazards: list = field(default_factory=list)

    @property
    def own_reads(self):
        """The lines of anybatch that read, each as often as it did."""
        return [line for _, line in self.reads if line]


class Machine:
    """The devices of one training."""

    def __init__(self, *, meta=False):
        self.meta = meta
        self.log = Log()
        self._pending = []  # asynchronous copies to the host: their stream, target and entries
        self._owners = {}  # of each memory that is alive
        self._clock = 0
        self._synchronised = {}  # for each device, the clock at its last synchronisation

    def take(self):
        """The log since the last call."""
        found, self.log = self.log, Log()
        return found

    def put(self, tensor, device=CUDA):
        """`tensor` on the device."""
        return Pretended(tensor.to("meta") if self.meta else tensor.clone(), torch.device(device), self)

    def move(self, model, device=CUDA):
        """`model`, with its parameters and buffers on the device."""
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    made = self.put(p.detach(), device)
                    module._parameters[name] = nn.Parameter(made, requires_grad=p.requires_grad)
            for name, b in module._buffers.items():
                module._buffers[name] = None if b is None else self.put(b, device)
        return model

    # ---- what happens on a device ----

    def run(self, func, args, kwargs):
        """One operation of the dispatcher."""
        name = str(func).removeprefix("aten.").split(".")[0]
        leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        mine = [t for t in leaves if isinstance(t, Pretended)]
        self._check_devices(name, leaves, mine)
        if name == "record_stream":
            return self._owner(args[0]).recorded.add(args[1].stream_id)
        target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        to_host = target is not None and target.type == "cpu"
        device = mine[0].device if mine else None
        if target is not None:
            device = torch.device("cuda", target.index or 0) if target.type == "cuda" else None
            kwargs = {**kwargs, "device": torch.device("cpu" if device is None or not self.meta else "meta")}
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
        if mine:
            found = self._crossing(name, args, kwargs, mine, to_host=to_host)
            if found is not NotImplemented:
                return found
        out = func(*tree_map(_entries, args), **tree_map(_entries, kwargs))
        if device is None:
            return out
        view = func.is_view or name in _VIEWS
        if not view:
            self.log.operations[name] += 1
            self.log.launches += launches(name, args, kwargs)
        known = {id(t.entries): t for t in mine}

        def wrapped(value):
            if not isinstance(value, torch.Tensor):
                return value
            return known[id(value)] if id(value) in known else Pretended(value, device, self)

        made = tree_map(wrapped, out)
        if not view:
            self._use([*mine, *(t for t in tree_leaves(made) if isinstance(t, Pretended))])
        _raise_versions(func, args, kwargs)
        return made

    def _check_devices(self, name, leaves, mine):
        on_host = [t for t in leaves if not isinstance(t, Pretended) and t.dim() > 0]
        several = len({t.device for t in mine}) > 1
        if mine and (on_host or several) and name not in _COPIES:
            found = [(str(t.device), tuple(t.shape)) for t in leaves]
            raise RuntimeError(f"Expected all tensors to be on the same device: {name} {found}")

    def _crossing(self, name, args, kwargs, mine, *, to_host):
        """A read or a copy between host and device; `NotImplemented` for another operation."""
        if name in _READS:
            self.read(name, mine[0].device)
            return 1.0 if self.meta else NotImplemented
        if name == "_to_copy" and to_host:
            self.read(name, mine[0].device)
            if self.meta:  # norms whose variance is not zero: sums of squares of 2, and the mean's of 1
                return torch.tensor([2.0, 1.0] * mine[0].numel(), dtype=torch.float64)[: mine[0].numel()]
        if name == "copy_" and not isinstance(args[0], Pretended):
            if self.meta:
                return args[0]
            if not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
                self.read(name, mine[0].device)
                return NotImplemented
            self.log.operations["copy to the host"] += 1
            self.log.launches += 1
            stream = (mine[0].device.index, stream_of(mine[0].device))
            self._pending.append((stream, args[0], mine[0].entries.to(args[0].dtype, copy=True)))
            return args[0].fill_(nan) if args[0].is_floating_point() else args[0]
        if name == "copy_" and any(not isinstance(t, Pretended) and t.dim() > 0 for t in args[:2]):
            self.arrive(name, mine[0].device, kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        return NotImplemented

    def read(self, name, device):
        """Note a read by the host, which ends when all work of the current stream has."""
        self.log.reads.append((name, line_of_anybatch()))
        self.synchronise((device.index, stream_of(device)))

    def arrive(self, name, device, non_blocking):
        """Note a copy to the device; from memory that is not pinned it synchronises unless it is asynchronous."""
        if not non_blocking:
            self.read(f"{name} to the device", device)

    def synchronise(self, stream):
        """End the work of a stream, and with it of all others: a program's streams wait for each other in turn."""
        self._synchronised[stream[0]] = self._clock
        for of_stream, target, entries in self._pending:
            if of_stream == stream:
                target.copy_(entries)
        self._pending = [each for each in self._pending if each[0] != stream]

    # ---- memory ----

    def _owner(self, tensor):
        return self._owners.setdefault(tensor.memory, Owner(tensor.device.index, stream_of(tensor.device)))

    def _use(self, tensors):
        if self.meta:
            return
        self._clock += 1
        line = line_of_anybatch()
        for t in tensors:
            stream = stream_of(t.device)
            self._owner(t).used[stream] = self._clock, line

    def free(self, memory):
        """Note the end of a wrapper of this memory."""
        owner = self._owners.get(memory)
        if owner is None:
            return
        owner.wrappers -= 1
        if owner.wrappers == 0:
            del self._owners[memory]
            for stream, (time, line) in owner.used.items():
                done = self._synchronised.get(owner.device, 0) >= time
                if line and stream not in (owner.made, *owner.recorded) and not done:
                    self.log.hazards.append(line)

    def hold(self, tensor):
        """Note a new wrapper of a memory."""
        if not self.meta:
            self._owner(tensor).wrappers += 1
            weakref.finalize(tensor, self.free, tensor.memory).atexit = False


@dataclass
class Owner:
    """One memory: the device and the stream it was made on, and the streams that use it."""

    device: int
    made: int
    wrappers: int = 0
    used: dict = field(default_factory=dict)
    recorded: set = field(default_factory=set)


class Pretended(torch.Tensor):
    """A tensor on a pretended device; `entries` is a CPU tensor."""

    @staticmethod
    def __new__(cls, entries, device, machine):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            entries.shape,
            strides=entries.stride(),
            storage_offset=entries.storage_offset(),
            dtype=entries.dtype,
            layout=entries.layout,
            device=device,
        )
        made.entries, made.machine = entries, machine
        made.memory = 0 if machine.meta or entries.is_sparse else entries.untyped_storage().data_ptr()
        machine.hold(made)
        return made

    def __repr__(self):
        return f"Pretended({self.entries!r}, {self.device})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        (machine,) = {t.machine for t in tree_leaves((args, kwargs)) if isinstance(t, Pretended)}
        return machine.run(func, args, kwargs or {})

    def tolist(self):
        """A read by the host that no operation shows."""
        self.machine.read("tolist", self.device)
        return self.entries.tolist()


class Factories(TorchDispatchMode):
    """Makes new tensors on the machine's devices, where the device is asked for by name."""

    def __init__(self, machine):
        super().__init__()
        self._machine = machine

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        target = kwargs.get("device")
        mine = any(isinstance(t, Pretended) for t in tree_leaves((args, kwargs)))
        to_device = target is not None and torch.device(target).type == "cuda"
        if not mine and not to_device:
            return func(*args, **{key: value for key, value in kwargs.items() if key != "pin_memory"})
        if not mine and str(func).startswith("aten._to_copy"):
            self._machine.arrive("_to_copy", torch.device("cuda", target.index or 0), kwargs.get("non_blocking"))
        return self._machine.run(func, args, kwargs)


class Event:
    """A torch.cuda.Event: what was queued on its stream is done when it is synchronised."""

    def __init__(self, machine):
        self._machine = machine

    def record(self, stream):
        self._stream = (stream.device.index, stream.stream_id)
        return self

    def synchronize(self):
        self._machine.synchronise(self._stream)


class Stream(torch.Stream):
    """A torch.cuda.Stream, to be current in a `with`."""

    def __new__(cls, machine, device, number):
        made = super().__new__(cls, stream_id=number, device_index=device.index, device_type=1)
        made.machine = machine
        return made

    def record_event(self):
        return Event(self.machine).record(self)

    @contextmanager
    def current(self):
        before = stream_of(self.device)
        GUARD.pretended_set_stream(self.device.index, self.stream_id)
        try:
            yield
        finally:
            GUARD.pretended_set_stream(self.device.index, before)


@contextmanager
def installed(machine):
    """A context in which torch takes the machine's devices for CUDA's."""
    tensor = torch.tensor

    def made(data, *args, device=None, **kwargs):
        found = tensor(data, *args, **kwargs)
        if device is None or torch.device(device).type != "cuda":
            return found
        to = torch.device("cuda", torch.device(device).index or 0)
        machine.arrive("torch.tensor", to, False)
        return machine.put(found, to)

    def stream(device=None):
        to = torch.device("cuda", 0) if device is None else torch.device(device)
        return Stream(machine, torch.device("cuda", to.index or 0), stream_of(to))

    changes = [
        (torch, "tensor", made),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_name", lambda _: "pretended"),
        (torch.cuda, "current_stream", stream),
        (torch._C, "_cuda_getCurrentRawStream", lambda index: GUARD.pretended_stream(index)),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda _: None),
        (torch.optim.Optimizer, "_cuda_graph_capture_health_check", lambda _: None),
    ]
    saved = [(of, name, getattr(of, name, None)) for of, name, _ in changes]
    for of, name, value in changes:
        setattr(of, name, value)
    try:
        with Factories(machine):
            yield
    finally:
        for of, name, value in saved:
            if value is None:
                delattr(of, name)
            else:
                setattr(of, name, value)


def launches(name, args, kwargs):
    """The number of kernels of one operation, by the limits of torch's own code: 1 but for lists of tensors."""
    if name.startswith(("empty", "new_empty", "_local_scalar_dense")) or name == "_reshape_alias":
        return 0
    if name in ("cat", "stack"):  # of several types each has a copy of its own
        return ceil(len(args[0]) / _INPUTS) if len({t.dtype for t in args[0]}) == 1 else len(args[0])
    if name == "linalg_vector_norm" and kwargs.get("dtype") == torch.float64 != args[0].dtype:
        return 2  # a copy in the other type; not from half precision to float32
    if not name.startswith(("_foreach", "_fused", "_amp_foreach")):
        return 1
    lists = [each for each in args if isinstance(each, list | tuple) and each and isinstance(each[0], torch.Tensor)]
    made = name.startswith("_foreach") and not name.endswith("_") and name != "_foreach_norm"
    most = _TENSORS[min(len(lists) + made, 5)]
    found, tensors, chunks = 0, 0, 0
    for position, tensor in enumerate(lists[0]):
        tensors += 1
        left = ceil(tensor.numel() / _CHUNK)
        while left:
            fit = min(left, _CHUNKS - chunks)
            chunks, left = chunks + fit, left - fit
            last = position == len(lists[0]) - 1 and left == 0
            if chunks == _CHUNKS or (tensors == most and left == 0) or last:
                found, chunks, tensors = found + 1, 0, int(left > 0)
    return found + (1 + ceil(len(lists[0]) / _TENSORS[1]) if name == "_foreach_norm" else 0)


def stream_of(device):
    """The number of the current stream of a device in this thread."""
    return GUARD.pretended_stream(device.index or 0)


def line_of_anybatch():
    """The innermost line of anybatch that is being run in this thread, and its function; `None` without one."""
    frame = sys._getframe(1)
    while frame is not None:
        if "/anybatch/_" in frame.f_code.co_filename:
            return f"{frame.f_code.co_filename.split('/anybatch/')[-1]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return None


def _entries(value):
    return value.entries if isinstance(value, Pretended) else value


def _raise_versions(func, args, kwargs):
    """Count a write in the version of each tensor that an operation writes to, as torch's own tensors do."""
    for given, argument in zip(args, func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            for t in tree_leaves(given):
                if isinstance(t, Pretended) and not t.is_inference():
                    torch.autograd.graph.increment_version(t)

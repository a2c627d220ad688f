"""Squared norms against float64."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from anybatch._gradients import norms
from anybatch._gradients.norms import norm_into, total_squared_norm


def exact(tensor):
    tensor = tensor.coalesce().values() if tensor.is_sparse else tensor
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return float(tensor.detach().double().square().sum())


TENSORS = {
    "empty": lambda: torch.zeros(0, 3),
    "scalar": lambda: torch.tensor(-3.0),
    "small": lambda: torch.randn(17, 3),
    "edge": lambda: torch.randn(16384),
    "large": lambda: torch.randn(333, 1001),
    "large multiple of a row": lambda: torch.randn(64, 512),
    "transposed": lambda: torch.randn(300, 200).t(),
    "channels last": lambda: torch.randn(64, 32, 5, 5).contiguous(memory_format=torch.channels_last),
    "double": lambda: torch.randn(50000, dtype=torch.float64),
    "complex": lambda: torch.randn(20000, dtype=torch.complex64),
    "sparse": lambda: torch.sparse_coo_tensor([[0, 2, 0]], torch.randn(3, 4), (5, 4), check_invariants=True),
    "expanded": lambda: torch.randn(1, 7).expand(5000, 7),
}


@pytest.mark.parametrize("name", TENSORS)
def test_norms_are_right_to_1e_7(name):
    torch.manual_seed(0)
    tensor = TENSORS[name]()
    out = torch.zeros(3, dtype=torch.float64)
    norm_into(out[1], tensor)
    assert float(out[1]) ** 2 == pytest.approx(exact(tensor), rel=2e-7)
    assert out[0] == out[2] == 0
    assert float(total_squared_norm([tensor])) == pytest.approx(exact(tensor), rel=2e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [100, 100_001])
def test_half_precision_norms_are_taken_in_float32(dtype, size):
    torch.manual_seed(0)
    tensor = (100 * torch.randn(size)).to(dtype)  # float16 squares would overflow
    out = torch.zeros((), dtype=torch.float64)
    norm_into(out, tensor)
    assert float(out) ** 2 == pytest.approx(exact(tensor), rel=1e-6)
    assert float(total_squared_norm([tensor])) == pytest.approx(exact(tensor), rel=1e-6)


def test_trap_long_flat_float32_norms_are_biased():
    """torch's own float32 norm loses 2e-4 of eight million elements; rows combined in float64 lose nothing."""
    torch.manual_seed(0)
    tensor = torch.randn(1 << 23)
    out = torch.zeros((), dtype=torch.float64)
    norm_into(out, tensor)
    assert float(out) ** 2 == pytest.approx(exact(tensor), rel=1e-7)


def test_trap_float32_cancellation():
    """Mean 1, noise 1e-3: the variance is a millionth of each squared norm and must not drown."""
    torch.manual_seed(0)
    n, d = 8, 200_000
    g = 1 + 1e-3 * torch.randn(n, d)
    out = torch.zeros((), dtype=torch.float64)
    squares = []
    for sample in g:
        norm_into(out, sample)
        squares.append(float(out) ** 2)
    m1, m2 = sum(squares) / n, float(total_squared_norm([g.mean(0)]))
    variance = n / (n - 1) * (m1 - m2)
    expected = float(g.double().var(0).sum())
    assert variance == pytest.approx(expected, rel=0.005)
    float32 = n / (n - 1) * float(g.square().sum(1).mean() - g.mean(0).square().sum())
    assert float32 != pytest.approx(expected, rel=0.02)  # the trap is real


def test_total_of_many():
    torch.manual_seed(0)
    tensors = [make() for make in TENSORS.values()]
    assert float(total_squared_norm(tensors)) == pytest.approx(sum(map(exact, tensors)), rel=1e-7)
    assert float(total_squared_norm([])) == 0


@pytest.fixture
def as_on_a_device(monkeypatch):
    """CPU tensors are measured by the operations of a device, of few launches."""
    monkeypatch.setattr(norms, "_on_host", lambda _: False)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("others", [0, 9])  # large tensors beside it: below and above the number for one operation
def test_norms_on_a_device_are_right_to_1e_7(as_on_a_device, name, others):
    torch.manual_seed(0)
    tensors = [TENSORS[name](), *(torch.randn(200, 100) for _ in range(others)), torch.randn(3).bfloat16()]
    assert float(total_squared_norm(tensors)) == pytest.approx(sum(map(exact, tensors)), rel=2e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_many_large_tensors_on_a_device_are_summed_in_float64(as_on_a_device, dtype):
    """A row of float32 is right to 2e-9 in architecture.md; a float64 sum of all entries to 1e-12."""
    torch.manual_seed(0)
    tensors = [(100 * torch.randn(40_000)).to(dtype) for _ in range(9)]
    assert float(total_squared_norm(tensors)) == pytest.approx(sum(map(exact, tensors)), rel=1e-12)


def test_tensors_of_each_type_take_one_norm_and_one_copy(as_on_a_device):
    tensors = [torch.ones(size, dtype=dtype) for dtype in (torch.float32, torch.bfloat16) for size in (20_000, 7) * 60]
    with Operations() as found:
        total_squared_norm(tensors)
    assert found.names == {"_foreach_norm": 2, "stack": 2 + 1, "dot": 2, "sum": 1}


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[str(func).split(".")[1]] += 1
        return func(*args, **(kwargs or {}))

from collections import namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import anybatch
from anybatch._scaling.batch import BatchSize


@given(base=st.floats(0.1, 1e6), micro=st.floats(0.1, 1e6), n=st.integers(1, 1000))
def test_equal_micro_batches(base, micro, n):
    scale, sample = BatchSize(base, micro, None).of_step(n, n / micro)
    assert scale == pytest.approx(n * micro / base)
    assert sample == pytest.approx(micro / base)


@given(sizes=st.lists(st.floats(1, 100), min_size=1, max_size=10))
def test_unequal_micro_batches_count_with_their_noise(sizes):
    """The mean of gradients of variance v/b_i, equally weighted, has variance v * sum(1/b_i) / N^2 = v / (B0 * S)."""
    base = 7.0
    scale, _ = BatchSize(base, 1.0, None).of_step(len(sizes), sum(1 / b for b in sizes))
    assert 1 / (base * scale) == pytest.approx(sum(1 / b for b in sizes) / len(sizes) ** 2)


Pair = namedtuple("Pair", "x y")


def test_split_keeps_structure_and_shares_memory():
    x = torch.arange(12).view(6, 2)
    batch = {"pair": Pair(x, [x[:, 0]]), "t": (x,), "name": "words", "n": 3}
    first, second = anybatch.split(batch, 2)
    assert torch.equal(second["pair"].x, x[3:])
    assert torch.equal(first["pair"].y[0], x[:3, 0])
    assert isinstance(first["pair"], Pair)
    assert isinstance(first["t"], tuple)
    assert (first["name"], second["n"]) == ("words", 3)
    assert first["t"][0].data_ptr() == x.data_ptr()


def test_the_gradient_of_a_split_batch_is_that_of_the_whole():
    torch.manual_seed(0)
    model, batch = torch.nn.Linear(3, 1).double(), torch.randn(12, 3).double()
    model(batch).square().mean().backward()
    expected = model.weight.grad.clone()
    model.zero_grad()
    for part in anybatch.split(batch, 4):
        (model(part).square().mean() / 4).backward()
    torch.testing.assert_close(model.weight.grad, expected)


@pytest.mark.parametrize(
    ("batch", "n"), [(torch.zeros(7), 2), (torch.tensor(1.0), 1), ([torch.zeros(4), torch.zeros(6)], 4)]
)
def test_split_refuses_unequal_parts(batch, n):
    with pytest.raises(anybatch.InvalidValueError, match="drop_last"):
        anybatch.split(batch, n)


@pytest.mark.parametrize("n", [0, -1, 1.5, True])
def test_split_needs_a_positive_number(n):
    with pytest.raises(anybatch.InvalidValueError, match="positive integer"):
        anybatch.split(torch.zeros(4), n)


@pytest.mark.parametrize(("base", "scale", "examples"), [(8, None, 8), (8, None, 3), (None, 2, 100)])
def test_a_size_of_the_data_that_does_not_fit_is_refused(base, scale, examples):
    with pytest.raises(anybatch.InvalidValueError, match="examples is the size of the data"):
        BatchSize(base, base, scale, examples)

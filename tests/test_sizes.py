"""Sizes of micro-batches: what "auto" reads, other dimensions, empty and smaller ones; against plain float64 loops."""

import io
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import anybatch

BASE = 4


def norms(model, batches, loss_of):
    """The squared norms of each batch's gradient and the mean gradient, in float64."""
    each = []
    for x in batches:
        gradients = torch.autograd.grad(loss_of(model, x), list(model.parameters()))
        each.append(torch.cat([g.flatten() for g in gradients]))
    return [float(g.square().sum()) for g in each], torch.stack(each).mean(0)


def moments(model, batches, loss_of, sizes):
    """Variance of one base batch and squared norm of the expected gradient, from unequal micro-batches."""
    squares, mean = norms(model, batches, loss_of)
    n, harmonic = len(batches), len(sizes) / sum(1 / size for size in sizes)
    of_mean = (sum(squares) / n - float(mean.square().sum())) / (n - 1)
    return of_mean * n * harmonic / BASE, float(mean.square().sum()) - of_mean


def mean_square(model, x):
    return (model(x) - 1).square().mean()


def attached(model, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rule = anybatch.AdaScale(smoothing=0.0)
    return optimizer, anybatch.attach(optimizer, model=model, rule=rule, **{"base_batch": BASE, **options})


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.out = nn.LSTM(3, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.out(self.net(x)[0])


@pytest.mark.parametrize("how", ["auto", "parts", "number"])
def test_another_dimension_counts_the_examples(how):
    """Time-first sequences `[T, B, ...]`: the scale, both moments and the gradient are those of a plain loop."""
    torch.manual_seed(0)
    model = TimeFirst().double()
    batch = torch.randn(14, 16, 3, dtype=torch.float64)
    pieces = list(batch.split(4, dim=1))
    optimizer, controller = attached(model, micro_batch="auto" if how == "auto" else BASE)
    controller.batch_dim = 1
    found = controller.parts(batch, 4) if how == "parts" else ((piece, 1 / 4) for piece in pieces)
    for x, share in found:
        (mean_square(model, x) * share).backward()
    _, mean = norms(model, pieces, mean_square)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), mean, rtol=1e-12, atol=1e-15)
    optimizer.step()
    assert controller.scale == 4
    expected = moments(model, pieces, mean_square, [4] * 4)
    assert (controller.variance, controller.sqnorm) == pytest.approx(expected, rel=1e-9)
    assert ("micro-batch 4 (dimension 1" in repr(controller)) == (how == "auto")


def test_labels_of_one_dimension_are_cut_along_it():
    x, y = torch.arange(12).view(2, 6), torch.arange(6)
    parts = list(anybatch.split((x, y), 3, batch_dim=1))
    assert [part.tolist() for part, _ in parts] == [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]
    assert [part.tolist() for _, part in parts] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(anybatch.InvalidValueError, match="pass batch_dim"):
        list(anybatch.split(x, 4))


class Conditioned(nn.Module):
    """A denoiser's form: its first argument may be one time for all examples."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 1)

    def forward(self, t, x):
        return self.net(x) + t.sum()


def test_tensors_of_different_sizes_are_an_error_whose_way_out_works():
    model = Conditioned().double()
    optimizer, controller = attached(model, micro_batch="auto")
    x = torch.randn(8, 3, dtype=torch.float64)
    with pytest.raises(anybatch.UsageError, match=r"sizes \[1, 8\] in dimension 0.*controller.micro_batch before"):
        model(torch.ones(1, dtype=torch.float64), x).mean().backward()
    optimizer.zero_grad()
    for _ in range(2):
        controller.micro_batch = 8
        (model(torch.ones(1, dtype=torch.float64), x).mean() / 2).backward()
    optimizer.step()
    assert controller.scale == 4


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("how", ["auto", "number", "weight"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_empty_micro_batch_is_no_sample(place, how, reduction):
    """A loss that is a sum over no example: the scale and both moments are those of the other micro-batches."""
    if how == "weight" and reduction == "sum":
        pytest.skip("weights are for losses that add up to a mean")
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    batches = [torch.randn(size, 3, dtype=torch.float64) for size in (4, 8)]
    batches.insert(place, torch.zeros(0, 3, dtype=torch.float64))
    options = {} if reduction == "mean" else {"reduction": "sum"}
    optimizer, controller = attached(model, micro_batch="auto" if how == "auto" else BASE, **options)
    for x in batches:
        if how != "auto":
            controller.micro_batch = len(x)
        if how == "weight":
            controller.weight = float(len(x) > 0)
        loss = (model(x) - 1).square().sum() / max(len(x), 1)
        (loss / (2 if reduction == "mean" else 1)).backward()
    optimizer.step()
    full = [x for x in batches if len(x)]
    assert controller.gain > 0
    if how == "weight":  # sizes count for the scale alone: 12 examples
        assert controller.scale == 3
    else:
        harmonic = 2 / (1 / 4 + 1 / 8)
        assert controller.scale == pytest.approx(2 * harmonic / BASE)
        expected = moments(model, full, mean_square, [4, 8])
        assert (controller.variance, controller.sqnorm) == pytest.approx(expected, rel=1e-9)
    _, mean = norms(model, full, mean_square)
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(found, mean, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("reduction", ["sum", 2, 4])
@pytest.mark.parametrize("sizes", [(4, 0), (0, 4, 0, 8), (4, 4, 8, 0)])
def test_the_mean_of_a_sum_is_over_the_micro_batches_that_are_not_empty(sizes, reduction):
    """The divisor may equal the number of all micro-batches, empty ones included."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    optimizer, controller = attached(model, micro_batch="auto", reduction=reduction)
    batches = [torch.randn(size, 3, dtype=torch.float64) for size in sizes]
    for x in batches:
        loss = (model(x) - 1).square().sum() / max(len(x), 1)
        (loss / (1 if reduction == "sum" else reduction)).backward()
    controller.mean_gradients()
    _, mean = norms(model, [x for x in batches if len(x)], mean_square)
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(found, mean, rtol=1e-12, atol=1e-15)
    optimizer.step()
    assert controller.count == sum(size > 0 for size in sizes)


def test_a_step_of_empty_micro_batches_does_not_count():
    model = nn.Linear(3, 1)
    optimizer, controller = attached(model, micro_batch="auto")
    for _ in range(2):
        model(torch.zeros(0, 3)).sum().backward()
    optimizer.step()
    assert (controller.steps, controller.skipped) == (0, 1)


@pytest.mark.parametrize("step", [0, 2, 7])
def test_a_smaller_last_batch_is_noticed_at_any_step(step):
    model = nn.Linear(3, 1)
    optimizer, controller = attached(model, micro_batch=BASE)
    for i in range(9):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for part in range(2):
                (model(torch.randn(2 if i == step and part else BASE, 3)).square().mean() / 2).backward()
            with torch.no_grad():
                model(torch.randn(50, 3))  # an evaluation is no micro-batch
            with controller.paused():
                model(torch.randn(1, 3))
            optimizer.step()
            optimizer.zero_grad()
        found = [str(each.message) for each in seen if "2 rows" in str(each.message)]
        assert len(found) == (i == step)
        assert all("drop_last=True" in text and "micro_batch='auto'" in text for text in found)


def scales_of_parts(batches, *, by_hand=False, **options):
    """The scales of steps over four parts of each batch, and the warnings."""
    model = nn.Linear(3, 1)
    optimizer, controller = attached(model, **options)
    scales = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for rows in batches:
            for part, share in controller.parts(torch.randn(rows, 3), 4):
                if by_hand:
                    controller.micro_batch = len(part)
                (model(part).square().mean() * share).backward()
            optimizer.step()
            optimizer.zero_grad()
            scales.append(controller.scale)
    return scales, [str(each.message) for each in seen]


@pytest.mark.parametrize("batches", [(512, 512, 512, 20, 512), (20, 256, 20, 256), (256, 20, 256, 256, 20)])
def test_a_micro_batch_that_is_not_the_parts_size_is_warned_of(batches):
    """A number that is wrong, or a first batch that is the small last one of an epoch; each way out gives the scale."""
    given, right = 64, [rows / BASE for rows in batches]
    scales, found = scales_of_parts(batches, micro_batch=given)
    wrong = batches[0] // 4 != given
    assert len(found) == wrong
    assert all(f"micro_batch=64, but each forward of the model got a tensor of shape [{batches[0] // 4}, 3]" in text
               for text in found)  # fmt: skip
    if given in [rows // 4 for rows in batches]:  # the steps after the warning are right
        assert scales[wrong:] == right[wrong:]
    for ways_out in (
        {"micro_batch": batches[0] // 4},
        {"micro_batch": "auto"},
        {"micro_batch": given, "by_hand": True},
    ):
        assert scales_of_parts(batches, **ways_out) == (right, [])


def test_sizes_in_another_unit_are_not_compared_with_rows():
    model = nn.Linear(3, 1)
    optimizer, controller = attached(model, micro_batch=20)  # tokens
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(8):
            for _ in range(2):
                (model(torch.randn(4 if i % 2 else 2, 5 if i % 2 else 10, 3)).square().mean() / 2).backward()
            optimizer.step()
            optimizer.zero_grad()


def test_auto_in_together_is_the_size_of_the_first_forward():
    """Two losses of one micro-batch, the second on twice the examples."""
    model = nn.Linear(3, 1)
    optimizer, controller = attached(model, micro_batch="auto")
    for both in (False, True, False):
        with controller.together():
            real, fake = torch.randn(4, 3), torch.randn(8, 3)
            if both:
                losses = [model(real).mean(), model(fake).mean()]
                for loss in losses:
                    loss.backward()
            else:
                for x in (real, fake):
                    model(x).mean().backward()
    optimizer.step()
    assert (controller.count, controller.scale) == (3, 3.0)


@pytest.mark.parametrize("micro_batch", ["auto", BASE])
def test_a_pickled_model_has_no_trace_of_the_hooks(micro_batch, tmp_path):
    """It loads with `weights_only` and where anybatch cannot be imported, and still calls the user's own hooks."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    optimizer, controller = attached(model, micro_batch=micro_batch)
    for _ in range(2):
        (model(torch.randn(BASE, 3)).square().mean() / 2).backward()
    optimizer.step()
    path = tmp_path / "model.pt"
    torch.save(model, path)
    with torch.serialization.safe_globals([nn.Sequential, nn.Linear]):
        loaded = torch.load(path, weights_only=True)
    x = torch.randn(2, 3)
    torch.testing.assert_close(loaded(x), model(x))
    assert b"anybatch" not in path.read_bytes()
    code = (
        "import sys, torch; sys.modules['anybatch'] = None; "
        f"print(torch.load({str(path)!r}, weights_only=False)(torch.ones(1, 3)).item())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert float(found.stdout) == pytest.approx(model(torch.ones(1, 3)).item(), rel=1e-5), found.stderr


def test_a_model_with_a_hook_of_its_own_keeps_its_handle():
    model, calls = nn.Linear(3, 1), []
    before = model.register_forward_pre_hook(lambda *_: calls.append("before"))
    optimizer, controller = attached(model, micro_batch="auto")
    after = model.register_forward_pre_hook(lambda *_: calls.append("after"))
    model(torch.randn(BASE, 3))
    assert calls == ["before", "after"]
    before.remove()
    after.remove()
    model(torch.randn(BASE, 3))
    assert len(calls) == 2
    controller.detach()
    torch.save(model.state_dict(), io.BytesIO())
    assert not model._forward_pre_hooks

"""Examples of little worth are said: in a run, in its controller's text, and in a forecast."""

import warnings

import pytest
import torch
from torch import nn

import anybatch

DIM = 64


def train(noise, scale, *, total=400, rule=None):
    """A linear loss whose gradient has mean 1 and `noise` in each coordinate; the gains, and the step of a warning."""
    torch.manual_seed(0)
    model = nn.Linear(DIM, 1, bias=False, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    arguments = {"total": total} if total else {}
    controller = anybatch.attach(
        optimizer, model=model, base_batch=16, micro_batch=4 * scale, rule=rule or anybatch.AdaScale(), **arguments
    )
    gains, warned = [], []
    while controller.tau < 400:
        # The mean of scale / 4 base batches has 4 / scale of the variance of one.
        for _ in range(4):
            gradient = 1 + noise * torch.randn(DIM, dtype=torch.float64) * (4 / scale) ** 0.5
            (model(gradient) / 4).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        optimizer.zero_grad()
        gains.append(controller.gain)
        warned += [(len(gains), str(each.message)) for each in caught if "worth" in str(each.message)]
    text = str(controller)
    controller.detach()
    return gains, warned, text


@pytest.mark.parametrize(("noise", "scale"), [(0.3, 32), (1.0, 32), (2.0, 64)])
def test_one_warning_after_a_fifth_of_the_run(noise, scale):
    gains, warned, text = train(noise, scale)
    ((step, message),) = warned
    low = [gain if gain < 0.15 * scale else 0.0 for gain in gains]
    assert sum(low[: step - 1]) < 80 <= sum(low[:step])
    count = sum(each > 0 for each in low[:step])
    worth = sum(low[:step]) / (scale * count)
    assert f"{worth:.1%}" in message
    # The variance of a base batch over the squared mean is noise ** 2, so half of the worth is at noise ** 2 + 2.
    half = float(message.split("worth 50 % is ")[1].split(",")[0])
    assert half == pytest.approx(noise**2 + 2, rel=0.1)
    batch = float(message.split("a batch of ")[1].split(".")[0])
    assert batch == pytest.approx(16 * (noise**2 + 2), rel=0.1)
    assert f"an example is worth {gains[-1] / scale:.1%} of one at scale 1" in text


@pytest.mark.parametrize(
    ("noise", "scale", "arguments"),
    [
        (20.0, 32, {}),  # worth much
        (0.3, 4, {}),  # worth a quarter
        (0.3, 32, {"total": None}),  # nobody says what a fifth of the run is
        (0.3, 32, {"rule": anybatch.Identity()}),  # measures nothing
    ],
)
def test_no_warning(noise, scale, arguments):
    _, warned, _ = train(noise, scale, **arguments)
    assert not warned


def test_a_forecast_notes_the_scales_and_the_largest_that_is_worth_half():
    def step(i):  # at scale 2 with variance 8 and squared mean 1: gain 9 / 5
        return anybatch.StepRecord(i, 1.8 * i, 1.8, 2, 2, 8, 1, 8, 1, 1.8, 0.1, 1.8, 8, 0.5)

    from anybatch._record import Run

    run = Run({"total": 1800.0, "base_batch": 32}, [step(i + 1) for i in range(1000)], 0)
    found = anybatch.forecast(run, [1, 16, 64, 128])
    note = found.notes[0]
    for each in found.scales[2:]:
        # The plain formula, (8 + 1) / (8 + S); the careful first steps cost a little.
        assert each.efficiency.value == pytest.approx(9 / (8 + each.scale), rel=0.15)
        assert f"{each.efficiency.value:.1%} at {each.scale:g}" in note
    assert "at 16 " not in note
    half = float(note.split("worth 50 % is about ")[1].split(",")[0])
    assert anybatch.forecast(run, [half]).scales[0].efficiency.value == pytest.approx(0.5, abs=0.03)
    assert not any("worth" in each for each in anybatch.forecast(run, [1, 16]).notes)

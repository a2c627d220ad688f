"""DINO: its loss against a plain loop, the centre and the teacher on the clock, and both configurations' code."""

import itertools
import math
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

import anybatch
from recipes.ema import dino
from recipes.ema.config import Config
from recipes.ema.crops import CropFolder, Crops
from recipes.ema.nets import vit
from recipes.ema.train import train
from recipes.images import made
from recipes.images.imagenet import Images

SMALL = replace(dino.CONFIGS["small"], total=8, warmup=2, evaluations=2, points=2)


def begun(experiment):
    """A model, a batch of 16, and the clock that the experiment follows."""
    torch.manual_seed(0)
    model, clock = experiment.model(), anybatch.Clock()
    experiment.begin(model, clock)
    return model, experiment.batch(16, torch.Generator().manual_seed(0)), clock


@torch.no_grad()
def test_the_loss_is_that_of_the_plain_loop():
    """Each of the two large crops' distributions against the student's of all other crops, one pair at a time."""
    experiment = dino.Digits(SMALL)
    model, batch, _ = begun(experiment)
    model.centre.copy_(0.1 * torch.randn(64))
    large, small, wanted = experiment.targets(model, batch)
    said = [model(large)[:, 0], model(large)[:, 1], model(small)[:, 0], model(small)[:, 1]]
    total = terms = 0.0
    for t in range(2):
        for s in range(4):
            for i in range(16):
                if t != s:
                    teacher = [math.exp(v / 0.02) for v in (said[t][i] - model.centre).double().tolist()]
                    student = [math.exp(v / 0.1) for v in said[s][i].double().tolist()]
                    total -= sum(q / sum(teacher) * math.log(p / sum(student)) for q, p in zip(teacher, student))
                    terms += 1
    assert experiment.loss(model, (large, small, wanted)).item() == pytest.approx(total / terms, rel=1e-4)


@torch.no_grad()
def test_the_centre_moves_by_its_decay_to_the_power_of_the_iterations():
    experiment = dino.Digits(SMALL)
    model, batch, clock = begun(experiment)
    for part in anybatch.split(batch, 2):
        experiment.targets(model, part)
    experiment.before_step(model)
    mean = model(batch[0]).double().mean((0, 1))
    assert model.centre.abs().max() == 0  # not before the step has happened
    clock.advance(3.0)
    torch.testing.assert_close(model.centre.double(), (1 - 0.9**3) * mean, rtol=1e-5, atol=1e-7)


class Watched(anybatch.ModelEMA):
    """Notes how far each move went, as a share of the way to the weights."""

    moves: list

    def __init__(self, model, decay, **options):
        self.watched = model
        super().__init__(model, decay, **options)

    def update(self, iterations=1.0):
        before, weights = self.last(), self.watched.last.detach().clone()
        super().update(iterations)
        self.moves.append((iterations, ((self.last() - before).norm() / (weights - before).norm()).item()))

    def last(self):
        with self.applied():
            return self.watched.last.detach().clone()


@pytest.mark.parametrize("arm", ["rule", "off"])
def test_the_teachers_momentum_is_on_its_cosine_of_tau(arm, monkeypatch):
    """In a run of 8 base iterations, two steps of 4: rho goes from .99 to 1, .995 at tau = 4."""
    monkeypatch.setattr(anybatch, "ModelEMA", Watched)
    monkeypatch.setattr(Watched, "moves", [], raising=False)
    train(dino.Digits(SMALL), arm, scale=4, seed=0)
    fine = [0.99 + 0.01 * (1 - math.cos(math.pi * (i + 0.5) / 8000)) / 2 for i in range(8000)]
    kept = [math.exp(sum(map(math.log, part)) / 1000) for part in (fine[:4000], fine[4000:])]  # of four base iterations
    expected = [(4.0, 1 - k) for k in kept] if arm == "rule" else [(1.0, 0.005), (1.0, 0.0)]
    assert Watched.moves == [(iterations, pytest.approx(share, rel=1e-3, abs=1e-6)) for iterations, share in expected]


def test_the_weight_decay_and_the_rate_follow_their_schedules(monkeypatch):
    seen = []
    step = torch.optim.AdamW.step

    def noting(self, *arguments, **options):
        seen.append((self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]))
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    train(dino.Digits(SMALL), "rule", scale=1, seed=0)
    rates = [1 / 3, 2 / 3] + [(1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]
    decays = [0.4 - 0.36 * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]
    assert [rate for rate, _ in seen] == pytest.approx([1e-2 * rate for rate in rates])
    assert [decay for _, decay in seen] == pytest.approx(decays)


def test_each_gradient_is_clipped():
    experiment = dino.Digits(SMALL)
    model, batch, _ = begun(experiment)
    experiment.targets(model, batch)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 10.0)
    model.encoder.norm.bias.grad = torch.full((32,), 0.1)
    experiment.before_step(model)
    assert model.encoder.norm.weight.grad.norm().item() == pytest.approx(3.0, rel=1e-4)
    assert model.last.grad.norm().item() == pytest.approx(3.0, rel=1e-4)
    assert model.encoder.norm.bias.grad.tolist() == pytest.approx([0.1] * 32)


def test_the_last_layer_waits(monkeypatch):
    experiment = dino.Digits(SMALL)
    experiment.frozen = 4.0
    weights = []
    before_step = experiment.before_step
    noting = lambda model: weights.append(model.last.detach().clone()) or before_step(model)  # noqa: E731
    monkeypatch.setattr(experiment, "before_step", noting)
    train(experiment, "rule", scale=2, seed=0)
    assert [torch.equal(a, b) for a, b in itertools.pairwise(weights)] == [True, True, False]  # tau 0, 2 | 4, 6


def test_the_teachers_temperature_rises():
    experiment = dino.MultiCrop.__new__(dino.Digits)
    experiment.temperatures, experiment.warm = (0.04, 0.07), 30
    assert [experiment.temperature(tau) for tau in (0, 10, 30, 90)] == pytest.approx([0.04, 0.05, 0.07, 0.07])


@torch.no_grad()
def test_a_smaller_crop_has_the_positions_in_between():
    encoder, _ = vit(side=64, patch=16, width=8, depth=1, heads=1)
    row, column = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    encoder.positions.copy_(torch.stack([row, column] * 4, -1).view(1, 16, 8))
    half = encoder._positions(2).view(2, 2, 8)
    assert half[..., 0].tolist() == [pytest.approx([0.5] * 2, abs=0.15), pytest.approx([2.5] * 2, abs=0.15)]
    assert half[..., 1].tolist() == [pytest.approx([0.5, 2.5], abs=0.15)] * 2
    assert encoder._positions(4) is encoder.positions
    assert encoder(torch.zeros(3, 3, 32, 32)).shape == (3, 8)


def test_dino_learns_on_the_digits_and_does_not_collapse(monkeypatch):
    losses, loss = [], dino.Digits.loss

    def noting(self, model, batch):
        value = loss(self, model, batch)
        sure = -batch[2].xlogy(batch[2]).sum(-1).mean().item()
        losses.append((value.item(), sure))
        return value

    monkeypatch.setattr(dino.Digits, "loss", noting)
    config = replace(dino.CONFIGS["small"], total=128, warmup=12, evaluations=2, points=2)
    found = train(dino.Digits(config), "rule", scale=2, seed=0)
    assert found["steps"] == 64
    assert sum(value for value, _ in losses[-5:]) < 0.8 * sum(value for value, _ in losses[:5])
    assert found["teacher_entropy"][-1] > 2  # of at most log 64 = 4.2: no output has won
    assert losses[-1][1] < 3  # and the teacher is not undecided of each


def test_dino_from_an_image_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(made.TRAIN, "least", 60)
    made.image_folder(tmp_path, size="least")
    values = {"base_batch": 8, "total": 4, "decay": 0.9, "final_decay": 1.0, "rate": 1e-3, "optimizer": "adamw"}
    config = Config(**values, largest=8, evaluations=1, points=1)
    experiment = CropFolder(config, data=tmp_path, tiny=True, workers=0)
    large, small, *colours = experiment.batch(8, torch.Generator().manual_seed(0))
    assert (large.shape, small.shape) == ((8, 2, 3, 112, 112), (8, 2, 3, 48, 48))
    assert [values.shape for values in colours] == [(8, 2, 2)] * 2
    found = train(experiment, "adascale", scale=2, seed=0)
    assert 2 <= found["steps"] <= 4
    assert math.isfinite(found["teacher_accuracy"][-1])


def test_a_broken_image_gives_its_place_to_the_next(tmp_path, monkeypatch):
    monkeypatch.setitem(made.TRAIN, "least", 20)
    made.image_folder(tmp_path, size="least")
    names = sorted(path.name for path in (tmp_path / "train").iterdir())
    images = Images(tmp_path / "train", names, side=64, training=True)
    images.files[0][0].write_bytes(b"no image")
    with pytest.warns(UserWarning, match="takes its place"):
        large, small = Crops(images, side=64, small=3)[0]
    assert (large.shape, small.shape) == ((2, 3, 64, 64), (3, 3, 27, 27))


def test_the_full_configuration_is_the_papers():
    config = dino.CONFIGS["full"]
    assert (config.base_batch, config.total, config.warmup) == (1024, 125_114, 12_511)
    with torch.device("meta"):
        model = CropFolder.model(Namespace(tiny=False))
    assert sum(p.numel() for p in model.encoder.parameters()) == 21_665_664 - 2 * 384  # ViT-S/16 without a class token
    assert (model.last.shape, model.centre.shape) == ((65_536, 256), (65_536,))

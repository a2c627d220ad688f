"""A killed run of recipes/ema goes on: as if nothing had been."""

from argparse import Namespace
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from recipes.ema import byol, dino, lars, pseudo, resume, supervised
from recipes.ema import runs as ema_runs
from recipes.ema import train as ema_train
from recipes.ema.resume import Checkpoint
from recipes.training.task import Shuffled

STUDIES = {
    "byol": (byol, "small", {}),
    "dino": (dino, "small", {"warmup": 6, "cosine": True, "final_weight_decay": 0.4, "final_decay": 1.0}),
    "lars": (lars, "small", {}),
    "pseudo by AdamW": (pseudo, "adamw", {"warmup": 6}),
    "supervised": (supervised, "small", {}),
}


class Killed(Exception):
    """As a signal would end it."""


@pytest.fixture(autouse=True)
def always(monkeypatch):
    monkeypatch.setattr(resume, "EVERY", 0.0)


def made(module, name, changes):
    config = replace(module.CONFIGS[name], total=40, evaluations=4, points=4, **changes)
    return module.STUDY.make(config, Namespace(config=name, data=None, device="cpu"))


def killed(experiment, after):
    """Dies in an evaluation, when so many are over; each is of the student and of the teacher."""
    left = [2 * after]
    evaluate = experiment.evaluate

    def counted(model):
        if not left[0]:
            raise Killed
        left[0] -= 1
        return evaluate(model)

    experiment.evaluate = counted
    return experiment


@pytest.mark.parametrize("arm", ["adascale", "off"])
@pytest.mark.parametrize("name", STUDIES)
def test_a_killed_run_goes_on_as_if_nothing_had_been(name, arm, tmp_path):
    run = {"arm": arm, "scale": (2, 4), "seed": 3}
    undisturbed = ema_train.train(made(*STUDIES[name]), **run)
    path = tmp_path / "run.pt"
    for after in (2, 1, 0):  # the first is at tau 0, and the last dies before another is over
        with pytest.raises(Killed):
            ema_train.train(killed(made(*STUDIES[name]), after), **run, checkpoint=Checkpoint(path, same={}))
    found = ema_train.train(made(*STUDIES[name]), **run, checkpoint=Checkpoint(path, same={}))
    assert found == undisturbed


def test_examples_that_a_killed_run_has_seen_are_passed_over():
    class Numbers(Dataset):
        def __len__(self):
            return 50

        def __getitem__(self, i):
            return torch.tensor(i), torch.tensor(i)

    def order(start, taken):
        task = SimpleNamespace(model=None, batches=partial(batches_of, Numbers()), workers=0)
        experiment = supervised.Photographs(replace(supervised.CONFIGS["full"], base_batch=12), task, workers=0)
        experiment.start = start
        generator = torch.Generator().manual_seed(5)
        return torch.cat([experiment.batch(n, generator)[0] for n in taken]).tolist()

    assert order(0, (12, 24, 7))[19:] == order(19, (24,))


def batches_of(data, chunk, *, seed, rank, ranks, start, workers):
    order = Shuffled(data, chunk, seed=seed, rank=rank, ranks=ranks, start=start)
    return iter(DataLoader(data, batch_sampler=order, num_workers=workers))


def test_a_study_goes_on_with_its_killed_run_and_leaves_no_checkpoint(tmp_path, monkeypatch):
    module, name, changes = STUDIES["supervised"]
    config = replace(module.CONFIGS[name], total=40, evaluations=4, points=4, seeds=1, scales=(1,), **changes)
    study = replace(module.STUDY, compared=())
    results = ema_runs.Results(study, config, tmp_path / "ema.json")
    with pytest.raises(Killed):
        results.complete(killed(made(module, name, changes), 3))
    (kept,) = tmp_path.glob("ema.*.pt")
    assert not results.path.exists()
    whole = ema_runs.Results(study, config, tmp_path / "ema.json")
    whole.complete(made(module, name, changes))
    assert len(whole.runs) == 1
    assert [each.name for each in tmp_path.iterdir()] == ["ema.json"]
    other = Checkpoint(kept, same={"config": 1})
    other.write({})
    with pytest.raises(SystemExit, match="delete it"):
        Checkpoint(kept, same={"config": 2}).read()


def test_a_full_disk_leaves_the_last_checkpoint_alone(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path / "x.pt", same={})
    checkpoint.write({"used": 1})

    def full(_, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write({"used": 2})
    assert [each.name for each in tmp_path.iterdir()] == ["x.pt"]
    assert checkpoint.read()["used"] == 1


def test_nothing_is_written_by_runs_that_are_soon_over(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "EVERY", 600.0)
    ema_train.train(
        made(*STUDIES["supervised"]), "rule", scale=4, seed=0, checkpoint=Checkpoint(tmp_path / "x", same={})
    )
    assert not list(tmp_path.iterdir())

"""LightningCLI makes the callback from a file, its rule too."""

import sys

import pytest

import anybatch
from integrations import task

workers = pytest.importorskip("integrations.lightning_workers", exc_type=ModuleNotFoundError)
pytest.importorskip("jsonargparse")
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore:.*LeafSpec:FutureWarning",
    "ignore::DeprecationWarning:lightning",  # of jsonargparse, for what Lightning asks of it
)

CONFIG = """
trainer:
  max_steps: 100
  accumulate_grad_batches: 4
  accelerator: cpu
  devices: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  use_distributed_sampler: false
  callbacks:
    - class_path: anybatch.integrations.lightning.AnyBatch
      init_args:
        base_batch: 4
        rule: {rule}
"""


class Plain(workers.Module):
    def __init__(self, lr: float = 0.05):
        super().__init__(lr=lr)


class Data(LightningDataModule):
    def train_dataloader(self):
        return task.loader()


@pytest.mark.parametrize(
    ("said", "rule"),
    [
        ("null", anybatch.AdaScale()),
        ("{class_path: anybatch.AdaScale, init_args: {smoothing: 0.9}}", anybatch.AdaScale(smoothing=0.9)),
        ("{class_path: anybatch.SquareRoot}", anybatch.SquareRoot()),
    ],
)
def test_the_callback_comes_from_a_file(said, rule, tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text(CONFIG.format(rule=said))
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", f"--config={tmp_path / 'config.yaml'}"])
    cli = LightningCLI(Plain, Data, save_config_callback=None, seed_everything_default=False)
    (adapter,) = [each for each in cli.trainer.callbacks if hasattr(each, "controller")]
    assert adapter.controller.rule == rule
    assert adapter.controller.scale == 4
    assert 100 <= adapter.controller.tau < 104

"""`anybatch plan`: every value before and after, where the theory ends, and one clear line for every bad input."""

import json
import math

import pytest

import anybatch

typer = pytest.importorskip("typer")
from typer.testing import CliRunner

from anybatch import cli

BASE = {"--optimizer": "adamw", "--lr": "3e-4", "--base-batch": "256", "--batch": "2048"}


def run(*extra, **options):
    given = BASE | {f"--{name.replace('_', '-')}": str(value) for name, value in options.items()}
    words = [word for pair in given.items() for word in pair]
    return CliRunner().invoke(cli.app, ["plan", *words, *extra], env={"COLUMNS": "200"})


def parsed(**options):
    result = run("--json", **options)
    assert result.exit_code == 0, result.output

    def refuse(word):
        raise AssertionError(f"{word} is not strict JSON")

    return json.loads(result.stdout, parse_constant=refuse)


def write_run(path, noise_scales, *, base_batch=256, skipped=()):
    """A record whose steps have these noise scales, in examples, or in base batches without a `base_batch`."""
    record = anybatch.RunRecord(path, config={"base_batch": base_batch})
    for i, noise in enumerate(noise_scales):
        sqnorm = 0.0 if noise == math.inf else (base_batch or 1) / noise
        values = dict.fromkeys(["raw_variance", "raw_sqnorm", "lr", "lr_factor", "seconds", "gain", "iterations"], 1.0)
        record.write(anybatch.StepRecord(step=i + 1, tau=i + 1.0, scale=2.0, count=2, variance=1.0, sqnorm=sqnorm,
                                         noise_scale=noise, skipped=i in skipped, **values))  # fmt: skip
    record.close()
    return path


def test_every_value_stands_before_and_after_with_its_reason():
    result = run(ema=0.9999, batch_norm_momentum=0.1, total=10_000, warmup=300)
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line for line in result.output.splitlines() if line.strip()}
    assert "kappa = 8" in result.output
    for name, before, after, why in [
        ("lr", "0.0003", "0.0008485281", "square root"),
        ("betas", "0.9, 0.999", "0.4304672, 0.9920279", "beta ** kappa"),
        ("eps", "1e-08", "3.535534e-09", "sqrt(kappa)"),
        ("weight_decay", "0.01", "0.02828397", "power of kappa"),
        ("ema_decay", "0.9999", "0.9992003", "Busbridge"),
        ("batch_norm_momentum", "0.1", "0.5695328", "1 - (1 - m)"),
        ("total", "10000", "1250", "same examples"),
        ("warmup", "300", "38", "same examples"),
    ]:
        assert all(text in rows[name] for text in (before, after)), rows[name]
        assert why in rows[f"{name}:"]
    assert "AdaScale needs none of this: keep the values for 256, and attach(" in result.output


def test_json_is_the_plan_and_the_plan_is_the_function():
    plan = parsed(ema=0.9999, betas="0.95, 0.98", weight_decay=0.1, eps=1e-7)
    expected = anybatch.scale_hyperparameters(
        "adamw", 8, lr=3e-4, betas=(0.95, 0.98), weight_decay=0.1, eps=1e-7, ema_decay=0.9999
    )
    for name, change in expected.items():
        after = list(change.after) if isinstance(change.after, tuple) else change.after
        assert plan["changes"][name]["after"] == after
        assert plan["changes"][name]["why"] == change.why
    assert set(plan["changes"]) == set(expected)
    assert (plan["kappa"], plan["noise_scale"], plan["gain"], plan["limits"]) == (8, None, None, [])


def test_other_optimizers_take_their_own_values():
    assert parsed(optimizer="sgd", momentum=0.9)["changes"]["momentum"]["after"] == 0.9
    assert parsed(optimizer="RMSprop", alpha=0.99)["changes"]["alpha"]["after"] == pytest.approx(0.99**8)
    assert parsed(betas="0.95,0.999", betas_rule="sde")["changes"]["betas"]["after"] == pytest.approx([0.6, 0.992])


def test_the_same_batch_changes_nothing():
    plan = parsed(batch=256, ema=0.99, total=77)
    assert all(change["before"] == change["after"] for change in plan["changes"].values())
    assert plan["limits"] == []


# ---- where the theory ends ----


def test_sgd_is_told_of_stability_and_the_adam_family_is_not():
    assert any("2 / beta" in limit for limit in parsed(optimizer="sgd")["limits"])
    assert not any("2 / beta" in limit for limit in parsed()["limits"])
    assert not any("2 / beta" in limit for limit in parsed(optimizer="sgd", batch=128)["limits"])


def test_weight_decay_that_turns_signs():
    assert any("flips the weights' signs" in x for x in parsed(optimizer="sgd", lr=1, weight_decay=0.2)["limits"])
    assert not any("sign" in x for x in parsed(optimizer="sgd", lr=1, weight_decay=0.1)["limits"])


def test_memories_shorter_than_a_step():
    limits = parsed(batch=256 * 16, ema=0.9)["limits"]
    assert [limit.split(":")[0] for limit in limits] == ["betas 0.9", "ema_decay 0.9"]


def test_a_smaller_batch():
    plan = parsed(batch=64, total=100)
    assert "4 times as many steps" in plan["limits"][0]
    assert plan["changes"]["total"]["after"] == 400
    assert plan["changes"]["lr"]["after"] == pytest.approx(1.5e-4)
    assert "from 0.25 to 1" in plan["adascale"]


def test_beyond_the_noise_scale_of_a_record(tmp_path):
    """The last tenth counts: here 4 of 40 steps; a skipped one does not."""
    record = write_run(tmp_path / "run.jsonl", [1e6] * 36 + [1000, 1000, 9e9, 1100, 1100], skipped=[38])
    plan = parsed(record=record)
    assert plan["noise_scale"] == 1050
    assert plan["gain"] == pytest.approx((1050 / 256 + 1) / (1050 / 2048 + 1))
    assert "2048 is beyond the run's noise scale of 1050" in plan["limits"][0]
    assert f"gain would be {plan['gain']:.4g}" in plan["adascale"]
    assert parsed(record=record, batch=1024)["limits"] == []
    assert "Note: The batch of 2048 is beyond" in run(record=record).output


def test_a_record_that_counts_base_batches(tmp_path):
    record = write_run(tmp_path / "run.jsonl", [3.0] * 5, base_batch=None)
    assert parsed(record=record)["noise_scale"] == 3 * 256


def test_noise_alone_is_no_limit(tmp_path):
    record = write_run(tmp_path / "run.jsonl", [math.inf] * 5)
    plan = parsed(record=record)
    assert (plan["noise_scale"], plan["gain"], plan["limits"]) == (None, 8, [])


def test_the_record_of_a_real_run(tmp_path):
    from common import attach_task, run_task
    from oracle import loss_fn, make_model, micro_batch

    model = make_model()
    optimizer, controller = attach_task(model, record=tmp_path / "run.jsonl")

    def backward(t, a):
        x, y = micro_batch(t, a)
        (loss_fn(model(x), y) / 16).backward()

    run_task(optimizer, controller, backward, steps=5, accumulation=16)
    assert math.isfinite(controller.noise_scale)
    assert (
        parsed(record=tmp_path / "run.jsonl")["noise_scale"] == controller.noise_scale
    )  # a tenth of 5 steps: the last
    controller.detach()


# ---- bad input ----


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"optimizer": "adamv"}, "adamv"),
        ({"optimizer": "lbfgs"}, "LBFGS"),
        ({"lr": "-1"}, "learning rate"),
        ({"lr": "nan"}, "learning rate"),
        ({"lr": "inf"}, "lr"),
        ({"base_batch": "0"}, "base-batch"),
        ({"batch": "-8"}, "batch"),
        ({"betas": "0.9"}, "--betas"),
        ({"betas": "a,b"}, "--betas"),
        ({"betas": "0.9,0.99,0.999"}, "--betas"),
        ({"betas": "0.9,1"}, "beta"),
        ({"eps": "-1"}, "epsilon"),
        ({"weight_decay": "nan"}, "--weight-decay"),
        ({"weight_decay": "4000"}, "--weight-decay"),
        ({"momentum": "0.9"}, "AdamW has no momentum"),
        ({"ema": "1"}, "--ema"),
        ({"batch_norm_momentum": "2"}, "--batch-norm-momentum"),
        ({"warmup": "0"}, "warmup"),
        ({"total": "-1"}, "total"),
        ({"betas_rule": "linear"}, "--betas-rule"),
        ({"batch": "4096", "betas_rule": "sde"}, "kappa must be below 10;"),
        ({"record": "no/such/file"}, "no/such/file"),
        ({"record": "/"}, "/"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(options, word):
    result = run(**options)
    assert result.exit_code == 2, result.output
    assert word in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_a_file_that_is_no_record_and_a_record_without_noise(tmp_path):
    (tmp_path / "text").write_text("hello\n")
    without = write_run(tmp_path / "without.jsonl", [math.nan] * 3)
    for path in (tmp_path / "text", without):
        result = run(record=path)
        assert (result.exit_code, len(result.output.strip().splitlines())) == (2, 1)
        assert path.name in result.output
    assert "no step with a noise scale" in run(record=without).output

"""`anybatch plan`: every value before and after, where the theory ends, and one clear line for every bad input."""

import json

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
    assert "Memory: 10 steps = 2,560, 1000 steps = 256,000 examples; then 1.756 steps = 3,596" in rows["betas:"]
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
    assert plan["memory"]["betas"] == {
        "before": pytest.approx([20, 50]),
        "after": pytest.approx([1 / (1 - 0.95**8), 1 / (1 - 0.98**8)]),
        "examples_before": pytest.approx([20 * 256, 50 * 256]),
        "examples_after": pytest.approx([2048 / (1 - 0.95**8), 2048 / (1 - 0.98**8)]),
    }


def test_another_length_of_the_run_changes_the_weight_decay_of_adamw_alone():
    options = {"weight_decay": 0.1, "total": 10_000, "warmup": 300}
    same, longer = parsed(**options)["changes"], parsed(horizon=40_000, **options)["changes"]
    assert longer.pop("total")["after"] == 5000
    decay = longer.pop("weight_decay")
    # The share of the run that AdamW remembers: 1 / (lr * decay) steps of `total` steps, after over before.
    before, after = 1 / (3e-4 * 0.1) / 10_000, 1 / (longer["lr"]["after"] * decay["after"]) / 5000
    assert after / before == pytest.approx(4**-0.527, rel=2e-3)  # the map of the batch is exact to first order in lr
    assert "2505.13738" in decay["source"]
    assert longer == {name: change for name, change in same.items() if name in longer}
    sgd = {"optimizer": "sgd", "weight_decay": 0.1, "total": 10_000}
    assert parsed(horizon=40_000, **sgd)["changes"]["weight_decay"] == parsed(**sgd)["changes"]["weight_decay"]


def test_a_length_needs_that_of_the_tuned_run():
    result = run(horizon=40_000)
    assert result.exit_code == 2
    assert "--horizon needs total" in result.output


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
        ({"record": "run.jsonl", "total": "100"}, "--total is that of the record"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(options, word):
    result = run(**options)
    assert result.exit_code == 2, result.output
    assert word in result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.parametrize("left_out", ["--optimizer", "--lr", "--base-batch"])
def test_without_a_record_the_values_are_needed(left_out):
    words = [word for name, value in BASE.items() if name != left_out for word in (name, value)]
    result = CliRunner().invoke(cli.app, ["plan", *words])
    assert (result.exit_code, len(result.output.strip().splitlines())) == (2, 1)
    assert result.output.startswith(f"{left_out} is needed")

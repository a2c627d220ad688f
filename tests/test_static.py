"""Static values from a record: the mean gain of a plain float64 loop, the values by hand, and training with them."""

import json
import math
from statistics import fmean

import pytest
import torch

import anybatch

typer = pytest.importorskip("typer")
from typer.testing import CliRunner

from anybatch import cli

TOTAL, BASE = 1000.0, 256


def moments(x):
    """As training has them: the mean gradient falls fast and far, the variance slowly."""
    return 4 * math.exp(-x), 8 * math.exp(-x / 0.15) + 0.2


def write(path, *, scale=8, total=TOTAL, **options):
    """A run at one scale, whose gain is exact at each step."""
    config = {"base_batch": BASE, "total": total, "optimizer": "AdamW", "noise_factor": 1.0, "rule": "AdaScale()",
              "param_groups": [{"lr": 3e-4, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1}]}  # fmt: skip
    config |= options
    record = anybatch.RunRecord(path, config=config)
    tau, i = 0.0, 0
    while tau < total:
        v, m = moments(tau / total)
        gain = (v + m) / (v / scale + m)
        tau, i = tau + gain, i + 1
        record.write(anybatch.StepRecord(
            step=i, tau=tau, iterations=gain, scale=scale, count=8, raw_variance=v, raw_sqnorm=m, variance=v, sqnorm=m,
            gain=gain, lr=3e-4, lr_factor=gain**0.5, noise_scale=BASE * v / m, seconds=0.1, skipped=False,
        ))  # fmt: skip
    record.close()
    return path


def mean_gain(path, scale, *, horizon=0.01):
    """The mean gain from the lines of the file: a walk along tau with the averages' memory, in float64."""
    header, *lines = (json.loads(text) for text in path.read_text().splitlines())
    config = header.get("config", header)
    total, factor = config["total"], config["noise_factor"]
    known = [(line["tau"] - line["iterations"], line["raw_variance"], line["raw_sqnorm"]) for line in lines]
    tau, steps, moved, at = 0.0, 0, 1.0, 0
    v = m = weight = 0.0
    while tau < total:
        while at + 1 < len(known) and known[at + 1][0] <= tau:
            at += 1
        keep = min(math.exp(-moved / (horizon * total)), 1 - scale / 1000)
        v, m, weight = (keep * a + (1 - keep) * b for a, b in ((v, known[at][1]), (m, known[at][2]), (weight, 1.0)))
        gain = factor * v + m
        gain /= factor * v / scale + m
        gain = gain ** (1 - math.sqrt(0.5) ** (steps + 2)) if gain > 1 else gain  # the first rest on few samples
        moved = min(gain, total - tau)
        steps += moved / gain
        tau += moved
    return total / steps


def plan(record, *arguments):
    return CliRunner().invoke(cli.app, ["plan", "--record", str(record), *map(str, arguments)], env={"COLUMNS": "200"})


def parsed(record, *arguments):
    result = plan(record, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("recorded_at", [2, 8])
@pytest.mark.parametrize("batch", [64, 512, 2048, 8192, 32768])
@pytest.mark.parametrize("noise_factor", [1.0, 2.0])
def test_the_mean_gain_is_that_of_a_plain_loop(tmp_path, recorded_at, batch, noise_factor):
    path = write(tmp_path / "run.jsonl", scale=recorded_at, noise_factor=noise_factor)
    expected = mean_gain(path, batch / BASE)
    made = parsed(path, "--batch", batch)
    assert made["gain"]["value"] == pytest.approx(expected, rel=0.03)
    assert made["gain"]["low"] <= made["gain"]["value"] <= made["gain"]["high"]
    assert made["changes"]["total"]["after"] == pytest.approx(TOTAL / expected, rel=0.03, abs=2)


def test_every_value_follows_the_mean_gain(tmp_path):
    path = write(tmp_path / "run.jsonl")
    made = parsed(path, "--batch", 2048, "--ema", 0.999, "--warmup", 100)
    r, lr, wd = made["gain"]["value"], 3e-4, 0.1
    assert 2 < r < 8 == made["kappa"]
    after = {name: change["after"] for name, change in made["changes"].items()}
    assert after["lr"] == pytest.approx(math.sqrt(r) * lr)
    assert after["betas"] == pytest.approx([0.9**r, 0.99**r])
    assert after["eps"] == pytest.approx(1e-8 / math.sqrt(r))
    assert after["weight_decay"] == pytest.approx((1 - (1 - lr * wd) ** r) / (math.sqrt(r) * lr))
    assert after["ema_decay"] == pytest.approx(0.999**r)
    assert after["warmup"] == math.ceil(100 / r)
    assert (made["changes"]["total"]["before"], after["total"]) == (TOTAL, made["steps"]["value"])
    assert made["memory"]["ema_decay"]["examples_before"] == pytest.approx([1000 * BASE])
    assert made["memory"]["ema_decay"]["examples_after"] == pytest.approx([2048 / (1 - 0.999**r)])
    found = anybatch.forecast(path, [8]).scales[0].gain
    assert (found.value, found.low, found.high) == tuple(made["gain"][name] for name in ("value", "low", "high"))
    in_python = anybatch.scale_hyperparameters("adamw", found.value, lr=lr, betas=(0.9, 0.99), weight_decay=wd)
    assert in_python["lr"].after == after["lr"]


def test_sgd_keeps_its_momentum_and_says_how_good_that_is(tmp_path):
    group = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "dampening": 0, "nesterov": False}
    path = write(tmp_path / "run.jsonl", optimizer="SGD", param_groups=[group])
    made = parsed(path, "--batch", 2048)
    after = {name: change["after"] for name, change in made["changes"].items()}
    assert after["lr"] == pytest.approx(0.1 * made["gain"]["value"])
    assert (after["momentum"], after["weight_decay"]) == (0.9, 1e-4)
    assert "58 and 66 %" in made["how_good"]
    assert "three of four" in parsed(write(tmp_path / "adam.jsonl"), "--batch", 512)["how_good"]
    rms = write(tmp_path / "rms.jsonl", optimizer="RMSprop", param_groups=[{"lr": 0.1, "alpha": 0.99}])
    assert "were not measured" in parsed(rms, "--batch", 512)["how_good"]


def test_the_text_has_the_gain_the_memories_and_the_known_limit(tmp_path):
    result = plan(write(tmp_path / "run.jsonl"), "--batch", 2048)
    assert result.exit_code == 0, result.output
    assert "mean gain" in result.output
    assert "2505.23971" in result.output
    assert "Memory: 10 steps = 2,560, 100 steps = 25,600 examples; then" in result.output
    assert "gain" in next(line for line in result.output.splitlines() if line.startswith("betas:"))
    assert "kappa" not in next(line for line in result.output.splitlines() if line.startswith("betas:"))


def test_large_memories_are_counted_in_millions(tmp_path):
    path = write(tmp_path / "run.jsonl", base_batch=524288)
    assert "Memory: 10 steps = 5.24M, 100 steps = 52.4M examples" in plan(path, "--batch", 524288 * 8).output


def test_the_learning_rate_of_a_schedule_is_its_base(tmp_path):
    groups = [{"lr": 1e-6, "initial_lr": 3e-4, "betas": [0.9, 0.99], "weight_decay": 0.1},
              {"lr": 1e-6, "initial_lr": 6e-4, "betas": [0.9, 0.99], "weight_decay": 0.0}]  # fmt: skip
    made = parsed(write(tmp_path / "run.jsonl", param_groups=groups), "--batch", 2048)
    root = math.sqrt(made["gain"]["value"])
    assert made["changes"]["lr"] | {"why": "", "source": ""} == {"before": 3e-4, "after": pytest.approx(3e-4 * root),
                                                               "why": "", "source": ""}  # fmt: skip
    assert made["changes"]["lr of group 1"]["after"] == pytest.approx(6e-4 * root)
    assert made["changes"]["weight_decay of group 1"]["after"] == 0
    assert "betas of group 1" not in made["changes"]


def test_an_option_is_stronger_than_the_record(tmp_path):
    path = write(tmp_path / "run.jsonl")
    assert parsed(path, "--batch", 512, "--lr", 1e-3)["changes"]["lr"]["before"] == 1e-3
    other = parsed(path, "--batch", 512, "--optimizer", "sgd", "--lr", 0.1)
    assert set(other["changes"]) == {"lr", "total"}


def test_a_record_that_counts_base_batches(tmp_path):
    path = write(tmp_path / "run.jsonl", base_batch=None)
    known = parsed(write(tmp_path / "known.jsonl"), "--batch", 2048)
    made = parsed(path, "--batch", 2048, "--base-batch", 256)
    assert made["gain"] == known["gain"]


@pytest.mark.parametrize(
    ("config", "arguments", "word"),
    [
        ({"base_batch": None}, (), "--base-batch is needed"),
        ({}, ("--base-batch", "128"), "--base-batch is 128"),
        ({"optimizer": None}, (), "--optimizer is needed"),
        ({"optimizer": "Muon, AdamW"}, (), "--optimizer is needed"),
        ({}, ("--optimizer", "sgd"), "--lr is needed"),
        ({"optimizer": "Lion"}, ("--lr", "1e-4"), "--optimizer must be one of"),
        ({}, ("--total", "100"), "--total is that of the record"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, config, arguments, word):
    result = plan(write(tmp_path / "run.jsonl", **config), "--batch", 2048, *arguments)
    assert (result.exit_code, len(result.output.strip().splitlines())) == (2, 1), result.output
    assert result.output.startswith(word)


# ---- training with them ----

B = 8


def task(seed):
    """A network of tanh units that learns another one from noisy values; draws of examples, and its error without."""
    teacher = torch.nn.Sequential(torch.nn.Linear(12, 24), torch.nn.Tanh(), torch.nn.Linear(24, 4))
    with torch.no_grad():
        for p in teacher.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.7)
    draws = torch.Generator().manual_seed(seed)

    def draw(n):
        x = torch.randn(n, 12, generator=draws)
        with torch.no_grad():
            return x, teacher(x) + torch.randn(n, 4, generator=draws) * 0.7

    held_out = torch.randn(4000, 12, generator=torch.Generator().manual_seed(99))
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(12, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))
    return net, draw, lambda: torch.nn.functional.mse_loss(net(held_out), teacher(held_out)).item()


TUNED = {
    "AdamW": {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0.05},
    "SGD": {"lr": 0.05, "momentum": 0.9},
}


def measured(seed, scale, total, name, *, parts, record=None):
    """The final error with a controller."""
    net, draw, error = task(seed)
    optimizer = getattr(torch.optim, name)(net.parameters(), **TUNED[name])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / total)
    controller = anybatch.attach(
        optimizer,
        model=net,
        scheduler=schedule,
        total=total,
        base_batch=B,
        micro_batch=scale * B / parts,
        record=record,
    )
    while not controller.done:
        for x, y in anybatch.split(draw(scale * B), parts):
            (torch.nn.functional.mse_loss(net(x), y) / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
    controller.detach()
    return error()


def bare(seed, scale, name, values, *, steps):
    """The final error with constants and the optimizer alone."""
    net, draw, error = task(seed)
    optimizer = getattr(torch.optim, name)(net.parameters(), **values)
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = values["lr"] * (1 - i / steps)
        x, y = draw(scale * B)
        torch.nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return error()


@pytest.mark.filterwarnings("ignore:At scale .* an example is worth:anybatch.AnybatchWarning")
@pytest.mark.parametrize(
    ("name", "total", "scale", "most"),
    [
        ("AdamW", 600, 8, 1.1),
        ("AdamW", 600, 32, 1.2),
        ("AdamW", 2400, 8, 1.05),
        ("AdamW", 2400, 32, 1.05),
        ("SGD", 600, 8, 2.5),
        ("SGD", 600, 32, 2.5),
    ],
)
def test_static_values_train_between_the_fixed_rule_and_the_measured_gain(tmp_path, name, total, scale, most):
    """From one record at scale 1; printed are means of 4 seeds. In few steps a measured gain ends lower."""
    path, seeds, values = tmp_path / "run.jsonl", range(4), TUNED[name]
    measured(100, 1, total, name, parts=2, record=path)
    changes = parsed(path, "--batch", scale * B)["changes"]
    static = {name: changes[name]["after"] for name in {"lr", "betas", "eps", "weight_decay", "momentum"} & {*changes}}
    rule = {name: c.after for name, c in anybatch.scale_hyperparameters(name, scale, **values).items()}
    steps = round(changes["total"]["after"])
    ends = {
        "measured": fmean(measured(seed, scale, total, name, parts=scale) for seed in seeds),
        "static": fmean(bare(seed, scale, name, static, steps=steps) for seed in seeds),
        "rule": fmean(bare(seed, scale, name, rule, steps=total // scale) for seed in seeds),
        "unscaled": fmean(bare(seed, scale, name, values, steps=steps) for seed in seeds),
    }
    print(name, total, scale, steps, {name: round(end, 3) for name, end in ends.items()})
    assert ends["static"] < most * ends["measured"]
    assert not ends["rule"] <= ends["static"]  # the rule may end in nan
    assert ends["static"] < 0.95 * ends["unscaled"]

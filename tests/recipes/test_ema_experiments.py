"""The EMA paper's experiments at reduced sizes: each runs, and its central law holds."""

import json
import math
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

import anybatch
from recipes.ema import __main__ as ema
from recipes.ema import byol, parabola, pseudo, supervised
from recipes.ema import nets as ema_nets
from recipes.ema import runs as ema_runs
from recipes.ema import train as ema_train
from recipes.ema.encoder import SpeechTransformer
from recipes.ema.images import Folder
from recipes.ema.resnet_v2 import PreActivationBottleneck, imagenet_resnet_v2
from recipes.ema.speech import Speech
from recipes.ema.stream import Stream
from recipes.ema.train import Config
from recipes.images import made as made_images
from recipes.images.cifar10 import Cifar10
from recipes.images.imagenet import ImageNet
from recipes.images.resnet import imagenet_resnet_v1
from recipes.speech import made as made_speech

# The parabola


def means(config, kappa, *, order, rule):
    """The recursion of the means, in plain floats: the noise has mean 0 and the parabola is linear in theta."""
    decay = config.decay**kappa if rule else config.decay
    theta = zeta = 1.0
    path = []
    for _ in range(config.total // kappa):
        moved = theta * (1 - config.rate * kappa)
        zeta = decay * zeta + (1 - decay) * (theta if order == "before" else moved)
        theta = moved
        path.append((theta, zeta))
    return zip(*path)


@pytest.mark.parametrize("order", parabola.ORDERS)
@pytest.mark.parametrize("rule", [True, False])
def test_the_means_follow_the_plain_recursion(order, rule):
    config = parabola.Config(total=128, runs=2000)
    theta, zeta = parabola.path(config, 4, order=order, rule=rule)
    expected_theta, expected_zeta = means(config, 4, order=order, rule=rule)
    deviation = config.rate * math.sqrt(1.5 * config.total / config.runs)  # of the mean of theta, from above
    assert (theta - torch.tensor(expected_theta)).abs().max() < 4 * deviation
    assert (zeta - torch.tensor(expected_zeta)).abs().max() < 4 * deviation


def test_the_parabolas_law():
    rows = parabola.errors(parabola.Config(runs=500, scales=(1, 2, 8)))
    assert [(row["order"], row["kappa"]) for row in rows] == [(o, k) for o in parabola.ORDERS for k in (2, 8)]
    for row in rows:
        assert row["rule"] <= (1.5 if row["order"] == "before" else 1.7) * row["target"]
        assert row["off"] >= 10 * row["rule"]


def test_the_parabola_under_adam_is_the_plain_loop():
    """beta**kappa, sqrt(kappa) and rho**kappa written out, in tensors of the runs."""
    config = replace(parabola.CONFIGS["adam"], total=64, runs=50)
    theta, zeta = parabola.path(config, 8, order="before", rule=True)
    noise = torch.Generator().manual_seed(config.seed)
    w = torch.ones(50, dtype=torch.float64)
    average, m, v = w.clone(), torch.zeros_like(w), torch.zeros_like(w)
    for t in range(1, 9):
        drawn = sum(torch.randn(50, generator=noise, dtype=torch.float64) for _ in range(8))
        g = w + 10 * (w**2 / 2 + 1).sqrt() * drawn / 8
        m, v = 0.9**8 * m + (1 - 0.9**8) * g, 0.99**8 * v + (1 - 0.99**8) * g**2
        average = 0.99**8 * average + (1 - 0.99**8) * w
        w = w - 0.1 * math.sqrt(8) * (m / (1 - 0.9 ** (8 * t))) / ((v / (1 - 0.99 ** (8 * t))).sqrt() + 1e-8)
        assert theta[t - 1].item() == pytest.approx(w.mean().item(), rel=1e-6)
        assert zeta[t - 1].item() == pytest.approx(average.mean().item(), rel=1e-6)


@pytest.mark.parametrize("order", parabola.ORDERS)
def test_the_error_term_is_that_of_model_ema(order):
    for kappa in (1, 2, 8, 32):
        measured = parabola.measured_term(parabola.Config(), kappa, order)
        assert measured == pytest.approx(parabola.term(parabola.Config(), kappa, order), abs=1e-12)


def test_the_parabolas_results_are_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(parabola.CONFIGS, "small", parabola.Config(total=16, runs=10, scales=(1, 2, 4)))
    rows = parabola.main(["--out", str(tmp_path)])
    assert (tmp_path / "ema_parabola.png").stat().st_size > 10_000
    monkeypatch.setattr(parabola, "errors", lambda config: pytest.fail("computed again"))
    before = (tmp_path / "ema_parabola.json").read_bytes()
    assert parabola.main(["--out", str(tmp_path)]) == rows
    monkeypatch.setitem(parabola.CONFIGS, "small", parabola.Config(total=32, runs=10, scales=(1, 2, 4)))
    with pytest.raises(SystemExit, match="another configuration: name another --json"):
        parabola.main(["--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="another configuration"):
        parabola.main(["--config", "adam", "--json", str(tmp_path / "ema_parabola.json"), "--out", str(tmp_path)])
    assert (tmp_path / "ema_parabola.json").read_bytes() == before


def test_an_experiment_is_called_by_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(parabola.CONFIGS, "small", parabola.Config(total=16, runs=10, scales=(1, 2, 4)))
    ema.main(["parabola", "--out", str(tmp_path)])
    assert (tmp_path / "ema_parabola.json").exists()
    with pytest.raises(SystemExit):
        ema.main(["byol", "--help"])
    assert "python -m recipes.ema.byol" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        ema.main(["adascale"])


@pytest.mark.parametrize("name", ["lars", "dino"])
def test_studies_of_one_kappa_run_by_their_names(name, tmp_path, capsys):
    ema.main([name, "--seeds", "1", "--scales", "4", "--total", "4", "--out", str(tmp_path)])
    runs = json.loads((tmp_path / f"ema_{name}.json").read_text())["runs"]
    arms = ["rule", "off", "adascale", *(["linear"] if name == "lars" else [])]
    assert [(run["arm"], run["scale"]) for run in runs] == [("rule", 1), *((arm, 4) for arm in arms)]
    assert (tmp_path / f"ema_{name}.png").stat().st_size > 10_000
    assert "teacher accuracy" in capsys.readouterr().out


# The digits, supervised


def study(module, tmp_path, *arguments, **changes):
    return ema_runs.main(replace(module.STUDY, **changes), ["--out", str(tmp_path), *arguments])


def test_on_the_clock_the_ema_has_the_same_curve(tmp_path):
    arms = {"rule": (1,), "off": (8,), "adascale": (8,)}
    arguments = ["--seeds", "2", "--scales", "1", "8", "--total", "640"]
    results = study(supervised, tmp_path, *arguments, scales=arms)
    assert supervised.deviation(results, "adascale", 8) < 0.06  # of 2 short runs; 3 % with all, see docs/ema.md
    assert supervised.deviation(results, "off", 8) > 0.5
    assert supervised.points(results).count("\n") == 4


def test_kappa_1_which_all_wait_for_is_drawn_alone(tmp_path):
    study(supervised, tmp_path, "--seeds", "1", "--scales", "1", "--total", "16")
    assert (tmp_path / "ema_supervised.png").stat().st_size > 10_000


def test_eight_points():
    assert supervised.eight(torch.arange(1, 17)).tolist() == [2, 4, 6, 8, 10, 12, 14, 16]
    assert supervised.eight(torch.arange(1, 9)).tolist() == list(range(1, 9))


# A teacher


def flat(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


class Watched(anybatch.ModelEMA):
    """Notes every move, and the averages before and after it."""

    moves: list

    def __init__(self, model, decay, **options):
        self.watched = model
        super().__init__(model, decay, **options)

    def update(self, iterations=1.0):
        before = self.weights()
        super().update(iterations)
        self.moves.append((iterations, before, self.weights()))

    def weights(self):
        with self.applied():
            return flat(self.watched)


@pytest.mark.parametrize(
    ("arm", "scale", "expected"),
    [("rule", 8, 8.0), ("off", 8, 1.0), ("adascale", 8, None), ("rule", 0.5, 0.5), ("adascale-scale", 8, 8.0)],
)
@pytest.mark.parametrize("module", [byol, pseudo])
def test_the_teacher_moves_by_the_power_of_its_decay(module, arm, scale, expected, monkeypatch):
    config = replace(module.CONFIGS["small"], total=24, evaluations=4, points=4)
    monkeypatch.setattr(anybatch, "ModelEMA", Watched)
    monkeypatch.setattr(Watched, "moves", [], raising=False)
    weights = []
    loss = module.Digits.loss

    def noting(self, model, batch):
        weights.append(flat(model))
        return loss(self, model, batch)

    monkeypatch.setattr(module.Digits, "loss", noting)
    found = ema_train.train(module.Digits(config), arm, scale=scale, seed=0)
    assert len(Watched.moves) == found["steps"]
    parts = len(weights) // found["steps"]
    iterations = [k for k, _, _ in Watched.moves]
    if expected is None:
        assert all(1 <= k <= 8 for k in iterations)
        assert sum(iterations) >= config.total
    else:
        assert iterations == [expected] * found["steps"]
    for i in range(found["steps"] - 1):
        k, before, after = Watched.moves[i]
        stepped = weights[(i + 1) * parts]  # what the next step's loss sees
        kept = config.decay**k
        torch.testing.assert_close(after, kept * before + (1 - kept) * stepped, rtol=1e-5, atol=1e-6)


def test_the_teacher_sees_no_more_at_a_time_than_the_student(monkeypatch):
    """With BatchNorm it would be another teacher at every batch, and at full size it would not fit."""
    config = replace(byol.CONFIGS["small"], total=8, largest=16, evaluations=1, points=1)
    sizes, targets, loss = {"teacher": [], "student": []}, byol.Digits.targets, byol.Digits.loss
    seen = lambda who, batch: sizes[who].append(len(batch[0]))  # noqa: E731
    monkeypatch.setattr(byol.Digits, "targets", lambda *given: seen("teacher", given[2]) or targets(*given))
    monkeypatch.setattr(byol.Digits, "loss", lambda *given: seen("student", given[2]) or loss(*given))
    ema_train.train(byol.Digits(config), "rule", scale=2, seed=0)
    assert sizes == {"teacher": [16] * 32, "student": [16] * 32}  # four steps of 128


def mean_loss(experiment, arm, scale, monkeypatch):
    """Losses of a run, in the order of its backwards."""
    losses = []
    loss = type(experiment).loss

    def noting(self, model, batch):
        value = loss(self, model, batch)
        losses.append(value.item())
        return value

    monkeypatch.setattr(type(experiment), "loss", noting)
    found = ema_train.train(experiment, arm, scale=scale, seed=0)
    return found, losses


def test_byol_learns_and_does_not_collapse(monkeypatch):
    config = replace(byol.CONFIGS["small"], total=256, decay=0.98)
    found, losses = mean_loss(byol.Digits(config), "rule", 2, monkeypatch)
    assert found["steps"] == 128
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert found["teacher_accuracy"][-1] > found["teacher_accuracy"][0]
    assert found["teacher_spread"][-1] > 0.05


def test_pseudo_labels_need_the_rule(tmp_path):
    arms = {"rule": (1, 8), "off": (8,)}
    results = study(pseudo, tmp_path, "--seeds", "2", "--scales", "1", "8", scales=arms)
    base, on, off = (results.ends(*pair) for pair in (("rule", 1), ("rule", 8), ("off", 8)))
    assert min(base) > 90
    assert sum(on) / 2 > sum(base) / 2 - 2.5
    assert results.curve("off", 8)[7] < results.curve("rule", 8)[7] - 10  # at half of the run
    assert sum(off) < sum(on)


def test_under_adamw_pseudo_labels_need_the_rule_too():
    experiment = pseudo.make(replace(pseudo.CONFIGS["adamw"], total=768), Namespace(config="adamw"))
    on, off = (ema_train.train(experiment, arm, scale=8, seed=0)["student_accuracy"] for arm in ("rule", "off"))
    assert on[7] > off[7] + 5  # at half of the run
    assert on[-1] > off[-1] + 2


def test_byol_runs_end_to_end(tmp_path):
    arguments = ["--seeds", "2", "--scales", "1", "8", "--total", "32"]
    results = study(byol, tmp_path, *arguments, progressive=((1, 2, 4, 8),))
    saved = json.loads((tmp_path / "ema_byol.json").read_text())
    assert len(saved["runs"]) == len(results.study.plan(results.config)) == 2 * 5
    assert [run["steps"] for run in results.of("rule", (1, 2, 4, 8))] == [15, 15]  # 8 + 4 + 2 + 1
    assert (tmp_path / "ema_byol.png").stat().st_size > 10_000


# Runs, and what is kept of them


def test_runs_are_kept_and_another_configuration_is_refused(tmp_path, monkeypatch):
    arguments = ["--seeds", "1", "--scales", "1", "8", "--total", "16"]
    first = study(pseudo, tmp_path, *arguments).runs
    monkeypatch.setattr(ema_runs, "train", lambda *_, **__: pytest.fail("trained again"))
    assert study(pseudo, tmp_path, *arguments).runs == first
    with pytest.raises(SystemExit, match="another configuration"):
        study(pseudo, tmp_path, "--seeds", "1", "--scales", "1", "--total", "32")


def test_two_processes_write_to_one_file(tmp_path, monkeypatch):
    """While one trains at kappa 8, another trains at 4: what one has finished is not overwritten by the other."""
    train, trained = ema_runs.train, []

    def meanwhile(experiment, arm, *, scale, seed, checkpoint):
        trained.append((arm, scale))
        if len(trained) == 1:
            study(pseudo, tmp_path, "--seeds", "1", "--scales", "4", "--total", "16")
        return train(experiment, arm, scale=scale, seed=seed, checkpoint=checkpoint)

    monkeypatch.setattr(ema_runs, "train", meanwhile)
    study(pseudo, tmp_path, "--seeds", "1", "--scales", "4", "8", "--total", "16")
    runs = json.loads((tmp_path / "ema_pseudo.json").read_text())["runs"]
    found = [(run["arm"], run["scale"]) for run in runs]
    pairs = [("rule", 1), *((arm, kappa) for arm in ("rule", "off", "adascale") for kappa in (4, 8))]
    assert sorted(found) == sorted(pairs)
    assert sorted(trained) == sorted([("rule", 1), *pairs])  # the one that both had begun, twice; no other


def test_runs_on_other_data_or_of_other_versions_are_not_mixed(tmp_path, monkeypatch):
    arguments = ["--seeds", "1", "--scales", "1", "--total", "16"]
    study(pseudo, tmp_path, *arguments)
    with pytest.raises(SystemExit, match="another configuration"):
        study(pseudo, tmp_path, *arguments, "--data", str(tmp_path))
    monkeypatch.setattr(ema_runs, "VERSIONS", ema_runs.VERSIONS | {"torch": "0"})
    study(pseudo, tmp_path, *arguments)  # nothing is missing: the figure is drawn
    with pytest.raises(SystemExit, match="'torch': '0'"):
        study(pseudo, tmp_path, "--seeds", "2", "--scales", "1", "--total", "16")


def test_runs_from_before_a_field_was_added_are_still_known(tmp_path, monkeypatch):
    arguments = ["--seeds", "1", "--scales", "1", "--total", "16"]
    study(pseudo, tmp_path, *arguments)
    path = tmp_path / "ema_pseudo.json"
    saved = json.loads(path.read_text())
    del saved["config"]["trust"], saved["config"]["final_decay"]
    path.write_text(json.dumps(saved))
    monkeypatch.setattr(ema_runs, "train", lambda *_, **__: pytest.fail("trained again"))
    study(pseudo, tmp_path, *arguments)
    del saved["config"]["rate"]  # which has no default
    path.write_text(json.dumps(saved))
    with pytest.raises(SystemExit, match="another configuration"):
        study(pseudo, tmp_path, *arguments)


def test_kappa_1_is_always_run_and_8_need_not_be(tmp_path):
    results = study(pseudo, tmp_path, "--seeds", "1", "--scales", "4", "--total", "16")
    assert results.pairs() == [("rule", 1), ("rule", 4), ("off", 4), ("adascale", 4)]
    assert (tmp_path / "ema_pseudo.png").stat().st_size > 10_000


@pytest.mark.filterwarnings("ignore:10 steps in a row")
@pytest.mark.parametrize("arm", ["adascale", "rule"])
def test_a_run_that_takes_no_step_any_more_ends(arm):
    config = replace(pseudo.CONFIGS["small"], rate=1e30, total=64)
    found = ema_train.train(pseudo.Digits(config), arm, scale=8, seed=0)
    assert found["steps"] < 64
    assert len(found["tau"]) == len(found["teacher_loss"]) == 16
    assert not math.isfinite(found["teacher_loss"][-1])


@pytest.mark.parametrize("module", [pseudo, supervised])
def test_diverged_runs_are_in_the_table_and_the_figure(module, tmp_path):
    results = study(module, tmp_path, "--seeds", "2", "--scales", "8", "--total", "16")
    for run in results.of("adascale", 8):
        run |= dict.fromkeys((name for name in run if "_" in name), [math.nan] * 16)
    assert "nan ± nan" in ema_runs.table(results)
    module.STUDY.draw(results, tmp_path / "again.png")
    assert (tmp_path / "again.png").stat().st_size > 10_000


def test_welch_against_scipy():
    from scipy.stats import ttest_ind

    a, b = [1.0, 2.0, 4.0, 3.5], [2.5, 5.0, 4.0]
    assert ema_runs.welch(a, b) == pytest.approx(ttest_ind(a, b, equal_var=False, alternative="less").pvalue)
    assert ema_runs.welch([1.0, 1.0], [2.0, 2.0]) == 0
    assert ema_runs.welch([2.0, 2.0], [1.0, 1.0]) == 1


def test_scales_along_a_progressive_run():
    assert [ema_train.scale_at((1, 2, 4, 8), share) for share in (0, 0.24, 0.25, 0.5, 0.75, 1.0)] == [1, 1, 2, 4, 8, 8]
    assert ema_train.scale_at(32, 0.5) == 32


def test_backwards_of_a_step():
    ada, fixed, config = (
        ema_train.ARMS["adascale"],
        ema_train.ARMS["rule"],
        Config(base_batch=16, total=1, decay=0.9, rate=0.1, largest=64),
    )
    counts = [ema_train.backwards(how, k, round(16 * k), config) for how in (fixed, ada) for k in (0.25, 1, 4, 32)]
    assert counts == [1, 1, 1, 8, 2, 2, 4, 8]


# The full configurations' code, on made data in the real formats


SMALL = Config(base_batch=8, total=4, decay=0.9, rate=0.01, largest=8, evaluations=2, points=2)


def finite(found):
    return all(math.isfinite(value) for name in found if name.endswith(("_accuracy", "_loss")) for value in found[name])


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar")
    made_images.TRAIN["least"] = 40
    made_images.cifar10(folder, size="least")
    return folder


def made_by(module, name, data):
    """What `--config name --data data` trains."""
    return module.make(module.CONFIGS[name], Namespace(config=name, data=data, device="cpu"))


def test_no_example_is_left_out_whatever_is_taken_at_a_time():
    numbers = torch.arange(40)
    stream = Stream(iter(zip(numbers.split(4), (10 * numbers).split(4))))
    taken = [stream.take(n) for n in (3, 4, 1, 12, 5, 2)]
    assert [len(x) for x, _ in taken] == [3, 4, 1, 12, 5, 2]
    assert torch.cat([x for x, _ in taken]).tolist() == list(range(27))
    assert all(torch.equal(10 * x, y) for x, y in taken)


def test_a_batch_may_have_any_number_of_photographs(cifar):
    """Taken three at a time, they are those that come eight at a time: each once in an epoch of 40."""
    photographs = supervised.Photographs(SMALL, Cifar10(cifar, tiny=True), workers=0)
    for size in (3, 8):
        generator = torch.Generator().manual_seed(0)
        batches = [photographs.batch(size, generator) for _ in range(-(-40 // size))]
        images, labels = (torch.cat(parts)[:40] for parts in zip(*batches))
        if size == 3:
            first = images, labels
    assert torch.equal(first[0], images)
    assert torch.equal(first[1], labels)


def test_cifar10_from_its_binary_files(cifar):
    assert isinstance(made_by(supervised, "full", cifar).task, Cifar10)
    found = ema_train.train(
        supervised.Photographs(SMALL, Cifar10(cifar, tiny=True), workers=0), "adascale", scale=2, seed=0
    )
    assert 2 <= found["steps"] <= 4
    assert finite(found)


@pytest.mark.parametrize(("name", "network"), list(byol.NETWORKS.items()))
def test_byol_from_an_image_folder(name, network, tmp_path, monkeypatch):
    monkeypatch.setitem(made_images.TRAIN, "least", 200)
    made_images.image_folder(tmp_path, size="least")
    config = replace(SMALL, base_batch=32, largest=32, optimizer=byol.CONFIGS[name].optimizer)
    experiment = Folder(config, data=tmp_path, network=network, tiny=True, workers=0)
    assert made_by(byol, name, tmp_path).network == network
    found = ema_train.train(experiment, "rule", scale=(1, 2), seed=0)
    assert found["steps"] == 3
    assert finite(found)


def test_byol_goes_from_4096_to_24576_at_once_and_progressively():
    for name in byol.NETWORKS:
        config = byol.CONFIGS[name]
        plan = byol.STUDY.plan(config)
        assert (config.base_batch, max(config.scales) * config.base_batch) == (4096, 24_576)
        assert ("rule", (1, 6), 0) in plan
        assert ("rule", (4, 8, 16, 32), 0) not in plan
    assert ("rule", (1, 6), 0) not in byol.STUDY.plan(byol.CONFIGS["small"])


def test_the_teachers_forward_leaves_batch_norms_running_statistics():
    network, _ = ema_nets.resnet18(width=8, blocks=1, batch_norm=True)
    norm = next(module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d))
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad(), ema_nets.unmoved_statistics(network):
        said = network(x)
    assert norm.running_mean.abs().max() == 0
    with torch.no_grad():
        torch.testing.assert_close(network(x), said)  # by the batch's own statistics, both times
    assert norm.running_mean.abs().max() > 0


def test_supervised_imagenet_has_resnet_50_v2(tmp_path, monkeypatch):
    monkeypatch.setitem(made_images.TRAIN, "least", 40)
    made_images.image_folder(tmp_path, size="least")
    experiment = made_by(supervised, "imagenet", tmp_path)
    with torch.device("meta"):
        network, whole, v1 = experiment.model(), imagenet_resnet_v2(1000), imagenet_resnet_v1(1000)
    assert network[-1].out_features == len(experiment.task.classes)
    counts = [sum(p.numel() for p in net.parameters() if p.ndim == 4) for net in (whole, v1)]
    assert counts[0] == counts[1] == 25_557_032 - 2_049_000 - 53_120  # torchvision's ResNet-50, its head, its norms
    assert whole(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)
    task = ImageNet(tmp_path, tiny=True)
    network = lambda: imagenet_resnet_v2(10, width=8, depths=(1, 1, 1, 1))  # noqa: E731
    small = supervised.Photographs(SMALL, task, network=network, workers=0)
    assert finite(ema_train.train(small, "rule", scale=2, seed=0))


def test_what_a_v2_block_adds_ends_without_an_activation():
    block = PreActivationBottleneck(8, 2, stride=1).eval()
    x = torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        block.convs[2].weight.zero_()
        torch.testing.assert_close(block(x), x)  # negative values pass


@torch.no_grad()
def test_padding_has_no_influence_on_the_speech_transformer():
    torch.manual_seed(0)
    model = SpeechTransformer(width=16, layers=2, heads=2, inner=32).eval()
    x = torch.randn(2, 21, 161)
    x[1, 13:] = 0
    said, sizes = model(x, torch.tensor([21, 13]))
    alone, size = model(x[1:, :13], torch.tensor([13]))
    assert sizes.tolist() == [11, 7]
    torch.testing.assert_close(said[:7, 1], alone[:, 0], rtol=1e-4, atol=1e-5)
    assert size.tolist() == [7]
    assert said.exp().sum(2).flatten().tolist() == pytest.approx([1.0] * 22, abs=1e-5)


def test_pseudo_labels_for_speech_with_a_transformer(tmp_path):
    made_speech.write(tmp_path, size="tiny", seed=0)
    whole = made_by(pseudo, "transformer", tmp_path)
    with torch.device("meta"):
        model = whole.model()
    assert 38e6 < sum(p.numel() for p in model.parameters()) < 40e6
    config = replace(SMALL, base_batch=2, total=2, optimizer="adamw", evaluations=1, points=1)
    experiment = Speech(config, data=tmp_path, transformer=True, tiny=True, workers=0)
    assert finite(ema_train.train(experiment, "rule", scale=2, seed=0))


def test_pseudo_labels_for_speech(tmp_path):
    made_speech.write(tmp_path, size="tiny", seed=0)
    experiment = Speech(replace(SMALL, base_batch=2, total=2), data=tmp_path, tiny=True, workers=0)
    assert isinstance(made_by(pseudo, "full", tmp_path), Speech)
    model = experiment.model()
    generator = torch.Generator().manual_seed(0)
    batch = experiment.batch(4, generator)
    assert [len(part) for part in batch] == [4] * 6
    labelled = experiment.targets(model, batch)
    assert model.training
    assert len(labelled) == 8
    assert torch.isfinite(experiment.loss(model, labelled))
    assert finite(ema_train.train(experiment, "adascale", scale=2, seed=0))


def test_the_encoders_full_sizes():
    with torch.device("meta"):
        network, features = ema_nets.resnet18()
        transformer, width = ema_nets.vit()
    assert (features, width) == (512, 384)
    assert sum(p.numel() for p in network.parameters()) == 11_176_512  # torchvision's ResNet-18 without its head
    assert sum(p.numel() for p in transformer.parameters()) == 21_665_664 - 384 - 384  # ViT-S/16: no class token
    assert network(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 512)
    assert transformer(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 384)

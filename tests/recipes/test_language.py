"""The language model: counts of parameters, files of tokens, the text's own tokens, and a training at any batch."""

import json
import math
import pickle
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from distributed import language_workers as workers
from distributed import launch
from tokenizers import Tokenizer

import anybatch
from recipes.language import made, text
from recipes.language import task as language
from recipes.language.model import GPT, GPT2_TOKENS, SHAPES
from recipes.language.task import Language
from recipes.language.tokens import Windows, read_folder, read_shard
from recipes.train import Training, main, run
from recipes.training import parallel
from recipes.training.once import prepared
from recipes.training.options import Options
from recipes.training.task import DataError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    made.make(folder)
    return folder


def llm_c(tokens, *, magic=20240520, version=1, stated=None, width="<u2"):
    """A file of llm.c: 256 numbers of four bytes, then the tokens."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if stated is None else stated
    return header.tobytes() + np.array(tokens, width).tobytes()


@pytest.fixture
def short_test(monkeypatch):
    monkeypatch.setattr(language, "VALIDATION", 64 * 64)


def plain(tokens):
    """A file of nanoGPT: low byte first, nothing else."""
    return b"".join(bytes((token % 256, token // 256)) for token in tokens)


# ---- the model ----


@pytest.mark.parametrize(("size", "published"), [("124M", 124_439_808), ("350M", 354_823_168)])
def test_as_many_parameters_as_gpt2(size, published):
    with torch.device("meta"):
        model = GPT(GPT2_TOKENS, SHAPES[size])
    assert sum(p.numel() for p in model.parameters()) == published


def test_the_vocabulary_of_the_model_is_filled_up(data):
    """To 512 = 4 * 128, and GPT-2's to 50,304."""
    task = Language(data, tiny=True, vocabulary=500)
    assert task.vocabulary == 500
    assert task.model().tokens.num_embeddings == 512
    assert math.ceil(GPT2_TOKENS / language.ROWS) * language.ROWS == 50_304


def test_later_tokens_leave_earlier_logits_and_every_earlier_one_matters():
    torch.manual_seed(0)
    model = GPT(40, SHAPES["tiny"]).double()
    tokens = torch.randint(40, (2, 9))
    before = model(tokens)
    for position in range(9):
        other = tokens.clone()
        other[:, position] = (other[:, position] + 1) % 40
        after = model(other)
        assert torch.equal(after[:, :position], before[:, :position])
        assert (after[:, position:] != before[:, position:]).any(-1).all()


def test_a_block_by_plain_loops():
    torch.manual_seed(1)
    shape = replace(SHAPES["tiny"], heads=2, width=4)
    block = GPT(7, shape).blocks[0].double()
    for p in block.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(1, 3, 4, dtype=torch.float64)

    def normed(row, norm):
        centred = [v - sum(row) / 4 for v in row]
        size = math.sqrt(sum(v * v for v in centred) / 4 + 1e-5)
        return [c / size * w + b for c, w, b in zip(centred, norm.weight.tolist(), norm.bias.tolist())]

    def through(row, layer):
        return [sum(w * v for w, v in zip(ws, row)) + b for ws, b in zip(layer.weight.tolist(), layer.bias.tolist())]

    rows = x[0].tolist()
    qkv = [through(normed(row, block.norms[0]), block.qkv) for row in rows]
    out = []
    for i, row in enumerate(rows):
        mixed = []
        for head in range(2):
            q, k, v = (slice(4 * part + 2 * head, 4 * part + 2 * head + 2) for part in range(3))
            score = [sum(a * b for a, b in zip(qkv[i][q], qkv[j][k])) / math.sqrt(2) for j in range(i + 1)]
            share = [math.exp(s) / sum(map(math.exp, score)) for s in score]
            mixed += [sum(share[j] * qkv[j][v][c] for j in range(i + 1)) for c in range(2)]
        row = [a + b for a, b in zip(row, through(mixed, block.mixed))]
        inner = through(normed(row, block.norms[1]), block.inner)
        gelu = [u / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))) for u in inner]
        out.append([a + b for a, b in zip(row, through(gelu, block.outer))])
    torch.testing.assert_close(block(x)[0].detach(), torch.tensor(out, dtype=torch.float64))


def test_one_graph_compiles_all_of_it():
    torch.manual_seed(0)
    model, tokens = GPT(40, SHAPES["tiny"]), torch.randint(40, (2, 9))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), model(tokens))


# ---- files of tokens ----


@pytest.mark.parametrize("form", [plain, llm_c])
def test_both_formats_are_read(form, tmp_path):
    """Windows of four tokens, each with the one after it, over two files; what is too short for one is left out."""
    first, second = [0, 1, 256, 513, 65535, 5, 6, 7, 8, 9, 10], [20, 21, 22, 23, 24]
    (tmp_path / "text_train_000001.bin").write_bytes(form(first))
    (tmp_path / "text_train_000002.bin").write_bytes(form(second))
    (tmp_path / "text_val_000000.bin").write_bytes(form(second))
    windows = Windows(read_folder(tmp_path, "train"), context=4, vocabulary=2**16)
    assert [row.tolist() for row in windows] == [first[0:5], first[4:9], second[0:5]]
    assert windows[0].dtype == torch.long
    assert [row.tolist() for row in Windows(read_folder(tmp_path, "val"), context=4, vocabulary=25)] == [second]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (b"\1\2\3", "3 bytes"),
        (llm_c(range(9), magic=20240801, version=7, width="<u4"), "tokens of four bytes"),
        (llm_c(range(9), version=2), "version 2"),
        (llm_c(range(9), stated=10), "says that it has 10 tokens, and has 9"),
        (llm_c(range(9), stated=8), "says that it has 8 tokens, and has 9"),
    ],
)
def test_a_file_that_is_none_is_named(content, message, tmp_path):
    path = tmp_path / "train.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"train\.bin .*{message}"):
        read_shard(path)


def test_a_file_to_train_and_to_test_on_is_refused(tmp_path):
    """By its name it was both, without a word: what it is trained on would be what it is tested on."""
    for name in ("medieval_train_000001.bin", "val.bin"):
        (tmp_path / name).write_bytes(plain(range(9)))
    for kind in ("train", "val"):
        with pytest.raises(DataError, match=r"medieval_train_000001\.bin is to train on and to test on"):
            read_folder(tmp_path, kind)
    with pytest.raises(DataError, match=r"has no file \*train\*\.bin"):
        (tmp_path / "medieval_train_000001.bin").unlink()
        read_folder(tmp_path, "train")


def test_a_token_outside_of_the_vocabulary_is_named(tmp_path):
    (tmp_path / "train.bin").write_bytes(plain([1, 2, 3, 4, 5, 6, 700, 8, 9]))
    windows = Windows(read_folder(tmp_path, "train"), context=4, vocabulary=512)
    assert windows[0].tolist() == [1, 2, 3, 4, 5]
    with pytest.raises(DataError, match=r"train\.bin has the token 700 .*ends with 511.*--vocabulary"):
        windows[1]
    with pytest.raises(DataError, match=r"token 3 .*ends with 2"):  # at once, where it is in the first window
        Windows(read_folder(tmp_path, "train"), context=2, vocabulary=3)
    with pytest.raises(DataError, match="too short: a window has 10 tokens"):
        Windows(read_folder(tmp_path, "train"), context=9, vocabulary=512)


def test_a_process_that_loads_gets_the_path_and_not_the_tokens(tmp_path):
    (tmp_path / "train.bin").write_bytes(plain(range(60_000)))
    windows = Windows(read_folder(tmp_path, "train"), context=100, vocabulary=2**16)
    sent = pickle.dumps(windows)
    assert len(sent) < 2000
    assert torch.equal(pickle.loads(sent)[7], windows[7])


@pytest.mark.parametrize(
    ("files", "message"),
    [({}, "0 .txt files"), ({"a.txt": b"a", "b.txt": b"b"}, "2 .txt files"), ({"val.bin": b"ab"}, r"\*train\*\.bin"),
     ({"train.bin": b"a\0" * 80}, r"\*val\*\.bin")],
)  # fmt: skip
def test_a_folder_without_what_is_needed_is_named(files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        Language(tmp_path, tiny=True)


# ---- a text ----


def test_a_text_is_tokenized_once_and_loses_nothing(data):
    folder, vocabulary = text.tokenized(data / "python.txt", vocabulary=512)
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert sorted(times) == ["made.json", "train.bin", "val.bin", "vocabulary.json"]
    encoder = Tokenizer.from_file(str(folder / "vocabulary.json"))
    assert vocabulary == encoder.get_vocab_size() == 512
    tokens = [np.fromfile(folder / f"{name}.bin", "<u2").tolist() for name in ("train", "val")]
    texts = [encoder.decode(part, skip_special_tokens=False) for part in tokens]
    assert "".join(texts) == (data / "python.txt").read_text()
    assert texts[0].endswith("\n")
    assert len(texts[0].encode()) / len("".join(texts).encode()) == pytest.approx(0.9, abs=0.001)
    assert 0 in tokens[0], "<|endoftext|> is a token"
    text.tokenized(data / "python.txt", vocabulary=512)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_pieces_do_not_change_the_tokens(tmp_path, monkeypatch):
    path = tmp_path / "some.txt"
    path.write_text("".join(f"line {i} of them, with ü\n" for i in range(300)))
    read = []
    for piece in (2**22, 50):
        monkeypatch.setattr(text, "PIECE", piece)
        folder, _ = text.tokenized(path, vocabulary=300)
        read.append([(folder / name).read_bytes() for name in ("train.bin", "val.bin", "vocabulary.json")])
        (folder / "made.json").unlink()
    assert read[0] == read[1]


def test_a_changed_text_is_said_and_tokenized_anew(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("one line\n" * 100)
    folder, few = text.tokenized(path, vocabulary=400)
    assert few < 300, "a small text has fewer tokens than asked for"
    before = (folder / "train.bin").stat().st_size
    path.write_text("one line\n" * 200)
    with pytest.warns(anybatch.AnybatchWarning, match=r"some\.txt has changed since .*some\.txt\.400 was made of it"):
        text.tokenized(path, vocabulary=400)
    assert (folder / "train.bin").stat().st_size == pytest.approx(2 * before, rel=0.05)
    assert {p.name for p in tmp_path.iterdir()} == {"some.txt", "some.txt.400"}, "nothing half-made is left"


def test_what_another_machine_has_made_meanwhile_stays(tmp_path):
    """Eight machines are given one command, and some read already what the first has made."""
    path, folder = tmp_path / "text", tmp_path / "made"
    path.write_text("some")

    def write(content, folder):
        (folder / "tokens").write_text(content)
        return {"of": len(content)}

    def slow(new):
        assert prepared(folder, of=[path], make=partial(write, "theirs")) == {"of": 6}
        return write("ours, later", new)

    assert prepared(folder, of=[path], make=slow) == {"of": 6}
    assert (folder / "tokens").read_text() == "theirs"
    path.write_text("other")
    with pytest.warns(anybatch.AnybatchWarning, match="has changed"):
        assert prepared(folder, of=[path], make=partial(write, "new")) == {"of": 3}
    assert {p.name for p in tmp_path.iterdir()} == {"text", "made"}


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"good\n" * 50 + b"\xff\n", "not UTF-8"), (b"one line", "too short, or is one line"), (None, "No such file")],
)
def test_a_text_that_cannot_be_used_is_named(content, message, tmp_path):
    path = tmp_path / "some.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"some\.txt.*{message}"):
        Language(path, tiny=True)
    assert {p.name for p in tmp_path.iterdir()} <= {"some.txt"}


# ---- what is chosen ----


def test_matrices_decay_and_muon_has_those_of_the_blocks(data):
    model = Language(data, tiny=True).model()
    one = Language(data, tiny=True).optimizer(model)
    muon, adamw = Language(data, tiny=True, optimizer="muon").optimizer(model)
    names = {p: name for name, p in model.named_parameters()}
    decays = {names[p]: group["weight_decay"] for group in one.param_groups for p in group["params"]}
    assert decays == {name: 0.1 if p.dim() == 2 else 0.0 for p, name in names.items()}
    inner = {names[p] for group in muon.param_groups for p in group["params"]}
    kinds = ("qkv", "mixed", "inner", "outer")
    assert inner == {f"blocks.{i}.{kind}.weight" for i in range(2) for kind in kinds}
    assert inner.isdisjoint(rest := {names[p] for group in adamw.param_groups for p in group["params"]})
    assert inner | rest == set(names.values())


def test_schedules_by_hand(data):
    cosine, wsd = (Language(data, tiny=True, schedule=schedule) for schedule in ("cosine", "wsd"))
    assert [cosine.rate(i) for i in (0, 39, 40, 520, 1000)] == pytest.approx([1 / 41, 40 / 41, 1, 0.55, 0.1])
    assert [wsd.rate(i) for i in (0, 40, 799, 800, 900, 1000, 1001)] == pytest.approx([1 / 41, 1, 1, 1, 0.5, 0, 0])


@pytest.mark.parametrize("wrong", [{"size": "7B"}, {"optimizer": "sgd"}, {"schedule": "step"}, {"vocabulary": 100}])
def test_a_choice_that_is_none(wrong, data):
    with pytest.raises(anybatch.InvalidValueError, match=f"--{next(iter(wrong))} is"):
        Language(data, **{"tiny": True, **wrong})


@pytest.mark.parametrize(
    ("words", "message"),
    [("language", "needs --data"), ("digits --optimizer muon", "digits has no --optimizer"),
     ("language --data {data} --tiny --micro-batch 100 --scale 25", "multiple of the 64"),
     ("digits --grow noise", "--most"), ("digits --most 4", "--grow"),
     ("digits --grow noise --most 4 --scale 1,2@0.5", "one --scale"),
     ("digits --efficiency 0.5", "--grow noise")],
)  # fmt: skip
def test_what_is_wrong_is_one_line(words, message, data, tmp_path, capsys):
    assert main([*words.format(data=data).split(), "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


# ---- training ----


def test_a_window_comes_once_an_epoch_on_any_number_of_ranks(data):
    task = Language(data, tiny=True)
    alone = list(islice(task.batches(128, seed=3, rank=0, ranks=1), 12))
    shared = [task.batches(128, seed=3, rank=rank, ranks=2) for rank in range(2)]
    assert all(torch.equal(batch, next(shared[i % 2])) for i, batch in enumerate(alone))
    later = task.batches(128, seed=3, rank=0, ranks=1, start=128 * 5)
    assert torch.equal(next(later), alone[5])
    assert task.size(alone[0]) == 128
    assert task.examples == len(task.train_set) * 64


def test_loss_accuracy_and_perplexity_by_a_plain_loop(data, monkeypatch):
    task = Language(data, tiny=True)
    torch.manual_seed(0)
    model = task.model().eval()
    monkeypatch.setattr(language, "VALIDATION", 64 * 5)
    monkeypatch.setattr(language, "TOGETHER", 64 * 2)
    found = task.evaluate(model, torch.device("cpu"))
    rows = [task.test_set[i * len(task.test_set) // 5] for i in range(5)]
    total = right = 0.0
    for row in rows:
        logits = model(row[None, :-1])[0].double()
        for position in range(64):
            scores = logits[position].tolist()
            total += math.log(sum(map(math.exp, scores))) - scores[int(row[position + 1])]
            right += scores.index(max(scores)) == int(row[position + 1])
    assert found["loss"] == pytest.approx(total / 320, rel=1e-5)
    assert found["accuracy"] == pytest.approx(100 * right / 320)
    assert found["perplexity"] == pytest.approx(math.exp(total / 320), rel=1e-4)
    assert task.loss(model, torch.stack(rows)).item() == pytest.approx(total / 320, rel=1e-5)


@pytest.mark.parametrize(("optimizer", "precision"), [("adamw", "bf16"), ("muon", "fp32")])
def test_it_learns_and_eight_times_the_batch_learns_as_much(optimizer, precision, data, short_test):
    """Untrained it is at log 512 = 6.24, where it is not worse for the eight times larger batch."""
    found = {}
    for scale, micro_batch in (("1", 128), ("8", 512)):
        task = Language(data, tiny=True, optimizer=optimizer, schedule="wsd")
        options = Options(base_batch=128, scale=scale, micro_batch=micro_batch, total=100, evaluations=1)
        found[scale] = run(task, replace(options, precision=precision))
    assert found["1"]["iterations"] == 100
    assert found["8"]["iterations"] < 50
    assert found["1"]["loss"] < 5.5
    assert -0.5 < found["8"]["loss"] - found["1"]["loss"] < 0.1


def test_the_gradient_is_clipped_after_it_is_measured(data):
    """With a clip of nearly nothing plain SGD stands still, and the gain is that without a clip."""

    class Plain(Language):
        def optimizer(self, model):
            return torch.optim.SGD(model.parameters(), lr=0.1)

    gains, moved = [], []
    for clip in (None, 1e-6):
        task = Plain(data, tiny=True)
        task.clip = clip
        training = Training(task, Options(scale="2", total=20), parallel.here())
        before = [p.detach().clone() for p in training.net.parameters()]
        training.step()
        gains.append(training.controller.gain)
        moved.append(distance(before, training.net.parameters()))
        training.close()
    assert gains[0] == gains[1]
    assert moved[0] > 1e-3
    assert moved[1] < 1e-6


def test_two_optimizers_skip_a_step_together_under_a_loss_scale(data):
    """An overflow that only Muon's matrices saw had AdamW step alone, and ended the run."""
    task = Language(data, tiny=True, optimizer="muon")
    training = Training(task, Options(scale="2", total=40, precision="fp16"), parallel.here())
    training.scaler.load_state_dict(training.scaler.state_dict() | {"scale": 2.0**22})  # some overflow, others do not
    half = next(p for p in training.net.parameters() if p.dim() == 2)
    told = []
    for _ in range(8):
        before, steps = half.detach().clone(), training.controller.steps
        training.step()
        told.append(training.controller.steps - steps)
        assert torch.equal(before, half) == (told[-1] == 0)
    assert 0 < training.attempts.skipped == told.count(0) < 8
    assert told == sorted(told)  # half of a scale that overflowed, until none does
    training.close()


def distance(some, others):
    return sum(float((a - b).detach().square().sum()) for a, b in zip(some, others, strict=True)) ** 0.5


GROWING = Options(base_batch=128, scale="1", grow="noise", most=8, efficiency=0.5, total=24, save_every=7, ema=0.9)


def test_a_batch_grows_with_the_noise_to_the_most(data, tmp_path, short_test):
    run(Language(data, tiny=True), replace(GROWING, total=100, evaluations=1, out=tmp_path))
    scales = [step.scale for step in anybatch.read_record(tmp_path / "record.jsonl").steps]
    assert scales[0] == 1
    assert max(scales) > 2
    assert max(scales) <= 8


def test_seesaw_trades_the_cosine_for_a_batch(data, tmp_path, short_test):
    """Its rate ends at a tenth: at the end a batch of nearly ten, had it not a bound of eight."""
    options = Options(base_batch=128, rule="sqrt", grow="seesaw", most=8, total=60, evaluations=1, out=tmp_path)
    task = Language(data, tiny=True)
    run(task, options)
    steps = anybatch.read_record(tmp_path / "record.jsonl").steps
    assert [step.scale for step in steps[:10]] == [1] * 10
    for before, step in pairwise(steps):
        peak = max(task.rate(i) for i in range(int(before.tau + 1e-6) + 1))
        assert step.scale == min(8, int(peak / task.rate(int(before.tau + 1e-6)) + 1e-9))
    assert steps[-1].scale == 8


@pytest.mark.parametrize(
    ("options", "optimizer"),
    [(GROWING, "adamw"), (Options(base_batch=128, scale="2,4@0.5", total=24, save_every=7), "muon")],
)
def test_a_resumed_run_is_bit_exact(options, optimizer, data, tmp_path, short_test):
    class Killed(Exception):
        pass

    def watch(tau, point):
        if tau > 13:
            raise Killed

    def start(out, **watching):
        return run(
            Language(data, tiny=True, optimizer=optimizer),
            replace(options, evaluations=2, out=tmp_path / out),
            **watching,
        )

    start("straight")
    with pytest.raises(Killed):
        start("killed", watch=watch)
    start("killed")
    parts = [torch.load(tmp_path / out / "checkpoint.pt", weights_only=True) for out in ("straight", "killed")]
    for name in ("model", "ema", "optimizer", "scheduler", "controller", "growth", "used", "losses"):
        assert json.dumps(_plain(parts[0].get(name))) == json.dumps(_plain(parts[1].get(name))), name
    with pytest.raises(DataError, match="vocabulary"):
        run(Language(data, tiny=True, vocabulary=400, optimizer=optimizer), replace(options, out=tmp_path / "killed"))


def _plain(value):
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


# ---- two ranks ----

SHORT = Options(base_batch=128, scale="2", micro_batch=64, total=6, seed=1, evaluations=1)


@pytest.fixture(scope="module")
def launched(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    one = {
        optimizer: workers.train(data, SHORT, out=folder / f"one-{optimizer}", optimizer=optimizer)
        for optimizer in ("adamw", "muon")
    }
    torch.manual_seed(SHORT.seed)
    one["start"] = Language(data, tiny=True).model().state_dict()
    return one, launch.run(workers.ranks, world=2, args=(str(data), SHORT, str(folder)))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_two_ranks_are_one_rank_with_accumulation(kind, optimizer, launched):
    """Muon multiplies in bfloat16, so that another order of its sums is seen; hence the weights as a whole."""
    one, two = launched
    weights = one[optimizer]["weights"]
    moved = distance(one["start"].values(), weights.values())
    for rank in two:
        mine = rank[kind, optimizer]
        assert mine["gains"] == pytest.approx(one[optimizer]["gains"], rel=1e-3)
        assert mine["weights"].keys() == weights.keys()
        assert distance(mine["weights"].values(), weights.values()) < (0.02 if optimizer == "muon" else 1e-3) * moved


def test_what_is_made_once_is_made_by_rank_0_and_its_error_is_everybodys(launched):
    found = [rank["once"] for rank in launched[1]]
    assert found == [(1, "by rank 0", "the text is gone"), (0, "by rank 0", "the text is gone")]

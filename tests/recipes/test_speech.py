"""The speech task: features, padding, CTC, decoding, what is wrong on disk, batches, and a short training."""

import math
import wave
from itertools import islice, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import anybatch
from recipes.speech import librispeech
from recipes.speech import made as made_speech
from recipes.speech import task as speech
from recipes.speech.model import BLANK, CHARACTERS, DeepSpeech2, edit_distance, frames, greedy, spectrogram, steps
from recipes.train import run
from recipes.training.buckets import Bucketed
from recipes.training.options import Options
from recipes.training.task import DataError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech")
    speech.make(folder)
    return folder


@pytest.fixture(scope="module")
def task(data):
    return speech.Speech(data, tiny=True)


# ---- the model ----


def test_the_whole_model_has_as_many_parameters_as_by_hand():
    with torch.device("meta"):
        model = DeepSpeech2()
    convolutions = 32 * 41 * 11 + 32 * 32 * 21 * 11 + 2 * 2 * 32
    first = 2 * 3 * (800 * 32 * 41 + 800 * 800 + 2 * 800)
    others = 4 * 2 * 3 * (800 * 800 + 800 * 800 + 2 * 800)
    assert sum(p.numel() for p in model.parameters()) == convolutions + first + others + 5 * 2 * 800 + 29 * 800
    assert 40e6 < convolutions + first + others < 42e6


def test_the_whole_model_takes_a_step():
    model = DeepSpeech2()
    log_probs, lengths = model(torch.randn(2, 40, 161), torch.tensor([40, 31]))
    assert log_probs.shape == (20, 2, 29)
    assert lengths.tolist() == [20, 16]
    log_probs[:16].square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.fixture
def small():
    model = DeepSpeech2(channels=3, hidden=8, layers=2).double()
    with torch.no_grad():
        for name, buffer in model.named_buffers():  # running statistics that are not the identity
            if name.endswith(("mean", "var")):
                buffer.add_(torch.rand_like(buffer))
    return model


def test_padding_changes_no_loss(small):
    small.eval()
    features = [torch.randn(n, 161, dtype=torch.float64) for n in (37, 60, 24)]
    labels = [torch.randint(1, 29, (n,)) for n in (5, 9, 3)]
    task_collate = speech.Speech.collate
    together = task_collate(None, list(zip(features, labels)))
    alone = [speech.Speech.loss(None, small, task_collate(None, [pair])) for pair in zip(features, labels)]
    torch.testing.assert_close(speech.Speech.loss(None, small, together), torch.stack(alone).mean())


def test_padding_changes_no_statistics(small):
    """In training the normalisation sees the real steps alone: what stands in the padding has no influence."""
    features, lengths = torch.randn(2, 60, 161, dtype=torch.float64), torch.tensor([60, 24])
    features[1, 24:] = 0
    longer = torch.cat((features, torch.zeros(2, 30, 161, dtype=torch.float64)), dim=1)
    small.train()
    short, long = small(features, lengths)[0], small(longer, lengths)[0]
    assert short.shape == long.shape
    torch.testing.assert_close(short, long)


def test_steps_are_what_the_convolutions_give():
    for n in range(1, 40):
        assert int(steps(torch.tensor(n))) == (n + 2 * 5 - 11) // 2 + 1


def test_the_spectrogram_by_a_plain_fourier_sum():
    audio = torch.randn(800, dtype=torch.float64)
    found = spectrogram(audio.float()).double()
    assert found.shape == (frames(800), 161) == (6, 161)
    n = torch.arange(320, dtype=torch.float64)
    hamming = 0.54 - 0.46 * torch.cos(2 * math.pi * n / 319)
    padded = torch.cat((torch.zeros(160), audio, torch.zeros(160))).double()
    rows = []
    for frame in range(6):
        part = padded[160 * frame : 160 * frame + 320] * hamming
        angles = 2 * math.pi * n * torch.arange(161).unsqueeze(1) / 320
        rows.append(torch.hypot((part * angles.cos()).sum(1), (part * angles.sin()).sum(1)))
    log = torch.log(torch.stack(rows) + 1e-3)
    torch.testing.assert_close(found, (log - log.mean()) / log.std(), atol=2e-4, rtol=1e-3)


# ---- CTC, decoding, edit distance ----


def collapsed(path):
    kept = [label for i, label in enumerate(path) if i == 0 or label != path[i - 1]]
    return tuple(label for label in kept if label != BLANK)


def test_the_loss_is_the_sum_over_all_paths():
    torch.manual_seed(1)
    log_probs = torch.randn(5, 1, 29, dtype=torch.float64).log_softmax(2)
    labels = (3, 3)
    total = sum(
        math.exp(sum(float(log_probs[t, 0, label]) for t, label in enumerate(path)))
        for path in product((BLANK, 3), repeat=5)
        if collapsed(path) == labels
    )
    found = speech._losses(log_probs, torch.tensor([5]), torch.tensor([labels]), torch.tensor([2]))
    torch.testing.assert_close(found, torch.tensor([-math.log(total)], dtype=torch.float64))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_greedy_decoding_by_the_definition(path):
    log_probs = torch.full((len(path) + 2, 2, 29), -9.0)
    log_probs[:, :, 7] = 0.0  # beyond the length, and in the other utterance, there is something else
    log_probs[: len(path), 0, 7] = -9.0
    log_probs[range(len(path)), 0, path] = 0.0
    texts = greedy(log_probs, torch.tensor([len(path), 0]))
    assert texts == ["".join(CHARACTERS[label - 1] for label in collapsed(path)), ""]


def plain_distance(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(
        plain_distance(a[1:], b) + 1, plain_distance(a, b[1:]) + 1, plain_distance(a[1:], b[1:]) + (a[0] != b[0])
    )


words = st.lists(st.sampled_from("xyz"), max_size=5)


@given(words, words)
def test_edit_distance_by_the_recursion(a, b):
    assert edit_distance(a, b) == plain_distance(a, b)


def test_edit_distance_by_hand():
    assert edit_distance(["the", "red", "sun"], ["the", "sun", "set", "now"]) == 3


# ---- batches ----


@given(
    lengths=st.lists(st.integers(1, 30), min_size=16, max_size=60),
    micro_batch=st.sampled_from([2, 4, 8, 16]),
    ranks=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_every_example_comes_once_an_epoch_on_any_number_of_ranks(lengths, micro_batch, ranks, seed):
    def stream(rank, of):
        line = Bucketed(
            [1] * len(lengths), lengths=lengths, block=8, micro_batch=micro_batch, seed=seed, rank=rank, ranks=of
        )
        return iter(line)

    alone = list(islice(stream(0, 1), 60))
    shared = [stream(rank, ranks) for rank in range(ranks)]
    assert alone == [next(shared[i % ranks]) for i in range(60)]
    flat = [index for part in alone for index in part]
    n = len(lengths)
    for epoch in range(len(flat) // n):
        assert sorted(flat[epoch * n : (epoch + 1) * n]) == list(range(n))


@pytest.mark.parametrize("after", [2, 4, 8, 16])
def test_the_line_goes_on_with_another_micro_batch(after):
    def flat(micro_batch, start):
        line = Bucketed([1] * 40, lengths=list(range(40)), block=8, micro_batch=micro_batch, seed=1, start=start)
        return [index for part in islice(line, 40) for index in part]

    assert flat(4, 0)[80:160] == flat(after, 80)[:80]


def test_a_batch_has_neighbours_in_length(task):
    lengths = [utterance.samples for utterance in task.train_set.utterances]
    line = Bucketed([1] * len(lengths), lengths=lengths, block=8, micro_batch=8, seed=0)
    spread = [max(lengths[i] for i in part) - min(lengths[i] for i in part) for part in islice(line, 64)]
    assert sum(spread) / len(spread) < (max(lengths) - min(lengths)) / 8


def test_a_micro_batch_that_does_not_fit_is_an_error():
    with pytest.raises(anybatch.InvalidValueError, match="multiple or a divisor of the base batch 8, got 3"):
        Bucketed([1] * 9, lengths=[1] * 9, block=8, micro_batch=3, seed=0)
    with pytest.raises(anybatch.InvalidValueError, match="start must be a multiple of 8"):
        Bucketed([1] * 9, lengths=[1] * 9, block=8, micro_batch=8, seed=0, start=4)
    with pytest.raises(DataError, match="empty"):
        Bucketed([], lengths=[], block=8, micro_batch=8, seed=0)


# ---- the data on disk ----


def say(folder, lines, *, samples=4000, rate=16_000, channels=1, width=2, names=None):
    """A chapter with these lines in its transcript, and audio for the names in them."""
    chapter = folder / "train-clean-100" / "1" / "2"
    chapter.mkdir(parents=True)
    (chapter / "1-2.trans.txt").write_text("".join(f"{line}\n" for line in lines))
    for name in names if names is not None else [line.split()[0] for line in lines]:
        with wave.open(str(chapter / f"{name}.wav"), "wb") as file:
            file.setnchannels(channels)
            file.setsampwidth(width)
            file.setframerate(rate)
            file.writeframes(bytes(samples * channels * width))
    return chapter


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (["1-2-0000"], {}, r"1-2\.trans\.txt, line 1: the transcript of 1-2-0000 is empty"),
        (["1-2-0000 A", "1-2-0001 B"], {"names": ["1-2-0000"]}, r"1-2-0001\.flac \(or \.wav\): no such file"),
        (["1-2-0000 A"], {"samples": 0}, r"1-2-0000\.wav: the audio has no samples"),
        (["1-2-0000 A"], {"rate": 8000}, r"1-2-0000\.wav: 8000 Hz and 1 channel"),
        (["1-2-0000 A"], {"channels": 2}, r"1-2-0000\.wav: 16000 Hz and 2 channel"),
        (["1-2-0000 A"], {"width": 1}, r"1-2-0000\.wav: 8 bits a sample"),
        (["1-2-0000 A7"], {}, r"1-2\.trans\.txt, line 1: '7' is not among the characters"),
        (["../1-2-0000 A"], {"names": []}, r"'\.\./1-2-0000' is no name"),
        ([], {}, r"train-clean-100: no <speaker>"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, lines, options, message):
    say(tmp_path, lines, **options)
    with pytest.raises(DataError, match=message):
        librispeech.read_splits(tmp_path, "train-")


def test_headers_are_read_once(tmp_path, monkeypatch):
    chapter = say(tmp_path, ["1-2-0000 A", "1-2-0001 B"])
    found, read, samples = [], [], librispeech._samples
    monkeypatch.setattr(librispeech, "_samples", lambda path: read.append(path.name) or samples(path))

    def again():
        read.clear()
        found.append([utterance.samples for utterance in librispeech.read_splits(tmp_path, "train-")])
        return sorted(read)

    assert again() == ["1-2-0000.wav", "1-2-0001.wav"]
    assert again() == []
    made_speech._save(chapter / "1-2-0001.wav", torch.zeros(1234))
    assert again() == ["1-2-0001.wav"]
    assert found == [[4000, 4000], [4000, 4000], [4000, 1234]]
    (tmp_path / "lengths-train.json").write_text("{ half")
    assert again() == ["1-2-0000.wav", "1-2-0001.wav"]
    assert again() == []
    (tmp_path / "lengths-train.json").unlink()
    (tmp_path / "lengths-train.json").mkdir()  # as where the folder cannot be written
    with pytest.warns(anybatch.AnybatchWarning, match=r"lengths-train\.json cannot be written"):
        again()
    assert found[-1] == [4000, 1234]


def test_the_gradient_is_clipped_as_in_the_paper():
    assert speech.Speech.clip == 400


def test_audio_that_is_none_is_named(tmp_path):
    chapter = say(tmp_path, ["1-2-0000 A"])
    (chapter / "1-2-0000.wav").write_bytes(b"no audio at all")
    with pytest.raises(DataError, match=r"1-2-0000\.wav: the audio cannot be read"):
        librispeech.read_splits(tmp_path, "train-")


def test_audio_that_ends_early_is_named(tmp_path):
    chapter = say(tmp_path, ["1-2-0000 A"])
    path = chapter / "1-2-0000.wav"
    path.write_bytes(path.read_bytes()[:-1000])
    (utterance,) = librispeech.read_splits(tmp_path, "train-")
    with pytest.raises(DataError, match=r"1-2-0000\.wav: the audio ends after 3500 of 4000"):
        librispeech.read_audio(utterance.audio)


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match=r"train-.*: no such folder"):
        speech.Speech(tmp_path)
    with pytest.raises(DataError, match="needs a folder"):
        speech.Speech(None)


def test_flac_without_its_reader_says_what_to_install(tmp_path, monkeypatch):
    chapter = say(tmp_path, ["1-2-0000 A"], names=[])
    (chapter / "1-2-0000.flac").write_bytes(b"fLaC")
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(DataError, match=r"1-2-0000\.flac: .*pip install soundfile"):
        librispeech.read_splits(tmp_path, "train-")


def test_flac_is_read_as_wav_is(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    audio = torch.linspace(-0.9, 0.9, 3200)
    chapter = say(tmp_path, ["1-2-0000 A"], names=[])
    soundfile.write(chapter / "1-2-0000.flac", audio.numpy(), 16_000)
    made_speech._save(tmp_path / "same.wav", audio)
    (utterance,) = librispeech.read_splits(tmp_path, "train-")
    assert utterance.samples == 3200
    torch.testing.assert_close(
        librispeech.read_audio(utterance.audio), librispeech.read_audio(tmp_path / "same.wav"), atol=1e-4, rtol=0
    )
    (chapter / "1-2-0000.flac").write_bytes(b"fLaC and no more")
    with pytest.raises(DataError, match=r"1-2-0000\.flac: the audio cannot be read"):
        librispeech.read_splits(tmp_path, "train-")


def test_an_utterance_without_an_alignment_is_skipped_and_counted(tmp_path):
    # 3200 samples are 21 frames and 11 steps: 11 characters fit, but not with a blank between two that are the same.
    say(tmp_path, ["1-2-0000 ABCDEFGHIJK", "1-2-0001 ABCDEFGHIJJ", "1-2-0002 ABCDEFGHIJKL"], samples=3200)
    utterances = librispeech.read_splits(tmp_path, "train-")
    train = librispeech.LibriSpeech(utterances, train=True)
    assert (len(train), train.skipped) == (1, 2)
    features, labels = train[0]
    loss = speech._losses(torch.randn(11, 1, 29).log_softmax(2), torch.tensor([11]), labels[None], torch.tensor([11]))
    assert features.shape == (21, 161)
    assert bool(loss.isfinite())
    assert len(librispeech.LibriSpeech(utterances, train=False)) == 3


def test_made_speech_is_the_same_for_a_seed(tmp_path, monkeypatch):
    monkeypatch.setitem(made_speech.SIZES, "tiny", (48, 16))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        speech.make(tmp_path / name, seed=seed)

    def content(name):
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        return [(path.relative_to(tmp_path / name), path.read_bytes()) for path in files]

    assert content("a") == content("b") != content("c")
    assert len(content("a")) == 48 + 16 + 3 + 1


# ---- training ----


@pytest.mark.parametrize("micro_batch", [8, 4])
def test_three_steps(task, micro_batch):
    options = Options(scale="2", micro_batch=micro_batch, total=3, evaluations=1)
    summary = run(speech.Speech(task.data, tiny=True), options)
    assert summary["iterations"] <= 3
    assert math.isfinite(summary["loss"])


def test_the_batches_lie_near_the_base_batch(task):
    batch = next(task.batches(8, seed=0, rank=0, ranks=1))
    assert task.size(batch) == 8 == len(batch[1]) == len(batch[2]) == len(batch[3])


@pytest.mark.slow
def test_training_learns_the_words(data):
    summary = run(speech.Speech(data, tiny=True), Options(scale="4", total=300, evaluations=1))
    assert summary["word accuracy"] > 50  # a guess among 16 words, with their number known, has 6
    assert summary["iterations"] < 200

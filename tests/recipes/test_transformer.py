"""The transformer task: masks, padding, beam search, the text on disk, batches by tokens, and a short training."""

import math
import pickle
from itertools import islice, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import anybatch
from recipes.train import run
from recipes.training.buckets import Bucketed, cut, line
from recipes.training.options import Options
from recipes.training.task import DataError
from recipes.translation import task as transformer
from recipes.translation import wmt
from recipes.translation.model import BEGIN, END, LENGTH_PENALTY, PAD, Attention, TransformerModel, sinusoids, translate


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformer")
    transformer.make(folder)
    return folder


@pytest.fixture(scope="module")
def task(data):
    return transformer.Transformer(data, tiny=True)


def small(vocabulary=20, seed=0):
    torch.manual_seed(seed)
    return TransformerModel(vocabulary, width=16, heads=2, inner=32, layers=2, dropout=0.0).double().eval()


def tokens(*shape, vocabulary=20):
    return torch.randint(4, vocabulary, shape)


# ---- the model ----


def test_the_base_model_has_as_many_parameters_as_by_hand():
    with torch.device("meta"):
        model = TransformerModel(37_000)
    attention, inner, norm = 4 * (512 * 512 + 512), 512 * 2048 + 2048 + 2048 * 512 + 512, 2 * 512
    encoder, decoder = attention + inner + 2 * norm, 2 * attention + inner + 3 * norm
    count = sum(p.numel() for p in model.parameters())
    assert count == 37_000 * 512 + 6 * (encoder + decoder) + 2 * norm
    assert 62e6 < count < 66e6


def test_the_base_model_takes_a_step():
    model = TransformerModel(1000)
    loss = transformer.Transformer.loss(None, model, (tokens(2, 7, vocabulary=1000), tokens(2, 6, vocabulary=1000)))
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert abs(float(loss.detach()) - math.log(1000)) < 3


def test_later_target_tokens_leave_earlier_logits():
    model, source, target = small(), tokens(3, 9), tokens(3, 8)
    before = model(source, target)[0]
    for position in range(1, 8):
        other = target.clone()
        other[:, position:] = tokens(3, 8 - position)
        after = model(source, other)[0]
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-12)
        assert not torch.equal(after[:, position:], before[:, position:])


def test_every_source_token_matters():
    model, source, target = small(), tokens(1, 6), tokens(1, 3)
    before = model(source, target)[0]
    for position in range(6):
        other = source.clone()
        other[0, position] = 4 + (int(source[0, position]) - 3) % 16
        assert not torch.allclose(model(other, target)[0][:, 0], before[:, 0])


def test_padding_changes_no_loss():
    model, collate = small(), transformer.Transformer.collate
    pairs = [(tokens(m), tokens(n)) for m, n in ((3, 8), (9, 2), (5, 5))]
    together = collate(None, pairs)
    assert together[0].shape == (3, 9)
    assert together[1].shape == (3, 9)
    alone = [transformer._loss(model, collate(None, [pair]), smoothing=0.1, reduction="sum") for pair in pairs]
    assert transformer.Transformer.size(None, together) == 15
    torch.testing.assert_close(transformer.Transformer.loss(None, model, together), sum(alone) / 15)


def test_the_loss_by_its_definition():
    model, source, target = small(), tokens(1, 4), tokens(1, 4)
    log_probs = model(source, target[:, :-1])[0][0].log_softmax(1).detach()
    total = 0.0
    for t in range(3):
        wanted = torch.full((20,), 0.1 / 20, dtype=torch.float64)
        wanted[target[0, t + 1]] += 0.9
        total -= float((wanted * log_probs[t]).sum())
    found = transformer.Transformer.loss(None, model, (source, target))
    torch.testing.assert_close(found.double(), torch.tensor(total / 3, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_attention_by_plain_loops():
    torch.manual_seed(2)
    attention = Attention(6, 2).double()
    x, memory = torch.randn(1, 3, 6, dtype=torch.float64), torch.randn(1, 4, 6, dtype=torch.float64)
    allowed = torch.tensor([[[True, True, False, True]]])
    q, k, v = attention.query(x)[0].detach(), attention.key(memory)[0].detach(), attention.value(memory)[0].detach()
    mixed = torch.zeros(3, 6, dtype=torch.float64)
    for head, i in product(range(2), range(3)):
        part = slice(3 * head, 3 * head + 3)
        weights = [math.exp(float(q[i, part] @ k[j, part]) / math.sqrt(3)) for j in (0, 1, 3)]
        for weight, j in zip(weights, (0, 1, 3)):
            mixed[i, part] += weight / sum(weights) * v[j, part]
    torch.testing.assert_close(attention(x, memory, allowed=allowed)[0], attention.out(mixed))


def test_positions_by_the_formula():
    found = sinusoids(5, 8)
    for position, i in product(range(5), range(4)):
        angle = position / 10_000 ** (2 * i / 8)
        assert found[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
        assert found[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


# ---- decoding ----


def score(model, source, target):
    """log P of a target, END included, over its length's penalty."""
    target = torch.tensor([[BEGIN, *target, END]])
    log_probs = model(source, target[:, :-1])[0][0].log_softmax(1).detach()
    total = sum(float(log_probs[t, token]) for t, token in enumerate(target[0, 1:].tolist()))
    return total / ((5 + target.shape[1] - 1) / 6) ** LENGTH_PENALTY


@pytest.mark.parametrize("seed", range(5))
def test_a_beam_that_holds_everything_finds_the_best(seed):
    model, source = small(vocabulary=6, seed=seed), torch.tensor([[4, 5]])
    every = [target for n in range(4) for target in product((1, 4, 5), repeat=n)]
    best = max(every, key=lambda target: score(model, source, target))
    assert translate(model, source, beam=27, longer=2) == [list(best)]


def greedy(model, source, limit):
    target = [BEGIN]
    while len(target) < limit:
        log_probs = model(source, torch.tensor([target]))[0][0, -1].detach()
        log_probs[[PAD, BEGIN]] = -math.inf
        if int(log_probs.argmax()) == END:
            break
        target.append(int(log_probs.argmax()))
    return target[1:]


def test_a_beam_is_at_least_as_good_as_greedy():
    totals = {1: 0.0, 4: 0.0}
    for seed in range(12):
        model, source = small(vocabulary=9, seed=seed), tokens(1, 4, vocabulary=9)
        plain = score(model, source, greedy(model, source, 8))
        for beam in totals:
            found = score(model, source, translate(model, source, beam=beam, longer=4)[0])
            totals[beam] += found
            if beam == 1:  # it follows the greedy path, and may go on where that ends
                assert found >= plain - 1e-9
    assert totals[4] >= totals[1]


def test_sources_are_translated_as_if_alone():
    model = small(seed=3)
    sources = [tokens(n) for n in (3, 7, 5)]
    together = torch.nn.utils.rnn.pad_sequence(sources, batch_first=True, padding_value=PAD)
    found = translate(model, together, longer=1)
    assert found == [translate(model, source[None], longer=8 - len(source))[0] for source in sources]
    assert all(PAD not in target and BEGIN not in target and END not in target for target in found)


# ---- batches ----


@given(
    units=st.lists(st.integers(1, 20), min_size=40, max_size=90),
    micro_batch=st.sampled_from([32, 64, 128]),
    ranks=st.integers(1, 3),
)
def test_every_pair_comes_once_an_epoch_on_any_number_of_ranks(units, micro_batch, ranks):
    def stream(rank, of):
        return iter(Bucketed(units, lengths=units, block=64, micro_batch=micro_batch, seed=1, rank=rank, ranks=of))

    alone = list(islice(stream(0, 1), 40))
    shared = [stream(rank, ranks) for rank in range(ranks)]
    assert alone == [next(shared[i % ranks]) for i in range(40)]
    flat = [index for part in alone for index in part]
    for epoch in range(len(flat) // len(units)):
        assert sorted(flat[epoch * len(units) : (epoch + 1) * len(units)]) == list(range(len(units)))


@given(st.lists(st.integers(1, 20), min_size=5, max_size=60), st.integers(1, 5))
def test_stretches_are_whole_in_order_and_about_equal(units, parts):
    stretches = cut(list(range(len(units))), units, parts=parts)
    assert [index for part in stretches for index in part] == list(range(len(units)))
    assert len(stretches) == parts
    assert all(stretches)
    if len(units) > 20 * parts:
        assert all(abs(sum(units[i] for i in part) - sum(units) / parts) <= max(units) for part in stretches)


@pytest.mark.parametrize("after", [128, 256, 512])
def test_the_line_goes_on_with_another_micro_batch(task, after):
    lengths = task.train_set.target.lengths()

    def flat(micro_batch, start, blocks):
        batches = Bucketed(lengths, lengths=lengths, block=256, micro_batch=micro_batch, seed=1, start=start)
        return [index for part in islice(batches, blocks * 256 // micro_batch) for index in part]

    whole, used = flat(256, 0, 24), flat(256, 0, 4)
    assert flat(after, 4 * 256, 20) == whole[len(used) :]


@pytest.mark.parametrize("micro_batch", [128, 256, 1024])
def test_a_batch_has_about_the_tokens_that_were_asked_for(task, micro_batch):
    batches = task.batches(micro_batch, seed=0, rank=0, ranks=1)
    sizes = [task.size(batch) for batch in islice(batches, 20)]
    longest = max(task.train_set.target.lengths())
    assert all(abs(size - micro_batch) <= 1.5 * longest * max(1, micro_batch // 256) for size in sizes)
    assert abs(sum(sizes) / 20 - micro_batch) < 0.05 * micro_batch


def test_a_batch_has_little_padding(task):
    batches = [batch[1][:, 1:] for batch in islice(task.batches(256, seed=0, rank=0, ranks=1), 50)]
    shares = [float((batch != PAD).float().mean()) for batch in batches]
    assert sum(shares) / 50 > 0.85
    other = [batch[1] for batch in islice(task.batches(256, seed=1, rank=0, ranks=1), 1)]
    assert not torch.equal(other[0][:, 1:][:2, :4], batches[0][:2, :4])


def test_each_epoch_has_its_order():
    units = list(range(1, 200))
    first, second = (line(units, lengths=units, block=300, seed=0, epoch=epoch) for epoch in (0, 1))
    assert first != second
    assert first == line(units, lengths=units, block=300, seed=0, epoch=0)


# ---- the text on disk ----


def write(folder, **files):
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train_en": "a\n"}, r"train\.de: no such file"),
        ({"train_en": "a\nb\n", "train_de": "x\n"}, r"train\.en and .*train\.de: one ends after 1 lines"),
        ({"train_en": "a\n", "train_de": b"\xff\xfe\n"}, r"train\.de, after line 0: not UTF-8"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, files, message):
    with pytest.raises(DataError, match=message):
        list(wmt.read_pairs(write(tmp_path, **files), "train"))
    with pytest.raises(DataError, match=message):
        transformer.Transformer(tmp_path, tiny=True)
    assert not list(tmp_path.glob("vocabulary*")), "nothing half-made is left"
    with pytest.raises(DataError, match="needs a folder"):
        transformer.Transformer(None)


def test_only_a_newline_ends_a_line(tmp_path):
    write(tmp_path, train_en="a\u2028b\rc\x85d\n e \n", train_de="x\ny\n")
    assert list(wmt.read_pairs(tmp_path, "train")) == [("a\u2028b\rc\x85d", "x"), ("e", "y")]


def test_wmt_sgm_files_are_read(tmp_path):
    page = '<refset setid="n"><doc>\n<seg id="1">{} &amp; {}</seg>\n<seg id="2"> two\n</seg></doc></refset>'
    (tmp_path / "newstest2014-deen-src.en.sgm").write_text(page.format("a", "b"))
    (tmp_path / "newstest2014-deen-ref.de.sgm").write_text(page.format("c", "d"))
    for other in ("csen-ref.en", "csen-src.en", "csen-src.cs", "deen-ref.en", "deen-src.de", "fren-ref.en"):
        (tmp_path / f"newstest2014-{other}.sgm").write_text(page.format("of another", "pair"))  # as long
    assert list(wmt.read_pairs(tmp_path, "newstest2014")) == [("a & b", "c & d"), ("two", "two")]
    (tmp_path / "newstest2014-deen-src.en.sgm").unlink()
    with pytest.raises(DataError, match=r"newstest2014\.en: no such file"):
        list(wmt.read_pairs(tmp_path, "newstest2014"))


def test_empty_and_long_pairs_are_skipped_and_counted(task):
    pairs = [("the nata.", "de nyha."), ("", "de"), ("the", ""), ("the " * 300, "de")]
    train = wmt.ParallelText(iter(pairs), vocabulary=task.vocabulary)
    assert (len(train), train.skipped) == (1, 3)
    assert len(wmt.ParallelText(iter(pairs), vocabulary=task.vocabulary, longest=None)) == 4
    source, target = train[0]
    assert source[-1] == target[-1] == END
    assert task.vocabulary.decode(source.tolist()) == "the nata."


def test_the_vocabulary_is_made_once_and_without_chance(data, task, tmp_path):
    write(tmp_path, train_en=(data / "train.en").read_bytes(), train_de=(data / "train.de").read_bytes())
    again = wmt.vocabulary_of(tmp_path, size=300)
    assert again.get_piece_size() == task.vocabulary.get_piece_size() == 300
    name = "vocabulary.300.model"
    assert (tmp_path / name).read_bytes() == (data / name).read_bytes()
    (tmp_path / "train.en").unlink()
    assert wmt.vocabulary_of(tmp_path, size=300).get_piece_size() == 300
    assert {path.name for path in tmp_path.iterdir()} == {"train.de", name}


def test_a_vocabulary_that_another_machine_has_made_meanwhile_stays(data, task, tmp_path, monkeypatch):
    """It has encoded its pairs with that one, whose time tells whether they are still right."""
    write(tmp_path, train_en="one two\n" * 20, train_de="eins zwei\n" * 20)
    read, theirs = wmt.read_pairs, (data / "vocabulary.300.model").read_bytes()

    def slow(*given):
        yield from read(*given)
        (tmp_path / "vocabulary.22.model").write_bytes(theirs)

    monkeypatch.setattr(wmt, "read_pairs", slow)
    with pytest.raises(DataError, match="300 pieces"):
        wmt.vocabulary_of(tmp_path, size=22)
    assert (tmp_path / "vocabulary.22.model").read_bytes() == theirs
    assert {path.name for path in tmp_path.iterdir()} == {"train.de", "train.en", "vocabulary.22.model"}


def test_pairs_are_encoded_once_and_read_where_they_lie(tmp_path, monkeypatch):
    transformer.make(tmp_path)
    made, make = [], wmt._make_pairs
    monkeypatch.setattr(wmt, "_make_pairs", lambda *args: made.append(1) or make(*args))
    first, again = (transformer.Transformer(tmp_path, tiny=True).train_set for _ in range(2))
    assert made == [1]
    held = wmt.ParallelText(wmt.read_pairs(tmp_path, "train"), vocabulary=wmt.vocabulary_of(tmp_path, size=300))
    assert len(first) == len(again) == len(held) == 4000
    assert again.source.lengths() == held.source.lengths()
    assert [row.tolist() for pair in again for row in pair] == [row.tolist() for pair in held for row in pair]
    sent = pickle.dumps(again)
    assert len(sent) < 2000 < len(pickle.dumps(held))
    assert torch.equal(pickle.loads(sent)[3999][1], held[3999][1])
    (tmp_path / "train.en").write_text((tmp_path / "train.en").read_text() + "the nata.\n")
    (tmp_path / "train.de").write_text((tmp_path / "train.de").read_text() + "de nyha.\n")
    with pytest.warns(
        anybatch.AnybatchWarning, match=r"train\.en or .* has changed since .*train\.300\.tokens was made"
    ):
        assert len(transformer.Transformer(tmp_path, tiny=True).train_set) == 4001


def test_a_vocabulary_that_does_not_fit_is_named(data, tmp_path):
    with pytest.raises(DataError, match=r"train\.en and \.de: no vocabulary of 100000 pieces"):
        wmt.vocabulary_of(data, size=100_000)
    (tmp_path / "vocabulary.200.model").write_bytes((data / "vocabulary.300.model").read_bytes())
    with pytest.raises(DataError, match=r"vocabulary\.200\.model: 300 pieces .* but 200 are needed"):
        wmt.vocabulary_of(tmp_path, size=200)
    (tmp_path / "vocabulary.50.model").write_bytes(b"no model")
    with pytest.raises(DataError, match=r"vocabulary\.50\.model: not a sentencepiece model"):
        wmt.vocabulary_of(tmp_path, size=50)


def test_made_languages_are_the_same_for_a_seed_and_test_on_what_is_new(data, tmp_path):
    transformer.make(tmp_path / "again")
    transformer.make(tmp_path / "other", seed=1)
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (data / path.name).read_bytes() != (tmp_path / "other" / path.name).read_bytes()
    seen, new = ((data / f"{name}.en").read_text().splitlines() for name in ("train", "newstest2014"))
    assert len(seen) == 4000
    assert len(new) == 200
    assert not set(seen) & set(new)


# ---- training ----


@pytest.mark.parametrize(("optimizer", "micro_batch"), [("sgd", 256), ("adamw", 128)])
def test_three_steps(data, optimizer, micro_batch):
    task = transformer.Transformer(data, tiny=True, optimizer=optimizer, beam=1)
    task.test_pairs = task.test_pairs[:20]
    said = task.measured  # beside a whole table, too, whose evaluations others made
    summary = run(task, Options(scale="2", micro_batch=micro_batch, total=3, evaluations=1))
    assert summary["iterations"] <= 3
    assert 0 <= summary["BLEU"] < 100
    words = ("sacrebleu nrefs:1|case:mixed", "tok:13a", "version:", "newstest2014, beam 1, length penalty 0.6")
    assert all(word in said for word in words)
    assert summary["measured"] == said
    assert math.isfinite(summary["loss"])


def test_another_optimizer_is_an_error(data):
    with pytest.raises(anybatch.InvalidValueError, match='"sgd" or "adamw"'):
        transformer.Transformer(data, tiny=True, optimizer="lion")


def test_a_perfect_translation_has_a_bleu_of_100(task, monkeypatch):
    """`evaluate` puts the sentences back into the order of the references."""
    answers = dict(task.test_pairs)

    def known(_, sources, *, beam):
        kept = [[t for t in row if t not in (PAD, END)] for row in sources.tolist()]
        return [task.vocabulary.encode(answers[task.vocabulary.decode(row)]) for row in kept]

    monkeypatch.setattr(transformer, "translate", known)
    found = task.evaluate(task.model().eval(), torch.device("cpu"))
    assert found["BLEU"] == pytest.approx(100)
    assert found["loss"] > 1


@pytest.mark.slow
def test_training_learns_the_language(data):
    task = transformer.Transformer(data, tiny=True, beam=1)
    summary = run(task, Options(scale="4", total=500, evaluations=1))
    assert summary["BLEU"] > 30
    assert summary["iterations"] < 400

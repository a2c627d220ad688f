import copy
import dataclasses
import json
import math
import os
import pickle
import platform
import shutil
import subprocess
import sys
import time
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import anybatch
from anybatch._record import MetricRecord


def step(i, **values):
    of_type = {float: 1.5, int: 2, bool: False}
    plain = {field.name: of_type.get(field.type, {}) for field in dataclasses.fields(anybatch.StepRecord)}
    plain["step"] = i
    return anybatch.StepRecord(**{**plain, **values})


def test_round_trip_and_resume(tmp_path):
    path = tmp_path / "folder" / "run.jsonl"
    record = anybatch.RunRecord(path, config={"lr": 0.1, "names": ("a", "b"), "path": path, "rate": math.inf})
    record.write(step(1))
    record.close()
    record.close()
    again = anybatch.RunRecord(path, config={"lr": 0.2})
    again.write(step(2, gain=math.nan))
    again.close()
    run = anybatch.read_record(path)
    assert run.config == {"lr": 0.2}  # as the run ended
    headers = [json.loads(text) for text in path.read_text().splitlines() if '"header"' in text]
    assert headers[0]["config"] == {"lr": 0.1, "names": ["a", "b"], "path": str(path), "rate": None}
    assert run.steps[0] == step(1)
    assert math.isnan(run.steps[1].gain)
    assert run.torn == 0
    header = json.loads(path.read_text().splitlines()[0])
    assert header["torch"] == torch.__version__
    assert header["anybatch"] == anybatch.__version__


def test_every_line_is_strict_json(tmp_path):
    record = anybatch.RunRecord(tmp_path / "r.jsonl")
    record.write(step(1, noise_scale=math.inf, gain=math.nan, lr=-math.inf))
    for line in (tmp_path / "r.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize("cut", [1, 30, 150])
def test_a_torn_last_line_is_passed_over_and_a_resume_starts_on_a_new_one(tmp_path, cut):
    path = tmp_path / "r.jsonl"
    record = anybatch.RunRecord(path)
    record.write(step(1))
    record.write(step(2))
    record.close()
    os.truncate(path, path.stat().st_size - cut)
    run = anybatch.read_record(path)
    assert ([s.step for s in run.steps], run.torn) in [([1], 1), ([1, 2], 0)]  # cutting the newline alone tears nothing
    record = anybatch.RunRecord(path)
    record.write(step(3))
    assert anybatch.read_record(path).steps[-1].step == 3


# ---- kills ----


KILLS = """
import contextlib, mmap, os, random, signal, sys, time
sys.path.insert(0, {tests!r})
import anybatch
from anybatch._record import MetricRecord
from test_record import step

random.seed(0)
path, kills, torn = sys.argv[1], 50, 0
done = mmap.mmap(-1, 8)                       # shared with the children: the last step whose write has returned

def write(start, round):
    record = anybatch.RunRecord(path)
    for n in range(start + 1, 10**9):
        record.write(step(n, lr=float(round)))
        done[:] = n.to_bytes(8, "little")
        record.write(MetricRecord(n, 1.0, {{f"metric {{i}}": 1 / 3 for i in range(100)}}))  # 3 kB: may tear

start, restarted = 0, []
for round in range(kills):
    child = os.fork()
    if child == 0:
        write(start, round)
    before = int.from_bytes(done[:], "little")
    while int.from_bytes(done[:], "little") == before:
        time.sleep(0.001)                      # the clock starts when it writes
    time.sleep(random.uniform(0, 0.01))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    reported = int.from_bytes(done[:], "little")
    run = anybatch.read_record(path)
    steps = [s.step for s in run.steps]
    assert steps == list(range(1, len(steps) + 1)), steps
    assert reported <= len(steps) <= reported + 1, (reported, len(steps))
    assert run.torn - torn in (0, 1)
    torn = run.torn
    start = max(0, reported - random.choice([0, 0, 3]))     # of the last checkpoint
    restarted.append(start)

run = anybatch.read_record(path)
for s in run.steps:                                         # each step is that of the last round that took it
    assert s.lr == max(r for r in range(kills) if r == 0 or restarted[r - 1] < s.step), s
print(kills, "kills,", len(run.steps), "steps,", torn, "torn lines")

# a child of the writer, such as a DataLoader's worker, lives on: it must not hold the lock
reader, writer = os.pipe()
parent = os.fork()
if parent == 0:
    record = anybatch.RunRecord(path)
    worker = os.fork()
    if worker == 0:
        with contextlib.suppress(anybatch.UsageError):
            record.write(step(1))
            os._exit(1)
        os.write(writer, b"%d\\n" % os.getpid())
        time.sleep(60)
    time.sleep(60)
worker = int(os.read(reader, 20))
try:
    anybatch.RunRecord(path)
except anybatch.UsageError:
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    anybatch.RunRecord(path).close()
    os.kill(worker, 0)
    print("reopened")
finally:
    os.kill(worker, signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its processes by forks, for speed")
def test_a_record_killed_fifty_times_reads_as_one_run(tmp_path):
    code = KILLS.format(tests=os.path.dirname(__file__))
    command = [sys.executable, "-W", "ignore", "-c", code, tmp_path / "r.jsonl"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.startswith("50 kills,")
    assert result.stdout.endswith("reopened\n")


def test_a_lock_ends_with_its_process(tmp_path):
    path = tmp_path / "r.jsonl"
    anybatch.RunRecord(path).close()
    code = (
        f"import fcntl, time; f = open({str(path)!r}); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    other.stdout.readline()
    before = path.read_bytes()
    with pytest.raises(anybatch.UsageError, match="a file of its own"):
        anybatch.RunRecord(path)
    assert path.read_bytes() == before
    other.kill()
    other.wait()
    other.stdout.close()
    anybatch.RunRecord(path).close()


def test_a_second_writer_is_refused_while_the_first_is_open(tmp_path):
    record = anybatch.RunRecord(tmp_path / "r.jsonl")
    record.write(step(1))
    anybatch.read_record(tmp_path / "r.jsonl")  # reading must not give up the lock
    with pytest.raises(anybatch.UsageError, match="being written"):
        anybatch.RunRecord(tmp_path / "r.jsonl")
    record.close()
    with pytest.raises(anybatch.UsageError, match="closed"):
        record.write(step(2))
    record = anybatch.RunRecord(tmp_path / "r.jsonl")
    del record  # a dropped record gives up its lock, too
    anybatch.RunRecord(tmp_path / "r.jsonl").close()


# ---- one run ----


@given(
    st.lists(
        st.tuples(st.integers(0, 8), st.lists(st.sampled_from(["step", "skip", "metric"]), max_size=8)), max_size=6
    )
)
@pytest.mark.filterwarnings("ignore:The schedule does not fit total")
def test_a_record_reads_as_the_steps_that_the_weights_went_through(tmp_path_factory, starts):
    """Each start goes back to a checkpoint some steps before the end; the oracle keeps a list and cuts it."""
    path = tmp_path_factory.mktemp("records") / "r.jsonl"
    kept, label, count = [], 0, 0
    for back, events in starts:
        count = max(0, count - back)
        with_steps = "step" in events or "skip" in events
        if with_steps:
            kept = [line for line in kept if line.step <= count] if count else []
        record = anybatch.RunRecord(path, config={"start": label})
        for event in sorted(events, key=lambda e: e == "metric") if not with_steps else events:
            label += 1
            if event == "metric":
                line = MetricRecord(count, float(label), {"x": 1.0})
            else:
                count += event == "step"
                line = step(count, tau=float(label), skipped=event == "skip")
            record.write(line)
            kept.append(line)
        record.close()
        if not with_steps:
            count = max([0, *(line.step for line in kept if isinstance(line, anybatch.StepRecord))])
    if not starts:
        anybatch.RunRecord(path).close()
    run = anybatch.read_record(path)
    assert list(anybatch.iter_record(path)) == kept
    assert run.steps == [line for line in kept if isinstance(line, anybatch.StepRecord)]
    assert run.metrics == [line for line in kept if isinstance(line, MetricRecord)]
    assert run.torn == 0


def test_the_header_is_that_of_the_last_step(tmp_path):
    path = tmp_path / "r.jsonl"
    starts = [("first", 1, 8), ("from nothing", 1, 4), ("resumed", 3, 2), ("no steps yet", None, 16)]
    for start, first, ranks in starts:
        record = anybatch.RunRecord(path, config={"start": start, "ranks": ranks})
        for n in range(first or 1, 5 if first else 1):
            record.write(step(n))
        record.close()
    run = anybatch.read_record(path)
    assert run.config == run.header["config"] == {"start": "resumed", "ranks": 2}
    assert run.ranks == (2, 4)
    assert [s.step for s in run.steps] == [1, 2, 3, 4]


def test_version_1_still_reads(tmp_path):
    line = (
        '{"kind": "step", "step": 1, "tau": 1.5, "iterations": 1.5, "scale": 4.0, "count": 4, "raw_variance": 1.0, '
        '"raw_sqnorm": null, "variance": 1.0, "sqnorm": 2.0, "gain": 1.5, "lr": 0.1, "lr_factor": 1.5, "noise_scale": '
        '0.5, "seconds": 0.1, "skipped": false}\n'
    )
    header = '{"kind": "header", "version": 1, "time": 1.0, "anybatch": "0.1", "config": {"rule": "AdaScale()"}}\n'
    (tmp_path / "r.jsonl").write_text(header + line)
    run = anybatch.read_record(tmp_path / "r.jsonl")
    assert (run.config, run.steps[0].gain, run.metrics) == ({"rule": "AdaScale()"}, 1.5, [])
    assert math.isnan(run.steps[0].raw_sqnorm)
    anybatch.RunRecord(tmp_path / "r.jsonl").close()  # and may be continued


def test_reading_line_by_line_takes_constant_memory(tmp_path):
    record = anybatch.RunRecord(tmp_path / "r.jsonl")
    peaks, n = [], 0
    for lines in (200, 5000):
        while n < lines:
            n += 1
            record.write(step(n))
        tracemalloc.start()
        assert sum(1 for _ in anybatch.iter_record(tmp_path / "r.jsonl")) == lines
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


# ---- what a disk may do ----


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no device that is always full")
def test_training_goes_on_beside_a_full_disk():
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(anybatch.AnybatchWarning, match="No space left") as caught:
        controller = anybatch.attach(optimizer, model=model, scale="count", record="/dev/full")
        for _ in range(3):
            for _ in range(2):
                model(torch.randn(3, 2)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert (len(caught), controller.steps) == (1, 3)
    controller.detach()


@pytest.mark.parametrize("room", [0, 10, 100, 1000, 1500])
def test_a_disk_that_was_full_for_a_while_costs_the_lines_of_that_while(tmp_path, monkeypatch, room):
    """Writes are short where the room ends, as they are on a disk; the header comes as soon as there is room."""
    write, path = os.write, tmp_path / "r.jsonl"

    def full(file, data):
        nonlocal room
        if room == 0:
            raise OSError(28, "No space left on device")
        taken = write(file, data[:room])
        room -= taken
        return taken

    monkeypatch.setattr(os, "write", full)
    with pytest.warns(anybatch.AnybatchWarning, match="No space left") as caught:
        record = anybatch.RunRecord(path, config={"x": 1})
        for n in range(1, 6):
            record.write(step(n))
        room = 10**6
        for n in range(6, 9):
            record.write(step(n))
    assert len(caught) == 1
    record.close()
    run = anybatch.read_record(path)
    steps = [s.step for s in run.steps]
    assert steps[-3:] == [6, 7, 8]
    assert steps[:-3] == list(range(1, len(steps) - 2))
    assert (run.config, run.torn <= 1) == ({"x": 1}, True)


def test_a_slow_disk_takes_a_line_in_pieces(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    record = anybatch.RunRecord(tmp_path / "r.jsonl")
    record.write(step(1))
    assert anybatch.read_record(tmp_path / "r.jsonl").steps == [step(1)]


# ---- hostile content ----

TEXT = st.text(st.characters(exclude_categories=()))  # lone surrogates, too
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def inert(value):
    """What may be expected back: text without lone surrogates, numbers without nan and infinity."""
    if isinstance(value, str):
        return "".join(f"\\u{ord(c):04x}" if 0xD800 <= ord(c) < 0xE000 else c for c in value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {inert(k): inert(v) for k, v in value.items()}
    return [inert(v) for v in value] if isinstance(value, list) else value


@given(JSON)
def test_any_config_round_trips_or_is_made_inert(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("hostile") / "r.jsonl"
    anybatch.RunRecord(path, config={"value": value}).close()
    (line,) = path.read_bytes().decode("utf-8", "strict").splitlines()
    json.loads(line, parse_constant=lambda name: pytest.fail(name))
    read = anybatch.read_record(path).config["value"]
    assert read == inert(value)
    json.dumps(read, ensure_ascii=False).encode("utf-8")  # who writes it elsewhere does not stumble


@pytest.mark.parametrize(
    "name", ["</script><script>alert(1)</script>", "a\nb\r\x00\x1b[31m\u2028", "x\ud800", "\udcff.txt", "\U0001f600"]
)
def test_hostile_names(tmp_path, name):
    record = anybatch.RunRecord(tmp_path / "r.jsonl", config={name: name})
    record.write(MetricRecord(1, 1.0, {name: 1.0}))
    run = anybatch.read_record(tmp_path / "r.jsonl")
    assert run.config == {inert(name): inert(name)}
    assert run.metrics[0].values == {inert(name): 1.0}
    assert len((tmp_path / "r.jsonl").read_bytes().splitlines()) == 2


GARBAGE = [
    b"\xff\xfe\x00", b"[" * 100_000, b"9" * 5000, b"null", b"[]", b"{}", b'{"kind": "step"}', b'{"kind": "other"}',
    b'{"kind": "header"}', b'{"kind": "header", "version": "2", "config": {}}',
    b'{"kind": "header", "version": 2, "config": 1}', b'{"kind": "metric", "step": 1, "tau": 1, "values": [1]}',
    b'{"kind": "metric", "step": 1.5, "tau": 1, "values": {}}',
    b'{"kind": "metric", "step": 1, "tau": 1' + b"0" * 400 + b', "values": {}}', b"\xef\xbb\xbf{}",
]  # fmt: skip


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_in_the_middle_is_counted_and_passed_over(tmp_path, garbage):
    path = tmp_path / "r.jsonl"
    record = anybatch.RunRecord(path)
    record.write(step(1))
    with path.open("ab") as file:
        file.write(garbage + b"\n")
    record.write(step(2))
    run = anybatch.read_record(path)
    assert (run.steps, run.torn) == ([step(1), step(2)], 1)
    assert list(anybatch.iter_record(path)) == run.steps


@pytest.mark.parametrize("content", ["", "not json\n", '{"kind": "step"}\n', "[1, 2]\n", "\x00\xff\n"])
def test_foreign_files_are_refused(tmp_path, content):
    (tmp_path / "r.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(anybatch.InvalidValueError, match="not an anybatch record"):
        anybatch.read_record(tmp_path / "r.jsonl")


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"\n", b'{"a": 1}\n', b"\x89PNG", b"x"])
def test_nothing_is_appended_to_a_foreign_file(tmp_path, content):
    (tmp_path / "r").write_bytes(content)
    with pytest.raises(anybatch.InvalidValueError, match=r"not an anybatch record.*file of its own"):
        anybatch.RunRecord(tmp_path / "r")
    assert (tmp_path / "r").read_bytes() == content


@pytest.mark.parametrize("cut", [1, 5, 17, 18, 60])
def test_a_record_whose_first_header_was_torn_is_continued(tmp_path, cut):
    path = tmp_path / "r.jsonl"
    anybatch.RunRecord(path, config={"a": 1}).close()
    os.truncate(path, cut)
    with pytest.raises(anybatch.InvalidValueError, match="no header"):
        anybatch.read_record(path)
    for n in (1, 2):
        record = anybatch.RunRecord(path, config={"a": 2})
        record.write(step(n))
        record.close()
    run = anybatch.read_record(path)
    assert ([s.step for s in run.steps], run.torn, run.config) == ([1, 2], 1, {"a": 2})


def test_newer_records_are_refused(tmp_path):
    content = '{"kind": "header", "version": 99, "config": {}}\n'
    (tmp_path / "r.jsonl").write_text(content)
    for use in (anybatch.read_record, anybatch.iter_record, anybatch.RunRecord):
        with pytest.raises(anybatch.StateError, match=r"99.*upgrade"):
            use(tmp_path / "r.jsonl")
    assert (tmp_path / "r.jsonl").read_text() == content


@pytest.mark.parametrize("name", ["folder", "file/below", "a\x00b", "x" * 300])
def test_paths_that_cannot_be_used_are_told_in_one_line(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for use in (anybatch.RunRecord, anybatch.read_record):
        with pytest.raises(anybatch.InvalidValueError, match=r"Cannot (read|write)") as error:
            use(tmp_path / name)
        assert "\n" not in str(error.value)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(anybatch.InvalidValueError):
        anybatch.attach(optimizer, model=model, scale="count", record=tmp_path / name)
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    anybatch.attach(optimizer, model=model, scale="count").detach()


def test_a_missing_record_is_told_in_one_line(tmp_path):
    with pytest.raises(anybatch.InvalidValueError, match="No such file"):
        anybatch.read_record(tmp_path / "r.jsonl")


# ---- what the controller writes ----


def git(folder, *words):
    names = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", *names, *words], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_header_tells_where_the_run_comes_from(tmp_path, monkeypatch):
    torch.manual_seed(1234)
    model = torch.nn.Linear(2, 1)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": torch.tensor(0.25), "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.5, betas=(0.8, 0.9), weight_decay=0.1)
    monkeypatch.chdir(tmp_path)
    own = anybatch.RunRecord("r.jsonl", config={"task": "digits"})
    controller = anybatch.attach(optimizer, model=model, base_batch=8, micro_batch=4, total=50, record=own)
    header = anybatch.read_record("r.jsonl").header
    assert (header["version"], header["seed"], header["commit"]) == (2, 1234, None)
    assert (header["cpus"], header["python"]) == (os.cpu_count(), platform.python_version())
    config = header["config"]
    assert {name: config[name] for name in ("task", "optimizer", "total", "base_batch", "micro_batch", "ranks")} == {
        "task": "digits", "optimizer": "AdamW", "total": 50, "base_batch": 8, "micro_batch": 4, "ranks": 1,
    }  # fmt: skip
    assert (config["parameters"], config["device"]) == (3, f"cpu {platform.machine()}")
    assert "AdaScale" in config["rule"]
    assert [(g["lr"], g["betas"], g["weight_decay"]) for g in config["param_groups"]] == [
        (0.5, [0.8, 0.9], 0.1), (0.25, [0.8, 0.9], 0.0),
    ]  # fmt: skip
    controller.detach()
    own.begin({})  # it is the user's, and still open


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "repository" / "below").mkdir(parents=True)
    git(tmp_path / "repository", "init", "-q")
    monkeypatch.chdir(tmp_path / "repository" / "below")
    anybatch.RunRecord(tmp_path / "empty.jsonl").close()
    git(tmp_path / "repository", "commit", "-q", "--allow-empty", "-m", "one")
    anybatch.RunRecord(tmp_path / "one.jsonl").close()
    head = git(tmp_path / "repository", "rev-parse", "HEAD")
    monkeypatch.setenv("PATH", "")
    anybatch.RunRecord(tmp_path / "none.jsonl").close()
    commits = [anybatch.read_record(tmp_path / f"{name}.jsonl").header["commit"] for name in ("empty", "one", "none")]
    assert commits == [None, head, None]


def training(path):
    """A model with its controller, and a function that takes one step."""
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = anybatch.attach(optimizer, model=model, scale="count", record=path)

    def take():
        for _ in range(2):
            (model(torch.randn(3, 2)).square().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()

    return controller, take


def test_a_resume_from_an_older_checkpoint_supersedes_what_came_after_it(tmp_path):
    path, seen = tmp_path / "r.jsonl", []
    controller, take = training(path)
    for n in range(1, 8):
        take()
        seen.append((n, controller.tau))
        if n in (3, 5):
            state = controller.state_dict()
        if n == 6:
            controller.log(accuracy=0.5)
    controller.detach()
    controller, take = training(path)
    controller.load_state_dict(state)
    controller.log(accuracy=0.75, loss=math.nan)
    del seen[5:]
    for n in (6, 7, 8):
        take()
        seen.append((n, controller.tau))
    older = controller.state_dict()
    take()
    controller.load_state_dict(older)  # back again, in the same process
    take()
    seen.append((9, controller.tau))
    run = anybatch.read_record(path)
    assert [(s.step, s.tau) for s in run.steps] == seen
    assert [(m.step, m.tau) for m in run.metrics] == [seen[4]]
    assert run.metrics[0].values == {"accuracy": 0.75, "loss": pytest.approx(math.nan, nan_ok=True)}


def test_logging_needs_a_record_and_numbers(tmp_path):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = anybatch.attach(optimizer, model=model, scale="count")
    with pytest.raises(anybatch.UsageError, match="record="):
        controller.log(accuracy=1.0)
    controller.detach()
    controller = anybatch.attach(optimizer, model=model, scale="count", record=tmp_path / "r.jsonl")
    for results in (
        {"tau": 1.0},
        {"step": 1},
        {"name": "text"},
        {"name": None},
        {"gain": 0.5},
        {"count": 3},
        {"many": torch.ones(2)},
    ):
        with pytest.raises(anybatch.InvalidValueError):
            controller.log(**results)
    controller.log(tensor=torch.tensor(0.5), whole=3)
    assert anybatch.read_record(tmp_path / "r.jsonl").metrics == [MetricRecord(0, 0.0, {"tensor": 0.5, "whole": 3.0})]
    controller.detach()
    with pytest.raises(anybatch.UsageError, match="detached"):
        controller.log(accuracy=1.0)


@pytest.mark.filterwarnings("ignore:The schedule does not fit total")
def test_a_run_is_recorded_as_it_happened(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    path = tmp_path / "r.jsonl"
    controller = anybatch.attach(
        optimizer, model=model, scheduler=scheduler, base_batch=4, micro_batch=8, total=100, record=path
    )
    expected = []
    for t in range(4):
        base = optimizer.param_groups[0]["lr"]
        factor = math.inf if t == 2 else 1.0
        for _ in range(3):
            (factor * model(torch.randn(8, 4)).square().mean() / 3).backward()
        kept = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        if t == 2:
            with torch.no_grad():
                for p, k in zip(model.parameters(), kept, strict=True):
                    p.copy_(k)
        else:
            expected.append((controller.gain, controller.tau, base * controller.gain, controller.noise_scale))
    run = anybatch.read_record(path)
    done = [s for s in run.steps if not s.skipped]
    assert [(s.gain, s.tau, s.lr, s.noise_scale) for s in done] == [pytest.approx(e) for e in expected]
    assert [s.skipped for s in run.steps] == [False, False, True, False]
    assert all((s.scale, s.count) == (6, 3) for s in run.steps)
    assert run.config["optimizer"] == "SGD"
    assert "AdaScale" in run.config["rule"]
    assert (run.config["base_batch"], run.config["total"]) == (4, 100)


def test_each_line_has_the_seconds_of_its_own_step(tmp_path, monkeypatch):
    optimizer, model = optimizer_and_model()
    now = iter(range(0, 1000, 2))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    anybatch.attach(optimizer, model=model, scale="count", record=tmp_path / "run.jsonl")
    for _ in range(3):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [line.seconds for line in anybatch.read_record(tmp_path / "run.jsonl").steps] == [2, 2, 2]


def optimizer_and_model():
    model = torch.nn.Linear(2, 1)
    return torch.optim.SGD(model.parameters(), lr=0.1), model


def test_a_record_is_neither_copied_nor_sent(tmp_path):
    record = anybatch.RunRecord(tmp_path / "r.jsonl")
    for send in (copy.deepcopy, pickle.dumps):
        with pytest.raises(anybatch.UsageError, match="each process opens its own"):
            send(record)


def test_the_users_values_are_not_hidden_by_the_controllers(tmp_path):
    optimizer, model = optimizer_and_model()
    config = {"scale": "my", "task": "digits", "given": "mine"}
    anybatch.RunRecord(tmp_path / "r.jsonl", config=config).close()
    assert anybatch.read_record(tmp_path / "r.jsonl").config == config
    record = anybatch.RunRecord(tmp_path / "r.jsonl", config=config)
    controller = anybatch.attach(optimizer, model=model, scale=2, record=record)
    found = anybatch.read_record(tmp_path / "r.jsonl").config
    assert (found["scale"], found["task"]) == (2, "digits")
    assert found["given"] == {"scale": "my", "given": "mine"}
    assert found["estimator"] == "unbiased"
    controller.detach()
    anybatch.attach(optimizer, model=model, rule=anybatch.Linear(), scale=2, record=record).detach()
    assert anybatch.read_record(tmp_path / "r.jsonl").config["estimator"] is None


def test_a_record_given_to_attach_has_one_header(tmp_path):
    """The controller knows more of the run than whoever made the record: its header is the first and only one."""
    optimizer, model = optimizer_and_model()
    record = anybatch.RunRecord(tmp_path / "r.jsonl", config={"task": "digits"})
    anybatch.attach(optimizer, model=model, scale=2, record=record).detach()
    record.close()
    assert (tmp_path / "r.jsonl").read_text().count('"kind": "header"') == 1
    assert anybatch.read_record(tmp_path / "r.jsonl").config.items() >= {"task": "digits", "scale": 2}.items()


def test_two_controllers_do_not_share_a_record(tmp_path):
    record = anybatch.RunRecord(tmp_path / "r.jsonl")
    (first, model), (second, other) = optimizer_and_model(), optimizer_and_model()
    controller = anybatch.attach(first, model=model, scale=1, record=record)
    with pytest.raises(anybatch.UsageError, match="Another controller"):
        anybatch.attach(second, model=other, scale=1, record=record)
    with pytest.raises(anybatch.UsageError, match="Another controller"):
        anybatch.attach(second, model=other, scale=1, record=record)  # the failed one has not set it free
    controller.detach()
    anybatch.attach(second, model=other, scale=1, record=record).detach()


def test_a_later_destination_that_fails_leaves_no_lock(tmp_path):
    closed = anybatch.RunRecord(tmp_path / "closed.jsonl")
    closed.close()
    optimizer, model = optimizer_and_model()
    with pytest.raises(anybatch.UsageError, match="is closed") as error:  # which holds the traceback, and its frames
        anybatch.attach(optimizer, model=model, scale=1, record=[tmp_path / "r.jsonl", closed])
    anybatch.RunRecord(tmp_path / "r.jsonl").close()
    assert error.value is not None


def test_a_run_from_nothing_supersedes_the_evaluation_before_the_first_step(tmp_path):
    record = anybatch.RunRecord(tmp_path / "r.jsonl")
    for loss in (2.0, 3.0):
        record.begin({})
        record.write(MetricRecord(0, 0.0, {"loss": loss}))
        record.write(step(1))
    assert [m.values for m in anybatch.read_record(tmp_path / "r.jsonl").metrics] == [{"loss": 3.0}]


@pytest.mark.parametrize("per_layer", [0, -1, 1.5, True, "2", math.nan])
def test_a_number_of_steps_by_layer_that_is_none(tmp_path, per_layer):
    with pytest.raises(anybatch.InvalidValueError, match=r"per_layer is a number of steps, at least 1; got"):
        anybatch.RunRecord(tmp_path / "r.jsonl", per_layer=per_layer)
    assert not (tmp_path / "r.jsonl").exists()  # nothing is opened before the arguments are valid


@pytest.mark.parametrize("per_layer", [None, 1, 100])
def test_a_record_has_its_number_of_steps_by_layer(tmp_path, per_layer):
    record = anybatch.RunRecord(tmp_path / "r.jsonl", per_layer=per_layer)
    assert record.per_layer == per_layer
    with pytest.raises(AttributeError):
        record.per_layer = 2
    record.close()

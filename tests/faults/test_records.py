"""Records on full disks, cut at every byte, killed in the middle of a line, and wanted by several writers."""

import ctypes
import os
import resource
import signal
import warnings

import pytest
from processes import until

import anybatch
from anybatch._record import MetricRecord
from examples import elastic_digits
from faults import jobs
from faults.ledger import steps_of

STEPS = 30  # 11 lines may find room in the last page of a file


def train(record, *, steps=STEPS, before=lambda t: None, state=None):
    """The states after `steps` more steps."""
    named, model = jobs.parts(record=record, parallel=False)
    for name, saved in (state or {}).items():
        named[name].load_state_dict(saved)
    for t in range(steps):
        before(t)
        jobs.step(named, model)
    named["controller"].detach()
    return jobs.states(named)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The record that nothing has happened to, and the states at its end."""
    path = tmp_path_factory.mktemp("whole") / "record.jsonl"
    return path, train(path)


# ---- full disks ----


def limit_files(size):
    """No file of this process grows beyond `size` bytes; without the signal that would end it."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def small_disk(folder, pages):
    """Mount a file system of so many pages in a namespace of this process alone; whether the kernel lets us."""
    libc, user, group = ctypes.CDLL(None), os.getuid(), os.getgid()
    new_user, new_mounts, private = 0x10000000, 0x00020000, 0x44000  # of <linux/sched.h> and <linux/mount.h>
    if libc.unshare(new_mounts):
        if libc.unshare(new_user | new_mounts):
            return False
        for name, line in {"setgroups": "deny", "uid_map": f"0 {user} 1", "gid_map": f"0 {group} 1"}.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
    libc.mount(b"none", b"/", None, private, None)  # what follows stays in here
    options = f"size={pages * os.sysconf('SC_PAGESIZE')}".encode()
    return libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, options) == 0


def beside_a_full_disk(folder, kind, room, full, empty):
    """Train; the disk has room for `room` bytes more at step `full`, and for everything at step `empty`."""
    path, ballast = folder / "record.jsonl", folder / "ballast"
    if kind == "tmpfs" and not small_disk(folder, pages=16):
        return None

    def fill(t):
        if t == full and kind == "limit":
            limit_files(path.stat().st_size + room)
        elif t == full:
            with ballast.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    disk = os.statvfs(folder)
                    if not disk.f_bavail:
                        break
        elif t == empty and kind == "limit":
            limit_files(resource.RLIM_INFINITY)
        elif t == empty:
            ballast.unlink()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = train(path, before=fill)
        limit_files(resource.RLIM_INFINITY)
        warned = [str(each.message) for each in caught if issubclass(each.category, anybatch.AnybatchWarning)]
    run = anybatch.read_record(path)
    return warned, state, steps_of(run), run.torn


@pytest.mark.parametrize("kind", ["limit", "tmpfs"])
def test_a_full_disk_costs_the_lines_of_that_while_and_never_the_training(
    faults, processes, times, rng, tmp_path, whole, kind
):
    expected = steps_of(anybatch.read_record(whole[0]))
    for i in range(times(3, 40)):
        folder = tmp_path / str(i)
        folder.mkdir()
        empty, room = rng.choice([STEPS - 3, STEPS]), rng.randrange(1200)
        full = rng.randrange(empty == STEPS, 6)  # full from the header on and to the end, it would be no record
        result = processes.start(beside_a_full_disk, folder, kind, room, full, empty).result()
        if result is None:
            pytest.skip("the kernel lets us mount no file system")
        warned, state, steps, torn = result
        assert len(warned) == 1
        assert ("No space left" if kind == "tmpfs" else "too large") in warned[0]
        faults.fired()
        faults.same(state, whole[1], "training")
        written = {each["step"] for each in steps}
        lost = [each["step"] for each in expected if each["step"] not in written]
        faults.same(steps, [each for each in expected if each["step"] not in lost], "lines")
        assert lost == list(range(lost[0], empty + 1)), "the lines of that while"
        assert full < lost[0] <= full + 12
        assert torn <= 1
        faults.survived()


def save_on_a_full_disk(folder, room):
    """The example's save beside an old checkpoint: whether it raised, and whether that one is as it was."""
    path = folder / "checkpoint.pt"
    named, model = jobs.parts(parallel=False)
    elastic_digits.save(path, jobs.states(named))
    before = path.read_bytes()
    jobs.step(named, model)
    limit_files(room)
    raised = False
    try:
        elastic_digits.save(path, jobs.states(named))
    except (OSError, RuntimeError):
        raised = True
    finally:
        limit_files(resource.RLIM_INFINITY)
    return raised, path.read_bytes() == before


def test_a_checkpoint_for_which_there_is_no_room_leaves_the_old_one(faults, processes, times, rng, tmp_path):
    for _ in range(times(3, 40)):
        raised, kept = processes.start(save_on_a_full_disk, tmp_path, rng.randrange(1, 6000)).result()
        assert raised
        faults.fired()
        assert kept
        faults.survived()


# ---- torn lines ----


def test_a_record_cut_anywhere_reads_as_its_whole_lines(faults, times, rng, tmp_path, whole):
    data = whole[0].read_bytes()
    expected, header = steps_of(anybatch.read_record(whole[0])), data.index(b"\n")
    path = tmp_path / "record.jsonl"
    for length in sorted(rng.sample(range(1, len(data)), times(100, len(data) - 1))):
        path.write_bytes(data[:length])
        faults.fired()
        if length < header:
            with pytest.raises(anybatch.InvalidValueError, match="no header"):
                anybatch.read_record(path)
        else:
            run = anybatch.read_record(path)
            lines = data[: length + 1].count(b"\n") - 1  # a line that lacks its newline alone is whole
            faults.same(steps_of(run), expected[:lines], f"cut at {length}")
            assert run.torn == (not data[:length].endswith(b"\n") and data[length : length + 1] != b"\n")
            assert [vars(line) for line in anybatch.iter_record(path)] == [vars(step) for step in run.steps]
    faults.survived()


def train_and_die(path, state, step, left):
    """Killed when `left` bytes of the line of a step are in the file; the states were saved at each step before."""
    write = os.write

    def dying(file, data):
        if b'"kind": "step"' in data and f'"step": {step},'.encode() in data:
            write(file, data[:left])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(file, data)

    named, model = jobs.parts(record=path, parallel=False)
    for name, saved in (state or {}).items():
        named[name].load_state_dict(saved)
    os.write = dying
    while True:
        jobs.step(named, model)
        if named["controller"].steps % 3 == 0:
            elastic_digits.save(path.with_name("checkpoint.pt"), jobs.states(named))


def test_a_run_killed_in_the_middle_of_its_lines_reads_as_the_whole_one(faults, processes, times, rng, tmp_path, whole):
    for i in range(times(2, 40)):
        folder = tmp_path / str(i)
        folder.mkdir()
        path, checkpoint, state = folder / "record.jsonl", folder / "checkpoint.pt", None
        for kills, step in enumerate(sorted(rng.sample(range(1, STEPS), 3)), 1):
            child = processes.start(train_and_die, path, state, step, rng.randrange(400))
            assert child.join() == -signal.SIGKILL, child.text()
            faults.fired()
            run = anybatch.read_record(path)
            faults.steps([each.step for each in run.steps], range(1, step))
            assert run.torn <= kills
            state = elastic_digits.load(checkpoint) if checkpoint.exists() else None
        done = state["controller"]["steps"] if state else 0
        end = train(path, steps=STEPS - done, state=state)
        run, expected = anybatch.read_record(path), anybatch.read_record(whole[0])
        faults.steps([each.step for each in run.steps], [each.step for each in expected.steps])
        faults.same(steps_of(run), steps_of(expected), "lines")
        faults.same(end, whole[1], "training")
        faults.survived()


# ---- several writers ----


def write_when_told(path, starter, number, writers):
    """Open the record at the same moment as the others, and keep it until all have tried."""
    until(starter.exists, "the start")
    try:
        record = anybatch.RunRecord(path, config={"writer": number})
    except anybatch.UsageError as error:
        path.with_name(f"refused-{number}").write_text(str(error))
        return str(error)
    until(lambda: len(list(path.parent.glob("refused-*"))) == writers - 1, "the others")
    record.write(MetricRecord(0, 0.0, {"x": float(number)}))
    record.close()
    return None


def test_of_several_writers_one_writes_and_the_others_are_told(faults, processes, times, tmp_path):
    for i in range(times(2, 20)):
        folder = tmp_path / str(i)
        folder.mkdir()
        path, starter = folder / "record.jsonl", folder / "go"
        children = [processes.start(write_when_told, path, starter, n, 4) for n in range(4)]
        starter.touch()
        said = [child.result() for child in children]
        (winner,) = [n for n, error in enumerate(said) if error is None]
        assert all("being written by another run" in error for error in said if error)
        faults.fired(3)
        run = anybatch.read_record(path)
        assert (run.torn, run.config) == (0, {"writer": winner})
        assert [line.values for line in run.metrics] == [{"x": float(winner)}]
        faults.survived()


def hold(path):
    record = anybatch.RunRecord(path)
    record.write(MetricRecord(0, 0.0, {"x": 1.0}))
    path.with_suffix(".held").touch()
    until(lambda: False, "the kill")


def test_the_record_of_a_killed_writer_is_free(faults, processes, times, tmp_path):
    for i in range(times(2, 20)):
        path = tmp_path / f"{i}.jsonl"
        child = processes.start(hold, path)
        until(path.with_suffix(".held").exists, "the writer")
        with pytest.raises(anybatch.UsageError, match="being written"):
            anybatch.RunRecord(path)
        faults.fired(1 + child.kill())
        record = anybatch.RunRecord(path)
        record.write(MetricRecord(0, 0.0, {"x": 2.0}))
        record.close()
        assert [line.values for line in anybatch.read_record(path).metrics] == [{"x": 1.0}, {"x": 2.0}]
        faults.survived()

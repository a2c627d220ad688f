"""Checkpoints: writers that are killed in each phase, files cut and with flipped bits, states of impossible numbers.

What notices a flipped bit in a file of torch.save: torch.load, where the archive cannot be read any more, and nothing
where it is a weight; the checksums that torch.save writes for each member of the archive, which the elastic example
has zipfile look at. A state that came through a file without checksums, JSON say, can only be looked at for numbers
that cannot be.
"""

import copy
import io
import math
import os
import pickle
import signal
import struct
import zipfile
import zlib

import pytest
import torch

import anybatch
from examples import elastic_digits
from faults import jobs
from faults.ledger import equal

PHASES = ("opened", "written", "flushed", "synced", "replaced")


def trained(steps):
    """The states after so many steps."""
    named, model = jobs.parts(parallel=False)
    for _ in range(steps):
        jobs.step(named, model)
    return copy.deepcopy(jobs.states(named))


# ---- kills in each phase of a save ----


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def save_and_die(path, state, phase):
    """The example's save, killed after a phase, or after so many bytes of the file."""
    write, replace, fsync = torch.save, os.replace, os.fsync

    class Mortal(io.RawIOBase):
        """Hands its bytes on until `phase` of them are written, and dies with those in the file."""

        def __init__(self, file):
            self.file, self.left = file, phase

        def writable(self):
            return True

        def write(self, data):
            data = bytes(data)
            self.file.write(data[: self.left])
            if self.left <= len(data):
                self.file.flush()
                die()
            self.left -= len(data)
            return len(data)

    def dying_save(state, file):
        if phase == "opened":
            die()
        write(state, Mortal(file) if isinstance(phase, int) else file)
        if phase == "written":
            die()

    def dying_fsync(file):
        if phase == "flushed":
            die()
        fsync(file)
        if phase == "synced":
            die()

    def dying_replace(old, new):
        replace(old, new)
        if phase == "replaced":
            die()

    torch.save, os.fsync, os.replace = dying_save, dying_fsync, dying_replace
    elastic_digits.save(path, state)


def test_a_save_that_is_killed_leaves_the_old_checkpoint_or_the_new(faults, processes, times, rng, tmp_path):
    old, new = trained(3), trained(5)
    path = tmp_path / "checkpoint.pt"
    elastic_digits.save(path, new)
    size = path.stat().st_size
    cuts = [1, size - 1, size, *(rng.randrange(1, size) for _ in range(times(5, 200)))]
    for phase in (*PHASES, *cuts):
        elastic_digits.save(path, old)  # over what the last kill has left
        child = processes.start(save_and_die, path, new, phase)
        assert child.join() == -signal.SIGKILL, child.text()
        faults.fired()
        faults.same(elastic_digits.load(path), new if phase == "replaced" else old, f"killed when {phase}")
        faults.survived()


# ---- damaged files ----


def flipped(data, bit):
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def saved_bytes(state, path):
    elastic_digits.save(path, state)
    return path.read_bytes()


LOADERS_OWN = (  # what zipfile, zlib, struct and torch.load raise of files that are not whole
    *(
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        pickle.UnpicklingError,
        RuntimeError,
        ValueError,
        EOFError,
        OSError,
    ),
    *(NotImplementedError, KeyError, IndexError, TypeError, AttributeError, OverflowError, MemoryError),
)


def outcomes(read, path, damages):
    """How many damaged files were refused, read as the good one, or read as something else."""
    good = read(path)
    counts = {"refused": 0, "same": 0, "other": 0}
    for data in damages:
        damaged = path.with_suffix(".damaged")
        damaged.write_bytes(data)
        try:
            outcome = "same" if equal(read(damaged), good) else "other"
        except LOADERS_OWN:
            outcome = "refused"
        counts[outcome] += 1
    return counts


def bits_of(data, n, rng):
    """`n` of its bits, the first byte's and the last's among them; all where `n` is as many."""
    every = range(8 * len(data))
    return every if n >= len(every) else sorted({*every[:8], *every[-8:], *rng.sample(every, n - 16)})


def test_a_damaged_checkpoint_is_refused_or_read_as_the_good_one(faults, times, rng, tmp_path):
    path = tmp_path / "checkpoint.pt"
    data = saved_bytes(trained(3), path)
    flips = [flipped(data, bit) for bit in bits_of(data, times(500, 20_000), rng)]
    lengths = sorted(rng.sample(range(len(data)), times(100, len(data))))
    faults.fired(len(flips) + len(lengths))
    counts = outcomes(elastic_digits.load, path, flips)
    cut = outcomes(elastic_digits.load, path, (data[:length] for length in lengths))
    faults.counts["wrong"] += counts["other"] + cut["other"]
    assert (counts["other"], cut) == (0, {"refused": len(lengths), "same": 0, "other": 0})
    assert counts["refused"] > len(flips) / 4, counts  # the rest is padding and what nobody reads
    faults.survived()


def test_what_torchs_loader_alone_would_not_notice(rng, tmp_path):
    """The reason for the example's look at the checksums; torch.load finds structure, never numbers."""
    path = tmp_path / "weights.pt"
    weights = {"weights": torch.arange(1.0, 65.0, dtype=torch.float64)}
    data = saved_bytes(weights, path)
    at = data.index(weights["weights"].numpy().tobytes())
    flips = [flipped(data, 8 * at + bit) for bit in rng.sample(range(8 * 512), 50)]
    assert outcomes(torch.load, path, flips) == {"refused": 0, "same": 0, "other": 50}
    assert outcomes(elastic_digits.load, path, flips) == {"refused": 50, "same": 0, "other": 0}


def test_a_bit_that_calls_a_tensor_a_folder_is_refused(faults, tmp_path):
    """torch.load gives memory that nobody has written: the attributes of a member are in no checksum."""
    path = tmp_path / "weights.pt"
    data = saved_bytes({"weights": torch.ones(64, dtype=torch.float64)}, path)
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"/data/0"))  # of the directory at the end of the archive
    flips = [flipped(data, 8 * (entry + 38) + 4)]
    faults.fired()
    assert outcomes(elastic_digits.load, path, flips) == {"refused": 1, "same": 0, "other": 0}
    faults.survived()


# ---- damaged states ----


def attached():
    named, model = jobs.parts(parallel=False)
    return named["controller"], named["ema"]


@pytest.fixture(scope="module")
def good():
    return trained(3)


NOT_NUMBERS = (None, "", "nan", [], {}, math.nan, math.inf, -math.inf)


def refused(faults, part, state):
    """A state that cannot be is a StateError, and the part stays as it was."""
    faults.fired()
    before = copy.deepcopy(part.state_dict())
    with pytest.raises(anybatch.StateError):
        part.load_state_dict(state)
    faults.same(part.state_dict(), before, "after the refusal")


def test_a_controllers_state_with_a_part_missing_or_no_number_is_refused(faults, good):
    controller, _ = attached()
    for name in good["controller"]:
        refused(faults, controller, {key: value for key, value in good["controller"].items() if key != name})
        refused(faults, controller, {key if key != name else key + "~": v for key, v in good["controller"].items()})
        for value in NOT_NUMBERS:
            refused(faults, controller, {**good["controller"], name: value})
    for state in (None, [], "state", {}, 1.0):
        refused(faults, controller, state)
    controller.load_state_dict(good["controller"])
    faults.same(controller.state_dict(), good["controller"], "the good one")
    faults.survived()


IMPOSSIBLE = {
    "a clock before the start": {"tau": -1.0},
    "half a step": {"steps": 2.5},
    "fewer steps than none": {"steps": -3},
    "half a skip": {"skipped": 0.5},
    "fewer samples than none": {"samples": -1},
    "half a sample": {"samples": 1.5},
    "half of an offset": {"schedule_offset": 0.5},
    "an older version than the first": {"version": 0},
    "a version between two": {"version": 1.5},
}


@pytest.mark.parametrize("change", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_a_controllers_state_of_numbers_that_cannot_be_is_refused(faults, good, change):
    controller, _ = attached()
    refused(faults, controller, {**good["controller"], **change})
    faults.survived()


def test_an_averages_state_with_a_part_missing_or_no_number_is_refused(faults, good):
    _, ema = attached()
    state = good["ema"]
    for name in state:
        refused(faults, ema, {key: value for key, value in state.items() if key != name})
        refused(faults, ema, {key if key != name else key + "~": value for key, value in state.items()})
        for value in (None, "", [], {}, math.nan, -1):
            if name != "decay":  # a single one stays the one given to ModelEMA
                refused(faults, ema, {**state, name: value})
    for change in ({"tau": math.nan}, {"pending": math.inf}, {"waiting": -1}, {"tau": -1.0}, {"waiting": 0.5}):
        refused(faults, ema, {**state, **change})
    for name, average in state["averages"].items():
        for value in (None, 1.0, "x", average[..., :1], average[None], [1.0]):
            refused(faults, ema, {**state, "averages": {**state["averages"], name: value}})
    for other in (None, [], "state", {}, 1.0):
        refused(faults, ema, other)
    ema.load_state_dict(state)
    faults.same(ema.state_dict(), state, "the good one")
    faults.survived()

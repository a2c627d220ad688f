"""RunRecord: what every step did, one strict JSON object a line, appended by a single write.

The first line of a run is its header. A process killed at any moment leaves at most one torn last line, which
`read_record` passes over; a resumed run appends another header and goes on.
"""

import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from anybatch._errors import InvalidValueError, StateError
from anybatch._json import strict
from anybatch._version import __version__

_VERSION = 1


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. Numbers that are not known or not finite are null in the file and nan here.

    Args:
        step: steps counted so far, this one included.
        tau: the clock after the step, base iterations.
        iterations: how far this step moved the clock.
        scale: S.
        count: N, micro-batches on all ranks; 0 where nothing was counted.
        raw_variance: this step's own estimate of sigma^2, grad^2.
        raw_sqnorm: this step's own estimate of mu^2, grad^2.
        variance: the averaged sigma^2.
        sqnorm: the averaged mu^2.
        gain: r.
        lr: the learning rate applied to the first parameter group.
        lr_factor: its factor on the base learning rate.
        noise_scale: B_simple in examples, or in base batches where no base batch was given.
        seconds: wall time since the previous step.
        skipped: whether the step was not counted, because of a non-finite gradient.
    """

    step: int
    tau: float
    iterations: float
    scale: float
    count: int
    raw_variance: float
    raw_sqnorm: float
    variance: float
    sqnorm: float
    gain: float
    lr: float
    lr_factor: float
    noise_scale: float
    seconds: float
    skipped: bool = False


@dataclass(frozen=True)
class Run:
    """A record that was read.

    Args:
        config: the header's configuration.
        steps: the steps in the order they were taken.
        torn: lines that could not be read: at most the last one, and one for each time the run was killed.
    """

    config: dict[str, Any]
    steps: list[StepRecord]
    torn: int


class RunRecord:
    """Appends a run's steps to a file of JSON lines.

    Args:
        path: the file; made with its folders, appended to where it exists.
        config: any JSON values that say what the run was; stored in the header beside the versions.

    Raises:
        OSError: the file cannot be written.

    Example:
        >>> record = anybatch.RunRecord(tmp_path / "run.jsonl", config={"task": "digits"})
        >>> record.close()
        >>> anybatch.read_record(tmp_path / "run.jsonl").config["task"]
        'digits'
    """

    def __init__(self, path: str | os.PathLike[str], *, config: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")  # a kill tore the last line; what follows must start on a line of its own
        self._write({
            "kind": "header",
            "version": _VERSION,
            "time": time.time(),
            "anybatch": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "config": dict(config or {}),
        })  # fmt: skip

    def write(self, step: StepRecord) -> None:
        """Append one step."""
        self._write({"kind": "step", **asdict(step)})

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _write(self, line: dict[str, Any]) -> None:
        # One write of a whole line to a file in append mode: a kill before it leaves nothing, after it the line.
        os.write(self._file, (json.dumps(strict(line), allow_nan=False) + "\n").encode())


def read_record(path: str | os.PathLike[str]) -> Run:
    """Read a record back.

    Args:
        path: a file that a `RunRecord` wrote.

    Returns:
        The run, without its torn lines.

    Raises:
        InvalidValueError: the file is not a record.
        StateError: it was written by a newer anybatch.
    """
    config: dict[str, Any] | None = None
    steps: list[StepRecord] = []
    torn = 0
    with open(path, encoding="utf-8", errors="replace") as lines:
        for text in lines:
            try:
                line = json.loads(text)
                if line["kind"] == "step":
                    steps.append(_step(line))
                    continue
                version, header = line["version"], line["config"]
            except (ValueError, TypeError, KeyError):
                torn += 1
                continue
            if version > _VERSION:
                raise StateError(f"{path} has record version {version}; this anybatch reads up to {_VERSION}.")
            config = config or header
    if config is None:
        raise InvalidValueError(f"{path} is not an anybatch record: it has no header line.")
    return Run(config, steps, torn)


def _step(line: dict[str, Any]) -> StepRecord:
    names = [f.name for f in fields(StepRecord)]
    values: dict[str, Any] = {name: float("nan") if line[name] is None else line[name] for name in names}
    return StepRecord(**values)

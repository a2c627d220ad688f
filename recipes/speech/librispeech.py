"""LibriSpeech on disk: `train-clean-100/<speaker>/<chapter>/`, with `<speaker>-<chapter>.trans.txt` beside the audio.

Audio is .flac, read by soundfile (`pip install soundfile`), or 16-bit .wav, read by the standard library. The
transcripts and the header of every file are read at the start, so that a wrong one is an error then and not in the
night; what the headers say is kept in `lengths-train.json` and `lengths-test-clean.json`. A training utterance with
more characters than the model has steps has no alignment; it is skipped and counted.
"""

import wave
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from recipes.speech.lengths import lengths
from recipes.speech.model import CHARACTERS, SAMPLE_RATE, frames, spectrogram, steps
from recipes.training.task import DataError


@dataclass(frozen=True)
class Utterance:
    """One line of a transcript and its audio."""

    audio: Path
    text: str
    samples: int


class LibriSpeech(Dataset[tuple[Tensor, Tensor]]):
    """Features `[frames, bins]` and labels `[characters]` of utterances; `skipped` had no alignment."""

    def __init__(self, utterances: list[Utterance], *, train: bool) -> None:
        self.utterances = [u for u in utterances if not train or has_alignment(u)]
        self.skipped = len(utterances) - len(self.utterances)

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        utterance = self.utterances[index]
        labels = torch.tensor([CHARACTERS.index(c) + 1 for c in utterance.text])
        return spectrogram(read_audio(utterance.audio)), labels


def has_alignment(utterance: Utterance) -> bool:
    """Whether the model has a step for every character, and a blank between two that are the same."""
    needed = len(utterance.text) + sum(a == b for a, b in pairwise(utterance.text))
    return needed <= int(steps(torch.tensor(frames(utterance.samples))))


def read_splits(data: Path | None, prefix: str) -> list[Utterance]:
    """The utterances of every folder of `data` whose name begins with `prefix`."""
    if data is None:
        raise DataError("speech needs a folder with LibriSpeech's train-* and test-clean: unpack its archives there.")
    folders = sorted(folder for folder in Path(data).glob(f"{prefix}*") if folder.is_dir())
    if not folders:
        raise DataError(f"{Path(data) / prefix}*: no such folder. Unpack LibriSpeech's archives in {data}.")
    lines = [
        line for folder in folders for path in sorted(folder.glob("*/*/*.trans.txt")) for line in _transcript(path)
    ]
    if not lines:
        raise DataError(f"{folders[0]}: no <speaker>/<chapter>/*.trans.txt in it.")
    audio = [path for path, _ in lines]
    samples = lengths(Path(data), f"lengths-{prefix.rstrip('-')}.json", audio, read=_samples)
    return [Utterance(path, text, n) for (path, text), n in zip(lines, samples, strict=True)]


def _transcript(path: Path) -> list[tuple[Path, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the transcript cannot be read: {error}") from error
    return [_utterance(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _utterance(path: Path, number: int, line: str) -> tuple[Path, str]:
    name, _, text = line.strip().partition(" ")
    text = " ".join(text.lower().split())
    if not text:
        raise DataError(f"{path}, line {number}: the transcript of {name} is empty.")
    strange = sorted(set(text) - set(CHARACTERS))
    if strange:
        raise DataError(f"{path}, line {number}: {''.join(strange)!r} is not among the characters {CHARACTERS!r}.")
    if Path(name).name != name:
        raise DataError(f"{path}, line {number}: {name!r} is no name of an utterance.")
    found = [audio for suffix in (".flac", ".wav") if (audio := path.parent / f"{name}{suffix}").is_file()]
    if not found:
        raise DataError(f"{path.parent / name}.flac (or .wav): no such file, but {path.name} has a line for it.")
    return found[0], text


def _samples(path: Path) -> int:
    """The number of samples by the file's header."""
    if path.suffix == ".wav":
        with _wave(path) as file:
            samples, rate, channels = file.getnframes(), file.getframerate(), file.getnchannels()
    else:
        soundfile = _soundfile(path)
        try:
            info = soundfile.info(str(path))
        except (soundfile.SoundFileError, OSError) as error:
            raise DataError(f"{path}: the audio cannot be read: {error}") from error
        samples, rate, channels = info.frames, info.samplerate, info.channels
    if samples == 0:
        raise DataError(f"{path}: the audio has no samples.")
    if (rate, channels) != (SAMPLE_RATE, 1):
        raise DataError(f"{path}: {rate} Hz and {channels} channel(s), but {SAMPLE_RATE} Hz and 1 are needed.")
    return samples


def read_audio(path: Path) -> Tensor:
    """The samples `[n]` of a file, in [-1, 1]."""
    if path.suffix == ".wav":
        with _wave(path) as file:
            stated, raw = file.getnframes(), file.readframes(file.getnframes())
        if len(raw) < 2 * stated:
            raise DataError(f"{path}: the audio ends after {len(raw) // 2} of {stated} samples.")
        return torch.frombuffer(bytearray(raw), dtype=torch.int16).float() / 2**15
    soundfile = _soundfile(path)
    try:
        return torch.from_numpy(soundfile.read(str(path), dtype="float32")[0])
    except (soundfile.SoundFileError, OSError) as error:
        raise DataError(f"{path}: the audio cannot be read: {error}") from error


@contextmanager
def _wave(path: Path) -> Iterator[wave.Wave_read]:
    try:
        with wave.open(str(path), "rb") as file:
            if file.getsampwidth() != 2:
                raise DataError(f"{path}: {8 * file.getsampwidth()} bits a sample, but 16 are needed.")
            yield file
    except (OSError, EOFError, wave.Error) as error:
        raise DataError(f"{path}: the audio cannot be read: {error or 'it ends too early'}") from error


def _soundfile(path: Path) -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the package without the library libsndfile
        raise DataError(f"{path}: .flac is read by soundfile, which is not here: pip install soundfile.") from error
    return soundfile

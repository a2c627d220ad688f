"""Speech made of tones, in LibriSpeech's folders: a sound for each letter, and speakers differ in pitch and speed.

A letter is two formants over the harmonics of the speaker's pitch, with soft ends; words are letters without a pause,
and between words there is silence. Noise lies over everything. The task is that of real speech: what was said, where
nobody tells when a letter begins.
"""

import math
import wave
from pathlib import Path

import torch
from torch import Tensor

from recipes.speech.model import SAMPLE_RATE

WORDS = (
    "a",
    "on",
    "to",
    "the",
    "sun",
    "red",
    "day",
    "ship",
    "lake",
    "bird",
    "fox",
    "gold",
    "wind",
    "jump",
    "moth",
    "quiz",
)
FIRST = (300, 420, 560, 720, 900)  # Hz, the lower formant of a letter
SECOND = (1300, 1700, 2150, 2650, 3200, 3800)  # and the upper: 30 pairs, of which 26 are used
BANDWIDTH = 90.0
SIZES = {"tiny": (512, 96), "small": (4096, 512)}  # utterances to train on and to test on
UTTERANCES = 16  # in a chapter


def write(folder: Path, *, size: str, seed: int) -> None:
    """Make `train-clean-100` and `test-clean` in `folder`, by speakers that the other has not."""
    generator = torch.Generator().manual_seed(seed)
    train, test = SIZES[size]
    for split, count, offset in (("train-clean-100", train, 1000), ("test-clean", test, 5000)):
        for chapter in range(count // UTTERANCES):
            speaker = offset + chapter
            _chapter(folder / split / str(speaker) / "1", name=f"{speaker}-1", generator=generator)


def _chapter(folder: Path, *, name: str, generator: torch.Generator) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pitch = 90 + 130 * _uniform(generator)
    lines = []
    for number in range(UTTERANCES):
        count = 1 + int(3 * _uniform(generator))
        text = " ".join(WORDS[int(len(WORDS) * _uniform(generator))] for _ in range(count))
        lines.append(f"{name}-{number:04d} {text.upper()}\n")
        _save(folder / f"{name}-{number:04d}.wav", say(text, pitch=pitch, generator=generator))
    (folder / f"{name}.trans.txt").write_text("".join(lines), encoding="utf-8")


def say(text: str, *, pitch: float, generator: torch.Generator) -> Tensor:
    """The samples of `text`; the speed varies with the utterance, and each letter's length around it."""
    speed = 0.8 + 0.5 * _uniform(generator)
    silence = [torch.zeros(int(0.05 * SAMPLE_RATE))]
    sounds = [_sound(c, pitch, (0.055 + 0.03 * _uniform(generator)) / speed) for c in text]
    audio = torch.cat(silence + sounds + silence)
    loudness = 0.2 + 0.5 * _uniform(generator)
    return (loudness * audio + 0.01 * torch.randn(len(audio), generator=generator)).clamp(-1, 1)


def _sound(letter: str, pitch: float, seconds: float) -> Tensor:
    n = int(seconds * SAMPLE_RATE)
    if letter == " ":
        return torch.zeros(n)
    index = (ord(letter) - ord("a")) * 7 % 30  # neighbours in the alphabet sound different
    time = torch.arange(n) / SAMPLE_RATE
    harmonics = pitch * torch.arange(1, int(4500 / pitch))
    strength = sum(
        torch.exp(-(((harmonics - formant) / BANDWIDTH) ** 2) / 2)
        for formant in (FIRST[index % len(FIRST)], SECOND[index // len(FIRST)])
    )
    wave_ = (strength * torch.sin(2 * math.pi * time[:, None] * harmonics)).sum(1)
    ends = torch.minimum(time, time.flip(0)) / 0.008
    return wave_ / wave_.abs().max() * ends.clamp(max=1)


def _save(path: Path, audio: Tensor) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((audio * (2**15 - 1)).short().numpy().tobytes())


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))

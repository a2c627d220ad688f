"""How many examples a core loads in a second, beside how many the model takes.

    python -m benchmarks.loader [--rounds 5] [--json loader.json]

The data is made in the papers' sizes: JPEG files of 500x375 (85 KB; ImageNet's and VOC's are about as large),
CIFAR-10's 32x32 bytes, 12 seconds of FLAC, 1024 tokens. Loading is timed by its process's own seconds, which others on
the machine hardly change, collation included and the disk not. The full model's forward and backward are timed by the
clock on a GPU in bfloat16, else in a core's seconds and float32. Loaders take turns, and medians are given; where
simplejpeg is installed, it decodes beside Pillow.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import default_collate

from recipes.detection.model import YoloV3
from recipes.detection.voc import Example, TrainSet
from recipes.images.cifar10 import Augmented
from recipes.images.imagenet import Images
from recipes.images.resnet import cifar_resnet_v2, imagenet_resnet_v1
from recipes.language.model import GPT, SHAPES
from recipes.language.tokens import Windows, read_folder
from recipes.speech.librispeech import LibriSpeech, Utterance
from recipes.speech.model import SAMPLE_RATE, DeepSpeech2
from recipes.training.parallel import here
from recipes.training.task import Seeded

SIDES = (375, 500)
FILES = 16  # of each kind, loaded again and again
SOUND = 12 * SAMPLE_RATE
Input = Callable[[int, torch.device], Sequence[Tensor]]


def write(folder: Path) -> None:
    """Made files; smooth colours with some noise make a JPEG file as large as a photograph's."""
    import soundfile

    generator = torch.Generator().manual_seed(0)
    (folder / "n0").mkdir()
    for i in range(FILES):
        colours = interpolate(torch.rand(1, 3, 24, 32, generator=generator), SIDES, mode="bicubic")[0]
        pixels = (colours + 0.05 * torch.randn(3, *SIDES, generator=generator)).clamp(0, 1) * 255
        Image.fromarray(pixels.byte().permute(1, 2, 0).numpy()).save(folder / "n0" / f"{i}.jpg", quality=90)
        sound = torch.rand(SOUND, generator=generator) - 0.5
        soundfile.write(folder / f"{i}.flac", sound.numpy(), SAMPLE_RATE)
    torch.randint(50_000, (FILES * 1024 + 1,), generator=generator).numpy().astype("<u2").tofile(folder / "train.bin")


def sets(folder: Path) -> dict[str, Any]:
    """What each task trains on, in its full size."""
    boxes = torch.tensor([[0.0, 0.0, 40.0, 30.0, 300.0, 200.0], [3.0, 0.0, 200.0, 100.0, 480.0, 360.0]])
    photographs = sorted((folder / "n0").iterdir())
    cifar = torch.randint(256, (1000, 3, 32, 32), dtype=torch.uint8), torch.arange(1000) % 10
    utterances = [Utterance(folder / f"{i}.flac", "a sentence of some length", SOUND) for i in range(FILES)]
    return {
        "cifar10": Augmented(*cifar),
        "imagenet": Images(folder, ["n0"], side=224, training=True),
        "yolo": TrainSet([Example(path, boxes) for path in photographs], 416),
        "speech": LibriSpeech(utterances, train=True),
        "language": Windows(read_folder(folder, "train"), context=1024, vocabulary=50_257),
    }


def loading(data: Any, *, number: int) -> float:
    """Examples a second of this process."""
    seeded = Seeded(data, seed=0)
    start = time.process_time()
    examples = [seeded[i, i % len(data)] for i in range(number)]
    if isinstance(examples[0], Tensor) or all(len(x) == 2 and not isinstance(x[1], Tensor) for x in examples):
        default_collate(examples)
    else:
        torch.stack([x[0] for x in examples])
    return number / (time.process_time() - start)


def decoding(folder: Path) -> dict[str, Callable[[], None]]:
    """The files decoded, cut and resized as ImageNet's are, by each library that is here."""
    files = [path.read_bytes() for path in sorted((folder / "n0").iterdir())]

    def cut(image: Image.Image) -> None:
        image.resize((224, 224), Image.Resampling.BILINEAR, box=(40.3, 30.2, 400.7, 330.1)).tobytes()

    def pillow() -> None:
        from io import BytesIO

        for file in files:
            cut(Image.open(BytesIO(file)).convert("RGB"))

    found = {"Pillow": pillow}
    try:
        import simplejpeg
    except ImportError:
        return found

    def simple() -> None:
        for file in files:
            cut(Image.fromarray(simplejpeg.decode_jpeg(file)))

    return {**found, "simplejpeg": simple}


def models() -> dict[str, tuple[Callable[[], nn.Module], Input, int]]:
    """The full models, their inputs, and how many examples a micro-batch has on a GPU."""

    def images(side: int) -> Input:
        return lambda n, device: (torch.randn(n, 3, side, side, device=device),)

    def sound(n: int, device: torch.device) -> Sequence[Tensor]:
        return torch.randn(n, SOUND // 160, 161, device=device), torch.full((n,), SOUND // 160, device=device)

    return {
        "cifar10": (lambda: cifar_resnet_v2(10), images(32), 128),
        "imagenet": (lambda: imagenet_resnet_v1(1000), images(224), 256),
        "yolo": (lambda: YoloV3(20), images(416), 16),
        "speech": (DeepSpeech2, sound, 32),
        "language": (lambda: GPT(50_304, SHAPES["124M"]), lambda n, d: (torch.zeros(n, 1024, device=d).long(),), 16),
    }


def taking(name: str) -> float:
    """Examples a second that go forwards and backwards through the model."""
    device = here().device
    gpu = device.type == "cuda"
    make, given, size = models()[name]
    size = size if gpu else 1
    net, inputs = make().to(device), given(size, device)
    if gpu and len(inputs[0].shape) == 4:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    clock = time.perf_counter if gpu else time.process_time
    seconds = []
    for _ in range(10 if gpu else 2):
        start = clock()
        with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
            out = net(*inputs)
        (out[0] if isinstance(out, tuple) else out).float().square().mean().backward()
        if gpu:
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    return size / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        data, decoders = sets(folder), decoding(folder)
        rates: dict[str, list[float]] = {task: [] for task in data}
        seconds: dict[str, list[float]] = {library: [] for library in decoders}
        for _ in range(given.rounds):
            for task, some in data.items():
                rates[task].append(loading(some, number=2000 if task in ("cifar10", "language") else FILES))
            for library, decode in decoders.items():
                start = time.process_time()
                decode()
                seconds[library].append((time.process_time() - start) / FILES)
    rows: list[dict[str, Any]] = []
    print(f"| | loaded a second by a core | taken a second by {here().device.type} | cores for it |\n|---|---|---|---|")
    for task, found in rates.items():
        loaded, taken = median(found), taking(task)
        rows.append({"task": task, "loaded": loaded, "taken": taken})
        print(f"| {task} | {loaded:,.0f} | {taken:.3g} | {taken / loaded:.2g} |")
    base = median(seconds["Pillow"])
    for library, values in seconds.items():
        ratio = median(a / b for a, b in zip(values, seconds["Pillow"], strict=True))
        print(f"{library}: {1e3 * median(values):.2f} ms an image, decoded, cut and resized; {ratio:.2f} of Pillow's")
    if given.json:
        content = {"rows": rows, "decoding_ms": {k: 1e3 * median(v) for k, v in seconds.items()}, "pillow": base}
        given.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

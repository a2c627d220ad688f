"""Made data for detection, on disk as PASCAL VOC is: letters on textured backgrounds.

VOC's i-th class is drawn as the i-th of `SYMBOLS`, in a hue of its own, in any size and proportions. A few objects are
faint, and marked as difficult.
"""

from colorsys import hsv_to_rgb
from dataclasses import dataclass
from pathlib import Path
from random import Random
from xml.etree import ElementTree

from PIL import Image, ImageDraw, ImageFont

from recipes.detection.voc import CLASSES

SYMBOLS = "XOTLHVZEUKNSYAMCWPFR"  # the first ones are the easiest to tell apart, mirrored or not
DIFFICULT = 0.05  # part of the objects
CROWDED = 0.1  # overlap, as a part of the smaller box, that is not exceeded


@dataclass(frozen=True)
class Made:
    """How much to make: images of each split, classes, and the sides and objects of an image."""

    train: int
    test: int
    classes: int
    sides: tuple[int, int]
    objects: tuple[int, int]


SIZES = {
    "tiny": Made(train=1000, test=200, classes=4, sides=(64, 96), objects=(1, 2)),
    "small": Made(train=4000, test=800, classes=20, sides=(240, 360), objects=(1, 6)),
    "full": Made(train=16_551, test=4952, classes=20, sides=(333, 500), objects=(1, 8)),  # as many as VOC07+12 has
}


def make(folder: Path, *, size: str = "tiny", seed: int = 0) -> None:
    """Write `VOCdevkit/VOC2007` with `trainval` and `test` into `folder`; the same seed makes the same data.

    Args:
        folder: where to write; made if missing.
        size: `"tiny"` (1000 images of about 80 pixels, 4 classes), `"small"` (4000, 300 pixels, 20 classes) or `"full"`
            (as many as VOC07+12 has, and as large).
        seed: of the random numbers.

    Raises:
        ValueError: an unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"size={size!r} is none of {', '.join(SIZES)}.")
    year, made = Path(folder) / "VOCdevkit" / "VOC2007", SIZES[size]
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (year / part).mkdir(parents=True, exist_ok=True)
    random, done = Random(seed), 0
    symbols = [_symbol(letter) for letter in SYMBOLS[: made.classes]]
    for split, count in (("trainval", made.train), ("test", made.test)):
        names = [f"{done + i:06d}" for i in range(count)]
        done += count
        for name in names:
            image, objects = _scene(random, made, symbols)
            image.save(year / "JPEGImages" / f"{name}.jpg", quality=90)
            (year / "Annotations" / f"{name}.xml").write_bytes(_annotation(name, image, objects))
        (year / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))


def _symbol(letter: str) -> Image.Image:
    """A mask with the letter filling it."""
    mask = Image.new("L", (160, 160))
    ImageDraw.Draw(mask).text((40, 10), letter, fill=255, font=ImageFont.load_default(100), stroke_width=4)
    return mask.crop(mask.getbbox())


Box = tuple[int, int, int, int]
Object = tuple[int, bool, Box]


def _scene(random: Random, made: Made, symbols: list[Image.Image]) -> tuple[Image.Image, list[Object]]:
    width, height = random.randint(*made.sides), random.randint(*made.sides)
    image = _texture(random, width, height)
    objects: list[Object] = []
    for _ in range(random.randint(*made.objects)):
        kind, difficult = random.randrange(len(symbols)), random.random() < DIFFICULT
        box = _free_box(random, width, height, [o[2] for o in objects])
        if box is None:
            continue
        x1, y1, x2, y2 = box
        mask = symbols[kind].resize((x2 - x1, y2 - y1))
        hue, saturation, value = kind / len(symbols), random.uniform(0.7, 1), random.uniform(0.8, 1)
        colour = tuple(round(255 * part) for part in hsv_to_rgb(hue, saturation, value))
        image.paste(colour, (x1, y1), mask.point([i // 4 for i in range(256)]) if difficult else mask)
        objects.append((kind, difficult, box))
    return image, objects


def _texture(random: Random, width: int, height: int) -> Image.Image:
    """Smooth dark patches under fine noise."""
    coarse = Image.frombytes("RGB", (5, 5), bytes(random.randint(20, 120) for _ in range(75)))
    fine = Image.frombytes("RGB", (width, height), random.randbytes(3 * width * height))
    return Image.blend(coarse.resize((width, height), Image.Resampling.BICUBIC), fine, 0.12)


def _free_box(random: Random, width: int, height: int, others: list[Box]) -> Box | None:
    """A box of a quarter to six tenths of the image, almost free of the others; None where there is no room."""
    for _ in range(20):
        side = random.uniform(0.25, 0.6) * min(width, height)
        proportion = random.uniform(0.8, 1.25)
        w, h = round(side * proportion), round(side / proportion)
        x1, y1 = random.randint(0, width - w), random.randint(0, height - h)
        box = (x1, y1, x1 + w, y1 + h)
        if all(_common(box, other) <= CROWDED * min(w * h, _area(other)) for other in others):
            return box
    return None


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _common(a: Box, b: Box) -> int:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(w, 0) * max(h, 0)


def _annotation(name: str, image: Image.Image, objects: list[Object]) -> bytes:
    root = ElementTree.Element("annotation")
    for tag, text in (("folder", "VOC2007"), ("filename", f"{name}.jpg")):
        ElementTree.SubElement(root, tag).text = text
    size = ElementTree.SubElement(root, "size")
    for tag, value in zip(("width", "height", "depth"), (*image.size, 3), strict=True):
        ElementTree.SubElement(size, tag).text = str(value)
    for kind, difficult, (x1, y1, x2, y2) in objects:
        found = ElementTree.SubElement(root, "object")
        for tag, text in (("name", CLASSES[kind]), ("pose", "Unspecified"), ("truncated", "0")):
            ElementTree.SubElement(found, tag).text = text
        ElementTree.SubElement(found, "difficult").text = str(int(difficult))
        box = ElementTree.SubElement(found, "bndbox")
        # VOC counts pixels from 1 and includes the last one.
        for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), (x1 + 1, y1 + 1, x2, y2), strict=True):
            ElementTree.SubElement(box, tag).text = str(value)
    ElementTree.indent(root)
    return ElementTree.tostring(root)

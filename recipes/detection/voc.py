"""PASCAL VOC on disk: `VOCdevkit/VOC2007/{JPEGImages,Annotations,ImageSets/Main}`, and VOC2012 where it is there.

Every annotation is read at the start, so that a wrong one is an error then and not in the night. A training image
that cannot be read is skipped and counted, and so is a training object whose box reaches out of its image; in testing
both are errors, for the metric would be another one.
"""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree
from xml.parsers import expat

import torch
from PIL import Image, ImageEnhance
from torch import Tensor, nn
from torch.utils.data import Dataset

import anybatch
from recipes.training.task import DataError

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
GREY = (128, 128, 128)  # what lies outside of an image
JITTER = 0.3  # each side of a training crop moves by up to this part of the image (Darknet's value)
COLOUR = 1.5  # saturation and exposure change by up to this factor, hue by a tenth of the circle (Darknet's values)
HUE = 0.1


@dataclass(frozen=True)
class Example:
    """One image and its objects."""

    image: Path
    objects: Tensor  # [n, 6]: class, difficult, x1, y1, x2, y2 in pixels of the image
    skipped: int = 0  # objects whose boxes reach out of the image


def read_split(data: Path | None, split: str) -> list[Example]:
    """The examples of `"trainval"` (of VOC2007 and, where there, VOC2012) or `"test"` (of VOC2007)."""
    if data is None:
        raise DataError("yolo needs the folder that holds VOCdevkit: download PASCAL VOC, or make data of your own.")
    root = Path(data) / "VOCdevkit"
    if not (root / "VOC2007").is_dir():
        raise DataError(
            f"{root / 'VOC2007'}: no such folder. Unpack PASCAL VOC's archives, which hold VOCdevkit, there."
        )
    years = [root / "VOC2007"]
    if split == "trainval" and (root / "VOC2012").is_dir():
        years.append(root / "VOC2012")
    lists = [(year, year / "ImageSets" / "Main" / f"{split}.txt") for year in years]
    examples = [_example(year, name, strict=split == "test") for year, path in lists for name in _names(path)]
    if not examples:
        raise DataError(f"{root}: {split}.txt names no image.")
    if wrong := [example for example in examples if example.skipped]:
        warnings.warn(
            f"{sum(example.skipped for example in wrong)} object(s) of {split} are skipped: their boxes reach out of "
            f"their images. The first is in {wrong[0].image.name}.",
            anybatch.AnybatchWarning,
            stacklevel=2,
        )
    return examples


def _names(path: Path) -> list[str]:
    try:
        names = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the list of images cannot be read: {error}") from error
    for name in names:
        if Path(name).name != name:
            raise DataError(f"{path}: {name!r} is no name of an image.")
    return names


def _example(year: Path, name: str, *, strict: bool) -> Example:
    path = year / "Annotations" / f"{name}.xml"
    try:
        objects, skipped = _objects(parse_xml(path.read_bytes()), strict=strict)
    except (OSError, ValueError, expat.ExpatError) as error:
        raise DataError(f"{path}: {error}") from error
    image = year / "JPEGImages" / f"{name}.jpg"
    if not image.is_file():
        raise DataError(f"{image}: no such image, but {path} describes it.")
    return Example(image, objects, skipped)


def parse_xml(data: bytes) -> ElementTree.Element:
    """XML without a document type: entities, which can grow without bound or name other files, are refused."""
    builder, parser = ElementTree.TreeBuilder(), expat.ParserCreate()

    def refuse(*_: object) -> None:
        raise ValueError("a document type or an entity is declared, which VOC's annotations never do")

    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.Parse(data, True)
    return builder.close()


def _objects(root: ElementTree.Element, *, strict: bool) -> tuple[Tensor, int]:
    width, height = (_number(root, f"size/{side}") for side in ("width", "height"))
    rows, skipped = [], 0
    for i, found in enumerate(root.findall("object")):
        name = (found.findtext("name") or "").strip()
        if name not in CLASSES:
            raise ValueError(f"object {i}: {name!r} is not one of VOC's twenty classes")
        box = [_number(found, f"bndbox/{edge}") for edge in ("xmin", "ymin", "xmax", "ymax")]
        if not (box[0] < box[2] and box[1] < box[3]):
            raise ValueError(f"object {i}: the box {box} is empty")
        if not (box[0] >= 0 and box[1] >= 0 and box[2] <= width and box[3] <= height):
            if strict:
                raise ValueError(f"object {i}: the box {box} is not inside of the image, {width:g} by {height:g}")
            skipped += 1
            continue
        difficult = float((found.findtext("difficult") or "0").strip() == "1")
        # VOC counts from 1 and includes the last pixel.
        rows.append([CLASSES.index(name), difficult, max(box[0] - 1, 0), max(box[1] - 1, 0), *box[2:]])
    return torch.tensor(rows, dtype=torch.float32).view(-1, 6), skipped


def _number(element: ElementTree.Element, path: str) -> float:
    text = element.findtext(path)
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"<{path}> is {'missing' if text is None else f'{text!r}, no number'}")
    return value


def read_image(path: Path) -> Image.Image:
    """The whole image in RGB; an image that ends early is an error."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # what PIL raises on broken files
        raise DataError(f"{path}: the image cannot be read: {error}") from error


Window = tuple[float, float, float, float]


def place(image: Image.Image, boxes: Tensor, window: Window, size: int, *, flip: bool = False) -> tuple[Tensor, Tensor]:
    """`window` of the image in the middle of a square of `size` pixels, and the boxes there.

    The proportions stay (a letterbox), what lies outside of the image is grey, and one affine map moves pixels and
    boxes alike. Returns the pixels `[3, size, size]` from 0 to 1, and the boxes `[n, 4]`, which may reach beyond the
    square.
    """
    x1, y1, x2, y2 = window
    scale = size / max(x2 - x1, y2 - y1)
    left, top = (size - scale * (x2 - x1)) / 2 - scale * x1, (size - scale * (y2 - y1)) / 2 - scale * y1
    across = -1 / scale if flip else 1 / scale
    start = (size - left) / scale if flip else -left / scale
    square = image.transform(
        (size, size),
        Image.Transform.AFFINE,
        (across, 0, start, 0, 1 / scale, -top / scale),
        resample=Image.Resampling.BILINEAR,
        fillcolor=GREY,
    )
    moved = boxes * scale + torch.tensor([left, top, left, top])
    if flip:
        moved = torch.stack([size - moved[:, 2], moved[:, 1], size - moved[:, 0], moved[:, 3]], 1)
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(size, size, 3)
    return pixels.permute(2, 0, 1).float() / 255, moved


def uniform(low: float, high: float) -> float:
    """A number of torch's generator, which DataLoader seeds in each of its workers."""
    return low + (high - low) * float(torch.rand(()))


def recolour(image: Image.Image) -> Image.Image:
    """Other saturation, exposure and hue."""
    image = ImageEnhance.Color(image).enhance(COLOUR ** uniform(-1, 1))
    image = ImageEnhance.Brightness(image).enhance(COLOUR ** uniform(-1, 1))
    shift = round(255 * uniform(-HUE, HUE))
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(i + shift) % 256 for i in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


class TrainSet(Dataset[tuple[Tensor, Tensor]]):
    """Augmented pixels `[3, size, size]` and targets `[n, 5]` (class, box in these pixels).

    Difficult objects are learned like the others; only the metric leaves them out. An object stays if its centre is
    still to be seen.

    With `mixup` a, each example is a share of its pixels and the rest of another one's, the share from Beta(a, a), and
    has the objects of both; the share is their sixth column, `[n, 6]`: how much they count (Zhang et al. 2019, Bag of
    Freebies for Training Object Detection Neural Networks, where a is 1.5).
    """

    def __init__(
        self, examples: list[Example], size: int, *, jitter: float = JITTER, mixup: float | None = None
    ) -> None:
        self.examples, self.size, self.jitter = examples, size, jitter
        self.mixed = None if mixup is None else torch.distributions.Beta(mixup, mixup)
        self.skipped = 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.mixed is None:
            return self._one(index)
        share = float(self.mixed.sample())
        both = [(self._one(index), share), (self._one(int(torch.randint(len(self), ()))), 1 - share)]
        pixels = torch.stack([part * pixels for (pixels, _), part in both]).sum(0)
        return pixels, torch.cat([nn.functional.pad(targets, (0, 1), value=part) for (_, targets), part in both])

    def _one(self, index: int) -> tuple[Tensor, Tensor]:
        # A broken image gives its place to the next one, so that batches keep their size.
        for i in range(len(self)):
            example = self.examples[(index + i) % len(self)]
            try:
                image = read_image(example.image)
            except DataError as error:
                self._skip(error)
                continue
            return self._augmented(image, example.objects)
        raise DataError(f"{self.examples[0].image.parent}: not one of the {len(self)} training images can be read.")

    def _skip(self, error: DataError) -> None:
        self.skipped += 1
        if self.skipped == 1:
            warnings.warn(f"{error} It and others like it are skipped, and counted in `skipped`.", stacklevel=3)

    def _augmented(self, image: Image.Image, objects: Tensor) -> tuple[Tensor, Tensor]:
        (width, height), jitter = image.size, self.jitter
        x1, x2 = uniform(-jitter, jitter) * width, (1 + uniform(-jitter, jitter)) * width
        y1, y2 = uniform(-jitter, jitter) * height, (1 + uniform(-jitter, jitter)) * height
        window, flip = (x1, y1, x2, y2), uniform(0, 1) < 0.5
        pixels, boxes = place(recolour(image), objects[:, 2:], window, self.size, flip=flip)
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2
        boxes = boxes.clamp(0, self.size)
        # A centre inside keeps the box from being empty, but not from being a sliver of less than a pixel.
        kept = ((centre > 0) & (centre < self.size)).all(1) & (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
        return pixels, torch.cat([objects[kept, :1], boxes[kept]], 1)


class WholeSet(Dataset[tuple[Tensor, Tensor]]):
    """Whole images `[3, size, size]` and all objects `[n, 6]` (class, difficult, box in these pixels)."""

    def __init__(self, examples: list[Example], size: int) -> None:
        self.examples, self.size = examples, size

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        example = self.examples[index]
        image = read_image(example.image)
        pixels, boxes = place(image, example.objects[:, 2:], (0, 0, *image.size), self.size)
        return pixels, torch.cat([example.objects[:, :2], boxes], 1)

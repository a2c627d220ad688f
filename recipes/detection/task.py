"""YOLOv3 on PASCAL VOC: the paper's detection task (Table 2: base batch 16, 207k base iterations, mAP 81.3 at S = 32).

Data: `FOLDER/VOCdevkit/VOC2007`, and `VOC2012` for training where it is there. With Darknet's `darknet53.conv.74`
(ImageNet weights of the backbone) in FOLDER, the backbone starts from it, as published numbers on VOC do.

Loss of an image (YOLOv3, sections 2.1 and 2.2). For each object, at the one prediction in charge of it: binary
cross-entropy of the place in the cell, half the squared error of log(size / anchor), both times 2 - (area of the box /
area of the image) as Darknet has it, and binary cross-entropy of each class. For each prediction: binary cross-entropy
of the objectness, except where one that is not in charge overlaps an object by more than 0.5. The loss of a batch is
the mean over its images of these sums, so that it does not grow with the batch. The place in a cell is no 0 or 1, so
the loss has a floor above 0.

The AdaScale paper publishes B0, T_SI, the momentum and that the schedule is a step decay; learning rate, weight decay,
the times of the steps and the augmentation are ours. Two more are off unless asked for: `sizes="many"`, another size of
the input every ten batches, which YOLOv3's authors have on and the AdaScale paper does not mention; and `mixup`, which
is neither's.
"""

import math
import warnings
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

import anybatch
from recipes.detection import made
from recipes.detection.boxes import Grid, detect, iou, make_grid, mean_average_precision
from recipes.detection.model import STRIDES, YoloV3, anchors
from recipes.detection.voc import CLASSES, JITTER, TrainSet, WholeSet, read_split
from recipes.training.parallel import here
from recipes.training.sharing import ALONE, Share
from recipes.training.task import Task

IGNORE = 0.5  # overlap with an object above which a prediction not in charge is not told that there is none

make = made.make


class Yolo(Task):
    """Whole YOLOv3 at 416 pixels; tiny: a quarter of the width, seven residual blocks instead of 23, 64 pixels.

    Args:
        data: the folder that holds `VOCdevkit`.
        tiny: as for every task.
        sizes: `"one"`, or `"many"`: every ten base batches have another multiple of 32 from 3/4 to 3/2 of `pixels`
            (320 to 608), drawn anew. Ten base batches at any scale, so that training sees the same on the clock.
        mixup: as in `TrainSet`; a word, as the command line has it.
    """

    name: ClassVar[str] = "yolo"
    metric: ClassVar[str] = "mAP"
    convolutions = True
    measured = "VOC2007 test, 11 points, overlap 0.5, difficult objects left out"

    def __init__(
        self, data: Path | None, *, tiny: bool = False, sizes: str = "one", mixup: str | float | None = None
    ) -> None:
        super().__init__(data, tiny=tiny)
        if sizes not in ("one", "many"):
            raise anybatch.InvalidValueError(f"--sizes is one or many, got {sizes!r}.")
        share = None if mixup is None else _positive(mixup)
        self.variant = {"sizes": sizes, "mixup": share}
        self.base_batch, self.total = (8, 1000) if tiny else (16, 207_000)
        self.pixels = 64 if tiny else 416
        self.learning_rate = 3e-3 if tiny else 2.5e-4
        self.grids: dict[tuple[torch.device, int], Grid] = {}
        self.sides = [self.pixels]
        if sizes == "many":
            self.sides = [side for side in range(32, 2 * self.pixels, 32) if 3 <= 4 * side / self.pixels <= 6]
        examples, jitter = read_split(data, "trainval"), 0.1 if tiny else JITTER
        self.train_set = TrainSet(examples, max(self.sides), jitter=jitter, mixup=share)
        self.test_set = WholeSet(read_split(data, "test"), self.pixels)

    def model(self) -> nn.Module:
        """YOLOv3 for VOC's twenty classes; the backbone from `darknet53.conv.74` where that is there."""
        if self.tiny:
            return YoloV3(len(CLASSES), width=8, blocks=(1, 1, 2, 2, 1))
        model, weights = YoloV3(len(CLASSES)), Path(self.data or ".") / "darknet53.conv.74"
        if weights.is_file():
            model.backbone.load_darknet(weights)
        elif here().first:
            warnings.warn(
                f"{weights} is not there: yolo starts WITHOUT PRETRAINED WEIGHTS, and its mAP will be far below the "
                "published ones, which start from Darknet's. recipes/README.md says where the file is from.",
                anybatch.AnybatchWarning,
                stacklevel=2,
            )
        return model

    def optimizer(self, model: nn.Module) -> Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(model.parameters(), lr=self.learning_rate, momentum=0.9, weight_decay=5e-4)

    def scheduler(self, optimizer: Optimizer) -> Any:
        """A tenth at 80 and at 90 % of the run."""
        steps = [self.total * 8 // 10, self.total * 9 // 10]
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, steps, gamma=0.1)

    def grid(self, device: torch.device, side: int | None = None) -> Grid:
        """The grid of an input, the task's by default, made once for a device; all have the same anchors in pixels."""
        side = side or self.pixels
        if (device, side) not in self.grids:
            grid = make_grid(side, anchors=anchors(self.pixels), strides=STRIDES, device=device)
            self.grids[device, side] = grid
        return self.grids[device, side]

    def batches(self, micro_batch: int, **place: Any) -> Iterator[Any]:
        """As for every task; of many sizes each batch says its own, by the shape of a third tensor without elements."""
        batches = super().batches(micro_batch, **place)
        if len(self.sides) == 1:
            return batches
        step, start = place["ranks"] * micro_batch, place.get("start", 0) + place["rank"] * micro_batch
        sides = (self.side_at(number, seed=place["seed"]) for number in count(start, step))
        return ([*batch, torch.empty(side, 0)] for batch, side in zip(batches, sides, strict=False))

    def side_at(self, number: int, *, seed: int) -> int:
        """The size of a batch with so many examples before it, on all ranks."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number // (10 * self.base_batch))
        return self.sides[int(torch.randint(len(self.sides), (), generator=generator))]

    def __getstate__(self) -> dict[str, Any]:
        """For a loading process: without what lies on the device, which it would open for itself."""
        return {**super().__getstate__(), "grids": {}}

    def collate(self, examples: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Images `[B, 3, H, W]`, and the targets of all of them `[n, 6]`: image, class, box; 7 with mixup."""
        rows = [torch.cat([torch.full((len(t), 1), float(i)), t], 1) for i, (_, t) in enumerate(examples)]
        return [torch.stack([image for image, _ in examples]), torch.cat(rows)]

    def loss(self, model: nn.Module, batch: list[Tensor]) -> Tensor:
        """The mean over the images, at the batch's size."""
        images, targets, *sized = batch
        if sized:
            side, before = len(sized[0]), images.shape[-1]
            images = functional.interpolate(images, (side, side), mode="bilinear", antialias=True)
            targets = torch.cat([targets[:, :2], targets[:, 2:6] * (side / before), targets[:, 6:]], 1)
        return detection_loss(model(images), targets, self.grid(images.device, images.shape[-1]))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, device: torch.device, share: Share = ALONE) -> dict[str, float]:
        """`mAP` with 11 points, `mAP_area` (VOC2010's), and the loss, over VOC2007's test images."""
        grid, found, number = self.grid(device), [], len(self.test_set)
        loss = torch.zeros((), dtype=torch.float64, device=device)
        size = self.base_batch
        parts = share.of([list(range(i, min(i + size, number))) for i in range(0, number, size)])
        batches = self.tested(self.test_set, [part for part, _ in parts], collate=self._truths)
        for (images, targets, whole), (part, counts) in zip(batches, parts, strict=True):
            raw = model(images.to(device, non_blocking=True)).float()
            if not counts:
                continue
            loss += detection_loss(raw, targets.to(device), grid).double() * len(images)
            scores = raw[..., 4:5].sigmoid() * raw[..., 5:].sigmoid()
            detections = [detect(b, s).cpu() for b, s in zip(grid.decode(raw), scores, strict=True)]
            found += list(zip(part, zip(detections, whole, strict=True), strict=True))
        detected, truths = (list(some) for some in zip(*share.gathered(found), strict=True))
        points, area = mean_average_precision(detected, truths, len(CLASSES))
        return {"mAP": points, "mAP_area": area, "loss": share.summed(loss).item() / number}

    def _truths(self, examples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, list[Tensor]]:
        images, targets = self.collate([(image, t[:, [0, 2, 3, 4, 5]]) for image, t in examples])
        return images, targets, [t for _, t in examples]


def detection_loss(raw: Tensor, targets: Tensor, grid: Grid) -> Tensor:
    """YOLOv3's loss, a mean over the images.

    Args:
        raw: `[B, P, 5 + classes]`, what the model says.
        targets: `[n, 6]`: image, class, box; the rows of one image lie together. A seventh column is how much an object
            counts, 1 without it.
        grid: the grid of P predictions.
    """
    raw = raw.float()
    batch, predictions, _ = raw.shape
    image, kind, boxes = targets[:, 0].long(), targets[:, 1].long(), targets[:, 2:6]
    share = targets[:, 6] if targets.shape[1] > 6 else torch.ones_like(targets[:, 0])
    index = grid.assign(boxes)
    told = ~_seen(grid.decode(raw.detach()), image, boxes)
    alone = _first(image * predictions + index, batch * predictions)
    image, kind, boxes, index, share = image[alone], kind[alone], boxes[alone], index[alone], share[alone]

    wanted = torch.zeros_like(raw[..., 4])
    counts = torch.ones_like(wanted)
    wanted[image, index], told[image, index], counts[image, index] = 1.0, True, share
    objectness = functional.binary_cross_entropy_with_logits(raw[..., 4], wanted, weight=counts, reduction="none")[told]

    mine = raw[image, index]
    place, shape = grid.encode(boxes, index)
    weight = 2 - (boxes[:, 2:] - boxes[:, :2]).prod(1) / grid.size**2
    centre = functional.binary_cross_entropy_with_logits(mine[:, :2], place, reduction="none").sum(1)
    size = (mine[:, 2:4] - shape).square().sum(1) / 2
    kinds = functional.one_hot(kind, raw.shape[2] - 5).to(raw.dtype)
    classes = functional.binary_cross_entropy_with_logits(mine[:, 5:], kinds, reduction="none").sum(1)
    return (objectness.sum() + (share * (weight * (centre + size) + classes)).sum()) / batch


def _positive(word: str | float) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise anybatch.InvalidValueError(f"--mixup is the parameter of a Beta distribution, positive; got {word!r}.")
    return number


def _first(place: Tensor, places: int) -> Tensor:
    """Which objects are the first of those at their place: one prediction can be in charge of one object."""
    order = torch.arange(len(place), device=place.device)
    first = order.new_full((places,), len(place)).scatter_reduce(0, place, order, "amin")
    return first[place] == order


def _seen(boxes: Tensor, image: Tensor, objects: Tensor) -> Tensor:
    """Which predicted boxes `[B, P, 4]` overlap an object of their image by more than `IGNORE`: `[B, P]`."""
    counts = torch.bincount(image, minlength=len(boxes))
    rank = torch.arange(len(image), device=image.device) - (counts.cumsum(0) - counts)[image]
    # An empty box overlaps nothing, so images with fewer objects are filled up with such.
    padded = boxes.new_zeros(len(boxes), max(1, int(counts.max())), 4)
    padded[image, rank] = objects
    return iou(boxes, padded).amax(2) > IGNORE

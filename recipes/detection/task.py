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
the times of the steps and the augmentation are ours. The input has one size; YOLOv3's training changes it every ten
batches.
"""

import warnings
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
    """Whole YOLOv3 at 416 pixels; tiny: a quarter of the width, seven residual blocks instead of 23, 64 pixels."""

    name: ClassVar[str] = "yolo"
    metric: ClassVar[str] = "mAP"
    convolutions = True
    measured = "VOC2007 test, 11 points, overlap 0.5, difficult objects left out"

    def __init__(self, data: Path | None, *, tiny: bool = False) -> None:
        super().__init__(data, tiny=tiny)
        self.base_batch, self.total = (8, 1000) if tiny else (16, 207_000)
        self.pixels = 64 if tiny else 416
        self.learning_rate = 3e-3 if tiny else 2.5e-4
        self.grids: dict[torch.device, Grid] = {}
        self.train_set = TrainSet(read_split(data, "trainval"), self.pixels, jitter=0.1 if tiny else JITTER)
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

    def grid(self, device: torch.device) -> Grid:
        """The grid of the task's input, made once for a device."""
        if device not in self.grids:
            self.grids[device] = make_grid(self.pixels, anchors=anchors(self.pixels), strides=STRIDES, device=device)
        return self.grids[device]

    def collate(self, examples: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Images `[B, 3, H, W]`, and the targets of all of them `[n, 6]`: image, class, box."""
        rows = [torch.cat([torch.full((len(t), 1), float(i)), t], 1) for i, (_, t) in enumerate(examples)]
        return [torch.stack([image for image, _ in examples]), torch.cat(rows)]

    def loss(self, model: nn.Module, batch: list[Tensor]) -> Tensor:
        """The mean over the images."""
        images, targets = batch
        return detection_loss(model(images), targets, self.grid(images.device))

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
        targets: `[n, 6]`: image, class, box; the rows of one image lie together.
        grid: the grid of P predictions.
    """
    raw = raw.float()
    batch, count, _ = raw.shape
    image, kind, boxes = targets[:, 0].long(), targets[:, 1].long(), targets[:, 2:]
    index = grid.assign(boxes)
    told = ~_seen(grid.decode(raw.detach()), image, boxes)
    alone = _first(image * count + index, batch * count)
    image, kind, boxes, index = image[alone], kind[alone], boxes[alone], index[alone]

    wanted = torch.zeros_like(raw[..., 4])
    wanted[image, index], told[image, index] = 1.0, True
    objectness = functional.binary_cross_entropy_with_logits(raw[..., 4], wanted, reduction="none")[told]

    mine = raw[image, index]
    place, shape = grid.encode(boxes, index)
    weight = 2 - (boxes[:, 2:] - boxes[:, :2]).prod(1) / grid.size**2
    centre = functional.binary_cross_entropy_with_logits(mine[:, :2], place, reduction="none").sum(1)
    size = (mine[:, 2:4] - shape).square().sum(1) / 2
    kinds = functional.one_hot(kind, raw.shape[2] - 5).to(raw.dtype)
    classes = functional.binary_cross_entropy_with_logits(mine[:, 5:], kinds, reduction="sum")
    return (objectness.sum() + (weight * (centre + size)).sum() + classes) / batch


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

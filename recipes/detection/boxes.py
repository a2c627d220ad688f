"""Boxes: overlap, assignment to anchors, decoding, suppression of doubles, and mean average precision.

A box is `(x1, y1, x2, y2)` with continuous edges in pixels. VOC counts pixels from 1 and includes the last one, so its
`xmin - 1, ymin - 1, xmax, ymax` are such edges, and VOC's own overlap (with its `+ 1`) is the overlap here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SCORE = 0.01  # detections below do not count: they would only lengthen the tail of the precision curve
OVERLAP = 0.45  # of two detections of one class above it, the weaker goes (Darknet's value)
CANDIDATES = 400  # the strongest detections of an image before doubles are suppressed
KEPT = 100  # and after
LARGEST = 8.0  # of log(size / anchor): beyond e^8 no box is meant, and no overlap may become inf / inf


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of all pairs, `[..., n, 4]` by `[..., m, 4]` to `[..., n, m]`; 0 where both are empty."""
    low = torch.maximum(a[..., :, None, :2], b[..., None, :, :2])
    high = torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:])
    common = (high - low).clamp(min=0).prod(-1)
    areas = (a[..., 2:] - a[..., :2]).prod(-1)[..., :, None] + (b[..., 2:] - b[..., :2]).prod(-1)[..., None, :]
    return common / (areas - common).clamp(min=1e-9)


@dataclass(frozen=True)
class Grid:
    """Where each of the P predictions of a square image stands: all anchors of all cells of all scales.

    The order is that of `model.YoloV3`: scale (coarse first), anchor, row, column.
    """

    size: int
    cell: Tensor  # [P, 2], column and row
    stride: Tensor  # [P, 1], pixels per cell
    anchor: Tensor  # [P, 2], width and height in pixels
    anchors: Tensor  # [A, 2], every anchor once
    starts: Tensor  # [A], index of its first prediction

    def decode(self, raw: Tensor) -> Tensor:
        """Raw predictions `[..., P, 4 or more]` to boxes `[..., P, 4]`: YOLOv3, section 2.1."""
        centre = (self.cell + raw[..., :2].sigmoid()) * self.stride
        half = self.anchor * raw[..., 2:4].clamp(max=LARGEST).exp() / 2
        return torch.cat([centre - half, centre + half], -1)

    def encode(self, boxes: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """What predictions `index` should say for `boxes`: the place in the cell, 0 to 1, and log(size / anchor)."""
        centre, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        return centre / self.stride[index] - self.cell[index], (size / self.anchor[index]).log()

    def assign(self, boxes: Tensor) -> Tensor:
        """The prediction in charge of each box `[n, 4]`: in the cell of its centre, the anchor of nearest shape."""
        size = boxes[:, 2:] - boxes[:, :2]
        common = torch.minimum(size[:, None], self.anchors).prod(-1)
        shape = common / (size.prod(-1)[:, None] + self.anchors.prod(-1) - common)
        start = self.starts[shape.argmax(1)]
        stride = self.stride[start, 0]
        across = self.size / stride
        # A centre on the right or lower edge belongs to the last cell.
        column, row = ((boxes[:, :2] + boxes[:, 2:]) / 2 / stride[:, None]).floor().unbind(1)
        column, row = column.clamp(min=0).minimum(across - 1), row.clamp(min=0).minimum(across - 1)
        return start + (row * across + column).long()


def make_grid(size: int, *, anchors: Tensor, strides: tuple[int, ...], device: torch.device | None = None) -> Grid:
    """The grid of an image of `size` by `size` pixels; `anchors` is `[scales, k, 2]` in pixels, as are `strides`."""
    cells, steps, shapes, starts, done = [], [], [], [], 0
    for stride, some in zip(strides, anchors, strict=True):
        n = size // stride
        row, column = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
        for anchor in some:
            cells.append(torch.stack([column, row], -1).view(-1, 2).float())
            steps.append(torch.full((n * n, 1), float(stride)))
            shapes.append(anchor.expand(n * n, 2))
            starts.append(done)
            done += n * n
    tensors = torch.cat(cells), torch.cat(steps), torch.cat(shapes), anchors.reshape(-1, 2), torch.tensor(starts)
    return Grid(size, *(t.to(device) for t in tensors))


def nms(boxes: Tensor, scores: Tensor, *, overlap: float = OVERLAP) -> Tensor:
    """Indices of the boxes to keep, strongest first: each goes if it overlaps a stronger one that is kept.

    The greedy answer is the one fixed point of "kept = no stronger kept box overlaps me": after k rounds the k
    strongest are right, and mostly two or three rounds do.
    """
    order = scores.argsort(descending=True, stable=True)
    beats = (iou(boxes[order], boxes[order]) > overlap).triu(1)
    kept = torch.ones_like(order, dtype=torch.bool)
    while True:
        before, kept = kept, ~(beats & kept[:, None]).any(0)
        if torch.equal(before, kept):
            return order[kept]


def detect(boxes: Tensor, scores: Tensor) -> Tensor:
    """One image's detections `[n, 6]` (class, score, box), strongest first, from `[P, 4]` and `[P, classes]`."""
    place, kind = (scores > SCORE).nonzero(as_tuple=True)
    value, best = scores[place, kind].topk(min(CANDIDATES, len(place)))
    place, kind = place[best], kind[best]
    # Classes are moved apart, so that boxes of different ones never overlap.
    apart = kind[:, None] * (boxes[place].abs().max().item() * 2 + 1 if len(place) else 0)
    kept = nms(boxes[place] + apart, value)[:KEPT]
    return torch.cat([kind[kept, None].float(), value[kept, None], boxes[place[kept]]], 1)


@dataclass(frozen=True)
class Matches:
    """The detections of one class over all images, strongest first, and how many objects there were to find."""

    right: Tensor  # [n] bool; detections of difficult objects are left out
    objects: int

    def precision(self) -> tuple[Tensor, Tensor]:
        """Recall and precision after each detection."""
        found = self.right.double().cumsum(0)
        return found / self.objects, found / torch.arange(1, len(found) + 1)

    def average_11(self) -> float:
        """VOC2007's average precision: the mean of the best precision at recall 0, .1, ..., 1 or more."""
        recall, precision = self.precision()
        best = [precision[recall >= i / 10 - 1e-9] for i in range(11)]
        return sum(float(p.max()) for p in best if len(p)) / 11

    def average_area(self) -> float:
        """VOC2010's: the area under the precision, made falling, over recall."""
        recall, precision = self.precision()
        falling = precision.flip(0).cummax(0).values.flip(0)
        return float((recall.diff(prepend=recall.new_zeros(1)) * falling).sum())


def match(detections: list[Tensor], truths: list[Tensor], kind: int, *, overlap: float = 0.5) -> Matches:
    """VOC's rule: a detection belongs to the object it overlaps most; the strongest of them is right, the others wrong.

    Args:
        detections: for each image `[n, 6]`: class, score, box.
        truths: for each image `[m, 6]`: class, difficult (0 or 1), box.
        kind: the class.
        overlap: the least intersection over union.
    """
    scores, outcomes, objects = [], [], 0
    for found, truth in zip(detections, truths, strict=True):
        mine, real = found[found[:, 0] == kind], truth[truth[:, 0] == kind]
        objects += int((real[:, 1] == 0).sum())
        if not len(mine):
            continue
        mine, taken = mine[mine[:, 1].argsort(descending=True, stable=True)], set()
        # An empty box stands last for "none", so that there is always a largest overlap.
        largest, best = iou(mine[:, 2:], torch.cat([real[:, 2:], mine.new_zeros(1, 4)])).max(1)
        difficult = [*real[:, 1].tolist(), 0.0]
        for score, value, i in zip(mine[:, 1].tolist(), largest.tolist(), best.tolist(), strict=True):
            hit = value >= overlap
            if hit and difficult[i]:
                continue
            scores.append(score)
            outcomes.append(hit and i not in taken)
            if hit:
                taken.add(i)
    order = torch.tensor(scores).argsort(descending=True, stable=True)
    return Matches(torch.tensor(outcomes, dtype=torch.bool)[order], objects)


def mean_average_precision(detections: list[Tensor], truths: list[Tensor], classes: int) -> tuple[float, float]:
    """The mAP at overlap .5 in percent, with 11 points and as an area, over the classes that have objects to find."""
    found = [match(detections, truths, kind) for kind in range(classes)]
    found = [m for m in found if m.objects]
    if not found:
        return 0.0, 0.0
    scale = 100 / len(found)
    return scale * sum(m.average_11() for m in found), scale * sum(m.average_area() for m in found)

"""YOLOv3 on the VOC layout: the boxes against plain loops, the files and their errors, the model, and training."""

import pickle
import random
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import anybatch
from recipes.detection import model as yolo_model
from recipes.detection.boxes import detect, iou, make_grid, match, mean_average_precision, nms
from recipes.detection.model import STRIDES, YoloV3, anchors
from recipes.detection.task import Yolo, detection_loss, make
from recipes.detection.voc import CLASSES, TrainSet, place, read_image, read_split
from recipes.train import run
from recipes.training.options import Options
from recipes.training.task import DataError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voc")
    make(folder)
    return folder


@pytest.fixture
def few(data, tmp_path):
    """Four training images and one test image, to be broken."""
    old, new = data / "VOCdevkit" / "VOC2007", tmp_path / "VOCdevkit" / "VOC2007"
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (new / part).mkdir(parents=True)
    for split, count in (("trainval", 4), ("test", 1)):
        names = (old / "ImageSets" / "Main" / f"{split}.txt").read_text().split()[:count]
        (new / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))
        for name in names:
            shutil.copy(old / "JPEGImages" / f"{name}.jpg", new / "JPEGImages")
            shutil.copy(old / "Annotations" / f"{name}.xml", new / "Annotations")
    return tmp_path


def numbers(generator, *shape, low=0.0, high=1.0):
    return low + (high - low) * torch.rand(*shape, generator=generator)


def some_boxes(generator, n, size=64.0):
    corner = numbers(generator, n, 2, high=size * 0.8)
    return torch.cat([corner, corner + numbers(generator, n, 2, low=1.0, high=size * 0.4)], 1)


# ---- boxes, against plain loops ----


def plain_iou(a, b):
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
    return w * h / union


def test_overlap_by_hand_and_in_batches():
    a = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1]])
    b = torch.tensor([[1.0, 1, 3, 3], [0, 0, 2, 1], [5, 5, 6, 6], [0, 0, 0, 0]])
    expected = torch.tensor([[1 / 7, 1 / 2, 0, 0], [0, 1 / 2, 0, 0]])
    torch.testing.assert_close(iou(a, b), expected)
    torch.testing.assert_close(iou(torch.stack([a, a]), torch.stack([b, b])), torch.stack([expected, expected]))
    assert iou(a, b[:0]).shape == (2, 0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(0, 40), overlap=st.sampled_from([0.1, 0.3, 0.45, 0.7]))
def test_nms_is_the_greedy_one(seed, n, overlap):
    generator = torch.Generator().manual_seed(seed)
    boxes, scores = some_boxes(generator, n), numbers(generator, n)
    kept = []
    for i in sorted(range(n), key=lambda i: -float(scores[i])):
        if all(plain_iou(boxes[i].tolist(), boxes[j].tolist()) <= overlap for j in kept):
            kept.append(i)
    assert nms(boxes, scores, overlap=overlap).tolist() == kept


def test_a_box_beaten_by_a_beaten_one_stays():
    """A beats B, B would beat C, but B is gone."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]])
    assert nms(boxes, torch.tensor([0.9, 0.8, 0.7]), overlap=0.4).tolist() == [0, 2]


def test_classes_do_not_suppress_each_other():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 30, 30]])
    scores = torch.tensor([[0.9, 0.8], [0.7, 0.0], [0.0, 0.001]])
    found = detect(boxes, scores)
    assert found[:, :2].tolist() == [[0, pytest.approx(0.9)], [1, pytest.approx(0.8)]]
    assert found[:, 2:].tolist() == [[0, 0, 10, 10]] * 2
    assert detect(boxes, scores * 0).shape == (0, 6)


def plain_predictions(size):
    """Each prediction's column, row, stride, width and height, in the order of the model's output."""
    for stride, some in zip((32, 16, 8), yolo_model.ANCHORS, strict=True):
        for w, h in some:
            for row in range(size // stride):
                for column in range(size // stride):
                    yield column, row, stride, w * size / 416, h * size / 416


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.sampled_from([64, 96]))
def test_the_prediction_in_charge_is_in_the_cell_and_of_the_nearest_shape(seed, size):
    grid = make_grid(size, anchors=anchors(size), strides=STRIDES)
    boxes = some_boxes(torch.Generator().manual_seed(seed), 5, float(size))
    index = grid.assign(boxes)
    for box, chosen in zip(boxes.tolist(), index.tolist(), strict=True):
        x, y, w, h = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box[2] - box[0], box[3] - box[1]
        at = [p for p in enumerate(plain_predictions(size)) if p[1][:2] == (x // p[1][2], y // p[1][2])]
        assert len(at) == 9
        best = max(at, key=lambda p: plain_iou((0, 0, w, h), (0, 0, p[1][3], p[1][4])))
        assert chosen == best[0]
    place_, shape = grid.encode(boxes, index)
    raw = torch.zeros(grid.cell.shape[0], 4)
    raw[index] = torch.cat([place_.logit(), shape], 1)
    if len(set(index.tolist())) == 5:
        torch.testing.assert_close(grid.decode(raw)[index], boxes, rtol=1e-4, atol=1e-3)


def test_a_centre_on_the_edge_belongs_to_the_last_cell():
    grid = make_grid(64, anchors=anchors(64), strides=STRIDES)
    index = grid.assign(torch.tensor([[60.0, 60.0, 68.0, 68.0]]))
    assert (grid.cell[index] == 64 / grid.stride[index] - 1).all()


# ---- mean average precision ----


def detections(*rows):
    return torch.tensor(rows, dtype=torch.float32).view(-1, 6)


HERE, THERE, AWAY = (0, 0, 10, 10), (20, 20, 30, 30), (50, 50, 60, 60)


def test_average_precision_by_hand():
    """Two objects; right, wrong, right: precision 1 at recall 1/2 and 2/3 at 1."""
    found = detections((3, 0.9, *HERE), (3, 0.8, *AWAY), (3, 0.7, *THERE), (2, 0.99, *HERE))
    matches = match([found], [detections((3, 0, *HERE), (3, 0, *THERE))], 3)
    assert matches.right.tolist() == [True, False, True]
    assert matches.average_11() == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert matches.average_area() == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_a_second_detection_of_an_object_is_wrong_and_a_difficult_one_is_neither():
    found = detections((0, 0.9, *HERE), (0, 0.8, 0, 0, 10, 11), (0, 0.7, *THERE))
    matches = match([found], [detections((0, 0, *HERE), (0, 1, *THERE))], 0)
    assert matches.right.tolist() == [True, False]
    assert matches.objects == 1


def test_a_weak_overlap_does_not_take_the_object():
    found = detections((0, 0.9, 6, 0, 16, 10), (0, 0.8, *HERE))
    assert match([found], [detections((0, 0, *HERE))], 0).right.tolist() == [False, True]


def test_classes_without_objects_do_not_count():
    truths = [detections((0, 0, *HERE)), detections((1, 1, *HERE))]
    assert mean_average_precision([detections((0, 0.5, *HERE)), detections()], truths, 20) == (100.0, 100.0)
    assert mean_average_precision([detections(), detections()], truths, 20) == (0.0, 0.0)
    assert mean_average_precision([detections()], [detections()], 20) == (0.0, 0.0)


def plain_average(found, truths, points):
    """VOC's devkit in loops: sorted detections, one image each, then the precision curve."""
    flat = sorted(
        ((float(d[1]), i, d[2:].tolist()) for i, image in enumerate(found) for d in image), key=lambda d: -d[0]
    )
    taken, curve, right, total = set(), [], 0, 0
    objects = sum(1 for image in truths for t in image if t[1] == 0)
    for _, i, box in flat:
        overlaps = [plain_iou(box, t[2:].tolist()) for t in truths[i]]
        best = max(range(len(overlaps)), key=overlaps.__getitem__, default=None)
        hit = best is not None and overlaps[best] >= 0.5
        if hit and truths[i][best][1] == 1:
            continue
        total += 1
        if hit and (i, best) not in taken:
            taken.add((i, best))
            right += 1
        curve.append((right / objects, right / total))
    if points == 11:
        return sum(max((p for r, p in curve if r >= k / 10 - 1e-9), default=0.0) for k in range(11)) / 11
    area, last = 0.0, 0.0
    for k, (recall, _) in enumerate(curve):
        area += (recall - last) * max(p for _, p in curve[k:])
        last = recall
    return area


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_average_precision_is_the_devkit_s(seed):
    generator, draw = torch.Generator().manual_seed(seed), random.Random(seed)
    truths, found = [], []
    for _ in range(4):
        boxes = some_boxes(generator, draw.randint(1, 4))
        difficult = torch.tensor([[float(draw.random() < 0.2)] for _ in boxes])
        truths.append(torch.cat([torch.zeros(len(boxes), 1), difficult, boxes], 1))
        near = boxes.repeat(2, 1) + numbers(generator, 2 * len(boxes), 4, low=-2.0, high=2.0)
        near[:, 2:] = near[:, 2:].maximum(near[:, :2] + 0.5)
        guesses = torch.cat([near, some_boxes(generator, 2)])
        found.append(torch.cat([torch.zeros(len(guesses), 1), numbers(generator, len(guesses), 1), guesses], 1))
    truths[0][0, 1] = 0
    matches = match(found, truths, 0)
    assert matches.average_11() == pytest.approx(plain_average(found, truths, 11))
    assert matches.average_area() == pytest.approx(plain_average(found, truths, None))


# ---- the model ----


def values(model):
    """Parameters and running statistics, as Darknet counts them."""
    return sum(v.numel() for name, v in model.state_dict().items() if not name.endswith("num_batches_tracked"))


def test_the_whole_model_has_the_size_of_the_published_weights():
    """`darknet53.conv.74` has 162,482,580 bytes and `yolov3.weights` (80 classes) 248,007,048, 20 of them a header."""
    with torch.device("meta"):
        model, coco = YoloV3(20), YoloV3(80)
    assert 20 + 4 * values(model.backbone) == 162_482_580
    assert 20 + 4 * values(coco) == 248_007_048
    assert sum(p.numel() for p in model.parameters()) == 61_626_049
    assert sum(isinstance(m, nn.Conv2d) for m in model.backbone.modules()) == 52
    assert model(torch.empty(1, 3, 416, 416, device="meta")).shape == (1, 10_647, 25)


def test_predictions_stand_where_the_grid_says():
    """Of all predictions at stride 8, those whose cell the changed pixel cannot reach stay; the order is the grid's."""
    layer = torch.arange(3 * 7 * 2 * 2, dtype=torch.float32).view(1, 21, 2, 2)
    model = YoloV3(2, width=4, blocks=(1, 1, 1, 1, 1)).eval()
    maps = [torch.zeros(1, 21, n, n) for n in (1, 2, 4)]
    maps[1] = layer
    for head, values_ in zip(model.heads, maps, strict=True):
        head.last.forward = lambda _, values_=values_: values_
    out = model(torch.zeros(1, 3, 32, 32))
    for anchor in range(3):
        for row in range(2):
            for column in range(2):
                index = 3 + anchor * 4 + row * 2 + column
                assert torch.equal(out[0, index], layer[0, anchor * 7 : anchor * 7 + 7, row, column])


def darknet_bytes(model):
    """A file of Darknet's with random weights, and what each convolution should hold."""
    parts, wanted = [], []
    for layer, norm in [(s[0], s[1]) for s in model.modules() if isinstance(s, nn.Sequential) and len(s) == 3
                        and isinstance(s[1], nn.BatchNorm2d)]:  # fmt: skip
        numbers_ = [torch.randn(norm.num_features) for _ in range(4)] + [torch.randn(layer.weight.shape)]
        parts += [n.flatten() for n in numbers_]
        wanted.append((norm, numbers_[0], numbers_[3], layer, numbers_[4]))
    return bytes(20)[:4] + (2).to_bytes(4, "little") + bytes(12) + torch.cat(parts).numpy().tobytes(), wanted


def test_darknet_s_weights_are_read(tmp_path):
    model, path = yolo_model.Darknet(4, (1, 1, 1, 1, 1)), tmp_path / "darknet53.conv.74"
    content, wanted = darknet_bytes(model)
    path.write_bytes(content)
    model.load_darknet(path)
    for norm, bias, variance, layer, weight in wanted:
        assert torch.equal(norm.bias, bias)
        assert torch.equal(norm.running_var, variance)
        assert torch.equal(layer.weight, weight)
    for broken in (content[:-4], content[:-3]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"darknet53\.conv\.74"):
            model.load_darknet(path)


def test_the_backbone_starts_from_darknet_s_weights_where_they_are(few, monkeypatch):
    read = []
    monkeypatch.setattr(yolo_model.Darknet, "load_darknet", lambda self, path: read.append(path))
    with torch.device("meta"):
        with pytest.warns(
            anybatch.AnybatchWarning, match=r"darknet53\.conv\.74 is not there.*WITHOUT PRETRAINED.*README"
        ):
            Yolo(few).model()
        assert not read
        assert "darknet53.conv.74" in (Path(__file__).parents[2] / "recipes/README.md").read_text()
        (few / "darknet53.conv.74").touch()
        assert values(Yolo(few).model()) > 61_000_000
    assert read == [few / "darknet53.conv.74"]


# ---- the loss ----


def plain_loss(raw, targets, size):
    """One image's loss in float64 loops; a seventh column is an object's share of its terms."""
    log = torch.nn.functional.logsigmoid
    shapes = list(plain_predictions(size))
    boxes = [t[2:6].tolist() for t in targets]
    charge = {}
    for k, box in enumerate(boxes):
        x, y, w, h = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box[2] - box[0], box[3] - box[1]
        at = [i for i, s in enumerate(shapes) if s[:2] == (x // s[2], y // s[2])]
        best = max(at, key=lambda i: plain_iou((0, 0, w, h), (0, 0, *shapes[i][3:])))
        charge.setdefault(best, k)
    total = 0.0
    for i, (column, row, stride, aw, ah) in enumerate(shapes):
        p = raw[i].double()
        if i in charge:
            t, before, total = targets[charge[i]].double(), total, 0.0
            x, y, w, h = (t[2] + t[4]) / 2 / stride - column, (t[3] + t[5]) / 2 / stride - row, t[4] - t[2], t[5] - t[3]
            weight = 2 - w * h / size**2
            for value, want in ((p[0], x), (p[1], y)):
                total -= weight * (want * log(value) + (1 - want) * log(-value))
            total += weight * ((p[2] - (w / aw).log()) ** 2 + (p[3] - (h / ah).log()) ** 2) / 2
            total -= log(p[4])
            for kind in range(len(p) - 5):
                total -= log(p[5 + kind]) if kind == int(t[1]) else log(-p[5 + kind])
            total = before + (t[6] if len(t) > 6 else 1.0) * total
            continue
        x, y = (column + p[0].sigmoid()) * stride, (row + p[1].sigmoid()) * stride
        w, h = aw * p[2].exp(), ah * p[3].exp()
        mine = [float(v) for v in (x - w / 2, y - h / 2, x + w / 2, y + h / 2)]
        if all(plain_iou(mine, box) <= 0.5 for box in boxes):
            total -= log(-p[4])
    return float(total)


def loss_case():
    generator = torch.Generator().manual_seed(3)
    grid = make_grid(64, anchors=anchors(64), strides=STRIDES)
    raw = numbers(generator, 4, len(grid.cell), 9, low=-1.0, high=1.0)
    rows = []
    for image, count in enumerate((3, 0, 1, 4)):
        kinds = torch.randint(4, (count, 1), generator=generator).float()
        rows.append(torch.cat([torch.full((count, 1), float(image)), kinds, some_boxes(generator, count)], 1))
    rows[3][1, 2:] = rows[3][0, 2:]  # two objects for one prediction
    return grid, raw, rows


def test_the_loss_is_the_papers_in_plain_loops():
    grid, raw, rows = loss_case()
    expected = sum(plain_loss(raw[i], rows[i], 64) for i in range(4)) / 4
    assert float(detection_loss(raw, torch.cat(rows), grid)) == pytest.approx(expected, rel=1e-5)


def test_with_mixup_each_object_counts_by_its_share():
    grid, raw, rows = loss_case()
    generator = torch.Generator().manual_seed(4)
    mixed = [torch.cat([some, numbers(generator, len(some), 1)], 1) for some in rows]
    expected = sum(plain_loss(raw[i], mixed[i], 64) for i in range(4)) / 4
    assert float(detection_loss(raw, torch.cat(mixed), grid)) == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(float(detection_loss(raw, torch.cat(rows), grid)), rel=0.01)


def test_predictions_that_see_an_object_are_not_told_there_is_none():
    grid, raw, rows = loss_case()
    truth = rows[2]
    index = int(grid.assign(truth[:, 2:])[0])
    other = index + (1 if grid.cell[index, 0] == 0 else -1)  # its neighbour says the very same box
    raw = torch.zeros_like(raw[2:3])
    x = (truth[0, 2] + truth[0, 4]) / 2 / grid.stride[other, 0] - grid.cell[other, 0]
    assert not 0 <= x <= 1  # the centre is next door, so put the box as near as the cell allows
    y = (truth[0, 3] + truth[0, 5]) / 2 / grid.stride[other, 0] - grid.cell[other, 1]
    raw[0, other, 0], raw[0, other, 1] = (20.0 if x > 1 else -20.0), y.logit()
    near = truth.clone()
    near[0, [2, 4]] += (grid.cell[other, 0] + float(x > 1)) * grid.stride[other, 0] - (truth[0, 2] + truth[0, 4]) / 2
    raw[0, other, 2:4] = ((near[0, 4:] - near[0, 2:4]) / grid.anchor[other]).log()
    near[0, [2, 4]] += (0.01 if x > 1 else -0.01) * float(grid.stride[index, 0])  # still the first one's centre
    near[0, 0] = 0
    assert int(grid.assign(near[:, 2:])[0]) == index
    raw.requires_grad_()
    detection_loss(raw, near, grid).backward()
    assert raw.grad[0, other, 4] == 0
    assert raw.grad[0, index, 4] < 0


def test_loss_and_gradient_are_means_over_the_images():
    grid, raw, rows = loss_case()
    whole = raw.clone().requires_grad_()
    loss = detection_loss(whole, torch.cat(rows), grid)
    loss.backward()
    losses = []
    for i in range(4):
        alone, row = raw[i : i + 1].clone().requires_grad_(), rows[i].clone()
        row[:, 0] = 0
        losses.append(detection_loss(alone, row, grid))
        losses[-1].backward()
        torch.testing.assert_close(whole.grad[i], alone.grad[0] / 4)
    torch.testing.assert_close(loss, torch.stack(losses).mean())


# ---- the files ----


def test_made_data_is_read_as_it_was_made(data):
    train, test = read_split(data, "trainval"), read_split(data, "test")
    assert (len(train), len(test)) == (1000, 200)
    objects = torch.cat([e.objects for e in train + test])
    assert sorted({int(k) for k in objects[:, 0]}) == [0, 1, 2, 3]
    assert 0.02 < objects[:, 1].mean() < 0.1
    assert all(1 <= len(e.objects) <= 2 for e in train)


def test_the_same_seed_makes_the_same_data(data, tmp_path):
    make(tmp_path)
    for part in ("JPEGImages/000007.jpg", "Annotations/001100.xml"):
        path = f"VOCdevkit/VOC2007/{part}"
        assert (tmp_path / path).read_bytes() == (data / path).read_bytes()
    with pytest.raises(ValueError, match="huge"):
        make(tmp_path, size="huge")


def first_annotation(folder):
    return min((folder / "VOCdevkit" / "VOC2007" / "Annotations").iterdir())


ANNOTATION = """<annotation><size><width>{w}</width><height>80</height></size><object><name>{name}</name>
<difficult>0</difficult><part><bndbox><xmin>0</xmin></bndbox></part><bndbox>{box}</bndbox></object></annotation>"""


def annotation(*, w="90", name="cow", box=(1, 2, 90, 40)):
    edges = "".join(f"<{e}>{v}</{e}>" for e, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
    return ANNOTATION.format(w=w, name=name, box=edges)


def test_voc_counts_pixels_from_one(few):
    first_annotation(few).write_text(annotation())
    objects = read_split(few, "trainval")[0].objects
    assert objects.tolist() == [[CLASSES.index("cow"), 0, 0, 1, 90, 40]]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (annotation(box=(1, 2, 91, 40)), "not inside"),
        (annotation(box=(-3, 2, 80, 40)), "not inside"),
        (annotation(box=(50, 2, 50, 40)), "empty"),
        (annotation(box=(50, 40, 60, 2)), "empty"),
        (annotation(box=("nan", 2, 60, 40)), "no number"),
        (annotation(box=(1, 2, 3)), "bndbox/ymax> is missing"),
        (annotation(w="wide"), "'wide', no number"),
        (annotation(name="unicorn"), "'unicorn' is not one of VOC's"),
        ("<annotation><size>", "no element found"),
        ("", "no element found"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "entity is declared"),
        ('<!DOCTYPE a SYSTEM "file:///etc/hostname"><annotation/>', "document type"),
    ],
)
def test_a_wrong_annotation_is_named(few, content, complaint):
    path = first_annotation(few)
    path.write_text(content)
    lists = few / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"
    (lists / "test.txt").write_text(path.stem)  # in training a box that reaches out is no error
    with pytest.raises(DataError, match=complaint) as error:
        read_split(few, "test")
    assert str(path) in str(error.value)


def test_a_box_that_reaches_out_is_skipped_and_counted_in_training(few):
    inside = annotation(box=(1, 2, 90, 40)).partition("<object>")[2].removesuffix("</annotation>")
    first_annotation(few).write_text(
        annotation(box=(1, 2, 91, 40)).replace("</annotation>", f"<object>{inside}</annotation>")
    )
    with pytest.warns(
        anybatch.AnybatchWarning, match=r"1 object\(s\) of trainval are skipped.* first is in 000000\.jpg"
    ):
        examples = read_split(few, "trainval")
    assert [example.skipped for example in examples] == [1, *[0] * (len(examples) - 1)]
    assert examples[0].objects[:, 2:].tolist() == [[0, 1, 90, 40]]


def test_what_is_missing_is_named(few, tmp_path):
    with pytest.raises(DataError, match="folder that holds VOCdevkit"):
        Yolo(None, tiny=True)
    with pytest.raises(DataError, match="VOC2007"):
        Yolo(tmp_path / "nothing", tiny=True)
    root = few / "VOCdevkit" / "VOC2007"
    for path in (root / "JPEGImages" / "000000.jpg", root / "Annotations" / "000000.xml"):
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(DataError, match=path.name):
            Yolo(few, tiny=True)
        path.write_bytes(content)
    lists = root / "ImageSets" / "Main"
    (lists / "test.txt").write_text("../../secret")
    with pytest.raises(DataError, match="no name of an image"):
        Yolo(few, tiny=True)
    (lists / "test.txt").write_text("\n")
    with pytest.raises(DataError, match=r"test\.txt names no image"):
        Yolo(few, tiny=True)
    (lists / "test.txt").unlink()
    with pytest.raises(DataError, match=r"test\.txt: the list"):
        Yolo(few, tiny=True)


def test_voc2012_is_used_for_training_where_it_is(few):
    years = few / "VOCdevkit"
    shutil.copytree(years / "VOC2007", years / "VOC2012")
    assert len(read_split(few, "trainval")) == 8
    assert len(read_split(few, "test")) == 1


def test_a_truncated_training_image_gives_its_place_to_the_next(few):
    task = Yolo(few, tiny=True)
    for index in (0, 1):
        path = task.train_set.examples[index].image
        path.write_bytes(path.read_bytes()[:-400])
    with pytest.warns(UserWarning, match=r"000000\.jpg.*skipped"):
        images, _ = next(task.batches(4, seed=0, rank=0, ranks=1))
    assert len(images) == 4
    assert task.train_set.skipped == 3  # 0 and 1 for example 0, 1 for example 1


def test_images_that_cannot_be_read_at_all_are_errors(few):
    task = Yolo(few, tiny=True)
    for example in task.train_set.examples + task.test_set.examples:
        example.image.write_bytes(b"no image")
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(DataError, match="not one of the 4"):
        task.train_set[0]
    with pytest.raises(DataError, match="cannot be read"):
        task.evaluate(task.model().eval(), torch.device("cpu"))


# ---- augmentation ----


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), flip=st.booleans())
def test_boxes_move_with_the_pixels(seed, flip):
    """A white box on black is found again where the moved box says."""
    draw = random.Random(seed)
    width, height = draw.randint(60, 120), draw.randint(60, 120)
    x, y = draw.randint(15, width - 40), draw.randint(15, height - 40)
    box = (x, y, x + draw.randint(12, 20), y + draw.randint(12, 20))
    image = Image.new("RGB", (width, height))
    image.paste((255, 255, 255), box)
    window = (draw.uniform(-10, 10), draw.uniform(-10, 10), width + draw.uniform(-5, 10), height + draw.uniform(-5, 10))
    pixels, moved = place(image, torch.tensor([box], dtype=torch.float32), window, 64, flip=flip)
    bright = (pixels[0] > 0.75).nonzero()
    found = [*bright.min(0).values.flip(0).tolist(), *(bright.max(0).values.flip(0) + 1).tolist()]
    inside = moved[0].clamp(0, 64).tolist()
    assert found == pytest.approx(inside, abs=1.5)


def test_training_targets_lie_in_the_image_and_whole_images_keep_their_proportions(data):
    task = Yolo(data, tiny=True)
    images, targets = task.collate([task.train_set[i] for i in range(50)])
    assert images.shape == (50, 3, 64, 64)
    assert task.size([images, targets]) == 50
    assert 0 <= images.min() < images.max() <= 1
    assert (targets[:, 2:] >= 0).all()
    assert (targets[:, 2:] <= 64).all()
    assert (targets[:, 4:] - targets[:, 2:4] >= 1).all()
    assert targets[:, 0].diff().min() >= 0
    example, (_, moved) = task.test_set.examples[0], task.test_set[0]
    before, after = example.objects[:, 4:] - example.objects[:, 2:4], moved[:, 4:] - moved[:, 2:4]
    ratio = 64 / max(read_image(example.image).size)
    torch.testing.assert_close(after, before * ratio)


def test_augmentation_is_random_and_follows_torch_s_seed(data):
    train = TrainSet(read_split(data, "test"), 64)
    torch.manual_seed(1)
    first, second = train[0][0], train[0][0]
    torch.manual_seed(1)
    assert torch.equal(first, train[0][0])
    assert not torch.equal(first, second)


def test_mixup_is_two_images_by_their_shares(data):
    """As torch's generator gives them: a share, the image itself, another one's number, and that one."""
    examples = read_split(data, "test")
    plain, mixing = TrainSet(examples, 64), TrainSet(examples, 64, mixup=1.5)
    torch.manual_seed(2)
    pixels, targets = mixing[3]
    torch.manual_seed(2)
    share = float(torch.distributions.Beta(1.5, 1.5).sample())
    first, mine = plain[3]
    other = int(torch.randint(len(plain), ()))
    second, theirs = plain[other]
    assert 0 < share < 1
    torch.testing.assert_close(pixels, share * first + (1 - share) * second)
    assert torch.equal(targets[:, :5], torch.cat([mine, theirs]))
    assert targets[:, 5].tolist() == pytest.approx([share] * len(mine) + [1 - share] * len(theirs))


def test_many_sizes_change_every_ten_base_batches_and_are_the_same_on_any_ranks(data):
    task = Yolo(data, tiny=True, sizes="many")  # 64 and 96 pixels
    assert task.sides == [64, 96]
    assert task.train_set.size == 96
    sides = [task.side_at(number, seed=0) for number in range(0, 3200, 8)]  # base batches
    assert all(len(set(sides[i : i + 10])) == 1 for i in range(0, 400, 10))
    assert {64, 96} == set(sides)
    alone = [len(batch[2]) for batch in islice(task.batches(8, seed=0, rank=0, ranks=1), 40)]
    assert alone == sides[:40]
    both = [islice(task.batches(8, seed=0, rank=rank, ranks=2, start=80), 15) for rank in range(2)]
    assert [len(batch[2]) for pair in zip(*both, strict=True) for batch in pair] == sides[10:40]


@torch.no_grad()
def test_a_batch_of_another_size_is_that_size_to_the_model_and_the_boxes(data):
    task, seen = Yolo(data, tiny=True, sizes="many"), []
    images, targets = torch.rand(2, 3, 96, 96), torch.tensor([[0.0, 1, 6, 12, 48, 60], [1, 2, 30, 30, 90, 96]])

    def model(x):
        seen.append(x)
        return torch.zeros(len(x), len(task.grid(x.device, x.shape[-1]).cell), 25)

    said = task.loss(model, [images, targets, torch.empty(64, 0)])
    small = nn.functional.interpolate(images, (64, 64), mode="bilinear", antialias=True)
    smaller = torch.cat([targets[:, :2], targets[:, 2:] * 2 / 3], 1)
    assert torch.equal(seen[0], small)
    assert said == detection_loss(model(small), smaller, make_grid(64, anchors=anchors(64), strides=STRIDES))
    assert torch.equal(task.grid(images.device, 96).anchors, task.grid(images.device).anchors)


def test_nothing_of_the_device_goes_to_a_loading_process(few):
    task = Yolo(few, tiny=True)
    task.grid(torch.device("cpu"))
    assert len(task.grids) == 1
    sent = pickle.loads(pickle.dumps(task))
    assert not sent.grids
    assert len(sent.train_set) == 4


def test_the_whole_model_has_yolov3_s_sizes(few):
    assert Yolo(few).sides == [416]
    assert Yolo(few, sizes="many").sides == list(range(320, 609, 32))


@pytest.mark.parametrize(("choice", "complaint"), [({"sizes": "two"}, "one or many"), ({"mixup": "-1"}, "positive")])
def test_a_choice_that_is_none_is_named(few, choice, complaint):
    with pytest.raises(anybatch.InvalidValueError, match=complaint):
        Yolo(few, tiny=True, **choice)


# ---- training ----


def test_it_trains_with_many_sizes_and_mixup(data, tmp_path):
    task = Yolo(data, tiny=True, sizes="many", mixup="1.5")
    task.test_set.examples = task.test_set.examples[:16]
    summary = run(task, Options(scale="4", total=12, evaluations=1, out=tmp_path / "out"))
    assert summary["iterations"] >= 3
    assert 0 < summary["loss"] < 1000


def test_three_steps_with_accumulation(data):
    task = Yolo(data, tiny=True)
    torch.manual_seed(0)
    model = task.model()
    optimizer = task.optimizer(model)
    controller = anybatch.attach(
        optimizer,
        model=model,
        scheduler=task.scheduler(optimizer),
        total=task.total,
        base_batch=task.base_batch,
        micro_batch=8,
    )
    batches = task.batches(8, seed=0, rank=0, ranks=1)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        for batch in islice(batches, 4):
            (task.loss(model, batch) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert controller.steps == 3
    assert 3 < controller.tau <= 3 * controller.scale
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.slow
def test_it_learns_at_scale_4(data):
    """An untrained model has a mAP of 0."""
    task = Yolo(data, tiny=True)
    summary = run(task, Options(rule="adascale", scale="4", total=300, evaluations=1))
    assert summary["mAP"] > 12
    assert summary["mean_gain"] > 2

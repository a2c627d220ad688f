"""The image tasks: their networks, their files, their random crops, and that they learn."""

import pickle
from itertools import islice
from math import sqrt

import numpy as np
import pytest
import torch
from common import times
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from recipes.digits import Digits
from recipes.images import cifar10, imagenet, resnet
from recipes.images import made as made_images
from recipes.images.cifar10 import Cifar10
from recipes.images.imagenet import ImageNet
from recipes.train import run
from recipes.training.options import Options
from recipes.training.task import DataError

TASKS = {"digits": Digits, "cifar10": Cifar10, "imagenet": ImageNet}


# ---- networks ----


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_resnet_50_has_its_known_number_of_parameters():
    assert count(resnet.imagenet_resnet_v1(1000)) == 25_557_032


def test_resnet_18_v2_has_its_known_number_of_parameters():
    """Convolutions and normalisations counted by hand; 11.17 million."""
    expected, inputs = 3 * 64 * 9, 64
    for outputs in (64, 128, 256, 512):
        for _ in range(2):
            expected += 2 * inputs + inputs * outputs * 9 + 2 * outputs + outputs * outputs * 9
            expected += inputs * outputs if inputs != outputs else 0
            inputs = outputs
    expected += 2 * 512 + 512 * 10 + 10
    assert count(resnet.cifar_resnet_v2(10)) == expected == 11_172_170


def test_v1_has_its_stride_in_the_first_convolution():
    blocks = [m for m in resnet.imagenet_resnet_v1(10, width=4) if isinstance(m, resnet.Bottleneck)]
    assert [b.conv1.stride[0] for b in blocks] == [1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1]
    assert all(b.conv2.stride == b.conv3.stride == (1, 1) for b in blocks)


@torch.no_grad()
def test_blocks_start_as_their_shortcuts_or_keep_them():
    x = torch.randn(2, 16, 8, 8)
    v1 = resnet.Bottleneck(16, 4, stride=1)
    torch.testing.assert_close(v1(x), x.relu())  # the last gamma is 0
    v2 = resnet.PreActivation(16, 16, stride=1)
    v2.conv2.weight.zero_()
    assert torch.equal(v2(x), x)  # nothing after the sum


@pytest.mark.parametrize(("make", "side", "last"), [
    (resnet.cifar_resnet_v2, 32, (4, 4)), (resnet.imagenet_resnet_v1, 64, (2, 2))])  # fmt: skip
def test_shapes(make, side, last):
    model = make(7, width=4, depths=(1, 2, 1, 1))
    features = []
    pool = next(m for m in model if isinstance(m, torch.nn.AdaptiveAvgPool2d))
    pool.register_forward_hook(lambda _, inputs, __: features.append(inputs[0].shape[2:]))
    assert model(torch.randn(2, 3, side, side)).shape == (2, 7)
    assert features == [last]


# ---- what a batch is made of ----


@pytest.mark.parametrize("name", ["cifar10", "imagenet"])
def test_random_crops_are_the_same_on_any_number_of_ranks_and_after_a_resume(name, made):
    task = TASKS[name](made(name), tiny=True)

    def batches(n, **shares):
        return list(islice(task.batches(3, seed=5, **shares), n))

    straight = batches(6, rank=0, ranks=1)
    for rank in (0, 1):
        for mine, other in zip(batches(3, rank=rank, ranks=2), straight[rank::2], strict=True):
            assert torch.equal(mine[0], other[0])
            assert torch.equal(mine[1], other[1])
    assert torch.equal(batches(1, rank=0, ranks=1, start=12)[0][0], straight[4][0])
    again = batches(6, rank=0, ranks=1)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(straight, again, strict=True))
    other_seed = next(iter(task.batches(3, seed=6, rank=0, ranks=1)))
    assert not torch.equal(other_seed[0], straight[0][0])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # how DataLoader starts them
def test_worker_processes_load_the_same_crops(made):
    task = Cifar10(made("cifar10"), tiny=True)
    with_worker = task.batches(4, seed=0, rank=0, ranks=1, workers=1)
    for mine, other in zip(with_worker, islice(task.batches(4, seed=0, rank=0, ranks=1), 3)):
        assert torch.equal(mine[0], other[0])


def test_loading_leaves_the_random_numbers_of_training_alone(made):
    batches = Cifar10(made("cifar10"), tiny=True).batches(4, seed=0, rank=0, ranks=1)
    next(batches)
    before = torch.get_rng_state()
    next(batches)
    assert torch.equal(torch.get_rng_state(), before)


def test_cifar_crops_are_windows_of_the_padded_image():
    image = torch.randint(1, 256, (1, 3, 32, 32), dtype=torch.uint8)
    data = cifar10.Augmented(image, torch.tensor([3]))
    padded = np.pad(image[0].numpy(), ((0, 0), (4, 4), (4, 4)))
    windows = {}
    for top in range(9):
        for left in range(9):
            window = padded[:, top : top + 32, left : left + 32]
            windows[window.tobytes()] = top, left, False
            windows[np.ascontiguousarray(window[:, :, ::-1]).tobytes()] = top, left, True
    torch.manual_seed(0)
    drawn = [windows[data[0][0].contiguous().numpy().tobytes()] for _ in range(600)]
    assert {top for top, _, _ in drawn} == {left for _, left, _ in drawn} == set(range(9))
    assert 240 < sum(flip for _, _, flip in drawn) < 360


@given(width=st.integers(1, 2000), height=st.integers(1, 2000), seed=st.integers(0, 2**31))
def test_random_boxes_lie_in_the_image(width, height, seed):
    torch.manual_seed(seed)
    left, top, right, bottom = imagenet.random_box(width, height)
    assert 0 <= left < right <= width + 1e-9
    assert 0 <= top < bottom <= height + 1e-9
    w, h = right - left, bottom - top
    assert 3 / 4 - 1e-6 <= w / h <= 4 / 3 + 1e-6
    fallback = abs(w - min(width, height)) < 1e-6 and abs(h - min(width, height)) < 1e-6
    assert fallback or 0.08 - 1e-6 <= w * h / (width * height) <= 1 + 1e-6


def test_the_area_of_random_boxes_is_uniform():
    torch.manual_seed(0)
    boxes = [imagenet.random_box(400, 400) for _ in range(4000)]
    areas = torch.tensor([(r - l) * (b - t) / 400**2 for l, t, r, b in boxes])  # noqa: E741
    small = areas[areas < 0.7]  # where every ratio fits
    assert small.mean() == pytest.approx((0.08 + 0.7) / 2, abs=0.01)
    assert sqrt(small.var()) == pytest.approx((0.7 - 0.08) / sqrt(12), abs=0.01)


def test_the_centre_is_that_of_the_shorter_side_at_256():
    """Resized to 256 x 512 and cut to 224 x 224, in the coordinates of an image of 512 x 1024."""
    assert imagenet.centre_box(1024, 512) == ((1024 - 448) / 2, 32, (1024 + 448) / 2, 480)


# ---- made data ----


def test_made_images_are_reproducible_and_balanced(tmp_path, made):
    cifar = made("cifar10")
    made_images.cifar10(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        assert path.read_bytes() == (cifar / path.name).read_bytes()
    _, labels = cifar10.read(tmp_path, ["data_batch_1"])
    assert labels.bincount().tolist() == [40] * 10
    assert {len(list(folder.iterdir())) for folder in (made("imagenet") / "val").iterdir()} == {50}


# ---- CIFAR-10's files ----


def write_pickles(folder, *, rows=6, key=str, numpy=b"numpy._core"):
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        data = generator.integers(0, 256, (rows, 3072), dtype=np.uint8)
        labels = [int(label) for label in generator.integers(0, 10, rows)]
        batch = {key("data"): data, key("labels"): labels, key("filenames"): ["x.png"] * rows}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2).replace(b"numpy._core", numpy))
        rows_ = np.concatenate([np.array(labels, dtype=np.uint8)[:, None], data], 1)
        binary = folder.parent / "cifar-10-batches-bin"
        binary.mkdir(exist_ok=True)
        (binary / f"{name}.bin").write_bytes(rows_.tobytes())


@pytest.mark.parametrize("key", [str, str.encode], ids=["str", "bytes"])
@pytest.mark.parametrize("numpy", [b"numpy.core", b"numpy._core"])
def test_both_versions_of_cifar_10_read_alike(tmp_path, key, numpy):
    write_pickles(tmp_path / "cifar-10-batches-py", key=key, numpy=numpy)
    binary = cifar10.read(tmp_path / "cifar-10-batches-bin", ["data_batch_2", "test_batch"])
    python = cifar10.read(tmp_path / "cifar-10-batches-py", ["data_batch_2", "test_batch"])
    above = cifar10.read(tmp_path, ["data_batch_2", "test_batch"])
    assert binary[0].shape == (12, 3, 32, 32)
    for other in (python, above):
        assert torch.equal(binary[0], other[0])
        assert torch.equal(binary[1], other[1])


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("content", [
    pickle.dumps({b"data": Evil(), b"labels": [0]}), pickle.dumps([1, 2]), b"", b"\x80\x02garbage",
    pickle.dumps({b"data": np.zeros((2, 3072), dtype=np.uint8)}),
    pickle.dumps({b"data": np.zeros((2, 3071), dtype=np.uint8), b"labels": [0, 1]}),
    pickle.dumps({b"data": np.zeros((2, 3072), dtype=np.float32), b"labels": [0, 1]}),
    pickle.dumps({b"data": np.zeros((2, 3072), dtype=np.uint8), b"labels": [0, 10]}),
])  # fmt: skip
def test_a_damaged_or_evil_pickle_is_an_error(tmp_path, capsys, content):
    write_pickles(tmp_path / "python")
    (tmp_path / "python" / "data_batch_3").write_bytes(content)
    with pytest.raises(DataError, match=r"data_batch_3"):
        Cifar10(tmp_path / "python")
    assert not capsys.readouterr().out


@pytest.mark.parametrize("cut", [1, 3072, 6 * 3073])
def test_a_binary_file_of_the_wrong_size_is_an_error(tmp_path, cut):
    write_pickles(tmp_path / "python")
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_4.bin"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(DataError, match=rf"data_batch_4\.bin has {6 * 3073 - cut} bytes"):
        Cifar10(path.parent)


def test_missing_cifar_10_files_are_named(tmp_path):
    write_pickles(tmp_path / "python")
    (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").unlink()
    with pytest.raises(DataError, match=r"test_batch\.bin cannot be read"):
        Cifar10(tmp_path / "cifar-10-batches-bin")
    with pytest.raises(DataError, match="holds neither"):
        Cifar10(tmp_path / "nowhere")
    with pytest.raises(DataError, match="needs --data"):
        Cifar10(None)


# ---- ImageNet's folders ----


@pytest.fixture
def folders(tmp_path):
    """Two classes, a hundred training and ten test images each, all of their own grey."""
    for part, number in (("train", 100), ("val", 10)):
        for name in ("n01", "n02"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(number):
                path = tmp_path / part / name / f"{name}_{i:03}.JPEG"
                Image.new("RGB", (70, 60), (2 * i,) * 3).save(path)
    return tmp_path


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def test_folders_are_read(folders):
    task = ImageNet(folders, tiny=True)
    assert task.classes == ["n01", "n02"]
    assert (len(task.train_set), len(task.test_set)) == (200, 20)
    image, label = task.train_set[150]
    assert (image.dtype, image.shape, label) == (torch.uint8, (3, 64, 64), 1)
    assert (image.float() - 100).abs().max() <= 2


def test_other_kinds_of_images_are_read(folders):
    path = folders / "train" / "n01" / "n01_005.JPEG"
    Image.new("CMYK", (70, 60)).save(path)
    Image.new("L", (70, 60), 9).save(path.with_name("n01_006.JPEG"))
    Image.new("RGBA", (70, 60), (9, 9, 9, 0)).save(path.with_suffix(".png"))
    task = ImageNet(folders, tiny=True)
    assert all(task.train_set[i][0].shape == (3, 64, 64) for i in (5, 6, 7))
    assert not task.train_set.broken


def test_a_truncated_training_image_is_replaced_with_one_warning(folders):
    paths = [folders / "train" / "n01" / f"n01_{i:03}.JPEG" for i in (7, 8)]
    for path in paths:
        truncate(path)
    data = ImageNet(folders, tiny=True).train_set
    with pytest.warns(UserWarning, match=r"n01_007\.JPEG cannot be read") as caught:
        image, label = data[7]
        again = data[8]
    assert len(caught) == 1
    assert label == again[1] == 0
    assert (image.float() - 18).abs().max() <= 2  # the one after the two
    assert sorted(data.broken) == [7, 8]


def test_more_than_one_percent_of_broken_images_is_an_error(folders):
    paths = sorted((folders / "train" / "n02").iterdir())
    for path in paths[10:13]:
        path.write_bytes(b"")
    data = ImageNet(folders, tiny=True).train_set
    with pytest.warns(UserWarning, match="n02_010"), pytest.raises(DataError, match=r"3 of 200 images.*n02_011"):
        data[110]


def test_a_broken_test_image_is_left_out_of_the_accuracy(folders):
    class Right(torch.nn.Module):
        def forward(self, x):
            return torch.stack([torch.ones(len(x)), torch.zeros(len(x))], 1)  # the first class, always

    truncate(folders / "val" / "n02" / "n02_004.JPEG")
    task = ImageNet(folders, tiny=True)
    with pytest.warns(UserWarning, match=r"n02_004.*left out"):
        values = task.evaluate(Right(), torch.device("cpu"))
    assert values["accuracy"] == pytest.approx(100 * 10 / 19)


def test_the_names_of_a_million_files_fit_into_every_process(tmp_path):
    """In bytes of an array, which loading processes share; a Path takes 400, and is copied by being looked at."""
    names = [["ä.JPEG", "b.png"], [f"n01440764_{i}.JPEG" for i in range(500)], ["only.jpg"]]
    folders = [tmp_path / f"n{k:02d}" for k in range(3)]
    for folder, some in zip(folders, names):
        folder.mkdir()
        for name in (*some, "notes.txt"):
            (folder / name).touch()
    files = imagenet.Files(folders)
    expected = [(folder / name, k) for k, folder in enumerate(folders) for name in sorted(names[k])]
    assert [files[i] for i in range(len(files))] == expected
    assert len(pickle.dumps(files)) < 40 * len(files)


def test_missing_and_empty_folders_are_named(folders):
    with pytest.raises(DataError, match="needs --data"):
        ImageNet(None)
    (folders / "val" / "n03").mkdir()
    with pytest.raises(DataError, match=r"val/n03.*same classes"):
        ImageNet(folders)
    (folders / "val" / "n03").rmdir()
    (folders / "train" / "n00").mkdir()
    (folders / "val" / "n00").mkdir()
    with pytest.raises(DataError, match="train/n00 holds no"):
        ImageNet(folders)
    (folders / "val").rename(folders / "test")
    (folders / "train" / "n00").rmdir()
    with pytest.raises(DataError, match="val is missing"):
        ImageNet(folders)
    (folders / "val").mkdir()
    with pytest.raises(DataError, match="no class folders"):
        ImageNet(folders)


# ---- training ----


@pytest.mark.parametrize("name", TASKS)
def test_three_steps(name, made):
    task = Digits() if name == "digits" else TASKS[name](made(name), tiny=True)
    summary = run(task, Options(scale="2", total=6, rule="linear", evaluations=1))
    assert summary["iterations"] == 3
    assert 0 <= summary[task.metric] <= 100
    assert 0 < summary["train_loss"] < 5
    assert summary["examples"] == 3 * 2 * task.base_batch


@pytest.mark.slow
@pytest.mark.parametrize(("name", "total", "least"), [("cifar10", 600, 50), ("imagenet", times(125, 250), 40)])
def test_learns_far_above_chance(name, total, least, made):
    task = TASKS[name](made(name), tiny=True)
    summary = run(task, Options(scale="4", total=total, evaluations=1))
    assert summary[task.metric] > least  # 10 by chance
    assert total / 4 <= summary["iterations"] < total
    assert not summary["diverged"]


def test_the_full_sizes_are_the_papers(folders):
    task = ImageNet(folders)
    assert (task.base_batch, task.total) == (256, 451_000)
    optimizer = task.optimizer(torch.nn.Linear(1, 1))
    assert [(g["lr"], g["momentum"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.1, 0.9, 1e-4)]
    assert sorted(task.scheduler(optimizer).milestones) == [150_000, 300_000, 400_000]
    write_pickles(folders / "python")
    small = Cifar10(folders / "python")
    assert (small.base_batch, small.total) == (128, 39_100)

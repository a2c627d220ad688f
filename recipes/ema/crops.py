"""DINO's full configuration: crops of two sizes from the images in an ImageNet folder, and ViT-S/16.

The crops are DINO's (2 of 224 pixels from 40 to 100 % of the area, 8 of 96 from 5 to 40 %), flipped half of the time;
their colours change as BYOL's here do, without its authors' blur and solarisation. The transformer averages its patches
in place of a class token and has no stochastic depth; the learning rate's cosine ends at 0 in place of 1e-6; biases and
norms decay like the rest.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from recipes.ema.config import Config
from recipes.ema.distillation import probe
from recipes.ema.images import SIDE, coloured, colours, features
from recipes.ema.multicrop import Dino, MultiCrop
from recipes.ema.nets import vit
from recipes.ema.stream import shuffled
from recipes.ema.train import Batch
from recipes.images.imagenet import Images, classes, random_box
from recipes.training.task import DataError

LARGE, SMALL = (0.4, 1.0), (0.05, 0.4)  # shares of the area
WARM, FROZEN = 30, 1  # epochs: of the teacher's temperature, and without the last layer


class Crops(Dataset[tuple[Tensor, Tensor]]):
    """`[2, 3, side, side]` and `[small, 3, side 3 / 7, side 3 / 7]` of every image, in bytes.

    Args:
        images: the training images; a broken one gives its place to the next.
        side: of the large crops.
        small: how many small ones.
    """

    def __init__(self, images: Images, *, side: int, small: int) -> None:
        self.images = images
        self.kinds = ((2, side, LARGE), (small, side * 96 // 224, SMALL))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        try:
            with Image.open(self.images.files[i][0]) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            self.images.skip(i, str(error))
            return self[(i + 1) % len(self)]
        large, small = (torch.stack([_crop(image, side, share) for _ in range(n)]) for n, side, share in self.kinds)
        return large, small


class CropFolder(MultiCrop):
    """DINO on train/<class>/*.JPEG, probed on val/<class>/*.JPEG.

    Args:
        config: see `Config`.
        data: the folder with `train` and `val`.
        tiny: a small network on images of 112x112, for a check of the whole path.
        device: where the networks are.
        workers: processes that load images.
    """

    def __init__(
        self, config: Config, *, data: Path | None, tiny: bool = False, device: str = "cpu", workers: int = 8
    ) -> None:
        epoch = config.total / 100
        super().__init__(
            config, temperatures=(0.04, 0.07), warm=WARM * epoch, frozen=FROZEN * epoch, device=device
        )  # fmt: skip
        if data is None:
            raise DataError(
                "This configuration needs --data: the folder with train/<class>/*.JPEG and val/<class>/*.JPEG."
            )
        names, side = classes(data / "train"), 112 if tiny else SIDE
        self.crops = Crops(Images(data / "train", names, side=side, training=True), side=side, small=2 if tiny else 8)
        self.known = Images(data / "train", names, side=side, training=False)
        self.unknown = Images(data / "val", names, side=side, training=False)
        self.tiny, self.workers = tiny, workers
        self._order: torch.Generator | None = None

    def model(self) -> Dino:
        """ViT-S/16; a head 2048 wide, a bottleneck of 256, 65,536 outputs."""
        if self.tiny:
            return Dino(*vit(side=112, width=32, depth=2, heads=2), hidden=32, bottleneck=16, outputs=64)
        return Dino(*vit(), hidden=2048, bottleneck=256, outputs=65_536)

    def batch(self, examples: int, generator: torch.Generator) -> Batch:
        """The crops of the next images in bytes, a quarter of what their numbers take, and the colours of each."""
        if self._order is not generator:  # another run
            self._order = generator
            chunk = max(1, self.config.base_batch // 4)
            place = {"seed": generator.initial_seed(), "start": self.start, "workers": self.workers}
            self._stream = shuffled(self.crops, chunk=chunk, **place)
        kinds = [crops.to(self.device) for crops in self._stream.take(examples)]
        drawn = [colours(x.shape[0] * x.shape[1], generator).unflatten(0, x.shape[:2]) for x in kinds]
        return (*kinds, *(values.to(self.device) for values in drawn))

    def targets(self, model: Dino, batch: Batch) -> Batch:
        """As ever, in colour."""
        pairs = zip(batch[:2], batch[2:], strict=True)
        kinds = (coloured(x.flatten(0, 1), drawn.flatten(0, 1)).unflatten(0, x.shape[:2]) for x, drawn in pairs)
        return super().targets(model, tuple(kinds))

    def evaluate(self, model: Dino) -> dict[str, float]:
        """The probe's accuracy."""
        parts = [self._features(model, images) for images in (self.known, self.unknown)]
        return {"accuracy": probe(*parts[0], *parts[1])}

    def _features(self, model: Dino, images: Images) -> tuple[Tensor, Tensor]:
        return features(model.encoder, images, batch=self.config.largest, device=self.device, workers=self.workers)


def _crop(image: Image.Image, side: int, share: tuple[float, float]) -> Tensor:
    box = random_box(*image.size, share=share)
    pixels = image.resize((side, side), Image.Resampling.BICUBIC, box=box)
    crop = torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1)
    return crop.flip(2) if torch.rand(()) < 0.5 else crop

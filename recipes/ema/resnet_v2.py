"""ResNet-50 v2: the bottleneck with its normalisations before the convolutions (He et al. 2016b)."""

from collections.abc import Sequence

from torch import Tensor, nn


class PreActivationBottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, each after its normalisation and ReLU; nothing after the sum."""

    def __init__(self, inputs: int, width: int, *, stride: int) -> None:
        super().__init__()
        sizes = ((inputs, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1))
        self.norms = nn.ModuleList(nn.BatchNorm2d(ins) for ins, *_ in sizes)
        self.convs = nn.ModuleList(
            nn.Conv2d(ins, outs, size, stride=step, padding=size // 2, bias=False) for ins, outs, size, step in sizes
        )
        changes = stride != 1 or inputs != 4 * width
        self.shortcut = nn.Conv2d(inputs, 4 * width, 1, stride=stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """`x` of shape `[B, inputs, H, W]`; where the shape changes, the shortcut starts after the activation."""
        active = residual = self.norms[0](x).relu()
        for i, conv in enumerate(self.convs):
            residual = conv(self.norms[i](residual).relu() if i else residual)
        return residual + (x if self.shortcut is None else self.shortcut(active))


def imagenet_resnet_v2(classes: int, *, width: int = 64, depths: Sequence[int] = (3, 4, 6, 3)) -> nn.Sequential:
    """ResNet-50 v2: a 7x7 stem and a maximum, both of stride 2, four stages, and a normalisation at the end."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False),
        nn.MaxPool2d(3, stride=2, padding=1),
    ]
    inputs = width
    for i, depth in enumerate(depths):
        for j in range(depth):
            layers.append(PreActivationBottleneck(inputs, width * 2**i, stride=1 + (i > 0 and j == 0)))
            inputs = 4 * width * 2**i
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # He et al. 2015
    end = [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return nn.Sequential(*layers, *end)

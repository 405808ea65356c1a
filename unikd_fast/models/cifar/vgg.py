"""VGG with batch normalisation and one linear layer, for 32x32 images."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unikd_fast.models.cifar.init import init_kaiming_fan_out

# Number of convolutions in each of the five blocks.
VGG_DEPTHS: dict[int, tuple[int, int, int, int, int]] = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


@torch.fx.wrap
def _fourth_pool(x: Tensor, image_height: int) -> Tensor:
    # The literature skips this pool on 32x32 images. A function of its own, so that a trace keeps the condition.
    return F.max_pool2d(x, 2) if image_height >= 64 else x


class CifarVGG(nn.Module):
    """VGG-8, 11, 13, 16 or 19; on images below 64x64 the last two blocks share one resolution.

    Args:
        depth: number of layers: 8, 11, 13, 16 or 19.
        num_classes: number of classes K.

    Raises:
        ValueError: the depth is none of these.

    Example:
        >>> CifarVGG(8, num_classes=100)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 100])
    """

    # The blocks end with BatchNorm, so that their keys match the published checkpoints; the stages end with ReLU.
    stage_modules: ClassVar[tuple[str, ...]] = ("relu1", "relu2", "relu3", "relu4")

    def __init__(self, depth: int, *, num_classes: int) -> None:
        super().__init__()
        if depth not in VGG_DEPTHS:
            raise ValueError(f"CifarVGG: depth must be one of {sorted(VGG_DEPTHS)}, got {depth}")
        counts = VGG_DEPTHS[depth]
        self.block0 = _block(3, 64, counts[0])
        self.block1 = _block(64, 128, counts[1])
        self.block2 = _block(128, 256, counts[2])
        self.block3 = _block(256, 512, counts[3])
        self.block4 = _block(512, 512, counts[4])
        self.relu0 = nn.ReLU(inplace=True)
        self.relu1 = nn.ReLU(inplace=True)
        self.relu2 = nn.ReLU(inplace=True)
        self.relu3 = nn.ReLU(inplace=True)
        self.relu4 = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(512, num_classes)
        init_kaiming_fan_out(self, linear_std=0.01)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu0(self.block0(images))  # (N, 64, H, W)
        x = self.relu1(self.block1(self.pool(x)))  # (N, 128, H/2, W/2)
        x = self.relu2(self.block2(self.pool(x)))  # (N, 256, H/4, W/4)
        x = self.relu3(self.block3(self.pool(x)))  # (N, 512, H/8, W/8)
        x = self.relu4(self.block4(_fourth_pool(x, images.shape[2])))  # (N, 512, H/8 or H/16, ...)
        return self.classifier(self.avgpool(x).flatten(1))


def _block(in_channels: int, channels: int, convolutions: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        layers += [
            nn.Conv2d(in_channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        ]
        in_channels = channels
    return nn.Sequential(*layers[:-1])

"""ShuffleNet V1 (Zhang et al. 2018) and V2 (Ma et al. 2018) as the distillation literature uses them on 32x32 images.

Both start with a 1x1 stem at full resolution and halve it at each of three stages.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

_STEM_CHANNELS = 24


def _depthwise3x3(channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False)


def _conv1x1(in_channels: int, out_channels: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=False)


class ShuffleUnitV1(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; the input is added, or pooled and concatenated at stride 2."""

    def __init__(self, in_channels: int, channels: int, stride: int, groups: int) -> None:
        super().__init__()
        hidden = channels // 4
        first_groups = 1 if in_channels == _STEM_CHANNELS else groups  # 24 channels are too few to group
        self.conv1 = _conv1x1(in_channels, hidden, first_groups)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.shuffle = nn.ChannelShuffle(first_groups)
        self.conv2 = _depthwise3x3(hidden, stride)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = _conv1x1(hidden, channels, groups)
        self.bn3 = nn.BatchNorm2d(channels)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.shuffle(self.relu(self.bn1(self.conv1(x))))
        out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
        return self.relu(out + x if self.pool is None else torch.cat([out, self.pool(x)], 1))


class CifarShuffleNetV1(nn.Module):
    """ShuffleNet V1, three groups.

    Args:
        num_classes: number of classes K.
        channels: channels of the three stages.
        blocks: number of units in each stage.
        groups: number of groups of the 1x1 convolutions.

    Example:
        >>> CifarShuffleNetV1(num_classes=100)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 100])
    """

    stage_modules: ClassVar[tuple[str, ...]] = ("layer1", "layer2", "layer3")

    def __init__(
        self,
        *,
        num_classes: int,
        channels: tuple[int, int, int] = (240, 480, 960),
        blocks: tuple[int, int, int] = (4, 8, 4),
        groups: int = 3,
    ) -> None:
        super().__init__()
        self.conv1 = _conv1x1(3, _STEM_CHANNELS)
        self.bn1 = nn.BatchNorm2d(_STEM_CHANNELS)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(_STEM_CHANNELS, channels[0], blocks[0], groups)
        self.layer2 = self._stage(channels[0], channels[1], blocks[1], groups)
        self.layer3 = self._stage(channels[1], channels[2], blocks[2], groups)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels[2], num_classes)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, groups: int) -> nn.Sequential:
        first = ShuffleUnitV1(in_channels, channels - in_channels, 2, groups)  # concatenation adds the rest
        return nn.Sequential(first, *(ShuffleUnitV1(channels, channels, 1, groups) for _ in range(blocks - 1)))

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))  # (N, 24, H, W)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)  # (N, 960, H/8, W/8)
        return self.linear(self.avgpool(x).flatten(1))


class ShuffleUnitV2(nn.Module):
    """Half the channels pass unchanged, half go through 1x1, depthwise 3x3, 1x1; then concatenation and shuffle."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = _conv1x1(half, half)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = _depthwise3x3(half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = _conv1x1(half, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu = nn.ReLU(inplace=True)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        kept, worked = x.chunk(2, dim=1)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(worked)))))
        out = self.relu(self.bn3(self.conv3(out)))
        return self.shuffle(torch.cat([kept, out], 1))


class ShuffleDownUnitV2(nn.Module):
    """Halves the resolution: both branches see all channels."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = _depthwise3x3(in_channels, stride=2)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = _conv1x1(in_channels, half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = _conv1x1(in_channels, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = _depthwise3x3(half, stride=2)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = _conv1x1(half, half)
        self.bn5 = nn.BatchNorm2d(half)
        self.relu = nn.ReLU(inplace=True)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        left = self.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(self.relu(self.bn3(self.conv3(x)))))
        right = self.relu(self.bn5(self.conv5(right)))
        return self.shuffle(torch.cat([left, right], 1))


class CifarShuffleNetV2(nn.Module):
    """ShuffleNet V2 at width 1.

    Args:
        num_classes: number of classes K.
        channels: channels of the three stages and of the last 1x1 convolution.
        blocks: number of units in each stage after the one that halves the resolution.

    Example:
        >>> CifarShuffleNetV2(num_classes=100)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 100])
    """

    stage_modules: ClassVar[tuple[str, ...]] = ("layer1", "layer2", "layer3")

    def __init__(
        self,
        *,
        num_classes: int,
        channels: tuple[int, int, int, int] = (116, 232, 464, 1024),
        blocks: tuple[int, int, int] = (3, 7, 3),
    ) -> None:
        super().__init__()
        self.conv1 = _conv1x1(3, _STEM_CHANNELS)
        self.bn1 = nn.BatchNorm2d(_STEM_CHANNELS)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(_STEM_CHANNELS, channels[0], blocks[0])
        self.layer2 = self._stage(channels[0], channels[1], blocks[1])
        self.layer3 = self._stage(channels[1], channels[2], blocks[2])
        self.conv2 = _conv1x1(channels[2], channels[3])
        self.bn2 = nn.BatchNorm2d(channels[3])
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels[3], num_classes)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int) -> nn.Sequential:
        return nn.Sequential(
            ShuffleDownUnitV2(in_channels, channels), *(ShuffleUnitV2(channels) for _ in range(blocks))
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))  # (N, 24, H, W)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)  # (N, 464, H/8, W/8)
        x = self.relu(self.bn2(self.conv2(x)))  # (N, 1024, H/8, W/8)
        return self.linear(self.avgpool(x).flatten(1))

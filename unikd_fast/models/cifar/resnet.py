"""ResNets for 32x32 images: the three-stage family of He et al. and the four-stage ResNet18 / ResNet50.

Parameter names are those of the published checkpoints, which differ between the families: `downsample` and `fc` in the
first, `shortcut` and `linear` in the second. Pooling is global, so that other image sizes work; at 32x32 it equals the
literature's 8x8 (4x4) average. Residuals are added in place: another tensor for each sum is 1 % of a step on a CPU.
"""

from typing import ClassVar

from torch import Tensor, nn

from unikd_fast.models.cifar.init import init_kaiming_fan_out


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class DownsampleBlock(nn.Module):
    """Two 3x3 convolutions and a residual; the projection, if there is one, is called `downsample`."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        projects = stride != 1 or in_channels != channels
        self.downsample = _projection(in_channels, channels, stride) if projects else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


class CifarResNet(nn.Module):
    """Three-stage ResNet of depth 6n + 2 (He et al. 2016, section 4.2).

    Args:
        depth: number of layers: 8, 14, 20, ..., 110.
        channels: channels of the stem and of the three stages.
        num_classes: number of classes K.

    Raises:
        ValueError: the depth is not 6n + 2.

    Example:
        >>> CifarResNet(20, (16, 16, 32, 64), num_classes=100)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 100])
    """

    stage_modules: ClassVar[tuple[str, ...]] = ("layer1", "layer2", "layer3")

    def __init__(self, depth: int, channels: tuple[int, int, int, int], *, num_classes: int) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"CifarResNet: depth must be 6n + 2 with n >= 1 (8, 14, 20, ...), got {depth}")
        blocks = (depth - 2) // 6
        stem, first, second, third = channels
        self.conv1 = _conv3x3(3, stem)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(stem, first, blocks, stride=1)
        self.layer2 = self._stage(first, second, blocks, stride=2)
        self.layer3 = self._stage(second, third, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(third, num_classes)
        init_kaiming_fan_out(self)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = DownsampleBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(DownsampleBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))  # (N, C_0, H, W)
        x = self.layer1(x)  # (N, C_1, H, W)
        x = self.layer2(x)  # (N, C_2, H/2, W/2)
        x = self.layer3(x)  # (N, C_3, H/4, W/4)
        return self.fc(self.avgpool(x).flatten(1))


class ShortcutBlock(nn.Module):
    """Two 3x3 convolutions and a residual; the projection is called `shortcut` and is empty if not needed."""

    expansion: ClassVar[int] = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        projects = stride != 1 or in_channels != width
        self.shortcut = _projection(in_channels, width, stride) if projects else nn.Sequential()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return self.relu(out)


class ShortcutBottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a residual; the 3x3 has the stride."""

    expansion: ClassVar[int] = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        channels = self.expansion * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        projects = stride != 1 or in_channels != channels
        self.shortcut = _projection(in_channels, channels, stride) if projects else nn.Sequential()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.shortcut(x)
        return self.relu(out)


class CifarResNet4Stage(nn.Module):
    """The ImageNet ResNet with a stride-1 3x3 stem and no max pooling: four stages at 32, 16, 8 and 4.

    Args:
        block: block class: ShortcutBlock (ResNet18) or ShortcutBottleneck (ResNet50).
        blocks: number of blocks in each stage.
        num_classes: number of classes K.

    Example:
        >>> CifarResNet4Stage(ShortcutBlock, (2, 2, 2, 2), num_classes=100)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 100])
    """

    stage_modules: ClassVar[tuple[str, ...]] = ("layer1", "layer2", "layer3", "layer4")

    def __init__(
        self,
        block: type[ShortcutBlock] | type[ShortcutBottleneck],
        blocks: tuple[int, int, int, int],
        *,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.conv1 = _conv3x3(3, 64)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(block, 64, 64, blocks[0], stride=1)
        self.layer2 = self._stage(block, 64 * block.expansion, 128, blocks[1], stride=2)
        self.layer3 = self._stage(block, 128 * block.expansion, 256, blocks[2], stride=2)
        self.layer4 = self._stage(block, 256 * block.expansion, 512, blocks[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(512 * block.expansion, num_classes)
        init_kaiming_fan_out(self)

    @staticmethod
    def _stage(
        block: type[ShortcutBlock] | type[ShortcutBottleneck], in_channels: int, width: int, blocks: int, stride: int
    ) -> nn.Sequential:
        rest = (block(width * block.expansion, width, 1) for _ in range(blocks - 1))
        return nn.Sequential(block(in_channels, width, stride), *rest)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))  # (N, 64, H, W)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)  # (N, 512 expansion, H/8, W/8)
        return self.linear(self.avgpool(x).flatten(1))

"""Wide residual networks (Zagoruyko & Komodakis 2016) for 32x32 images.

Blocks are pre-activated, so a stage ends with the sum itself rather than a ReLU; the distillation literature takes this
sum as the stage's feature.
"""

from typing import ClassVar

from torch import Tensor, nn

from unikd_fast.models.cifar.init import init_kaiming_fan_out


class PreActBlock(nn.Module):
    """BN, ReLU, 3x3, BN, ReLU, 3x3 and a residual; if channels change, the projection reads the activated input."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        projects = in_channels != channels
        self.convShortcut = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False) if projects else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        out = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        return out + (x if self.convShortcut is None else self.convShortcut(activated))


class WideStage(nn.Module):
    """A stage; its blocks are in `layer`, as in the published checkpoints."""

    def __init__(self, in_channels: int, channels: int, blocks: int, stride: int) -> None:
        super().__init__()
        first = PreActBlock(in_channels, channels, stride)
        self.layer = nn.Sequential(first, *(PreActBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """Wide ResNet of depth 6n + 4 without dropout.

    Args:
        depth: number of layers: 16, 40, ...
        widen_factor: multiplier of the stages' 16, 32 and 64 channels.
        num_classes: number of classes K.

    Raises:
        ValueError: the depth is not 6n + 4.

    Example:
        >>> WideResNet(16, 2, num_classes=100)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 100])
    """

    stage_modules: ClassVar[tuple[str, ...]] = ("block1", "block2", "block3")

    def __init__(self, depth: int, widen_factor: int, *, num_classes: int) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"WideResNet: depth must be 6n + 4 with n >= 1 (10, 16, 22, ...), got {depth}")
        blocks = (depth - 4) // 6
        first, second, third = 16 * widen_factor, 32 * widen_factor, 64 * widen_factor
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = WideStage(16, first, blocks, stride=1)
        self.block2 = WideStage(first, second, blocks, stride=2)
        self.block3 = WideStage(second, third, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(third)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(third, num_classes)
        init_kaiming_fan_out(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images)  # (N, 16, H, W)
        x = self.block1(x)
        x = self.block2(x)
        x = self.block3(x)  # (N, 64 widen_factor, H/4, W/4)
        return self.fc(self.avgpool(self.relu(self.bn1(x))).flatten(1))

"""MobileNetV2 (Sandler et al. 2018) as the distillation literature trims it for 32x32 images."""

from typing import ClassVar

from torch import Tensor, nn

from unikd_fast.models.cifar.init import init_kaiming_fan_out

# expansion (if None, the network's), channels at width 1, blocks, stride of the first block
_STAGES: tuple[tuple[int | None, int, int, int], ...] = (
    (1, 16, 1, 1),
    (None, 24, 2, 1),
    (None, 32, 3, 2),
    (None, 64, 4, 2),
    (None, 96, 3, 1),
    (None, 160, 3, 2),
    (None, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, linear 1x1; residual if the shape is unchanged."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.residual = stride == 1 and in_channels == channels
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class CifarMobileNetV2(nn.Module):
    """MobileNetV2 with ReLU, a stride-2 stem and four resolutions: 16, 8, 4, 2 at 32x32.

    Args:
        expansion: expansion factor t of the inverted residuals.
        width: multiplier of every channel count except the last, which stays at least 1280.
        num_classes: number of classes K.

    Example:
        >>> CifarMobileNetV2(expansion=6, width=0.5, num_classes=100)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 100])
    """

    stage_modules: ClassVar[tuple[str, ...]] = ("blocks.1", "blocks.2", "blocks.4", "blocks.6")

    def __init__(self, *, expansion: int, width: float, num_classes: int) -> None:
        super().__init__()
        in_channels = int(32 * width)
        self.conv1 = _conv_bn_relu(3, in_channels, kernel_size=3, stride=2)
        self.blocks = nn.ModuleList()
        for stage_expansion, full_channels, count, stride in _STAGES:
            channels, t = int(full_channels * width), stage_expansion or expansion
            first = InvertedResidual(in_channels, channels, stride, t)
            rest = (InvertedResidual(channels, channels, 1, t) for _ in range(count - 1))
            self.blocks.append(nn.Sequential(first, *rest))
            in_channels = channels
        last_channels = max(1280, int(1280 * width))
        self.conv2 = _conv_bn_relu(in_channels, last_channels, kernel_size=1, stride=1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Linear(last_channels, num_classes))
        init_kaiming_fan_out(self, linear_std=0.01)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images)  # (N, 32 width, H/2, W/2)
        for stage in self.blocks:
            x = stage(x)
        x = self.conv2(x)  # (N, 1280, H/16, W/16)
        return self.classifier(self.avgpool(x).flatten(1))


def _conv_bn_relu(in_channels: int, channels: int, *, kernel_size: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))

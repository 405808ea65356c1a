"""The CIFAR networks of the distillation literature, under its names for them."""

from collections.abc import Callable
from functools import partial

from torch import nn

from unikd_fast.models.cifar.mobilenetv2 import CifarMobileNetV2
from unikd_fast.models.cifar.resnet import CifarResNet, CifarResNet4Stage, ShortcutBlock, ShortcutBottleneck
from unikd_fast.models.cifar.shufflenet import CifarShuffleNetV1, CifarShuffleNetV2
from unikd_fast.models.cifar.vgg import VGG_DEPTHS, CifarVGG
from unikd_fast.models.cifar.wrn import WideResNet

_NARROW = (16, 16, 32, 64)
_WIDE = (32, 64, 128, 256)  # the "x4" networks

# Each entry takes num_classes by keyword. To add a network, add a line here.
CIFAR_MODELS: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(CifarResNet, depth, _NARROW) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(CifarResNet, depth, _WIDE) for depth in (8, 32)},
    "ResNet18": partial(CifarResNet4Stage, ShortcutBlock, (2, 2, 2, 2)),
    "ResNet50": partial(CifarResNet4Stage, ShortcutBottleneck, (3, 4, 6, 3)),
    **{f"wrn_{depth}_{factor}": partial(WideResNet, depth, factor) for depth in (16, 40) for factor in (1, 2)},
    **{f"vgg{depth}": partial(CifarVGG, depth) for depth in VGG_DEPTHS},
    "MobileNetV2": partial(CifarMobileNetV2, expansion=6, width=0.5),
    "ShuffleV1": CifarShuffleNetV1,
    "ShuffleV2": CifarShuffleNetV2,
}

"""Where the stages of published architectures end."""

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from support.long_rounds import quick
from unikd_fast.models import build_model, extract_features
from unikd_fast.models.hooks import HookedForward

# (module, channels, side) at 224; side at 32 follows. Literature's levels where it has them.
TORCHVISION = {
    "resnet18": [("layer1", 64, 56), ("layer2", 128, 28), ("layer3", 256, 14), ("layer4", 512, 7)],
    "resnet34": [("layer1", 64, 56), ("layer2", 128, 28), ("layer3", 256, 14), ("layer4", 512, 7)],
    "resnet50": [("layer1", 256, 56), ("layer2", 512, 28), ("layer3", 1024, 14), ("layer4", 2048, 7)],
    "mobilenet_v2": [("features.3", 24, 56), ("features.6", 32, 28), ("features.13", 96, 14), ("features.18", 1280, 7)],
    "vgg11_bn": [
        ("features.6", 128, 112),
        ("features.13", 256, 56),
        ("features.20", 512, 28),
        ("features.27", 512, 14),
    ],
    "densenet121": [
        ("features.denseblock1", 256, 56),
        ("features.denseblock2", 512, 28),
        ("features.denseblock3", 1024, 14),
        ("features.norm5", 1024, 7),
    ],
    "efficientnet_b0": [
        ("features.2", 24, 56),
        ("features.3", 40, 28),
        ("features.5", 112, 14),
        ("features.8", 1280, 7),
    ],
    "shufflenet_v2_x1_0": [("stage2", 116, 28), ("stage3", 232, 14), ("conv5", 1024, 7)],
    "convnext_tiny": [("features.1", 96, 56), ("features.3", 192, 28), ("features.5", 384, 14), ("features.7", 768, 7)],
    "regnet_y_400mf": [
        ("trunk_output.block1", 48, 56),
        ("trunk_output.block2", 104, 28),
        ("trunk_output.block3", 208, 14),
        ("trunk_output.block4", 440, 7),
    ],
    "squeezenet1_1": [
        ("features.4", 128, 55),
        ("features.7", 256, 27),
        ("features.12", 512, 13),
    ],
}
TIMM = {
    "mobilenetv1_100": [("blocks.1", 128, 56), ("blocks.2", 256, 28), ("blocks.3", 512, 14), ("blocks.4", 1024, 7)],
    "resnet50d": [("layer1", 256, 56), ("layer2", 512, 28), ("layer3", 1024, 14), ("layer4", 2048, 7)],
    "efficientnet_b0": [("blocks.1", 24, 56), ("blocks.2", 40, 28), ("blocks.4", 112, 14), ("blocks.6", 320, 7)],
    "convnext_atto": [("stages.0", 40, 56), ("stages.1", 80, 28), ("stages.2", 160, 14), ("stages.3", 320, 7)],
    "coatnet_0_rw_224": [("stages.0", 96, 56), ("stages.1", 192, 28), ("stages.2", 384, 14), ("stages.3", 768, 7)],
}


def _torchvision(name: str) -> nn.Module:
    if name.startswith("regnet"):  # its widths are computed with tensors
        return torchvision.models.get_model(name)
    with torch.device("meta"):
        return torchvision.models.get_model(name)


def _timm(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


def _levels(model: nn.Module, **arguments: int) -> list[tuple[str, int, int]]:
    extractor = extract_features(model, **arguments)
    return [(name, c, side) for name, (c, side, _) in zip(extractor.level_names, extractor.level_shapes, strict=True)]


@pytest.mark.parametrize("name", TORCHVISION)
def test_stages_of_torchvision_networks(name: str) -> None:
    assert _levels(_torchvision(name), image_size=224) == TORCHVISION[name]


@pytest.mark.parametrize("name", TIMM)
def test_stages_of_timm_networks(name: str) -> None:
    assert _levels(_timm(name), image_size=224) == TIMM[name]


def test_stages_do_not_depend_on_the_image_size() -> None:
    model = _torchvision("resnet18")
    expected = [("layer1", 64, 8), ("layer2", 128, 4), ("layer3", 256, 2), ("layer4", 512, 1)]
    assert _levels(model, image_size=32) == expected


@pytest.mark.parametrize("max_levels", [1, 2, 3])
def test_the_coarsest_levels_are_kept(max_levels: int) -> None:
    model = _torchvision("resnet18")
    assert _levels(model, image_size=224, max_levels=max_levels) == TORCHVISION["resnet18"][-max_levels:]


SWIN = [(96, 56), (192, 28), (384, 14), (768, 7)]
# Levels at even depths, or at the end of every stage; some by hooks, because their stages return more than a tensor.
TOKENS: dict[str, Any] = {
    "torchvision/vit_b_16": ("encoder.layers.encoder_layer_{}", (2, 5, 8, 11), [(768, 14)] * 4),
    "torchvision/swin_t": ("features.{}", (1, 3, 5, 7), SWIN),
    "timm/vit_tiny_patch16_224": ("blocks.{}", (2, 5, 8, 11), [(192, 14)] * 4),
    "timm/deit_tiny_distilled_patch16_224": ("blocks.{}", (2, 5, 8, 11), [(192, 14)] * 4),
    "timm/swin_tiny_patch4_window7_224": ("layers.{}", (0, 1, 2, 3), SWIN),
    "timm/mixer_s32_224": ("blocks.{}", (1, 3, 5, 7), [(512, 7)] * 4),
    "timm/mvitv2_tiny": ("stages.{}", (0, 1, 2, 3), SWIN),
}


@pytest.mark.parametrize("name", quick(TOKENS, *(name for name in TOKENS if name != "timm/mvitv2_tiny")))
def test_tokens_and_channels_that_are_last_become_maps(name: str) -> None:
    path, places, shapes = TOKENS[name]
    extractor = extract_features(build_model(name, num_classes=5), image_size=224).eval()
    assert extractor.level_names == tuple(path.format(place) for place in places)
    assert extractor.level_shapes == tuple((channels, side, side) for channels, side in shapes)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    by_hooks = HookedForward(extractor.level_names, None)
    with torch.no_grad():
        features, (outputs, logits, *_) = extractor(images), by_hooks(extractor.plain, images)
    assert torch.equal(features.logits, logits)
    for level, output, shape in zip(features.levels, outputs, extractor.level_shapes, strict=True):
        assert level.shape == (2, *shape)
        # The last row of the grid, wherever the channels are.
        rows = output.reshape(2, -1, shape[0]) if output.shape[1] != shape[0] else output.flatten(2).transpose(1, 2)
        assert torch.equal(level[:, :, -1].transpose(1, 2), rows[:, -shape[2] :])


def test_a_token_model_gets_levels_from_nodes() -> None:
    extractor = extract_features(_torchvision("vit_b_16"), image_size=224, nodes=["conv_proj"])
    assert extractor.level_shapes == ((768, 14, 14),)


class Detour(nn.Module):
    """The last module at 8x8 is on one of two paths; a size read early is used late."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.joined = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
        self.side = nn.Conv2d(4, 4, 1)
        self.down = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.skip = nn.Conv2d(4, 6, 1, stride=2)
        self.ends = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 10)

    def forward(self, images: Tensor) -> Tensor:
        stem = self.stem(images)
        count = stem.shape[0]
        joined = self.joined(stem)
        left, right = self.side(joined).chunk(2, dim=1)
        x = self.down(torch.cat([left, right], 1)) + self.skip(joined)
        return self.head(self.ends(x).mean((2, 3)).reshape(count, 6))


def test_stages_end_where_all_paths_meet() -> None:
    assert _levels(Detour(), image_size=128) == [("joined", 4, 64), ("ends", 6, 32)]


class Misnamed(Detour):
    stage_modules = ("joined", "endings")


def test_a_wrong_stage_modules_attribute_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stage_modules of Misnamed names \['endings'\]"):
        extract_features(Misnamed(), image_size=32)

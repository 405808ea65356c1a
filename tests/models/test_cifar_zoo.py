"""The CIFAR family against the literature: sizes, tensor names, numbers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unikd_fast.models import CIFAR_MODELS, build_model, extract_features, parameter_count
from unikd_fast.models.cifar.resnet import CifarResNet
from unikd_fast.models.cifar.vgg import CifarVGG
from unikd_fast.models.cifar.wrn import WideResNet

# For 100 classes, as the literature's implementations count them.
PARAMETERS = {
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "ResNet18": 11_220_132,
    "ResNet50": 23_705_252,
    "wrn_16_1": 180_916,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg11": 9_277_284,
    "vgg13": 9_462_180,
    "vgg16": 14_774_436,
    "vgg19": 20_086_692,
    "MobileNetV2": 812_836,
    "ShuffleV1": 949_258,
    "ShuffleV2": 1_355_528,
}

# Entries of the published state dicts: how many, and some that tell the families apart.
LAYOUTS: dict[str, tuple[int, dict[str, tuple[int, ...]]]] = {
    "resnet8x4": (
        62,
        {
            "conv1.weight": (32, 3, 3, 3),
            "layer1.0.downsample.0.weight": (64, 32, 1, 1),
            "layer3.0.bn2.running_var": (256,),
            "layer3.0.downsample.1.num_batches_tracked": (),
            "fc.weight": (100, 256),
        },
    ),
    "resnet20": (128, {"layer1.2.conv2.weight": (16, 16, 3, 3), "layer2.0.downsample.0.weight": (32, 16, 1, 1)}),
    "ResNet18": (122, {"layer2.0.shortcut.1.bias": (128,), "linear.weight": (100, 512)}),
    "ResNet50": (320, {"layer1.0.shortcut.0.weight": (256, 64, 1, 1), "layer4.2.conv3.weight": (2048, 512, 1, 1)}),
    "wrn_16_2": (
        83,
        {
            "block1.layer.0.convShortcut.weight": (32, 16, 1, 1),
            "block3.layer.1.bn2.weight": (128,),
            "bn1.running_mean": (128,),
            "fc.bias": (100,),
        },
    ),
    "vgg8": (37, {"block0.0.bias": (64,), "block4.1.running_mean": (512,), "classifier.weight": (100, 512)}),
    "MobileNetV2": (
        320,
        {
            "conv1.1.weight": (16,),
            "blocks.1.0.conv.3.weight": (48, 1, 3, 3),
            "blocks.6.0.conv.6.weight": (160, 480, 1, 1),
            "conv2.0.weight": (1280, 160, 1, 1),
            "classifier.0.weight": (100, 1280),
        },
    ),
    "ShuffleV1": (
        296,
        {"layer1.0.conv1.weight": (54, 24, 1, 1), "layer3.3.conv3.weight": (960, 80, 1, 1), "linear.bias": (100,)},
    ),
    "ShuffleV2": (338, {"layer2.0.conv5.weight": (116, 116, 1, 1), "layer3.3.bn3.weight": (232,), "bn2.bias": (1024,)}),
}

# logits[1, :4] in training mode of the literature's implementations, with the weights and images made below.
PUBLISHED_LOGITS = {
    "resnet8x4": [2.8008, 1.0564, -0.7076, 1.1850],
    "resnet20": [2.6406, 2.2784, 0.3862, -0.7324],
    "ResNet18": [4.6810, -2.5721, 4.6993, -2.5235],
    "ResNet50": [10.0572, 9.6953, 8.3902, 6.2678],
    "wrn_16_2": [1.6636, 0.7260, 0.9237, 1.6040],
    "vgg8": [2.2033, -0.1138, 2.2761, -0.1507],
    "MobileNetV2": [2.8909, 0.7172, -0.6549, 2.0713],
    "ShuffleV1": [1.6162, 4.2204, 1.9867, -1.6903],
    "ShuffleV2": [2.7414, 2.7979, 2.7336, 2.5441],
}

LEVELS = {
    "resnet20": [(16, 32), (32, 16), (64, 8)],
    "resnet32x4": [(64, 32), (128, 16), (256, 8)],
    "ResNet50": [(256, 32), (512, 16), (1024, 8), (2048, 4)],
    "wrn_40_2": [(32, 32), (64, 16), (128, 8)],
    "vgg13": [(128, 16), (256, 8), (512, 4), (512, 4)],
    "MobileNetV2": [(12, 16), (16, 8), (48, 4), (160, 2)],
    "ShuffleV1": [(240, 16), (480, 8), (960, 4)],
    "ShuffleV2": [(116, 16), (232, 8), (464, 4)],
}


def _fill(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64)).reshape(parameter.shape)
            parameter.copy_(wave / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 1 + 0.1 * wave)


def test_all_networks_of_the_literature_exist() -> None:
    assert set(CIFAR_MODELS) == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        assert parameter_count(CIFAR_MODELS[name](num_classes=100)) == PARAMETERS[name]


@pytest.mark.parametrize("name", LAYOUTS)
def test_tensor_names_match_published_checkpoints(name: str) -> None:
    with torch.device("meta"):
        state = CIFAR_MODELS[name](num_classes=100).state_dict()
    entries, shapes = LAYOUTS[name]
    assert len(state) == entries
    assert {tensor: tuple(state[tensor].shape) for tensor in shapes} == shapes


@pytest.mark.parametrize("name", PUBLISHED_LOGITS)
def test_logits_match_the_published_networks(name: str) -> None:
    model = build_model(f"cifar/{name}", num_classes=100)
    _fill(model)
    images = torch.sin(0.37 * torch.arange(4 * 3 * 32 * 32, dtype=torch.float64)).reshape(4, 3, 32, 32).float()
    with torch.no_grad():
        logits = model.train()(images)
    torch.testing.assert_close(logits[1, :4], torch.tensor(PUBLISHED_LOGITS[name]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", LEVELS)
def test_levels_match_the_literature(name: str) -> None:
    with torch.device("meta"):
        model = CIFAR_MODELS[name](num_classes=10)
    assert list(extract_features(model, image_size=32).level_shapes) == [(c, side, side) for c, side in LEVELS[name]]


def test_global_pooling_matches_published_pooling_at_32x32() -> None:
    extractor = extract_features(build_model("cifar/resnet8", num_classes=10), image_size=32).eval()
    with torch.no_grad():
        features = extractor(torch.randn(4, 3, 32, 32))
        published = extractor.plain.fc(F.avg_pool2d(features.levels[-1], 8).flatten(1))
    torch.testing.assert_close(features.logits, published, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "ShuffleV2"])
@pytest.mark.parametrize("side", [8, 16, 48])
def test_other_image_sizes(name: str, side: int) -> None:
    model = build_model(f"cifar/{name}", num_classes=10).eval()
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        # One image per batch: a network that mixed up space and samples would answer differently.
        torch.testing.assert_close(model(images)[1:], model(images[1:]), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(model(images), model(images.flip(0)))


def test_vgg_applies_the_fourth_pool_only_from_64x64() -> None:
    model = build_model("cifar/vgg8", num_classes=10).eval()
    assert extract_features(model, image_size=32).level_shapes[-1] == (512, 4, 4)
    extractor = extract_features(model, image_size=64)
    assert extractor.level_shapes[-2:] == ((512, 8, 8), (512, 4, 4))
    with torch.no_grad():  # the same graph still answers the question for each batch
        small = extractor(torch.randn(1, 3, 32, 32))
    assert small.levels[-1].shape == (1, 512, 4, 4)
    assert small.levels[-2].shape == (1, 512, 4, 4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CifarResNet(21, (16, 16, 32, 64), num_classes=10), r"6n \+ 2.*got 21"),
        (lambda: WideResNet(18, 2, num_classes=10), r"6n \+ 4.*got 18"),
        (lambda: CifarVGG(12, num_classes=10), r"\[8, 11, 13, 16, 19\], got 12"),
    ],
)
def test_invalid_depths_are_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_initialisation_preserves_the_activation_scale() -> None:
    model = build_model("cifar/resnet20", num_classes=100)
    weight = model.layer3[1].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.03)
    assert build_model("cifar/vgg8", num_classes=100).block1[0].bias.abs().max() == 0

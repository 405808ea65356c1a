"""BatchNorm folded: the same function to rounding, levels included; and everything that must be left alone."""

import copy
import logging

import pytest
import timm
import torch
from timm.layers import StdConv2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from support.long_rounds import long
from unikd_fast.models import FeatureExtractor, LogitsOnly, build_model, extract_features
from unikd_fast.models.faster_rcnn import faster_rcnn
from unikd_fast.teacher import fold_batch_norm
from unikd_fast.values import Features

# Network, side of the images, BatchNorms folded, BatchNorms in all. A Wide ResNet normalises before each convolution:
# only the norm between the two convolutions of a block follows one, and the stem's is followed by a fork.
NETWORKS = [
    ("torchvision/resnet50", 64, 53, 53),
    ("torchvision/mobilenet_v2", 64, 52, 52),
    ("torchvision/densenet121", 64, 59, 121),
    ("timm/mobilenetv1_100", 64, 27, 27),
    ("timm/resnet18", 64, 20, 20),
    ("cifar/resnet32x4", 32, 34, 34),
    ("cifar/vgg13", 32, 10, 10),
    ("cifar/wrn_40_2", 32, 19, 37),
    ("cifar/ShuffleV2", 32, 56, 56),
]
QUICK = {"timm/mobilenetv1_100", "timm/resnet18", "cifar/vgg13", "cifar/wrn_40_2", "cifar/ShuffleV2"}


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in network.modules())


def with_statistics(network: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and affine parameters such as training leaves: none is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.2, 0.2),
            ):
                tensor.uniform_(low, high, generator=generator)
    return network.eval()


def relative_errors(found: Features, expected: Features) -> list[float]:
    pairs = zip((*found.levels, found.logits), (*expected.levels, expected.logits), strict=True)
    return [float((a - b).norm() / b.norm()) for a, b in pairs]


@pytest.mark.parametrize(
    ("name", "side", "folded", "total"),
    [row if row[0] in QUICK else long(*row) for row in NETWORKS],
    ids=[row[0] for row in NETWORKS],
)
def test_folding_preserves_outputs_up_to_rounding(name: str, side: int, folded: int, total: int) -> None:
    torch.manual_seed(0)
    network = extract_features(with_statistics(build_model(name, num_classes=7)), image_size=side)
    images = torch.randn(2, 3, side, side)
    # float64 throughout: what is left is the rounding of the folded weights, a hundred layers deep.
    # fp32: the error of the folded network against float64 stays within that of the unfolded one, times a few.
    for dtype in (torch.float64, torch.float32):
        plain = copy.deepcopy(network).to(dtype)
        fast = copy.deepcopy(plain)
        assert norms(fast) == total
        assert fold_batch_norm(fast) == folded
        assert norms(fast) == total - folded
        with torch.no_grad():
            exact = copy.deepcopy(network).double()(images.double())
            expected, found = plain(images.to(dtype)), fast(images.to(dtype))
        errors, own = (relative_errors(_double(x), exact) for x in (found, expected))
        if dtype is torch.float64:
            assert max(errors) < 1e-12
        else:
            assert all(e < 4 * o + 1e-6 for e, o in zip(errors, own, strict=True)), (errors, own)


def _double(features: Features) -> Features:
    return Features(tuple(level.double() for level in features.levels), features.logits.double())


def test_logits_only_networks_fold_if_fx_can_trace_them(caplog: pytest.LogCaptureFixture) -> None:
    network = LogitsOnly(with_statistics(build_model("cifar/resnet8", num_classes=5))).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = network(images).logits
        assert fold_batch_norm(network) == 9
        torch.testing.assert_close(network(images).logits, before)

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, images: Tensor) -> Tensor:
            out = self.norm(self.conv(images)) if images.sum() > 0 else images
            return out.mean((2, 3))

    branches = LogitsOnly(Branches()).eval()
    with caplog.at_level(logging.WARNING, logger="unikd_fast"):
        assert fold_batch_norm(branches) == 0
    assert "cannot trace Branches" in caplog.text
    assert norms(branches) == 1


@pytest.mark.parametrize(("body", "count"), [("torchvision/resnet18", 20), ("timm/test_efficientnet", 12)])
@torch.no_grad()
def test_frozen_norms_of_detectors_fold(body: str, count: int) -> None:
    backbone = faster_rcnn(body, num_classes=2, out_channels=8, representation_size=8).backbone.eval()
    for tensor in backbone.body.buffers():
        tensor.uniform_(0.5, 1.5)
    images = torch.randn(1, 3, 64, 96)
    expected = backbone(images)
    assert fold_batch_norm(backbone) == count
    assert not any("BatchNorm" in type(module).__name__ for module in backbone.modules())
    found = backbone(images)
    assert all((found[name] - maps).norm() < 1e-5 * maps.norm() for name, maps in expected.items())
    assert not torch.equal(found["0"], expected["0"])


def test_activations_inside_timm_norm_layers_are_kept() -> None:
    model = with_statistics(timm.create_model("mobilenetv1_100", num_classes=5))
    assert isinstance(model.bn1, timm.layers.BatchNormAct2d)
    fold_batch_norm(LogitsOnly(model).eval())
    assert [type(module) for module in model.bn1] == [nn.ReLU6]


class Pair(nn.Module):
    """A layer and a norm, in the ways that forbid folding, or allow it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.layer: nn.Module = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        if how == "other weight":
            self.layer = StdConv2d(3, 4, 3)
        elif how == "parametrised":
            self.layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
        elif how == "batch statistics":
            self.norm = nn.BatchNorm2d(4, track_running_stats=False)
        elif how == "shared weight":
            self.twin = nn.Conv2d(3, 4, 3, padding=1)
            self.twin.weight = self.layer.weight  # type: ignore[assignment]
        elif how == "transposed":
            self.layer = nn.ConvTranspose2d(3, 4, 3)
        elif how == "linear":
            self.layer, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)  # type: ignore[assignment]
        elif how == "linear on rows":
            self.layer, self.norm = nn.Linear(3, 6), nn.BatchNorm1d(6)  # type: ignore[assignment]
        elif how == "two names":
            self.alias = self.norm

    def forward(self, images: Tensor) -> Tensor:
        if self.how == "linear":
            return self.norm(self.layer(images.mean((2, 3))))
        if self.how == "linear on rows":
            return self.norm(self.layer(images.mean(3).transpose(1, 2))).mean(2)  # (N, 6, 6): the norm's channels are L
        out = self.layer(images)
        if self.how == "second user":
            return (self.norm(out) + out).mean((2, 3))
        if self.how == "norm twice":
            return self.norm(self.norm(out)).mean((2, 3))
        if self.how == "layer twice":
            return (self.norm(out) + self.layer(images + 1)).mean((2, 3))
        if self.how == "weight read":
            return self.norm(out).mean((2, 3)) + self.layer.weight.mean()
        if self.how == "shared weight":
            return (self.norm(out) + self.twin(images)).mean((2, 3))
        if self.how == "activation between":
            return self.norm(out.relu()).mean((2, 3))
        return self.norm(out).mean((2, 3))


FORBIDDEN = [
    "second user",
    "norm twice",
    "layer twice",
    "weight read",
    "shared weight",
    "activation between",
    "other weight",
    "parametrised",
    "batch statistics",
    "linear",
    "linear on rows",
]


@pytest.mark.parametrize("how", [*FORBIDDEN, "plain", "transposed", "two names"])
def test_only_exact_pairs_fold_and_outputs_are_kept(how: str) -> None:
    torch.manual_seed(1)
    network = with_statistics(Pair(how)).double()
    images = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        before = network(images)
        assert fold_batch_norm(network) == (how not in FORBIDDEN)
        torch.testing.assert_close(network(images), before, rtol=1e-12, atol=1e-12)


def test_a_level_on_a_convolution_keeps_its_norm() -> None:
    model = with_statistics(build_model("cifar/resnet20", num_classes=5))
    network = extract_features(model, image_size=32, nodes=["layer1.0.conv1", "layer2.0.bn1", "layer3"])
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = network(images)
        # 21 norms; conv1 of the first block is a level. bn1 of the second stage is one too, and is what is folded.
        assert fold_batch_norm(network) == 20
        assert max(relative_errors(network(images), before)) < 1e-5


def test_training_mode_is_refused_without_changes() -> None:
    network = extract_features(build_model("cifar/resnet8", num_classes=5), image_size=32)
    assert isinstance(network, FeatureExtractor)
    network.train()
    with pytest.raises(ValueError, match=r"training mode; call network.eval"):
        fold_batch_norm(network)
    attributes = set(vars(network))
    fold_batch_norm(network.eval())
    assert set(vars(network)) == attributes

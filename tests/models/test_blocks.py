"""A network cut at its levels: together the blocks are the network, in values and in gradients."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from support.long_rounds import long, quick
from unikd_fast.models import build_model, extract_features
from unikd_fast.models.blocks import split_at_levels
from unikd_fast.teacher import OnlineTeacher

FAMILIES = ("resnet8", "wrn_16_2", "vgg13", "MobileNetV2", "ShuffleV1", "ShuffleV2")
NETWORKS = [
    *(f"cifar/{name}" for name in (*FAMILIES, "ResNet18")),
    *(f"torchvision/{name}" for name in ("resnet18", "mobilenet_v2", "densenet121", "shufflenet_v2_x0_5")),
    *("timm/mobilenetv1_100", "timm/test_nfnet"),
]
QUICK = (*(f"cifar/{name}" for name in FAMILIES), "torchvision/resnet18", "timm/mobilenetv1_100", "timm/test_nfnet")


def statistics(model: nn.Module, images: Tensor) -> nn.Module:
    """With running statistics of these images, so that eval mode normalises."""
    with torch.no_grad():
        model.train()(images)
    return model.eval()


@pytest.mark.parametrize("name", quick(NETWORKS, *QUICK))
def test_the_blocks_compose_to_the_network(name: str) -> None:
    torch.manual_seed(0)
    side = 32 if name.startswith("cifar") else 64
    images = torch.randn(3, 3, side, side)
    model = statistics(build_model(name, num_classes=10), images)
    reference = copy.deepcopy(model)
    extractor = extract_features(model, image_size=side)
    blocks = split_at_levels(extractor)
    features = extractor(images)
    levels = [level.clone() for level in features.levels]
    assert torch.equal(features.logits, reference(images))
    assert len(blocks) == len(levels) >= 2
    for index, block in enumerate(blocks):
        given = levels[index].clone().requires_grad_()
        output = block(given)
        after = [*levels, features.logits][index + 1]
        # A level that the next operation overwrites is returned after, and computed again before it.
        assert torch.equal(output, after) or torch.equal(output.relu(), after)
        assert torch.equal(given, levels[index])
    rest = levels[0]
    for block in blocks:
        rest = block(rest)
    assert torch.equal(rest, features.logits)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["cifar/resnet8", "cifar/wrn_16_1", "cifar/vgg8", long("torchvision/mobilenet_v2")])
def test_gradients_match_the_plain_network(name: str) -> None:
    """With respect to each level, by autograd through the network as it is."""
    torch.manual_seed(0)
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    model = statistics(build_model(name, num_classes=10).double(), images.detach())
    plain = extract_features(model, image_size=64)(images)
    upstream = torch.randn(3, 10)
    exact = torch.autograd.grad((plain.logits * upstream).sum(), plain.levels)
    extractor = extract_features(copy.deepcopy(model), image_size=64)
    blocks = split_at_levels(extractor)
    for index, (level, expected) in enumerate(zip(plain.levels, exact, strict=True)):
        given = level.detach().clone().requires_grad_()
        output = given
        for block in blocks[index:]:
            output = block(output)
        # The logits are cast to fp32, whose gradients are cast back: 2^-24 of the upstream gradient.
        (found,) = torch.autograd.grad((output * upstream).sum(), given)
        assert float(expected.abs().max()) > 0
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_blocks_work_for_other_batches_and_modes() -> None:
    extractor = extract_features(build_model("cifar/vgg8", num_classes=10), image_size=32)
    blocks = split_at_levels(extractor)
    before = {name: buffer.clone() for name, buffer in extractor.plain.named_buffers()}
    extractor.train()
    for count in (1, 5):
        images = torch.randn(count, 3, 32, 32)
        output: Tensor = extractor.eval()(images).levels[1]
        extractor.train()
        for block in blocks[1:]:
            output = block(output)
        assert torch.equal(output, extractor.eval()(images).logits)
    assert all(torch.equal(before[name], buffer) for name, buffer in extractor.plain.named_buffers())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_blocks_follow_later_folding_and_casting(precision: str) -> None:
    """Under an autocast of the student's, too."""
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    network = extract_features(statistics(build_model("cifar/resnet8", num_classes=10), images), image_size=32)
    *inner, last = split_at_levels(network)
    teacher = OnlineTeacher(network, precision=precision)
    assert teacher.folded == 9
    features = teacher(images)
    given = features.levels[0].float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = given
        for block in inner:
            output = block(output)
            assert output.dtype == teacher.dtype
        logits = last(output)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, features.logits)
    logits.square().sum().backward()
    assert given.grad is not None
    assert bool(given.grad.isfinite().all()) and float(given.grad.abs().max()) > 0


class Skipping(nn.Module):
    """The classifier reads the first stage again."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.stage2 = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.head = nn.Linear(4, 10)

    def forward(self, images: Tensor) -> Tensor:
        first = self.stage1(images).relu()
        return self.head(self.stage2(first).mean((2, 3)) + first.mean((2, 3)))


def test_a_block_that_reads_an_earlier_value_is_refused() -> None:
    extractor = extract_features(Skipping(), image_size=16, nodes=["stage1", "stage2"])
    with pytest.raises(ValueError, match=r"Skipping computes node 'mean_1' before|'relu' before 'stage2'") as caught:
        split_at_levels(extractor)
    assert "split it elsewhere (feature_nodes)" in str(caught.value)


class Flattening(Skipping):
    """The number of images is read before the last stage."""

    def forward(self, images: Tensor) -> Tensor:
        count = images.shape[0]
        return self.head(self.stage2(self.stage1(images).relu()).mean((2, 3)).view(count, 4))


def test_the_batch_size_is_not_frozen_into_a_block() -> None:
    extractor = extract_features(Flattening(), image_size=16, nodes=["stage1", "stage2"])
    with pytest.raises(ValueError, match="computes node 'getitem' before 'stage2'"):
        split_at_levels(extractor)


def test_a_level_overwritten_by_more_than_a_relu_is_refused() -> None:
    model = timm.create_model("test_nfnet", num_classes=10)
    model.final_act = nn.SiLU(inplace=True)
    with pytest.raises(ValueError, match="level 'final_conv' of NormFreeNet is overwritten"):
        split_at_levels(extract_features(model, image_size=64))
    named = extract_features(model, image_size=64, nodes=["stages.2", "final_conv"])
    *_, last = split_at_levels(named)
    images = torch.randn(2, 3, 64, 64)
    features = named(images)
    assert torch.equal(last(features.levels[-1]), features.logits)
    assert torch.equal(features.levels[-1], named(images).levels[-1])


def test_a_network_without_levels_cannot_be_split() -> None:
    model = torchvision.models.resnet18(num_classes=10)
    with pytest.raises(ValueError, match="built without levels"):
        split_at_levels(extract_features(model, image_size=64, levels=False, embedding=True))

"""Features before their activation and embeddings, against the network's own modules called one by one."""

import copy
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from support.long_rounds import quick
from unikd_fast.models import CIFAR_MODELS, build_model, checkpoint_blocks, extract_features
from unikd_fast.models.cifar.mobilenetv2 import CifarMobileNetV2
from unikd_fast.models.cifar.resnet import ShortcutBottleneck
from unikd_fast.models.cifar.shufflenet import CifarShuffleNetV1, CifarShuffleNetV2
from unikd_fast.models.cifar.vgg import CifarVGG
from unikd_fast.models.cifar.wrn import WideResNet
from unikd_fast.teacher import OnlineTeacher, fold_batch_norm

# One of each family is quick.
NETWORKS = quick(
    [*(f"cifar/{name}" for name in CIFAR_MODELS), "torchvision/resnet18", "torchvision/mobilenet_v2"],
    *(f"cifar/{name}" for name in ("resnet8", "ResNet50", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2")),
    "torchvision/mobilenet_v2",
)


def residual(block: nn.Module, x: Tensor) -> Tensor:
    """The sum of a residual block without its last ReLU."""
    skip = getattr(block, "downsample", None) or getattr(block, "shortcut", None) or nn.Identity()
    out = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
    if isinstance(block, ShortcutBottleneck):
        out = block.bn3(block.conv3(out.relu()))
    return out + skip(x)


def shuffled(unit: nn.Module, x: Tensor) -> Tensor:
    kept, worked = x.chunk(2, dim=1)
    out = unit.bn1(unit.conv1(worked)).relu()
    return unit.shuffle(torch.cat([kept, unit.bn3(unit.conv3(unit.bn2(unit.conv2(out))))], 1))


def added(unit: nn.Module, x: Tensor) -> Tensor:
    out = unit.shuffle(unit.bn1(unit.conv1(x)).relu())
    return unit.bn3(unit.conv3(unit.bn2(unit.conv2(out)).relu())) + x


def expected(model: nn.Module, images: Tensor) -> Iterator[Tensor]:
    """Of each level, what the literature's code calls preact_feats; for MobileNetV2 the linear bottlenecks."""
    if isinstance(model, CifarVGG):
        x = model.block0(images).relu()
        for block in (model.block1, model.block2, model.block3, model.block4):
            before = block(x if block is model.block4 else model.pool(x))  # pool3 is skipped below 64 pixels
            yield before
            x = before.relu()
    elif isinstance(model, WideResNet):
        x = model.conv1(images)
        nexts = (model.block2.layer[0].bn1, model.block3.layer[0].bn1, model.bn1)
        for stage, norm in zip((model.block1, model.block2, model.block3), nexts, strict=True):
            x = stage(x)
            yield norm(x)
    elif isinstance(model, CifarMobileNetV2):
        x = model.conv1(images)
        for index, stage in enumerate(model.blocks):
            x = stage(x)
            if index in (1, 2, 4, 6):
                yield x
    elif isinstance(model, torchvision.models.MobileNetV2):
        x = images
        for index, part in enumerate(model.features[:18]):
            x = part(x)
            if index in (3, 6, 13):
                yield x
        yield model.features[18][1](model.features[18][0](x))
    else:
        last = {CifarShuffleNetV1: added, CifarShuffleNetV2: shuffled}.get(type(model), residual)
        x = model.bn1(model.conv1(images)).relu()
        if isinstance(model, torchvision.models.ResNet):
            x = model.maxpool(x)
        for name in ("layer1", "layer2", "layer3", "layer4"):
            stage = getattr(model, name, None)
            if stage is not None:
                x = last(stage[-1], stage[:-1](x))
                yield x
                x = x.relu()


@pytest.mark.parametrize("name", NETWORKS)
def test_before_activation_and_embedding_match_the_modules(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, num_classes=10)
    side = 64 if name.startswith("torchvision") else 32
    images = torch.randn(4, 3, side, side)
    extractor = extract_features(model, image_size=side, before_activation=True, embedding=True)
    plain = extract_features(copy.deepcopy(model), image_size=side)
    for training in (True, False):
        extractor.train(training)
        reference = copy.deepcopy(model)
        by_hand = list(expected(copy.deepcopy(model), images))
        torch.manual_seed(1)  # dropout before the classifier
        features = extractor(images)
        torch.manual_seed(1)
        assert torch.equal(features.logits, reference(images))
        assert len(features.before_activation) == len(by_hand) == len(extractor.level_shapes)
        for before, exact, shape in zip(features.before_activation, by_hand, extractor.level_shapes, strict=True):
            assert torch.equal(before, exact)
            assert before.shape[1:] == shape
        linear = next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear))
        assert torch.equal(linear(features.embedding), features.logits)
        assert extractor.classifier_weight is linear.weight
        assert extractor.embedding_width == linear.in_features
        # BatchNorm counts once, and everything else is as without.
        torch.manual_seed(1)
        alone = plain.train(training)(images)
        assert all(torch.equal(a, b) for a, b in zip(features.levels, alone.levels, strict=True))
        for (key, value), other in zip(model.state_dict().items(), plain.plain.state_dict().values(), strict=True):
            assert torch.equal(value, other), key


@pytest.mark.parametrize("name", ["cifar/resnet8", "cifar/wrn_16_1", "cifar/vgg8", "cifar/ShuffleV2"])
def test_gradients_pass_through_both_features(name: str) -> None:
    model = build_model(name, num_classes=10).train().double()
    reference = copy.deepcopy(model)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    features = extract_features(model, image_size=32, before_activation=True, embedding=True)(images)
    weights = [torch.randn_like(level) for level in features.before_activation]
    assert features.embedding is not None
    pulled = sum((before * w).sum() for before, w in zip(features.before_activation, weights, strict=True))
    (pulled + features.embedding.square().sum() + features.logits.sum()).backward()
    by_hand = copy.deepcopy(reference)
    sum((before * w).sum() for before, w in zip(expected(by_hand, images), weights, strict=True)).backward()
    embeddings: list[Tensor] = []
    linear = next(m for m in reversed(list(reference.modules())) if isinstance(m, nn.Linear))
    linear.register_forward_pre_hook(lambda _, inputs: embeddings.append(inputs[0]))
    logits = reference(images)
    (embeddings[0].square().sum() + logits.sum()).backward()
    for (key, found), a, b in zip(model.named_parameters(), by_hand.parameters(), reference.parameters(), strict=True):
        whole = sum(p.grad for p in (a, b) if p.grad is not None)
        assert found.grad is not None, key
        # Sums of the same numbers in another order; in front of a BatchNorm they cancel out.
        torch.testing.assert_close(found.grad, whole, rtol=1e-9, atol=1e-9)


def test_a_norm_with_a_built_in_activation_is_split() -> None:
    """timm's BatchNormAct2d, as in the MobileNetV1 of the ImageNet tables, is one module."""
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv1_100", num_classes=10).train()
    reference = copy.deepcopy(model)
    keys = list(model.state_dict())
    extractor = extract_features(model, image_size=64, before_activation=True)
    images = torch.randn(4, 3, 64, 64)
    features = extractor(images)
    inputs: list[Tensor] = []
    for norm in (reference.blocks[i][-1].bn2 for i in (1, 2, 3, 4)):
        norm.act.register_forward_pre_hook(lambda _, given: inputs.append(given[0].clone()))
    assert torch.equal(features.logits, reference(images))
    assert all(torch.equal(a, b) for a, b in zip(features.before_activation, inputs, strict=True))
    assert all(
        torch.equal(level, a.clamp(0, 6)) or torch.equal(level, a.relu())
        for level, a in zip(features.levels, inputs, strict=True)
    )
    assert list(model.state_dict()) == keys
    for (key, value), other in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
    assert extractor.norms_before_activation == tuple(
        f"blocks.{i}.{n}.bn2" for i, n in ((1, 1), (2, 1), (3, 5), (4, 1))
    )
    folded = copy.deepcopy(extractor).eval()
    exact = extractor.eval()(images)
    assert fold_batch_norm(folded) > 0
    for a, b in zip(folded(images).before_activation, exact.before_activation, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def convnext(model: nn.Module) -> Iterator[nn.Module]:
    yield from (stage.blocks[-1] for stage in model.stages)


STREAMS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Iterator[nn.Module]]]] = {
    "convnext": (lambda: timm.create_model("test_convnext", num_classes=10), convnext),
    "vit": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=10),
        lambda model: iter(model.blocks),
    ),
    "swin": (
        lambda: torchvision.models.SwinTransformer([4, 4], 24, [1, 2], [2, 2], [4, 4], num_classes=10),
        lambda model: iter((model.features[1], model.features[3])),
    ),
    "pvt": (
        lambda: timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1), num_classes=10),
        lambda model: iter(model.stages),
    ),
}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("training", [False, True])
def test_a_stream_without_activations_is_its_own_level(name: str, training: bool) -> None:
    """Nothing rectifies a residual stream: the blocks' outputs, with negative values, are read by norms alone."""
    build, blocks = STREAMS[name]
    torch.manual_seed(0)
    model = build().train(training)
    extractor = extract_features(model, image_size=32, before_activation=True)
    outputs: list[Tensor] = []
    for block in blocks(model):
        block.register_forward_hook(lambda module, given, output: outputs.append(output.clone()))
    images = torch.randn(2, 3, 32, 32)
    features = extractor(images)
    torch.manual_seed(1)
    model(images)
    shapes = [(2, *shape) for shape in extractor.level_shapes]
    assert [tuple(before.shape) for before in features.before_activation] == shapes
    for before, level, own, exact in zip(
        features.before_activation, features.levels, extractor.levels, outputs[-len(shapes) :], strict=True
    ):
        assert torch.equal(before, level) and torch.equal(before, own.as_map(exact))
        assert (before < 0).float().mean() > 0.1


def test_sums_of_activated_terms_are_refused() -> None:
    class Rectified(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList(Sum(3 * 2**i, 3 * 2 ** (i + 1)) for i in range(3))
            self.head = nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            for stage in self.stages:
                x = stage(x)
            return self.head(x.mean((2, 3)))

    class Sum(nn.Module):
        def __init__(self, inside: int, outside: int) -> None:
            super().__init__()
            self.one, self.two = (nn.Conv2d(inside, outside, 3, 2, 1) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.two(x).relu()

    with pytest.raises(ValueError, match=r"level 'stages.0' of Rectified has no value before .*add.*such as unikd, at"):
        extract_features(Rectified(), image_size=64, before_activation=True)


NORMS = {
    "timm/regnetx_002": [f"s{i}.b{n}.conv3.bn" for i, n in ((1, 1), (2, 1), (3, 4), (4, 7))],
    "timm/efficientnet_lite0": [f"blocks.{i}.{n}.bn3" for i, n in ((1, 1), (2, 1), (4, 2), (6, 0))],
    "cifar/resnet8": ["layer1.0.bn2", "layer2.0.bn2", "layer3.0.bn2"],
    "cifar/ResNet50": ["layer1.2.bn3", "layer2.3.bn3", "layer3.5.bn3", "layer4.2.bn3"],
    "cifar/wrn_16_2": ["block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"],
    "cifar/vgg8": ["block1.1", "block2.1", "block3.1", "block4.1"],
    "cifar/MobileNetV2": [f"blocks.{i}.{n}.conv.7" for i, n in ((1, 1), (2, 2), (4, 2), (6, 0))],
    "cifar/ShuffleV1": ["layer1.3.bn3", "layer2.7.bn3", "layer3.3.bn3"],
    "cifar/ShuffleV2": [None, None, None],
    "torchvision/resnet18": ["layer1.1.bn2", "layer2.1.bn2", "layer3.1.bn2", "layer4.1.bn2"],
    # Identities follow the activation that is part of the norm.
    "timm/mobilenetv4_conv_small": ["blocks.0.1.bn1", "blocks.1.1.bn1", "blocks.2.5.pw_proj.bn", "blocks.4.0.bn1"],
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_before_activation_are_on_the_main_path(name: str) -> None:
    extractor = extract_features(build_model(name, num_classes=10), image_size=32, before_activation=True)
    assert list(extractor.norms_before_activation) == NORMS[name]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["cifar/resnet8", "cifar/wrn_16_1", "cifar/vgg8", "timm/mobilenetv1_100"])
def test_features_of_a_folded_half_precision_teacher(name: str, precision: str) -> None:
    torch.manual_seed(0)
    network = extract_features(
        build_model(name, num_classes=10), image_size=64, before_activation=True, embedding=True
    ).eval()
    images = torch.randn(5, 3, 64, 64)
    with torch.no_grad():
        network.train()(images)  # statistics to fold
        exact = network.eval()(images)
    teacher = OnlineTeacher(network, precision=precision, batch_size=2)  # cut and padded
    found = teacher(images)
    assert teacher.is_finite([images])
    assert teacher.folded > 0
    assert found.embedding is not None
    assert exact.embedding is not None
    tolerance = {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.02}[precision]  # of the largest entry, a few roundings a layer
    pairs = zip((*found.before_activation, found.embedding), (*exact.before_activation, exact.embedding), strict=True)
    for a, b in pairs:
        assert a.dtype == teacher.dtype
        assert a.shape == b.shape
        assert float((a.float() - b).abs().max()) < tolerance * float(b.abs().max())


def test_compiles_without_graph_breaks() -> None:
    extractor = extract_features(
        build_model("cifar/wrn_16_1", num_classes=10), image_size=16, before_activation=True, embedding=True
    ).eval()
    images = torch.randn(2, 3, 16, 16)
    found = torch.compile(extractor, backend="eager", fullgraph=True)(images)
    exact = extractor(images)
    assert found.embedding is not None
    assert torch.equal(found.embedding, exact.embedding)
    assert all(torch.equal(a, b) for a, b in zip(found.before_activation, exact.before_activation, strict=True))


def test_an_embedding_alone_needs_no_stages() -> None:
    model = torchvision.models.vit_b_16(image_size=32, num_classes=10).eval()
    extractor = extract_features(model, image_size=32, levels=False, embedding=True)
    images = torch.randn(2, 3, 32, 32)
    features = extractor(images)
    assert features.levels == features.before_activation == extractor.level_names == ()
    assert features.embedding is not None
    assert torch.equal(model.heads(features.embedding), features.logits)
    assert torch.equal(features.logits, model(images))


def checkpointed() -> nn.Module:
    model = build_model("cifar/resnet8", num_classes=10)
    checkpoint_blocks(model)
    return model


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (
            checkpointed(),
            {"before_activation": True},
            r"level 'layer1' .* CheckpointedDownsampleBlock \(node 'layer1_0",
        ),
        (torchvision.models.squeezenet1_0(), {"embedding": True}, "no embedding: its logits come from node 'flatten'"),
        (
            timm.create_model("resnetv2_50"),
            {"embedding": True},
            r"no embedding: its logits come from node 'head_fc' \(Conv2d\)",
        ),
        (torchvision.models.resnet18(), {"before_activation": True, "levels": False}, "got levels=False"),
    ],
)
def test_missing_features_are_refused_by_name(model: nn.Module, arguments: dict[str, bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extract_features(model, image_size=64, **arguments)  # type: ignore[arg-type]


def test_further_features_do_not_change_the_levels() -> None:
    """An activation in place overwrites the level, not the value before it."""
    model = torchvision.models.DenseNet(8, (2, 2), 16, num_classes=10).eval()
    images = torch.randn(2, 3, 64, 64)
    plain = extract_features(model, image_size=64)(images)
    asked = extract_features(model, image_size=64, before_activation=True)(images)
    assert all(torch.equal(a, b) for a, b in zip(plain.levels, asked.levels, strict=True))
    assert bool((asked.before_activation[-1] < 0).any())
    assert torch.equal(asked.before_activation[-1].relu(), asked.levels[-1])

"""Feature extraction against hooks on the plain network, in both modes, and what it must leave alone."""

import copy
import logging
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from unikd_fast.models import build_model, extract_features
from unikd_fast.values import Features

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "cifar residual": (lambda: build_model("cifar/resnet8", num_classes=10), 16),
    "cifar pre-activated": (lambda: build_model("cifar/wrn_16_1", num_classes=10), 16),
    "cifar vgg": (lambda: build_model("cifar/vgg8", num_classes=10), 16),
    "torchvision, dropout and stochastic depth": (
        lambda: torchvision.models.efficientnet_b0(num_classes=10, dropout=0.5, stochastic_depth_prob=0.5),
        32,
    ),
    "torchvision, activation in place after the last level": (
        lambda: torchvision.models.DenseNet(8, (2, 2), 16, drop_rate=0.3, num_classes=10),
        64,
    ),
    "torchvision, channel shuffle": (
        lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=10),
        64,
    ),
    "timm, drop path": (lambda: timm.create_model("test_convnext", num_classes=10, drop_path_rate=0.5), 64),
    "timm, weight standardisation": (lambda: timm.create_model("test_nfnet", num_classes=10), 64),
    "timm, squeeze and excitation": (lambda: timm.create_model("test_efficientnet", num_classes=10), 64),
}


class TwoHeads(nn.Module):
    """Convolutions, an auxiliary head that runs in training only, and a named way out."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 10)
        self.aux_norm = nn.BatchNorm2d(4)
        self.aux_head = nn.Linear(4, 10)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.stage1(images)
        aux = self.aux_head(self.aux_norm(x).mean((2, 3))) if self.training else None
        logits = self.head(self.stage2(x).mean((2, 3)))
        return logits if aux is None else (logits, aux)


def _hooked(model: nn.Module, names: tuple[str, ...], images: Tensor) -> tuple[list[Tensor], Tensor]:
    outputs: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda *args, name=name: outputs.__setitem__(name, args[2]))
        for name in names
    ]
    logits = model(images)
    for hook in hooks:
        hook.remove()
    return [outputs[name] for name in names], logits


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_features_match_hooks_on_the_plain_network(name: str, training: bool) -> None:
    build, side = NETWORKS[name]
    torch.manual_seed(0)
    model = build().train(training)
    reference = copy.deepcopy(model)
    extractor = extract_features(model, image_size=side)
    images = torch.randn(4, 3, side, side)

    torch.manual_seed(1)  # dropout and stochastic depth draw alike
    expected_levels, expected_logits = _hooked(reference, extractor.level_names, images)
    torch.manual_seed(1)
    features = extractor(images)

    assert isinstance(features, Features)
    assert torch.equal(features.logits, expected_logits)
    assert len(features.levels) == len(expected_levels) >= 2
    for level, expected, shape in zip(features.levels, expected_levels, extractor.level_shapes, strict=True):
        assert torch.equal(level, expected)
        assert level.shape[1:] == shape
    # One update of the BatchNorm statistics in training, none in evaluation.
    for (key, value), other in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        assert torch.equal(value, other), key

    weights = [torch.randn_like(level) for level in features.levels]
    sum((level * w).sum() for level, w in zip(features.levels, weights, strict=True)).backward()
    sum((level * w).sum() for level, w in zip(expected_levels, weights, strict=True)).backward()
    for (key, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), key
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=0, atol=0)


def test_building_leaves_the_model_unchanged() -> None:
    model = torchvision.models.efficientnet_b0(num_classes=10, dropout=0.5).train()
    model.features[1].eval()  # frozen statistics in a part of it
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    modes = {name: module.training for name, module in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random_state = torch.get_rng_state()

    extract_features(model, image_size=64, nodes=["features.2", "features.5"])  # the path that probes both modes

    assert torch.equal(random_state, torch.get_rng_state())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert list(model.state_dict()) == list(state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert all(parameter.grad is None for parameter in model.parameters())


def test_parameters_are_shared_and_keys_unchanged() -> None:
    model = build_model("cifar/resnet8", num_classes=10)
    keys = list(model.state_dict())
    extractor = extract_features(model, image_size=16)
    assert extractor.plain is model
    assert list(extractor.plain.state_dict()) == keys
    assert list(extractor.state_dict()) == [f"plain.{key}" for key in keys]
    assert {id(p) for p in extractor.parameters()} == {id(p) for p in model.parameters()}

    images = torch.randn(8, 3, 16, 16)
    before = model.eval()(images)
    optimiser = torch.optim.SGD(extractor.train().parameters(), lr=0.1)
    extractor(images).logits.square().mean().backward()
    optimiser.step()
    extractor.eval()
    assert not torch.allclose(model(images), before)
    assert torch.equal(model(images), extractor(images).logits)
    extractor.to(torch.float64)  # moving one moves the other
    assert model(images.double()).dtype == torch.float64


def test_modes_can_be_switched_on_extractor_or_network() -> None:
    model = torchvision.models.mobilenet_v2(num_classes=10, dropout=0.5)
    extractor = extract_features(model.eval(), image_size=32)
    images = torch.randn(2, 3, 32, 32)
    assert not extractor.training
    assert torch.equal(extractor(images).logits, extractor(images).logits)
    extractor.train()
    assert not torch.equal(extractor(images).logits, extractor(images).logits)
    model.eval()  # through the plain network
    assert torch.equal(extractor(images).logits, extractor(images).logits)


def test_auxiliary_heads_match_the_plain_network() -> None:
    model = TwoHeads().train()
    reference = copy.deepcopy(model)
    extractor = extract_features(model, image_size=16)
    images = torch.randn(4, 3, 16, 16)
    assert torch.equal(extractor(images).logits, reference(images)[0])
    assert torch.equal(model.aux_norm.running_mean, reference.aux_norm.running_mean)
    assert model.aux_norm.num_batches_tracked == 1
    assert torch.equal(extractor.eval()(images).logits, reference.eval()(images))


class Standardised(nn.Module):
    """Computes its weights from a parameter and a buffer at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.register_buffer("scale", torch.tensor(2.0))
        self.head = nn.Linear(4, 10)

    def forward(self, images: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean()) * self.scale.exp()
        return self.head(nn.functional.conv2d(images, weight).relu().mean((2, 3)))


def test_weights_computed_in_forward_keep_their_gradients() -> None:
    model = Standardised()
    extractor = extract_features(model, image_size=16, nodes=["relu"])
    images = torch.randn(2, 3, 16, 16)
    extractor(images).logits.sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.abs().sum() > 0
    with torch.no_grad():
        model.weight.mul_(3)
        model.scale.add_(1)
    assert torch.equal(extractor(images).logits, model(images))


def test_googlenet_returns_its_main_logits() -> None:
    model = torchvision.models.googlenet(num_classes=10, init_weights=False).train()
    reference = copy.deepcopy(model)
    extractor = extract_features(model, image_size=64)
    images = torch.randn(2, 3, 64, 64)
    torch.manual_seed(1)
    expected = reference(images)
    torch.manual_seed(1)
    assert torch.equal(extractor(images).logits, expected.logits)
    assert extractor.num_classes == 10


def test_named_nodes_replace_the_stages() -> None:
    model = build_model("cifar/resnet8", num_classes=10).eval()
    extractor = extract_features(model, image_size=16, nodes=["relu", "layer1.0.add", "layer3.0.bn2"])
    images = torch.randn(2, 3, 16, 16)
    stem, total, norm = extractor(images).levels
    assert extractor.level_names == ("relu", "layer1.0.add", "layer3.0.bn2")
    assert torch.equal(stem, model.bn1(model.conv1(images)).relu())
    block = model.layer1[0]
    assert torch.equal(total, block.bn2(block.conv2(block.bn1(block.conv1(stem)).relu())) + stem)
    assert norm.shape == (2, 64, 4, 4)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_named_node_is_returned_before_in_place_activation(training: bool) -> None:
    model = build_model("cifar/resnet8", num_classes=10).train(training)
    reference = copy.deepcopy(model)
    extractor = extract_features(model, image_size=16, nodes=["bn1", "layer3.0.add"])
    images = torch.randn(4, 3, 16, 16)
    features = extractor(images)
    expected_logits = copy.deepcopy(reference)(images)
    assert torch.equal(features.levels[0], reference.bn1(reference.conv1(images)))
    assert features.levels[1].min() < 0  # the sum, not its ReLU
    assert torch.equal(features.logits, expected_logits)


class _Operations(TorchDispatchMode):
    """Counts what is run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: build_model("cifar/resnet8", num_classes=10),
        lambda: torchvision.models.resnet18(num_classes=10),
        lambda: torchvision.models.mobilenet_v3_small(num_classes=10),
        lambda: torchvision.models.efficientnet_b0(num_classes=10),
        lambda: timm.create_model("resnet10t", num_classes=10),
        lambda: timm.create_model("seresnet18", num_classes=10),
    ],
    ids=["cifar", "torchvision", "mobilenet", "stochastic depth", "timm", "squeeze and excitation"],
)
def test_sums_in_place_stay_in_place(build: Callable[[], nn.Module], training: bool) -> None:
    model = build().train(training)
    extractor = extract_features(model, image_size=64)
    images = torch.randn(2, 3, 64, 64)
    torch.manual_seed(0)
    with torch.no_grad(), _Operations() as plain:
        expected = model(images)
    torch.manual_seed(0)
    with torch.no_grad(), _Operations() as own:
        features = extractor(images)
    assert plain.counts["aten.add_.Tensor"] > 0
    assert own.counts == plain.counts
    assert training or torch.equal(features.logits, expected)  # training has moved BatchNorm's statistics meanwhile


class Sums(nn.Module):
    """Sums whose first term is read once more: by the caller, by its own gradient, and by a square's."""

    def __init__(self, add: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.add = add
        self.conv1, self.norm1, self.skip1 = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Conv2d(3, 4, 1, 2)
        self.conv2, self.sigmoid, self.skip2 = nn.Conv2d(4, 8, 3, 2, 1), nn.Sigmoid(), nn.Conv2d(4, 8, 1, 2)
        self.conv3, self.norm3 = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.add(self.norm1(self.conv1(images)), self.skip1(images))
        x = self.add(self.sigmoid(self.conv2(x)), self.skip2(x))
        normalised = self.norm3(self.conv3(x))
        energy = normalised.square()
        return self.fc((self.add(normalised, x) + energy).mean((2, 3)))


def test_what_is_read_again_is_not_added_to_in_place() -> None:
    torch.manual_seed(0)
    model = Sums(operator.iadd)
    reference = Sums(operator.add)
    reference.load_state_dict(model.state_dict())
    images = torch.randn(4, 3, 16, 16)
    levels, logits = _hooked(reference, ("norm1", "norm3"), images)
    features = extract_features(model, image_size=16, nodes=["norm1", "norm3"])(images)

    assert torch.equal(features.logits, logits)
    for own, expected in zip(features.levels, levels, strict=True):
        assert torch.equal(own, expected)
    for outputs in ((*features.levels, features.logits), (*levels, logits)):
        sum(output.square().sum() for output in outputs).backward()
    for own, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(own.grad, expected.grad)


def test_deep_copies_are_independent() -> None:
    extractor = extract_features(build_model("cifar/resnet8", num_classes=10), image_size=16).eval()
    average = copy.deepcopy(extractor)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(average(images).logits, extractor(images).logits)
    with torch.no_grad():
        extractor.plain.fc.bias.add_(1)
    torch.testing.assert_close(extractor(images).logits, average(images).logits + 1)


def test_compiles_without_graph_breaks() -> None:
    extractor = extract_features(build_model("cifar/resnet8", num_classes=10), image_size=16).eval()
    images = torch.randn(2, 3, 16, 16)
    compiled = torch.compile(extractor, backend="eager", fullgraph=True)(images)
    expected = extractor(images)
    assert torch.equal(compiled.logits, expected.logits)
    for level, other in zip(compiled.levels, expected.levels, strict=True):
        assert torch.equal(level, other)


def test_tracebacks_show_lines_of_the_graph() -> None:
    extractor = extract_features(build_model("cifar/resnet8", num_classes=10), image_size=16)
    with pytest.raises(RuntimeError) as caught:
        extractor(torch.randn(2, 4, 16, 16))
    assert any("self.conv1(images)" in str(entry.statement) for entry in caught.traceback)


class Branches(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


class MakesATensor(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return (images * torch.ones(3, 1, 1)).mean((2, 3))


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (Branches(), {}, "Branches has no two stages .* or use a method on logits, such as kd or dkd"),
        (Branches(), {"before_activation": True, "nodes": ["x"]}, "no node 'x' in Branches"),
        (MakesATensor(), {}, "MakesATensor has no two stages"),
        (nn.Sequential(nn.Conv2d(3, 8, 3)), {"nodes": ["0"]}, r"must return logits \(N, K\), got \(2, 8, 14, 14\)"),
        (TwoHeads(), {"image_size": 0}, "image_size must be 1 or more, got 0"),
        (TwoHeads(), {"max_levels": 0}, "max_levels must be 1 or more, got 0"),
        (TwoHeads(), {"nodes": []}, "at least one level"),
        (TwoHeads(), {"nodes": ["stage3"]}, "no node 'stage3'.*nearest: stage"),
        (TwoHeads(), {"nodes": ["head"]}, r"'head' gives shape \(2, 10\)"),
        (TwoHeads(), {"nodes": ["stage2", "stage1"]}, "fine to coarse, got stage2 at 4, stage1 at 8"),
        (nn.Sequential(nn.Flatten(), nn.Linear(48, 10)), {}, "does not accept images of 16x16 pixels"),
    ],
)
def test_errors_name_cause_and_remedy(model: nn.Module, arguments: dict[str, object], message: str) -> None:
    attributes = set(vars(model))
    with pytest.raises(ValueError, match=message):
        extract_features(model, **{"image_size": 16, **arguments})
    assert set(vars(model)) == attributes
    assert model.training


class OneSize(nn.Module):
    """A network with a parameter for each place, which takes images of 32 pixels alone."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.places, self.head = nn.Parameter(torch.zeros(1, 8, 16, 16)), nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.two(self.one(images) + self.places).mean((2, 3)))


def test_a_network_of_one_size_is_probed_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    monkeypatch.setattr(logger, "handle", lambda record: None if logger.disabled else said.append(record.getMessage()))
    assert extract_features(OneSize(), image_size=32).level_names == ("one", "two")
    assert not said
    assert not logger.disabled

"""Networks that torch.fx cannot trace, or whose output is not a tensor: logits, levels and embeddings by hooks."""

import copy
import logging
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from unikd_fast.models import FeatureExtractor, LogitsOnly, extract_features
from unikd_fast.models.hooks import NoLogits


class Branching(nn.Module):
    """Three stages and a branch on values, which torch.fx does not follow."""

    def __init__(self, wrap: Any = lambda logits: logits) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, 2 * c, 3, stride=2, padding=1), nn.BatchNorm2d(2 * c), nn.ReLU())
            for c in (4, 8, 16)
        )
        self.spare = nn.Conv2d(32, 32, 1)
        self.head = nn.Linear(32, 5)
        self.wrap = wrap

    def forward(self, images: Tensor) -> Any:
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        if x.sum() > 1e9 or not self.training:
            x = x + 0 * self.spare(x)
        return self.wrap(self.head(x.mean((2, 3))))


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_levels_of_a_branching_network(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "unikd_fast")
    model = Branching()
    before = copy.deepcopy(model.state_dict())
    extractor = extract_features(model, image_size=16, embedding=True)
    assert "levels of Branching by hooks: torch.fx cannot trace Branching" in caplog.text
    assert extractor.level_names == ("stages.0", "stages.1", "stages.2")
    assert extractor.level_shapes == ((8, 8, 8), (16, 4, 4), (32, 2, 2))
    assert (extractor.num_classes, extractor.embedding_width) == (5, 32)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())

    features = extractor.train()(images())
    last = features.levels[-1]
    assert torch.equal(features.embedding, last.mean((2, 3)))
    assert torch.equal(features.logits, model.head(features.embedding))
    last.sum().backward()
    assert all(parameter.grad is not None for parameter in model.stages.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_copy_has_levels_of_its_own() -> None:
    extractor = extract_features(Branching(), image_size=16).eval()
    other: FeatureExtractor = copy.deepcopy(extractor)
    with torch.no_grad():
        other.plain.stem.weight.zero_()
        ours, theirs = extractor(images()).levels[0], other(images()).levels[0]
    assert not torch.equal(ours, theirs)
    assert torch.equal(theirs[:, :, 1:-1, 1:-1].std((0, 2, 3)), torch.zeros(8))


def test_named_modules_are_the_levels() -> None:
    extractor = extract_features(Branching(), image_size=16, nodes=["stem", "stages.1.0"])
    assert extractor.level_shapes == ((4, 16, 16), (16, 4, 4))
    with pytest.raises(ValueError, match=r"no node 'stages.4' in Branching; nearest: stages"):
        extract_features(Branching(), image_size=16, nodes=["stages.4"])
    with pytest.raises(ValueError, match=r"node 'head' gives shape \(2, 5\)"):
        extract_features(Branching(), image_size=16, nodes=["head"])


def test_a_level_that_training_does_not_compute_is_named() -> None:
    extractor = extract_features(Branching(), image_size=16, nodes=["stages.1", "spare"])
    assert len(extractor.eval()(images()).levels) == 2
    with pytest.raises(ValueError, match="does not run spare in training mode, whose outputs are levels; name others"):
        extractor.train()(images())


class Lists(Branching):
    """Embeddings of all stages in one list, and their blocks in lists of lists, as in PoolFormer of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = self.stages
        del self.stages
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Sequential(nn.Conv2d(c, c, 1), nn.ReLU()) for _ in range(2)) for c in (8, 16, 32)
        )

    def forward(self, images: Tensor) -> Any:
        x = self.stem(images)
        for embedding, blocks in zip(self.embeddings, self.blocks, strict=True):
            x = embedding(x)
            for block in blocks:
                x = block(x)
        return self.head(x.mean((2, 3)) if x.sum() < 1e9 else x)


def test_stages_end_in_the_last_block_of_their_list() -> None:
    extractor = extract_features(Lists(), image_size=16)
    assert extractor.level_names == ("blocks.0.1", "blocks.1.1", "blocks.2.1")


class Encodings(Branching):
    """A list of blocks for each stage, whose encodings are modules of the network, as in CoaT of timm."""

    def __init__(self) -> None:
        super().__init__()
        self.downsampling = self.stages
        del self.stages
        for stage, c in enumerate((8, 16, 32)):
            self.add_module(f"encoding{stage}", nn.Conv2d(c, c, 3, padding=1))
            self.add_module(f"blocks{stage}", nn.ModuleList(nn.Conv2d(c, c, 1) for _ in range(2)))

    def forward(self, images: Tensor) -> Any:
        x = self.stem(images)
        for stage, downsampling in enumerate(self.downsampling):
            x = downsampling(x)
            for block in self.get_submodule(f"blocks{stage}"):  # type: ignore[attr-defined]
                x = block(self.get_submodule(f"encoding{stage}")(x))
        return self.head(x.mean((2, 3)) if x.sum() < 1e9 else x)


def test_a_list_beside_other_modules_ends_a_stage() -> None:
    extractor = extract_features(Encodings(), image_size=16)
    assert extractor.level_names == ("stem", "blocks0.1", "blocks1.1", "blocks2.1")


class Pixels(nn.Module):
    """A block that returns pixels of patches (16 N, 4, C) before its map (N, C, H, W), as in TNT of timm."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Any) -> tuple[Tensor, Tensor]:
        x = self.block(x[1] if isinstance(x, tuple) else x)
        return x.new_ones(16 * len(x), 4, 5), x


def test_of_several_outputs_the_one_of_the_images_is_the_level() -> None:
    model = Branching()
    model.stages = nn.ModuleList(map(Pixels, model.stages))
    extractor = extract_features(Unwrapping(model), image_size=16)
    assert extractor.level_shapes == ((8, 8, 8), (16, 4, 4), (32, 2, 2))
    assert extractor(images()).levels[0].shape == (4, 8, 8, 8)


class Unwrapping(nn.Module):
    def __init__(self, model: Branching) -> None:
        super().__init__()
        self.stem, self.stages, self.head = model.stem, model.stages, model.head

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        return self.head(x[1].mean((2, 3)) if x[1].sum() < 1e9 else x[1])


class Nested(nn.Module):
    """A stage whose output, a map with its height and width, is the first of a tuple, as in PVTv2 of transformers."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Any) -> Any:
        x = self.stage(x[0][0] if isinstance(x, tuple) else x)
        return (x,), *x.shape[2:]


def test_levels_in_nested_outputs_and_a_named_argument() -> None:
    model = Branching()
    model.stages = nn.ModuleList(map(Nested, model.stages))
    model.head.forward = lambda input: functional.linear(input, model.head.weight)  # type: ignore[method-assign]

    def forward(x: Tensor) -> Tensor:
        x = model.stem(x)
        for stage in model.stages:
            x = stage(x)
        vector = x[0][0].mean((2, 3))
        return model.head(input=vector) if vector.sum() < 1e9 else vector

    model.forward = forward  # type: ignore[method-assign]
    extractor = extract_features(model, image_size=16, embedding=True)
    assert extractor.level_names == ("stages.0", "stages.1", "stages.2")
    features = extractor(images())
    assert torch.equal(features.embedding, features.levels[-1].mean((2, 3)))


def test_tokens_of_images_that_are_not_square_are_refused() -> None:
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, dynamic_img_size=True)
    extractor = extract_features(network, image_size=32)
    assert extractor(torch.zeros(1, 3, 48, 48)).levels[0].shape[2:] == (6, 6)
    with pytest.raises(ValueError, match="got 16x64 pixels; crop them to squares"):
        extractor(torch.zeros(1, 3, 16, 64))  # of 2 x 8 patches, which would pass for 4 x 4


def test_features_before_activation_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"torch.fx cannot trace Branching .* use a method that needs none, such as unikd"
    ):
        extract_features(Branching(), image_size=16, before_activation=True)


WRAPPED: dict[str, Any] = {
    "a tuple": lambda logits: (logits, logits + 1),
    "a dictionary": lambda logits: {"loss": None, "logits": logits},
    "an object": lambda logits: SimpleNamespace(logits=logits),
    "an ordered object": lambda logits: OrderedDict(logits=logits, other=logits + 1),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_logits_of_outputs_that_are_not_tensors(kind: str) -> None:
    model = Branching(WRAPPED[kind]).eval()
    plain = Branching().eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = plain(images())
        assert torch.equal(LogitsOnly(model)(images()).logits, expected)
        assert torch.equal(extract_features(model, image_size=16)(images()).logits, expected)


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda logits: {"scores": logits}, r"returns dict with \['scores'\], which has no logits"),
        (lambda logits: (None, logits), "returns tuple, which has no logits; return a tensor"),
        (lambda logits: None, "returns NoneType"),
    ],
)
def test_outputs_without_logits_are_refused(wrap: Any, said: str) -> None:
    with pytest.raises(NoLogits, match=said):
        LogitsOnly(Branching(wrap))(images())
    with pytest.raises(NoLogits, match=said):
        extract_features(Branching(wrap), image_size=16)

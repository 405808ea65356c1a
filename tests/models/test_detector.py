"""A Faster R-CNN run part by part does what torchvision's forward does."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign, roi_align

from unikd_fast.models.detector import Detector, SeededSampler, balanced, region_features, sizes_of
from unikd_fast.models.faster_rcnn import build_detector, faster_rcnn
from unikd_fast.values import DetectionBatch

SMALL = {"norm": "batch", "frozen_stages": 0, "out_channels": 16, "representation_size": 32}
NARROW = {"out_channels": 8, "representation_size": 8}


class AsGiven(nn.Module):
    """Takes the place of torchvision's transform: the batch is resized and normalised already."""

    def __init__(self, batch: DetectionBatch) -> None:
        super().__init__()
        self.batch = batch

    def forward(self, images: list[Tensor], targets: object) -> tuple[ImageList, object]:
        return ImageList(self.batch.images, sizes_of(self.batch)), targets

    def postprocess(self, found: object, *sizes: object) -> object:
        return found


@pytest.fixture(scope="module")
def network() -> FasterRCNN:
    torch.manual_seed(0)
    return faster_rcnn("timm/test_resnet", num_classes=4, anchor_sizes=(8, 16, 32, 64, 128), **SMALL)


def make_batch() -> DetectionBatch:
    generator = torch.Generator().manual_seed(1)
    sizes = torch.tensor([[64, 96], [80, 90]])
    images = torch.zeros(2, 3, 96, 96)
    for image, (height, width) in zip(images, sizes.tolist(), strict=True):
        image[:, :height, :width] = torch.randn(3, height, width, generator=generator)
    boxes = (torch.tensor([[4.0, 8.0, 40.0, 50.0], [30.0, 10.0, 90.0, 60.0]]), torch.zeros(0, 4))
    labels = (torch.tensor([2, 0]), torch.zeros(0, dtype=torch.int64))
    return DetectionBatch(images, sizes, boxes, labels, torch.arange(2), torch.tensor([5, 6]))


def as_targets(batch: DetectionBatch) -> list[dict[str, Tensor]]:
    return [{"boxes": b, "labels": n + 1} for b, n in zip(batch.boxes, batch.labels, strict=True)]


def test_losses_are_those_of_torchvision(network: FasterRCNN) -> None:
    batch, plain = make_batch(), copy.deepcopy(network)
    detector = Detector(copy.deepcopy(network)).train()
    output = detector.train_step(batch)
    ce = nn.functional.cross_entropy(output.features.logits, output.regions.labels)
    for owner in (plain.rpn, plain.roi_heads):
        given = owner.fg_bg_sampler
        owner.fg_bg_sampler = SeededSampler(given.batch_size_per_image, given.positive_fraction)
        owner.fg_bg_sampler.seeds = batch.seeds.tolist()
    plain.transform = AsGiven(batch)
    expected = plain.train()([*batch.images], as_targets(batch))
    assert {**output.losses, "loss_classifier": ce} == expected
    sum(expected.values()).backward()
    (ce + sum(output.losses.values())).backward()
    for (name, ours), theirs in zip(detector.plain.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


def test_detections_are_those_of_torchvision(network: FasterRCNN) -> None:
    batch, plain = make_batch(), copy.deepcopy(network).eval()
    plain.transform = AsGiven(batch)
    plain.roi_heads.score_thresh = 0.0
    with torch.no_grad():
        found = Detector(plain).eval()(batch.images, sizes_of(batch))
        expected = plain([*batch.images])
    assert all(len(each["boxes"]) for each in found)
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ("boxes", "scores", "labels"))


def test_choice_of_regions_repeats_whatever_the_batch() -> None:
    sampler = SeededSampler(8, 0.25)
    matched = [torch.tensor([1, 0, 0, -1, 2, 0, 3, 0, 0, 0, 0, 1]), torch.zeros(20, dtype=torch.int64)]
    sampler.seeds = [3, 4]
    positive, negative = sampler(matched)
    assert [int(x.sum()) for x in positive] == [2, 0]
    assert [int(x.sum()) for x in negative] == [6, 8]
    assert not any((p & n).any() for p, n in zip(positive, negative, strict=True))
    sampler.seeds = [4]
    alone = sampler(matched[1:])
    assert torch.equal(alone[1][0], negative[1])


def test_region_levels(network: FasterRCNN) -> None:
    batch = make_batch()
    output = Detector(network, levels="regions").train().train_step(batch)
    rows, compared = len(output.regions.labels), balanced(output.regions)
    of_first = compared.labels[: len(compared.boxes[0])]
    assert int((of_first > 0).sum()) == int((of_first == 0).sum()) == int((output.regions.labels > 0).sum()) > 0
    assert len(compared.boxes[1]) == 1  # an image without objects
    assert all(torch.equal(*pair) for pair in zip(balanced(compared).boxes, compared.boxes, strict=True))
    shape = (len(compared.labels), 16, 7, 7)
    assert [tuple(level.shape) for level in output.features.levels] == [shape] * 4
    assert output.features.logits.shape == (rows, 5)
    teacher = Detector(copy.deepcopy(network), levels="regions").eval()
    with torch.no_grad():
        maps = teacher.maps(batch.images)
        features = teacher.at(maps, output.regions, sizes_of(batch))
        own = teacher.sampled(maps, batch)
    assert features.logits.shape == (rows, 5)
    assert len(own.labels) == sum(map(len, own.boxes)) < rows


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("samples", [1, 2])
def test_region_features_are_those_of_roi_align(aligned: bool, samples: int) -> None:
    """Boxes inside, over the edges, outside, thinner than a pixel and of no image; values and gradients."""
    torch.manual_seed(0)
    level = torch.randn(3, 5, 9, 13, dtype=torch.float64, requires_grad=True)
    corners = 80 * torch.rand(20, 2, dtype=torch.float64) - 20
    boxes = torch.cat([corners, corners + 60 * torch.rand(20, 2, dtype=torch.float64)], dim=1)
    odd = torch.tensor([[0, 0, 52, 36], [4, 4, 4.5, 4.2], [90, 90, 99, 99], [-9, -9, 90, 90]], dtype=torch.float64)
    of_images = [torch.cat([boxes, odd]), boxes[:0], odd]
    ours = region_features(level, of_images, (7, 5), 0.25, samples, aligned)
    theirs = roi_align(level, of_images, (7, 5), 0.25, samples, aligned)
    upstream = torch.randn_like(theirs)
    # Both in float64, where they differ by roundings alone.
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(each, level, upstream)[0] for each in (ours, theirs))
    assert torch.allclose(*gradients, rtol=1e-12, atol=1e-12)
    assert theirs.any()
    none = [boxes[:0]] * 3
    assert region_features(level, none, (7, 5), 0.25, samples, aligned).shape == (0, 5, 7, 5)


def test_levels_by_name(network: FasterRCNN) -> None:
    batch = make_batch()
    whole, some = (Detector(copy.deepcopy(network), levels="regions", level_names=n) for n in (None, ["0", "2"]))
    levels = [detector.train().train_step(batch).features.levels for detector in (whole, some)]
    assert whole.level_names == ("0", "1", "2", "3")
    assert len(some.level_shapes) == len(levels[1]) == 2
    assert all(a.equal(b) for a, b in zip((levels[0][0], levels[0][2]), levels[1], strict=True))
    maps = Detector(copy.deepcopy(network), levels="maps", level_names=["1", "pool"])
    near = maps.near_objects(maps.maps(batch.images), batch)
    every = Detector(copy.deepcopy(network), levels="maps")
    expected = every.near_objects(every.maps(batch.images), batch)
    assert near[0].equal(expected[1])
    assert near[1].equal(expected[4])
    for names in (["2", "0"], ["0", "pool"], [], ["layer1"]):
        with pytest.raises(ValueError, match="the levels of regions are 0, 1, 2, 3, from fine to coarse"):
            Detector(copy.deepcopy(network), levels="regions", level_names=names)


def test_bodies() -> None:
    import torchvision

    own = faster_rcnn("torchvision/resnet50", num_classes=90)
    theirs = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    own.load_state_dict(theirs.state_dict(), strict=True)
    frozen = {name.split(".")[2] for name, p in own.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "layer1"}


@pytest.mark.parametrize("body", ["timm/convnext_atto", "timm/mobilenetv2_100", "torchvision/mobilenet_v2"])
def test_stages_that_are_frozen(body: str) -> None:
    counts = []
    for stages in range(6):
        network = faster_rcnn(body, num_classes=3, frozen_stages=stages, out_channels=8, representation_size=8)
        counts.append(sum(not p.requires_grad for p in network.parameters()))
        assert not any(not p.requires_grad for n, p in network.named_parameters() if not n.startswith("backbone.body"))
    assert counts[0] == 0
    assert counts == sorted(set(counts))
    levels = network.backbone(torch.zeros(1, 3, 64, 96))
    assert [tuple(x.shape[-2:]) for x in levels.values()] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]


@pytest.mark.parametrize("conventions", ["torchvision", "detectron2"])
@torch.no_grad()
def test_places_are_exact_in_bf16(conventions: Any) -> None:
    """Anchors are the same, and boxes have more digits than bf16."""
    torch.manual_seed(0)
    sizes = (8.0, 16.0, 32.0, 64.0, 128.0)
    network = faster_rcnn("timm/test_resnet", num_classes=4, anchor_sizes=sizes, conventions=conventions, **SMALL)
    network.roi_heads.score_thresh = 0.0
    detector, batch, found = Detector(network, levels="regions").eval(), make_batch(), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            maps = detector.maps(batch.images)
            assert maps["0"].dtype == (torch.bfloat16 if enabled else torch.float32)
            anchors = network.rpn.anchor_generator(ImageList(batch.images, sizes_of(batch)), [*maps.values()])
            regions = detector.sampled(maps, batch)
            features, objects = detector.at(maps, regions, sizes_of(batch)), detector(batch.images, sizes_of(batch))
        assert {each.dtype for each in (*anchors, features.logits, *features.levels)} == {torch.float32}
        for boxes in (*regions.boxes, *(each["boxes"] for each in objects)):
            assert not torch.equal(boxes, boxes.bfloat16().float())
        found.append((anchors, features))
    assert all(torch.equal(*pair) for pair in zip(found[0][0], found[1][0], strict=True))


def test_bad_bodies() -> None:
    with pytest.raises(ValueError, match=r"frozen_stages = 2, but .* of timm/hrnet_w18_small_v2 do not tell"):
        faster_rcnn("timm/hrnet_w18_small_v2", num_classes=3, **NARROW)
    body = faster_rcnn("timm/hrnet_w18_small_v2", num_classes=3, frozen_stages=0, **NARROW)
    assert all(parameter.requires_grad for parameter in body.parameters())
    with pytest.raises(ValueError, match=r"timm/coat_lite_tiny does not take images of 64 x 96 px \(AssertionError: "):
        faster_rcnn("timm/coat_lite_tiny", num_classes=3, **NARROW)
    with pytest.raises(ValueError, match=r"timm/dla46_c has maps of \[\(32, 48\), .* use another network"):
        faster_rcnn("timm/dla46_c", num_classes=3, **NARROW)
    with pytest.raises(ValueError, match=r"no body 'torchvision/resnet51'; nearest: .*torchvision/resnet50"):
        faster_rcnn("torchvision/resnet51", num_classes=3)
    with pytest.raises(ValueError, match=r"timm/test_vit has no features of strides 4, 8, 16, 32"):
        faster_rcnn("timm/test_vit", num_classes=3)
    with pytest.raises(ValueError, match=r"frozen_stages must be from 0 to 5, .* got 6"):
        faster_rcnn("torchvision/resnet18", num_classes=3, frozen_stages=6)
    with pytest.raises(ValueError, match=r"anchor_sizes must be 5 numbers, .* got 2"):
        faster_rcnn("torchvision/resnet18", num_classes=3, anchor_sizes=(8, 16))


def test_first_image_does_not_decide_on_scales(network: FasterRCNN) -> None:
    """A panorama is padded to more than twice its height, and torchvision would take strides to be half as long."""
    first, second = Detector(copy.deepcopy(network)).eval(), Detector(copy.deepcopy(network)).eval()
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        first(torch.zeros(1, 3, 32, 128), [(13, 128)])
        found, expected = first(image, [(64, 96)])[0], second(image, [(64, 96)])[0]
    assert first.plain.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_batch_without_objects_and_proposals(network: FasterRCNN) -> None:
    """The whole of each image is its region; torchvision's loss of boxes is 0 / 0 there."""
    batch, detector = make_batch(), Detector(copy.deepcopy(network), levels="regions").train()
    batch = batch._replace(boxes=(torch.zeros(0, 4),) * 2, labels=(torch.zeros(0, dtype=torch.int64),) * 2)
    detector.plain.rpn.score_thresh = 1.0
    output = detector.train_step(batch)
    assert [each.tolist() for each in output.regions.boxes] == [[[0, 0, 96, 64]], [[0, 0, 90, 80]]]
    assert output.regions.labels.tolist() == [0, 0]
    assert output.losses["loss_box_reg"] == 0
    assert [level.shape[0] for level in output.features.levels] == [2] * 4
    detector.eval()
    regions = detector.sampled(detector.maps(batch.images), batch)
    assert torch.equal(torch.cat(regions.boxes), torch.cat(output.regions.boxes))


class OneMap(nn.Sequential):
    """A body of one map of stride 4, which it returns as a tensor, as torchvision allows."""

    out_channels = 8

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 4, 4))


def one_map(num_classes: int, *, extra: int = 1, name: str = "0", anchors: int = 1, kind: Any = FasterRCNN) -> Any:
    generator = AnchorGenerator(((16, 32),) * anchors, ((1.0,),) * anchors)
    pools = {"box_roi_pool": MultiScaleRoIAlign([name], 7, 2)}
    if kind is not FasterRCNN:
        pools["mask_roi_pool"] = MultiScaleRoIAlign([name], 14, 2)
    return kind(OneMap(), num_classes + extra, rpn_anchor_generator=generator, **pools)


def test_a_map_alone_is_a_pyramid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    plain = build_detector("test_detector:one_map", num_classes=4)
    assert all(module.training for module in plain.modules())
    detector = Detector(plain, levels="maps").train()
    assert (detector.level_names, detector.level_strides) == (("0",), (4,))
    output, batch = detector.train_step(make_batch()), make_batch()
    assert [level.shape for level in output.features.levels] == [(2, 8, 24, 24)]
    assert [near.shape for near in detector.near_objects(detector.maps(batch.images), batch)] == [(2, 1, 24, 24)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"extra": 3}, "has 7 logits of a region, and the data have 4 classes, with the background 5"),
        ({"name": "1"}, "its box_roi_pool reads the map '1', and its backbone returns 0"),
        ({"anchors": 2}, "its anchors are for 2 maps, and its backbone returns 1, 0"),
        ({"kind": MaskRCNN}, "builds a MaskRCNN with a head of masks, and only boxes are trained"),
    ],
)
def test_parts_of_ones_own_that_do_not_fit(
    arguments: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    with pytest.raises(ValueError, match=said):
        build_detector("test_detector:one_map", num_classes=4, model_args=arguments)

"""Detectron2's files and conventions: a detector computes from them what Detectron2 does.

Its network is computed here from its own state dict and pixels, by the rules that its configuration and its
documentation state, in float64.
"""

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import batched_nms, clip_boxes_to_image, roi_align

from support.zoo_files import R50 as BLOCKS
from support.zoo_files import as_pickle, detectron2_state
from unikd_fast.models.detector import Detector, Regions, balanced
from unikd_fast.models.detector_weights import COCO_CLASSES, load_detector_weights
from unikd_fast.models.detectron2 import AlignedRoIAlign, ExactAnchors, L1Proposals, l1_box_loss, to_torchvision
from unikd_fast.models.faster_rcnn import build_detector, faster_rcnn
from unikd_fast.values import DetectionBatch

NARROW: dict[str, Any] = {"out_channels": 8, "representation_size": 16}
R50 = "frcnn/torchvision/resnet50"
THREE = ("dog", "person", "tv")
PIXEL_MEAN = torch.tensor([103.53, 116.28, 123.675], dtype=torch.float64).view(3, 1, 1)  # blue, green, red
ANCHOR_SIDES = (32, 64, 128, 256, 512)


class Detectron2:
    """What Detectron2 computes of one image in eval mode, in float64."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def layer(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        if weight.ndim == 2:
            return F.linear(x, weight, self.state[f"{name}.bias"])
        x = F.conv2d(x, weight, self.state.get(f"{name}.bias"), stride, weight.shape[-1] // 2)
        if f"{name}.norm.weight" not in self.state:
            return x
        w, b, mean, var = (
            self.state[f"{name}.norm.{part}"].view(-1, 1, 1)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / (var + 1e-5).sqrt() * w + b

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """Return p2 to p6 of an image in 0..255, blue first, padded after its mean is taken off."""
        x = pixels - PIXEL_MEAN
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % 32, 0, -height % 32))[None]
        x = F.max_pool2d(self.layer("backbone.bottom_up.stem.conv1", x, 2).relu(), 3, 2, 1)
        bodies = []
        for stage, count in enumerate(BLOCKS, 2):
            for i in range(count):
                name, stride = f"backbone.bottom_up.res{stage}.{i}", 2 if stage > 2 and not i else 1
                shortcut = x if i else self.layer(f"{name}.shortcut", x, stride)
                inner = self.layer(f"{name}.conv1", x, stride).relu()  # the stride is here
                inner = self.layer(f"{name}.conv2", inner).relu()
                x = (self.layer(f"{name}.conv3", inner) + shortcut).relu()
            bodies.append(x)
        found, top = [], None
        for level in (5, 4, 3, 2):
            side = self.layer(f"backbone.fpn_lateral{level}", bodies[level - 2])
            top = side if top is None else side + top.repeat_interleave(2, 2).repeat_interleave(2, 3)
            found.insert(0, self.layer(f"backbone.fpn_output{level}", top))
        return [*found, found[-1][:, :, ::2, ::2]]

    def proposals(self, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
        boxes, scores, levels = [], [], []
        for number, (x, side) in enumerate(zip(maps, ANCHOR_SIDES, strict=True)):
            x = self.layer("proposal_generator.rpn_head.conv", x).relu()
            logits = self.layer("proposal_generator.rpn_head.objectness_logits", x)[0]  # 3, H, W
            deltas = self.layer("proposal_generator.rpn_head.anchor_deltas", x)[0].unflatten(0, (3, 4))
            anchors = detectron2_anchors(side, 2 ** (number + 2), x.shape[-2:])
            score = logits.permute(1, 2, 0).flatten()
            best = score.argsort(descending=True)[:1000]
            scores.append(score[best])
            boxes.append(moved(anchors, deltas.permute(2, 3, 0, 1).reshape(-1, 4))[best])
            levels.append(torch.full_like(scores[-1], number))
        every, score, level = clip_boxes_to_image(torch.cat(boxes), size), torch.cat(scores), torch.cat(levels)
        keep = ((every[:, 2:] - every[:, :2]) > 0).all(1)
        every, score, level = every[keep], score[keep], level[keep]
        return every[batched_nms(every, score, level, 0.7)[:1000]]

    def classified(self, maps: list[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (R, K + 1) with the background last, and deltas (R, K, 4)."""
        regions = []
        for box in boxes:
            area = float((box[2] - box[0]) * (box[3] - box[1]))
            level = min(max(math.floor(4 + math.log2(math.sqrt(area) / 224 + 1e-8)), 2), 5)
            regions.append(roi_align(maps[level - 2], [box[None]], 7, 0.5**level, 0, aligned=True))
        x = self.layer("roi_heads.box_head.fc1", torch.cat(regions).flatten(1)).relu()
        x = self.layer("roi_heads.box_head.fc2", x).relu()
        logits = self.layer("roi_heads.box_predictor.cls_score", x)
        return logits, self.layer("roi_heads.box_predictor.bbox_pred", x).unflatten(1, (-1, 4))

    def detections(self, maps: list[Tensor], proposals: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        logits, deltas = self.classified(maps, proposals)
        scores, classes = logits.softmax(1)[:, :-1], deltas.shape[1]
        weights = torch.tensor([10, 10, 5, 5]).double()
        boxes = moved(proposals.repeat_interleave(classes, 0), deltas.flatten(0, 1) / weights)
        boxes = clip_boxes_to_image(boxes, size).unflatten(0, (-1, classes))
        rows, labels = (scores > 0.05).nonzero(as_tuple=True)
        keep = batched_nms(boxes[rows, labels], scores[rows, labels], labels, 0.5)[:100]
        rows, labels = rows[keep], labels[keep]
        return {"boxes": boxes[rows, labels], "scores": scores[rows, labels], "labels": labels}


def detectron2_anchors(side: float, stride: int, shape: Any) -> Tensor:
    """Return (H W 3, 4): row by row, at a place from wide to high, around multiples of the stride."""
    found = []
    for row, column, ratio in product(range(shape[0]), range(shape[1]), (0.5, 1.0, 2.0)):
        width = side / math.sqrt(ratio)
        half = (width / 2, width * ratio / 2)
        x, y = column * stride, row * stride
        found.append((x - half[0], y - half[1], x + half[0], y + half[1]))
    return torch.tensor(found).double()


def moved(boxes: Tensor, deltas: Tensor) -> Tensor:
    sides, centres = boxes[:, 2:] - boxes[:, :2], (boxes[:, 2:] + boxes[:, :2]) / 2
    centres = centres + deltas[:, :2] * sides
    sides = sides * deltas[:, 2:].clamp(max=math.log(1000 / 16)).exp()
    return torch.cat((centres - sides / 2, centres + sides / 2), 1)


ZOO = {**NARROW, "conventions": "detectron2", "stride_in_1x1": True}


@pytest.fixture(scope="module")
def zoo() -> dict[str, Tensor]:
    return detectron2_state()


@pytest.fixture(scope="module")
def zoo_file(zoo: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> str:
    return as_pickle(zoo, tmp_path_factory.mktemp("zoo") / "R_50_FPN_3x.pkl")


@torch.no_grad()
def test_detectron2(zoo: dict[str, Tensor], zoo_file: str) -> None:
    network = faster_rcnn("torchvision/resnet50", num_classes=80, **ZOO).double()
    load_detector_weights(network, R50, zoo_file, class_names=COCO_CLASSES, role="teacher")
    size = (90, 120)  # of 96 and 128 rows and columns, which is no multiple of 64
    pixels = torch.randint(0, 256, (3, *size), generator=torch.manual_seed(7)).double()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64).view(2, 3, 1, 1)
    image = F.pad((pixels.flip(0) / 255 - mean) / std, (0, 8, 0, 6))[None]
    detector, reference = Detector(network).eval(), Detectron2(zoo)
    maps, expected = detector.maps(image), reference.maps(pixels)
    for ours, theirs in zip(maps.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max()))
    proposals = reference.proposals(expected, size)
    detections = reference.detections(expected, proposals, size)
    assert len(proposals) > 50
    assert len(detections["boxes"]) > 10
    found = network.rpn(torchvision.models.detection.image_list.ImageList(image, [size]), maps)[0][0]
    torch.testing.assert_close(found, proposals, rtol=1e-5, atol=1e-4)  # our anchors are fp32
    logits, _ = reference.classified(expected, proposals)
    regions = Regions([proposals], torch.zeros(len(proposals), dtype=torch.int64))
    features = detector.at(maps, regions, [size])
    torch.testing.assert_close(features.logits, torch.cat((logits[:, -1:], logits[:, :-1]), 1))
    ours, theirs = detector(image, [size])[0], detections
    assert torch.equal(ours["labels"], theirs["labels"] + 1)
    torch.testing.assert_close(ours["scores"], theirs["scores"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=1e-5, atol=1e-3)


def test_detectron2_file_that_torch_saved(zoo: dict[str, Tensor], tmp_path: Path) -> None:
    single = {name: value.float() for name, value in zoo.items()}
    torch.save({"model": single, "iteration": 9}, tmp_path / "model_final.pth")
    files = (as_pickle(single, tmp_path / "model_final.pkl"), str(tmp_path / "model_final.pth"))
    arguments: dict[str, Any] = {"num_classes": 3, "model_args": ZOO, "class_names": THREE}
    one, other = (build_detector(R50, weights=each, **arguments).state_dict() for each in files)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    rows = single["roi_heads.box_predictor.cls_score.weight"]
    found = one["roi_heads.box_predictor.cls_score.weight"]
    assert torch.equal(found, rows[[80, 16, 0, 62]])  # background, dog, person, tv: the ids without the missing ones
    boxes = single["roi_heads.box_predictor.bbox_pred.bias"].view(80, 4)
    found = one["roi_heads.box_predictor.bbox_pred.bias"].view(4, 4)
    assert torch.equal(found, torch.cat((torch.zeros(1, 4), boxes[[16, 0, 62]])))


def test_pixels_as_the_file_states_them() -> None:
    weight = torch.randn(4, 3, 7, 7, dtype=torch.float64)
    mean, std = PIXEL_MEAN.flip(0), torch.tensor([58.395, 57.12, 57.375], dtype=torch.float64)  # ours by 255, red first
    state = {"backbone.bottom_up.stem.conv1.weight": weight, "pixel_mean": mean, "pixel_std": std.view(3, 1, 1)}
    found = to_torchvision(state, "x.pkl", "teacher")
    assert [*found] == ["backbone.body.conv1.weight"]
    torch.testing.assert_close(found["backbone.body.conv1.weight"], weight)
    state["pixel_mean"] = torch.full((3, 1, 1), 127.5)
    with pytest.raises(ValueError, match=r"less a mean of \[127.5, 127.5, 127.5\], and ours are less \[123.675"):
        to_torchvision(state, "x.pkl", "teacher")


def test_detectron2_norms_without_statistics() -> None:
    names = ("stem.conv1", "res4.22.conv2", "res3.0.shortcut")
    state = {f"backbone.bottom_up.{name}.norm.{part}": torch.ones(2) for name in names for part in ("weight", "bias")}
    found = to_torchvision(state, "x.pkl", "teacher")
    for name in ("bn1", "layer3.22.bn2", "layer2.0.downsample.1"):
        parts = [
            found.pop(f"backbone.body.{name}.{each}").tolist() for each in ("running_mean", "running_var", "weight")
        ]
        assert parts == [[0, 0], [1, 1], [1, 1]]
    assert len(found) == 3


def test_detectron2_needs_its_conventions(zoo_file: str) -> None:
    needed = r'set conventions to "detectron2" and stride_in_1x1 to true in teacher.model_args'
    with pytest.raises(ValueError, match=needed):
        build_detector(R50, num_classes=80, model_args=NARROW, weights=zoo_file, role="teacher")
    with pytest.raises(ValueError, match=r"another way; set stride_in_1x1 to true in teacher"):
        options = {**NARROW, "conventions": "detectron2"}
        build_detector(R50, num_classes=80, model_args=options, weights=zoo_file, role="teacher")
    with pytest.raises(ValueError, match=r"conventions must be torchvision or detectron2, got 'caffe'"):
        faster_rcnn("torchvision/resnet18", num_classes=3, conventions="caffe")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"stride_in_1x1 is true, but torchvision/resnet18 is not a ResNet with bott"):
        faster_rcnn("torchvision/resnet18", num_classes=3, stride_in_1x1=True)


# Detectron2's conventions


def test_anchors() -> None:
    anchors = ExactAnchors(((32,), (64,)), ((0.5, 1.0, 2.0),) * 2, (4, 64))
    maps = [torch.zeros(2, 1, 6, 5, dtype=torch.bfloat16), torch.zeros(2, 1, 1, 2)]
    images = torchvision.models.detection.image_list.ImageList(torch.zeros(2, 3, 24, 20), [(24, 20)] * 2)
    found = anchors(images, maps)
    expected = torch.cat([detectron2_anchors(32, 4, (6, 5)), detectron2_anchors(64, 64, (1, 2))]).float()
    assert len(found) == 2
    for each in found:
        torch.testing.assert_close(each, expected, rtol=1e-6, atol=1e-6)


def test_regions_of_levels() -> None:
    generator = torch.manual_seed(4)
    maps = {str(i): torch.randn(2, 3, 64 >> i, 64 >> i, generator=generator) for i in range(4)}
    sides = (0.5, 60.0, 111.9, 112.0, 223.9, 224.0, 447.0, 448.0, 2000.0)
    levels = (0, 0, 0, 1, 1, 2, 2, 3, 3)  # of a square: 224 is the side at p4
    boxes = torch.tensor([[5.0, 3.0, 5 + side, 3 + side] for side in sides])
    pool = AlignedRoIAlign(list(maps), 7, (4, 8, 16, 32))
    found = pool(maps, [boxes[:4], boxes[4:]], [(256, 256)] * 2)
    for row, (box, level) in enumerate(zip(boxes, levels, strict=True)):
        image = maps[str(level)][row >= 4 :][:1]
        assert torch.equal(found[row : row + 1], roi_align(image, [box[None]], 7, 0.25 / 2**level, 0, True))
    assert pool(maps, [boxes[:0]] * 2, [(256, 256)] * 2).shape == (0, 3, 7, 7)


def test_losses_of_boxes() -> None:
    torch.manual_seed(0)
    options = {**NARROW, "norm": "batch", "frozen_stages": 0, "conventions": "detectron2"}
    network = faster_rcnn("timm/test_resnet", num_classes=3, anchor_sizes=(8, 16, 32, 64, 128), **options).train()
    assert isinstance(network.rpn, L1Proposals)
    assert network.rpn.post_nms_top_n() == 1000
    moves, labels = torch.randn(5, 16), (torch.tensor([0, 2]), torch.tensor([3, 0, 0]))
    encoded = (torch.randn(2, 4), torch.randn(3, 4))
    expected = ((moves[1, 8:12] - encoded[0][1]).abs().sum() + (moves[2, 12:] - encoded[1][0]).abs().sum()) / 5
    torch.testing.assert_close(l1_box_loss(moves, labels, encoded), expected)
    # All 12 anchors but the third are sampled, one of them positive; Detectron2 divides by 256 an image.
    logits, deltas, target = torch.randn(12, 1), torch.randn(12, 4), torch.randn(12, 4)
    wanted = torch.zeros(12)
    wanted[1], wanted[2] = 1, -1
    objectness, boxes = network.rpn.compute_loss(logits, deltas, [wanted[:6], wanted[6:]], [target[:6], target[6:]])
    torch.testing.assert_close(boxes, (deltas[1] - target[1]).abs().sum() / 512)
    signs = torch.where(wanted == 1, -1.0, 1.0)
    expected = F.softplus(signs * logits[:, 0])[wanted >= 0].sum() / 512
    torch.testing.assert_close(objectness, expected)


def test_initialisation() -> None:
    torch.manual_seed(0)
    heads = faster_rcnn("timm/test_resnet", num_classes=20, out_channels=8, conventions="detectron2").roi_heads
    for layer, std, largest in (
        (heads.box_head.fc6, math.sqrt(1 / 392), math.sqrt(3 / 392)),  # uniform of variance 1 / fan-in
        (heads.box_head.fc7, math.sqrt(1 / 1024), math.sqrt(3 / 1024)),
        (heads.box_predictor.cls_score, 0.01, 0.06),
        (heads.box_predictor.bbox_pred, 0.001, 0.006),
    ):
        spread = float(layer.weight.detach().std())
        assert spread == pytest.approx(std, rel=0.03)  # six standard errors of 21,504 numbers, or more of them
        assert float(layer.weight.detach().abs().max()) <= largest
        assert not layer.bias.any()


def test_training_by_detectron2s_losses() -> None:
    torch.manual_seed(0)
    options = {**NARROW, "norm": "batch", "frozen_stages": 0, "conventions": "detectron2"}
    network = faster_rcnn("timm/test_resnet", num_classes=3, anchor_sizes=(8, 16, 32, 64, 128), **options)
    detector = Detector(network, levels="regions").train()
    batch = DetectionBatch(
        torch.randn(1, 3, 64, 64),
        torch.tensor([[64, 64]]),
        (torch.tensor([[4.0, 8.0, 40.0, 50.0]]),),
        (torch.tensor([2]),),
        torch.tensor([0]),
        torch.tensor([5]),
    )
    output = detector.train_step(batch)
    heads, maps = network.roi_heads, detector.maps(batch.images)
    heads.fg_bg_sampler.seeds = [5]
    boxes = output.regions.boxes
    _, moves = heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, boxes, [(64, 64)])))
    positive = output.regions.labels == 3
    assert positive.any()
    gt = batch.boxes[0].expand(int(positive.sum()), 4)
    encoded = heads.box_coder.encode([gt], [boxes[0][positive]])[0]
    expected = (moves[positive, 12:] - encoded).abs().sum() / len(positive)
    torch.testing.assert_close(output.losses["loss_box_reg"], expected)
    # The levels of a region hold what the head reads of one of them.
    boxes, levels = balanced(output.regions).boxes, torch.stack(output.features.levels)
    pooled = heads.box_roi_pool(maps, boxes, [(64, 64)])
    assert (levels == pooled).flatten(2).all(2).any(0).all()

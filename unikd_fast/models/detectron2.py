"""Conventions and weights of Detectron2's detectors (Wu et al. 2019) in torchvision's Faster R-CNN.

The facts are those of the models `COCO-Detection/faster_rcnn_R_50_FPN_3x` and `R_101_FPN_3x` of its zoo, whose bodies
began as MSRA's ResNets (He et al. 2016).
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.resnet import Bottleneck
from torchvision.ops import MultiScaleRoIAlign, roi_align

# Of images in [0, 1]: what our loaders normalise by, red first.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PIXEL_MEAN, _PIXEL_STD = (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)  # of the zoo, in 0..255, blue first

_BODY, _PREDICTOR = "backbone.bottom_up.", "roi_heads.box_predictor."
_NAMES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^backbone\.bottom_up\.(stem\.)?", "backbone.body."),
    (r"\.res(\d)\.", lambda found: f".layer{int(found[1]) - 1}."),
    (r"\.conv(\d)\.norm\.", r".bn\1."),
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"\.shortcut\.", ".downsample.0."),
    (r"\.fpn_lateral(\d)\.", lambda found: f".fpn.inner_blocks.{int(found[1]) - 2}.0."),
    (r"\.fpn_output(\d)\.", lambda found: f".fpn.layer_blocks.{int(found[1]) - 2}.0."),
    (r"^proposal_generator\.rpn_head\.conv\.", "rpn.head.conv.0.0."),
    (r"^proposal_generator\.rpn_head\.objectness_logits\.", "rpn.head.cls_logits."),
    (r"^proposal_generator\.rpn_head\.anchor_deltas\.", "rpn.head.bbox_pred."),
    (r"\.box_head\.fc1\.", ".box_head.fc6."),
    (r"\.box_head\.fc2\.", ".box_head.fc7."),
)
# Kept in files of before 2021, and stated by the configuration since.
_SETTINGS = ("pixel_mean", "pixel_std", "cell_anchors")


class ExactAnchors(AnchorGenerator):
    """Anchors of unrounded sides, at the strides of the pyramid.

    torchvision rounds an anchor's sides, and takes the height of the batch over that of the map for the stride, which
    is less than 64 on the coarsest map of a batch whose height is no multiple of 64.

    Args:
        sizes: L x (side in pixels,).
        ratios: L x (heights over widths).
        strides: L strides.
    """

    def __init__(
        self, sizes: tuple[tuple[float, ...], ...], ratios: tuple[tuple[float, ...], ...], strides: Sequence[int]
    ) -> None:
        super().__init__(sizes, ratios)
        self.strides = tuple(strides)

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008 as in torchvision
    ) -> Tensor:
        sides = [(math.sqrt(size**2 / ratio), ratio) for size in scales for ratio in aspect_ratios]
        corners = [(-width / 2, -ratio * width / 2, width / 2, ratio * width / 2) for width, ratio in sides]
        return torch.tensor(corners, dtype=dtype, device=device)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return the anchors (A, 4) of each image, fp32: bf16 does not hold the numbers of an image's pixels."""
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        strides = [[torch.tensor(stride, device=device)] * 2 for stride in self.strides]
        anchors = torch.cat(self.grid_anchors([each.shape[-2:] for each in feature_maps], strides))
        return [anchors] * len(image_list.image_sizes)


class AlignedRoIAlign(MultiScaleRoIAlign):
    """RoIAlign with pixels' centres at one half (Detectron2's ROIAlignV2), as many samples as a bin has pixels.

    The map of a region is the one of Lin et al. 2017, Eq. 1.

    Args:
        featmap_names: names of the maps.
        output_size: height and width of a region's features.
        strides: strides of the maps, powers of 2 that double.
    """

    aligned = True

    def __init__(self, featmap_names: list[str], output_size: int, strides: Sequence[int]) -> None:
        super().__init__(featmap_names, output_size, sampling_ratio=0)
        self.scales = [1 / stride for stride in strides]

    def forward(self, x: Mapping[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Return the features (R, C, H, W) of the regions."""
        maps = [x[name] for name in self.featmap_names]
        every = torch.cat(boxes)
        images = torch.cat([torch.full_like(each[:, :1], number) for number, each in enumerate(boxes)])
        sides = ((every[:, 2] - every[:, 0]) * (every[:, 3] - every[:, 1])).sqrt()
        first = -math.log2(self.scales[0])
        levels = (self.canonical_level + (sides / self.canonical_scale + 1e-8).log2()).floor() - first
        levels = levels.clamp(0, len(maps) - 1)
        regions = torch.cat([images, every], 1)
        pooled = maps[0].new_zeros(regions.shape[0], maps[0].shape[1], *self.output_size)
        for level, (features, scale) in enumerate(zip(maps, self.scales, strict=True)):
            rows = (levels == level).nonzero()[:, 0]
            wide = features.to(torch.promote_types(features.dtype, torch.float32))  # it has no bf16 on CPU
            found = roi_align(wide, regions[rows].to(wide.dtype), self.output_size, scale, 0, aligned=True)
            pooled[rows] = found.to(pooled.dtype)
        return pooled


class L1Proposals(RegionProposalNetwork):
    """Proposals with the losses of Detectron2: L1 of the boxes, and both over the number of anchors to be sampled.

    torchvision's are a smooth L1 loss with beta 1/9, and both over the number that was sampled.

    Args:
        plain: torchvision's, whose parts it takes over.
    """

    def __init__(self, plain: RegionProposalNetwork) -> None:
        super().__init__(
            plain.anchor_generator,
            plain.head,
            plain.proposal_matcher.high_threshold,
            plain.proposal_matcher.low_threshold,
            plain.fg_bg_sampler.batch_size_per_image,
            plain.fg_bg_sampler.positive_fraction,
            plain._pre_nms_top_n,
            plain._post_nms_top_n,
            plain.nms_thresh,
            plain.score_thresh,
        )

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the losses of objectness and boxes; see torchvision."""
        positive, negative = (torch.cat(each).nonzero()[:, 0] for each in self.fg_bg_sampler(labels))
        every, wanted = torch.cat((positive, negative)), torch.cat(labels)
        count = self.fg_bg_sampler.batch_size_per_image * len(labels)
        found = F.binary_cross_entropy_with_logits(objectness.flatten()[every], wanted[every], reduction="sum")
        boxes = F.l1_loss(pred_bbox_deltas[positive], torch.cat(regression_targets)[positive], reduction="sum")
        return found / count, boxes / count


def initialise(heads: RoIHeads) -> None:
    """Initialise the box head as Detectron2 does: uniformly by the fan-in, and its last layers near 0.

    The rest of the detector begins alike there and in torchvision.
    """
    for layer in (heads.box_head.fc6, heads.box_head.fc7):
        nn.init.kaiming_uniform_(layer.weight, a=1)
    for layer, std in ((heads.box_predictor.cls_score, 0.01), (heads.box_predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=std)
    for layer in (*heads.box_head.children(), *heads.box_predictor.children()):
        nn.init.zeros_(layer.bias)


def l1_box_loss(moves: Tensor, labels: Sequence[Tensor], encoded: Sequence[Tensor]) -> Tensor:
    """Return the L1 loss of the boxes of regions over their number R, as Detectron2 does.

    Args:
        moves: (R, 4 (K + 1)).
        labels: N x (r,) int64: 0 for background, class + 1 otherwise.
        encoded: N x (r, 4), what they should be.
    """
    wanted = torch.cat([*labels])
    rows = (wanted > 0).nonzero()[:, 0]
    found = moves.unflatten(1, (-1, 4))[rows, wanted[rows]]
    return F.l1_loss(found, torch.cat([*encoded])[rows], reduction="sum") / max(len(wanted), 1)


def move_strides(body: nn.Module) -> None:
    """Move the stride of every bottleneck from its 3x3 to its first 1x1 convolution, as in MSRA's ResNets."""
    for block in body.modules():
        if isinstance(block, Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


def has_stride_in_1x1(body: nn.Module) -> bool | None:
    """Return whether the bottlenecks have their stride in the first 1x1 convolution, or None if there are none."""
    blocks = [block for block in body.modules() if isinstance(block, Bottleneck)]
    return any(block.conv1.stride != (1, 1) for block in blocks) if blocks else None


def is_detectron2(state: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict has Detectron2's names."""
    return any(name.startswith(_BODY) for name in state)


def absorbs_deviation(state: Mapping[str, Tensor]) -> bool:
    """Return whether pixels are not divided by their deviation, as for the bodies of MSRA."""
    return bool((_pixel_std(state) == 1).all())


def to_torchvision(state: Mapping[str, Tensor], path: Any, role: str) -> dict[str, Tensor]:
    """Return a state dict of Detectron2 under torchvision's names, for images as our loaders normalise them.

    The background, last there, becomes the first row of the classifier; its four rows of boxes are zeros, and are not
    read. With an image in [0, 1] z = (x - m) / s here and u = (255 x - 255 m) / s' there, u = (255 s / s') z, which
    the first convolution takes in, with its channels from blue, green, red to red, green, blue: that is exact at the
    border, too, as the padding is 0 in both.

    Raises:
        ValueError: the file states another mean of pixels.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if any(each in name for each in _SETTINGS):
            continue
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        found[name] = tensor
    for name in [each for each in found if re.search(r"\.(bn\d|downsample\.1)\.weight$", each)]:
        # Files of 2019 have none: what a frozen one computes is weight * x + bias.
        prefix, weight = name.removesuffix("weight"), found[name]
        found.setdefault(f"{prefix}running_mean", torch.zeros_like(weight))
        found.setdefault(f"{prefix}running_var", torch.ones_like(weight))
    first = "backbone.body.conv1.weight"
    if first in found:
        found[first] = _of_normalised(found[first], state, path, role)
    for name in [each for each in found if each.startswith(f"{_PREDICTOR}cls_score.")]:
        found[name] = torch.cat([found[name][-1:], found[name][:-1]])
    for name in [each for each in found if each.startswith(f"{_PREDICTOR}bbox_pred.")]:
        found[name] = torch.cat([torch.zeros_like(found[name][:4]), found[name]])
    return found


def _pixel_std(state: Mapping[str, Tensor]) -> Tensor:
    return state.get("pixel_std", torch.tensor(_PIXEL_STD)).double().flatten()


def _of_normalised(weight: Tensor, state: Mapping[str, Tensor], path: Any, role: str) -> Tensor:
    """Return the first convolution (C, 3, 7, 7) for red, green and blue, each less its mean and over its deviation."""
    mean, std = state.get("pixel_mean", torch.tensor(_PIXEL_MEAN)).double().flatten(), _pixel_std(state)
    is_blue_first = bool(mean[0] < mean[-1])  # ImageNet's red is its brightest channel
    if is_blue_first:
        weight, mean, std = weight.flip(1), mean.flip(0), std.flip(0)
    if not torch.allclose(mean, 255 * torch.tensor(_MEAN, dtype=torch.float64), rtol=0, atol=0.01):
        raise ValueError(
            f"load_weights: the {role}'s checkpoint {path} is for images less a mean of {mean.tolist()}, and ours are "
            f"less {[255 * each for each in _MEAN]}, so that its padding would have another colour; use a file that "
            "was trained with ImageNet's mean"
        )
    scale = 255 * torch.tensor(_STD, dtype=torch.float64) / std
    return (weight.double() * scale[:, None, None]).to(weight.dtype)

"""A Faster R-CNN run part by part, so that what a method compares can be read between the parts.

A region is a sample: the student proposes regions, and both networks pool their features and classify them there.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import box_iou, roi_align

from unikd_fast.models.detectron2 import AlignedRoIAlign, L1Proposals, l1_box_loss
from unikd_fast.values import DetectionBatch, Features

Maps = dict[str, Tensor]
Sizes = list[tuple[int, int]]


class Regions(NamedTuple):
    """Regions of a batch that the box head is trained on, R = Σ r over its images."""

    boxes: list[Tensor]  # N x (r, 4) fp32
    labels: Tensor  # (R,) int64: 0 for background, class + 1 otherwise


class DetectorOutput(NamedTuple):
    """What the student's pass over a batch gives in training."""

    regions: Regions
    features: Features  # logits (R, K + 1), and levels
    losses: dict[str, Tensor]  # of proposals and boxes; the regions' classes are the method's


FEATURE_REGIONS = 128
"""At most so many regions of an image are compared by their features: 26 MB a network in fp32, for 256 channels."""


def balanced(regions: Regions) -> Regions:
    """Return the regions at which features are compared: in each image as many of background as of objects.

    Of the regions that a detector is trained on three quarters and more are background, whose features would decide
    alone.
    """
    boxes, labels = [], []
    of_image = regions.labels.split([len(each) for each in regions.boxes])
    for own_boxes, own in zip(regions.boxes, of_image, strict=True):
        objects = _spread((own > 0).nonzero()[:, 0], FEATURE_REGIONS // 2)
        background = _spread((own == 0).nonzero()[:, 0], max(len(objects), 1))
        rows = torch.cat([objects, background])
        boxes.append(own_boxes[rows])
        labels.append(own[rows])
    return Regions(boxes, torch.cat(labels))


def _spread(rows: Tensor, most: int) -> Tensor:
    """Return at most so many rows, evenly spread."""
    if len(rows) <= most:
        return rows
    return rows[torch.arange(most, device=rows.device) * len(rows) // most]


class SeededSampler:
    """Chooses regions as torchvision's `BalancedPositiveNegativeSampler`, from a generator of each image's own.

    So a run repeats, whatever the number of its processes.

    Args:
        batch_size_per_image: regions of an image.
        positive_fraction: largest share of those that hold an object.

    Attributes:
        seeds: seed of each image of the batch.
    """

    def __init__(self, batch_size_per_image: int, positive_fraction: float) -> None:
        self.batch_size_per_image, self.positive_fraction = batch_size_per_image, positive_fraction
        self.seeds: Sequence[int] = ()

    def __call__(self, matched: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return masks of the positive and of the negative regions that are chosen in each image.

        Args:
            matched: N x (r,): above 0 for an object, 0 for none, -1 for neither.
        """
        chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
        for labels, seed in zip(matched, self.seeds, strict=True):
            generator = torch.Generator(labels.device).manual_seed(seed)
            most = self.batch_size_per_image
            positive = _some(labels >= 1, int(most * self.positive_fraction), generator)
            negative = _some(labels == 0, most - int(positive.sum()), generator)
            chosen[0].append(positive)
            chosen[1].append(negative)
        return chosen


def _some(mask: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Return a mask of at most so many of the places of another."""
    places = mask.nonzero()[:, 0]
    order = torch.randperm(len(places), generator=generator, device=mask.device)[:most]
    return torch.zeros_like(mask).index_fill_(0, places[order], True)


class Detector(nn.Module):
    """Runs the parts of a `FasterRCNN`.

    Args:
        plain: the network; its samplers are replaced by `SeededSampler`.
        levels: levels of `Features`: "maps", those of the pyramid, L x (N, C, H_l, W_l); "regions": pooled from each of
            them at the `balanced` regions, L x (R', C, 7, 7); or "none".
    """

    def __init__(self, plain: FasterRCNN, *, levels: Literal["none", "maps", "regions"] = "none") -> None:
        super().__init__()
        self.plain, self.levels = plain, levels
        for owner in (plain.rpn, plain.roi_heads):
            given = owner.fg_bg_sampler
            owner.fg_bg_sampler = SeededSampler(given.batch_size_per_image, given.positive_fraction)

    @property
    def level_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Return the shape (C, H, W) of each level: that of a region, or (C, 0, 0) of maps, as large as the images."""
        pool, channels = self.plain.roi_heads.box_roi_pool, self.plain.backbone.out_channels
        if self.levels == "regions":
            return tuple((channels, *pool.output_size) for _ in pool.featmap_names)
        return ((channels, 0, 0),) * len(self.level_names)

    @property
    def level_names(self) -> tuple[str, ...]:
        """Return the names of the levels, from fine to coarse: maps that regions are pooled from, or all."""
        pooled = tuple(self.plain.roi_heads.box_roi_pool.featmap_names)
        return {"regions": pooled, "maps": (*pooled, "pool"), "none": ()}[self.levels]

    @property
    def norms_before_activation(self) -> tuple[None, ...]:
        """Return None for each level: none is computed by a BatchNorm."""
        return (None,) * len(self.level_names)

    @property
    def embedding_width(self) -> None:
        """Return None: a detector has no input of a classifier of the whole image."""
        return

    def maps(self, images: Tensor) -> Maps:
        """Return the maps of the pyramid by name, finest first."""
        maps: Maps = self.plain.backbone(images)
        return maps

    def train_step(self, batch: DetectionBatch) -> DetectorOutput:
        """Return what training needs of a batch; the network must be in training mode."""
        maps, sizes = self.maps(batch.images), sizes_of(batch)
        heads, targets = self.plain.roi_heads, targets_of(batch)
        for owner in (self.plain.rpn, heads):
            owner.fg_bg_sampler.seeds = batch.seeds.tolist()
        proposals, losses = self.plain.rpn(ImageList(batch.images, sizes), maps, targets)
        boxes, _, labels, encoded = heads.select_training_samples(proposals, targets)
        logits, moves = self._classified(maps, boxes, sizes)
        if isinstance(self.plain.rpn, L1Proposals):
            box_loss = l1_box_loss(moves, labels, encoded)
        else:  # the other half, the cross-entropy of the classes, is the method's
            box_loss = fastrcnn_loss(logits.detach(), moves, labels, encoded)[1]
        regions = Regions(boxes, torch.cat(labels))
        features = self._features(maps, regions, logits)
        return DetectorOutput(regions, features, {**losses, "loss_box_reg": box_loss})

    def sampled(self, maps: Maps, batch: DetectionBatch) -> Regions:
        """Return `balanced` regions, chosen as in training from those that this network proposes in eval mode."""
        proposals, _ = self.plain.rpn(ImageList(batch.images, sizes_of(batch)), maps)
        heads, targets = self.plain.roi_heads, targets_of(batch)
        heads.fg_bg_sampler.seeds = batch.seeds.tolist()
        boxes, _, labels, _ = heads.select_training_samples(proposals, targets)
        return balanced(Regions(boxes, torch.cat(labels)))

    def at(self, maps: Maps, regions: Regions, sizes: Sizes) -> Features:
        """Return logits (R, K + 1) at these regions, and levels."""
        logits, _ = self._classified(maps, regions.boxes, sizes)
        return self._features(maps, regions, logits)

    def near_objects(self, maps: Maps, batch: DetectionBatch) -> tuple[Tensor, ...]:
        """Return the places L x (N, 1, H_l, W_l) of anchors that overlap an object more than half as much as the best.

        The best anchor of an image for each of its objects; the overlap is the IoU (Wang et al. 2019).
        """
        generator, levels = self.plain.rpn.anchor_generator, [*maps.values()]
        counts = [
            level[0, 0].numel() * anchors
            for level, anchors in zip(levels, generator.num_anchors_per_location(), strict=True)
        ]
        near = []
        for boxes, anchors in zip(
            batch.boxes, generator(ImageList(batch.images, sizes_of(batch)), levels), strict=True
        ):
            overlap = box_iou(boxes, anchors)
            near.append((overlap > overlap.amax(dim=1, keepdim=True) / 2).any(dim=0))
        return tuple(
            rows.view(len(near), *level.shape[-2:], -1).any(dim=-1)[:, None]
            for level, rows in zip(levels, torch.stack(near).split(counts, dim=1), strict=True)
        )

    def forward(self, images: Tensor, sizes: Sizes) -> list[dict[str, Tensor]]:
        """Return the detections of each image, in eval mode: boxes (n, 4) in it, scores and labels from 1, (n,)."""
        maps = self.maps(images)
        proposals, _ = self.plain.rpn(ImageList(images, sizes), maps)
        detections: list[dict[str, Tensor]] = self.plain.roi_heads(maps, proposals, sizes)[0]
        return detections

    def _classified(self, maps: Maps, boxes: list[Tensor], sizes: Sizes) -> tuple[Tensor, Tensor]:
        heads = self.plain.roi_heads
        logits, moves = heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, boxes, sizes)))
        return logits, moves

    def _features(self, maps: Maps, regions: Regions, logits: Tensor) -> Features:
        levels = tuple(maps[name] for name in self.level_names)
        if self.levels == "regions":
            pool, boxes = self.plain.roi_heads.box_roi_pool, balanced(regions).boxes
            aligned = isinstance(pool, AlignedRoIAlign)
            levels = tuple(
                roi_align(level.float(), boxes, pool.output_size, scale, pool.sampling_ratio, aligned)
                for level, scale in zip(levels, pool.scales, strict=True)
            )
        # Those of a pyramid are sums of convolutions, without an activation.
        return Features(levels, logits, before_activation=levels)


def sizes_of(batch: DetectionBatch) -> Sizes:
    """Return height and width of each image of a batch, as torchvision takes them."""
    return [(int(height), int(width)) for height, width in batch.sizes.tolist()]


def targets_of(batch: DetectionBatch) -> list[dict[str, Tensor]]:
    """Return boxes and labels of each image of a batch, as torchvision takes them: 0 is the background."""
    return [{"boxes": boxes, "labels": labels + 1} for boxes, labels in zip(batch.boxes, batch.labels, strict=True)]

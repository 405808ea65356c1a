"""A Faster R-CNN run part by part, so that what a method compares can be read between the parts.

A region is a sample: the student proposes regions, and both networks pool their features and classify them there.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import box_iou, roi_align
from torchvision.ops.poolers import _setup_scales

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


DENSE_PIXELS = 1024
"""On a CPU maps of at most so many pixels are pooled by products of matrices; see `region_features`."""


def region_features(
    level: Tensor, boxes: list[Tensor], size: tuple[int, int], scale: float, samples: int, aligned: bool
) -> Tensor:
    """Return RoIAlign of a map at the boxes of each image, (R, C, *size); arguments as for torchvision's `roi_align`.

    The samples of a bin are a grid and their bilinear weights products, so that RoIAlign is A_y F A_xᵀ for each region
    and channel. On a CPU and small maps that is faster than `roi_align`, above all backwards, and differs by rounding.
    """
    _, channels, height, width = level.shape
    if samples <= 0 or level.device.type != "cpu" or height * width > DENSE_PIXELS:
        return roi_align(level, boxes, size, scale, samples, aligned)
    every = torch.cat(boxes)
    from_y, from_x = (  # (R, bins, pixels)
        _bin_weights(every[:, axis], every[:, axis + 2], scale, bins, samples, aligned, pixels)
        for axis, bins, pixels in ((1, size[0], height), (0, size[1], width))
    )
    counts = [len(each) for each in boxes]
    images = level.permute(0, 3, 2, 1).flatten(2)  # (N, W, H C)
    pooled = []
    with torch.autocast("cpu", enabled=False):  # as for `roi_align`
        for y, x, image in zip(from_y.split(counts), from_x.split(counts), images, strict=True):
            columns = (x.flatten(0, 1) @ image).view(len(x), size[1], height, channels)
            pooled.append(y[:, None] @ columns)  # (r, bins of x, bins of y, C)
    return torch.cat(pooled).permute(0, 3, 2, 1).contiguous()


def _bin_weights(
    low: Tensor, high: Tensor, scale: float, bins: int, samples: int, aligned: bool, pixels: int
) -> Tensor:
    """Return what each pixel of an axis adds to each bin, (R, bins, pixels), as `roi_align` weighs them."""
    shift = 0.5 if aligned else 0.0
    start, end = low * scale - shift, high * scale - shift
    length = end - start if aligned else (end - start).clamp(min=1.0)
    places = (torch.arange(bins * samples, dtype=low.dtype, device=low.device) + 0.5) / (bins * samples)
    at = start[:, None] + places * length[:, None]
    inside = (at >= -1) & (at <= pixels)
    away = at.clamp(0, pixels - 1)[..., None] - torch.arange(pixels, dtype=low.dtype, device=low.device)
    weights = (1 - away.abs()).clamp(min=0) * inside[..., None]
    return weights.unflatten(-2, (bins, samples)).mean(-2)


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


def maps_of(plain: FasterRCNN, images: Tensor) -> Maps:
    """Return the maps of a network's backbone by name; one alone is named as torchvision names it."""
    maps: Maps | Tensor = plain.backbone(images)
    return {"0": maps} if isinstance(maps, Tensor) else maps


TRIAL = (64, 96)
"""Height and width in pixels of an image on which a network is tried."""


@torch.no_grad()
def map_strides(plain: FasterRCNN) -> dict[str, int]:
    """Return the strides of a network's maps by name, in its order, from a trial."""
    modes = [(module, module.training) for module in plain.modules()]
    maps = maps_of(plain.eval(), next(plain.parameters()).new_zeros(1, 3, *TRIAL))
    for module, training in modes:
        module.training = training
    return {name: round(TRIAL[0] / each.shape[-2]) for name, each in maps.items()}


class Detector(nn.Module):
    """Runs the parts of a `FasterRCNN`.

    Args:
        plain: the network; its samplers are replaced by `SeededSampler`.
        levels: levels of `Features`: "maps", those of the pyramid, L x (N, C, H_l, W_l); "regions": pooled from each of
            them at the `balanced` regions, L x (R', C, 7, 7); or "none".
        level_names: which of the maps, from fine to coarse. If None, all; of regions those that the box head reads.

    Raises:
        ValueError: there is not a map of such a name.
    """

    def __init__(
        self,
        plain: FasterRCNN,
        *,
        levels: Literal["none", "maps", "regions"] = "none",
        level_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.plain, self.levels = plain, levels
        pooled = tuple(plain.roi_heads.box_roi_pool.featmap_names)
        strides = map_strides(plain) if levels == "maps" else {}
        known = {"regions": pooled, "maps": tuple(strides), "none": ()}[levels]
        self.level_names = known if level_names is None or levels == "none" else tuple(level_names)
        """Names of the levels, from fine to coarse."""
        in_order = tuple(name for name in known if name in self.level_names)
        if self.level_names != in_order or (known and not in_order):
            raise ValueError(f"the levels of {levels} are {', '.join(known)}, from fine to coarse, got {level_names}")
        self.level_strides = tuple(strides[name] for name in self.level_names if strides)
        """Strides of the levels, if they are maps."""
        for owner in (plain.rpn, plain.roi_heads):
            given = owner.fg_bg_sampler
            owner.fg_bg_sampler = SeededSampler(given.batch_size_per_image, given.positive_fraction)
        plain.rpn.anchor_generator.register_forward_pre_hook(_as_if_wide)
        for predictor in (plain.rpn.head, plain.roi_heads.box_predictor):
            predictor.register_forward_hook(_wide)

    @property
    def level_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Return the shape (C, H, W) of each level: that of a region, or (C, 0, 0) of maps, as large as the images."""
        pool, channels = self.plain.roi_heads.box_roi_pool, self.plain.backbone.out_channels
        height, width = pool.output_size if self.levels == "regions" else (0, 0)
        return ((channels, height, width),) * len(self.level_names)

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
        maps = maps_of(self.plain, images)
        pool = self.plain.roi_heads.box_roi_pool
        if pool.scales is None:
            # Of the padded images, as the maps are. torchvision takes the images' own size, and keeps what it finds
            # for the first batch: a first image that is padded by half of its height would put regions at twice
            # their size on every map of every later one.
            read = [maps[name] for name in pool.featmap_names]
            size = (images.shape[-2], images.shape[-1])
            pool.scales, pool.map_levels = _setup_scales(read, [size], pool.canonical_scale, pool.canonical_level)
        return maps

    def train_step(self, batch: DetectionBatch) -> DetectorOutput:
        """Return what training needs of a batch; the network must be in training mode."""
        maps, sizes = self.maps(batch.images), sizes_of(batch)
        heads, targets = self.plain.roi_heads, targets_of(batch)
        for owner in (self.plain.rpn, heads):
            owner.fg_bg_sampler.seeds = batch.seeds.tolist()
        proposals, losses = self.plain.rpn(ImageList(batch.images, sizes), maps, targets)
        proposals = _of_every_image(proposals, targets, sizes)
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
        sizes, heads, targets = sizes_of(batch), self.plain.roi_heads, targets_of(batch)
        proposals, _ = self.plain.rpn(ImageList(batch.images, sizes), maps)
        proposals = _of_every_image(proposals, targets, sizes)
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
        places = {
            name: rows.view(len(near), *level.shape[-2:], -1).any(dim=-1)[:, None]
            for (name, level), rows in zip(maps.items(), torch.stack(near).split(counts, dim=1), strict=True)
        }
        return tuple(places[name] for name in self.level_names)

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
            scales = dict(zip(pool.featmap_names, pool.scales, strict=True))
            levels = tuple(
                region_features(maps[name].float(), boxes, pool.output_size, scales[name], pool.sampling_ratio, aligned)
                for name in self.level_names
            )
        # Those of a pyramid are sums of convolutions, without an activation.
        return Features(levels, logits, before_activation=levels)


def _of_every_image(proposals: list[Tensor], targets: list[dict[str, Tensor]], sizes: Sizes) -> list[Tensor]:
    """Return the proposals (r, 4) of each image: the whole of it, where it has neither a proposal nor an object.

    Otherwise a batch could be without regions, whose mean loss torchvision has as NaN.
    """
    return [
        own if len(own) or len(target["boxes"]) else own.new_tensor([[0, 0, width, height]])
        for own, target, (height, width) in zip(proposals, targets, sizes, strict=True)
    ]


# Half precision does not hold the numbers of an image's pixels: in bf16, 1000 is followed by 1008. torchvision makes
# anchors of the dtype of the maps, and boxes of that of the moves that are predicted for them.


def _as_if_wide(anchors: nn.Module, inputs: tuple[ImageList, list[Tensor]]) -> tuple[ImageList, list[Tensor]]:
    """Pass on maps of the same shapes, in at least fp32: a generator of anchors reads nothing else of them."""
    images, maps = inputs
    wide = (each.new_empty((), dtype=torch.promote_types(each.dtype, torch.float32)) for each in maps)
    return images, [number.expand(each.shape) for number, each in zip(wide, maps, strict=True)]


def _wide(predictor: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Any, Any]) -> tuple[Any, Any]:
    """Return logits and moves, a tensor or a list of each, in at least fp32."""
    logits, moves = (
        [each.to(torch.promote_types(each.dtype, torch.float32)) for each in output]
        if isinstance(output, list)
        else output.to(torch.promote_types(output.dtype, torch.float32))
        for output in outputs
    )
    return logits, moves


def sizes_of(batch: DetectionBatch) -> Sizes:
    """Return height and width of each image of a batch, as torchvision takes them."""
    return [(int(height), int(width)) for height, width in batch.sizes.tolist()]


def targets_of(batch: DetectionBatch) -> list[dict[str, Tensor]]:
    """Return boxes and labels of each image of a batch, as torchvision takes them: 0 is the background."""
    return [{"boxes": boxes, "labels": labels + 1} for boxes, labels in zip(batch.boxes, batch.labels, strict=True)]

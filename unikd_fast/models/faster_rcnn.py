"""Faster R-CNN with a feature pyramid (Ren et al. 2015, Lin et al. 2017) on bodies of torchvision and timm.

The networks are torchvision's `FasterRCNN` and their weights have its layout; what is ours is the choice of a body,
whose features of strides 4, 8, 16 and 32 feed the pyramid.
"""

import difflib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from unikd_fast.models.build import constructed, own_network
from unikd_fast.models.detector import TRIAL, maps_of
from unikd_fast.models.detector_weights import load_detector_weights
from unikd_fast.models.detectron2 import AlignedRoIAlign, ExactAnchors, L1Proposals, initialise, move_strides

PYRAMID = ("0", "1", "2", "3")
"""torchvision's names of the levels of strides 4, 8, 16 and 32, from which regions are pooled."""
STRIDES = (4, 8, 16, 32)
_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
BODIES = tuple(f"torchvision/{name}" for name in (*_RESNETS, "mobilenet_v2"))
_POOLED = 7  # height and width of a region's features
# Of MobileNetV2: first and last block of the stages of 24, 32, 96 and 320 channels, whose features are mdistiller's.
_MOBILENET_STARTS, _MOBILENET_ENDS = ("2", "4", "7", "14"), {"3": 24, "6": 32, "13": 96, "17": 320}


def faster_rcnn(
    body: str,
    *,
    num_classes: int,
    norm: Literal["frozen", "batch"] = "frozen",
    frozen_stages: int = 2,
    out_channels: int = 256,
    representation_size: int = 1024,
    anchor_sizes: Sequence[float] = (32, 64, 128, 256, 512),
    conventions: Literal["torchvision", "detectron2"] = "torchvision",
    stride_in_1x1: bool = False,
    **arguments: Any,
) -> FasterRCNN:
    """Build a Faster R-CNN with random weights.

    Args:
        body: "torchvision/<name>" (`BODIES`), or "timm/<name>" with features of strides 4 to 32.
        num_classes: number of classes K, without the background.
        norm: "frozen": BatchNorms of the body with fixed statistics and weights, for a body that was trained; "batch":
            BatchNorms that are trained, for one that was not.
        frozen_stages: stages of the body that are not trained, the stem first (Detectron2's FREEZE_AT).
        out_channels: channels of the pyramid.
        representation_size: width of the two layers of the box head.
        anchor_sizes: side in pixels of the anchors on each level of the pyramid, strides 4 to 64.
        conventions: "detectron2": anchors of unrounded sides, RoIAlign with pixels' centres at one half, L1 losses of
            boxes, 1,000 proposals an image in training, and its initialisation. Networks of its zoo need them, and
            students that are compared with students of it.
        stride_in_1x1: whether the bottlenecks of a ResNet have their stride in the first 1x1 convolution, as those of
            Detectron2's zoo, and not in the 3x3, as torchvision's.
        arguments: of torchvision's `FasterRCNN`.

    Raises:
        ValueError: there is no such body, it has no such features or takes images of one size alone, more stages are
            frozen than it has or shows, there is not one anchor size a level, there are no such conventions, or the
            body has no bottlenecks.

    Example:
        >>> faster_rcnn("torchvision/resnet18", num_classes=80).roi_heads.box_predictor.cls_score.out_features
        81
    """
    source, _, name = body.partition("/")
    if source == "timm" and name:
        backbone, starts = _timm_backbone(name, out_channels, frozen=norm == "frozen")
    elif body in BODIES:
        backbone, starts = _torchvision_backbone(name, out_channels, frozen=norm == "frozen")
    else:
        near = ", ".join(difflib.get_close_matches(body, BODIES, n=3)) or "none"
        raise ValueError(
            f"faster_rcnn: no body {body!r}; nearest: {near}; give one of {', '.join(BODIES)} or timm/<name>"
        )
    _freeze(backbone.get_submodule("body"), starts, frozen_stages, body)
    if len(anchor_sizes) != len(STRIDES) + 1:
        raise ValueError(
            f"faster_rcnn: anchor_sizes must be {len(STRIDES) + 1} numbers, one for each level of strides 4 to 64, got "
            f"{len(anchor_sizes)}"
        )
    if stride_in_1x1:
        if body not in ("torchvision/resnet50", "torchvision/resnet101"):
            raise ValueError(
                f"faster_rcnn: stride_in_1x1 is true, but {body} is not a ResNet with bottlenecks; remove it"
            )
        move_strides(backbone.get_submodule("body"))
    sizes, ratios = tuple((size,) for size in anchor_sizes), ((0.5, 1.0, 2.0),) * len(anchor_sizes)
    if conventions == "detectron2":
        anchors: AnchorGenerator = ExactAnchors(sizes, ratios, (*STRIDES, 2 * STRIDES[-1]))
        pool: MultiScaleRoIAlign = AlignedRoIAlign(list(PYRAMID), _POOLED, STRIDES)
        arguments = {"rpn_post_nms_top_n_train": 1000, **arguments}
    elif conventions == "torchvision":
        anchors = AnchorGenerator(sizes, ratios)
        pool = MultiScaleRoIAlign(list(PYRAMID), output_size=_POOLED, sampling_ratio=2)
    else:
        raise ValueError(f"faster_rcnn: conventions must be torchvision or detectron2, got {conventions!r}")
    network = FasterRCNN(
        backbone,
        rpn_anchor_generator=anchors,
        box_roi_pool=pool,
        box_head=TwoMLPHead(out_channels * _POOLED**2, representation_size),
        box_predictor=FastRCNNPredictor(representation_size, num_classes + 1),
        **arguments,
    )
    if conventions == "detectron2":
        network.rpn = L1Proposals(network.rpn)
        initialise(network.roi_heads)
    return network


def build_detector(
    name: str,
    *,
    num_classes: int,
    model_args: Mapping[str, Any] | None = None,
    weights: str | None = None,
    weights_key: str | None = None,
    class_names: Sequence[str] | None = None,
    new_predictor: bool = False,
    role: str = "model",
) -> FasterRCNN:
    """Build a detector by its name in a configuration.

    Args:
        name: "frcnn/<body>" of `faster_rcnn`, or "<module>:<name>" for a function of one's own that returns a
            `FasterRCNN`.
        num_classes: number of classes K, without the background.
        model_args: further arguments of the function. If None, there are none.
        weights: path of a file, or an identifier; see `load_detector_weights`. If None or "random", the weights are
            random.
        weights_key: key of the state dict in a file that holds several.
        class_names: K names of the data's classes, by which those of COCO's weights are found. If None, the classes of
            the weights are taken to be the data's, in that order.
        new_predictor: whether weights for other classes are accepted, or of the body alone: what they lack is then
            random, and the log says so.
        role: name of the network in messages, "teacher" or "student".

    Raises:
        ValueError: there is no such network, it does not take an argument, or the weights are of another one.
        FileNotFoundError: the file does not exist.
        ConnectionError: the weights could not be downloaded.

    Example:
        >>> teacher = build_detector("frcnn/torchvision/resnet50", num_classes=80, weights="r50.pth", role="teacher")
    """
    source, _, body = name.partition("/")
    if ":" in name:
        build: Callable[..., Any] = own_network(name, role)
    elif source == "frcnn" and body:
        build = partial(faster_rcnn, body)
    else:
        raise ValueError(
            f"build_model: no detector {name!r} for the {role}; give frcnn/torchvision/<body>, frcnn/timm/<body> or "
            "your own <module>:<function>"
        )
    network = constructed(build, {"num_classes": num_classes, **(model_args or {})}, name, role)
    if not isinstance(network, FasterRCNN):
        raise ValueError(
            f"build_model: {role}.model = {name} builds a {type(network).__name__}, and not a torchvision FasterRCNN; "
            "name a function that returns one"
        )
    if ":" in name:
        _check_own(network, name, num_classes, role)
    if weights is not None and weights != "random":
        load_detector_weights(
            network,
            name,
            weights,
            key=weights_key,
            class_names=class_names,
            new_predictor=new_predictor,
            role=role,
        )
    return network


@torch.no_grad()
def _check_own(network: FasterRCNN, name: str, num_classes: int, role: str) -> None:
    """Refuse a detector of one's own that does not run, or whose parts do not fit each other or the data.

    Raises:
        ValueError: it is one.
    """
    what, heads = f"build_model: {role}.model = {name}", network.roi_heads
    if heads.has_mask() or heads.has_keypoint():
        kind = "masks" if heads.has_mask() else "keypoints"
        raise ValueError(
            f"{what} builds a {type(network).__name__} with a head of {kind}, and only boxes are trained; name a "
            "function that returns a FasterRCNN without it"
        )
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        maps = maps_of(network, torch.zeros(1, 3, *TRIAL))
    except Exception as error:  # whatever one's own network raises
        height, width = TRIAL
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{what}: its backbone does not take images of {height} x {width} px ({said}); correct it"
        ) from error
    pool = heads.box_roi_pool
    if lacking := [each for each in pool.featmap_names if each not in maps]:
        raise ValueError(
            f"{what}: its box_roi_pool reads the map {lacking[0]!r}, and its backbone returns {', '.join(maps)}; "
            "correct featmap_names"
        )
    if (levels := len(network.rpn.anchor_generator.num_anchors_per_location())) != len(maps):
        raise ValueError(
            f"{what}: its anchors are for {levels} maps, and its backbone returns {len(maps)}, {', '.join(maps)}; give "
            "the anchor generator a tuple of sizes for each map"
        )
    try:
        logits, _ = heads.box_predictor(heads.box_head(pool(maps, [torch.tensor([[0.0, 0.0, 32.0, 32.0]])], [TRIAL])))
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{what}: its box head does not take the features of a region ({said}); correct it") from error
    if logits.shape[-1] != num_classes + 1:
        raise ValueError(
            f"{what} has {logits.shape[-1]} logits of a region, and the data have {num_classes} classes, with the "
            f"background {num_classes + 1}; build it from its argument num_classes, and one more"
        )
    for module, training in modes:
        module.training = training


class TimmBackbone(nn.Module):
    """A body of timm with a feature pyramid, in the layout of torchvision's `BackboneWithFPN`.

    Args:
        body: network of timm that returns features of strides 4 to 32.
        channels: channels of those.
        out_channels: channels of the pyramid.
    """

    def __init__(self, body: nn.Module, channels: list[int], out_channels: int) -> None:
        super().__init__()
        self.body, self.out_channels = body, out_channels
        self.fpn = FeaturePyramidNetwork(channels, out_channels, LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = self.fpn(OrderedDict(zip(PYRAMID, self.body(images), strict=True)))
        return maps


def _torchvision_backbone(name: str, out_channels: int, *, frozen: bool) -> tuple[nn.Module, list[str]]:
    """Return a body with its pyramid, and the prefixes of where its stages of strides 4 to 32 begin."""
    model = torchvision.models.get_model(name, weights=None, norm_layer=FrozenBatchNorm2d if frozen else nn.BatchNorm2d)
    if name in _RESNETS:
        ends = [f"layer{i}" for i in range(1, 5)]
        channels = [model.fc.in_features // 2**i for i in (3, 2, 1, 0)]
        layers = dict(zip(ends, PYRAMID, strict=True))
        return BackboneWithFPN(model, layers, channels, out_channels), ends
    layers = dict(zip(_MOBILENET_ENDS, PYRAMID, strict=True))
    backbone = BackboneWithFPN(model.features, layers, [*_MOBILENET_ENDS.values()], out_channels)
    return backbone, [*_MOBILENET_STARTS]


def _timm_backbone(name: str, out_channels: int, *, frozen: bool) -> tuple[nn.Module, list[str] | None]:
    """Return the same of a network of timm; None if the names of its parameters do not tell where stages begin."""
    import timm
    from timm.layers import freeze_batch_norm_2d

    try:
        found = timm.create_model(name, pretrained=False, features_only=True).feature_info.reduction()
        levels = [found.index(stride) for stride in STRIDES]
        body = timm.create_model(name, pretrained=False, features_only=True, out_indices=levels)
    except Exception as error:  # timm raises whatever its networks meet
        said = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else f"it has strides {found}"
        raise ValueError(
            f"faster_rcnn: timm/{name} has no features of strides {', '.join(map(str, STRIDES))} ({said}); use a "
            "convolutional network, or a hierarchical transformer"
        ) from error
    _check_maps(body, name)
    names = [each for each, _ in body.named_parameters()]
    of_stage = [[i for i, each in enumerate(names) if _is_in(each, end)] for end in body.feature_info.module_name()]
    # Some stages end in a module without parameters, or are branches that run on beside the next one.
    ends = [0 if not stage else stage[-1] + 1 for stage in of_stage[:-1]]
    is_told = all(of_stage) and ends == sorted(set(ends)) and ends[-1] < len(names)
    starts = [names[i] for i in (of_stage[0][0], *ends)] if is_told else None
    if frozen:
        body = freeze_batch_norm_2d(body)
    return TimmBackbone(body, body.feature_info.channels(), out_channels), starts


@torch.no_grad()
def _check_maps(body: nn.Module, name: str) -> None:
    """Refuse a body of timm whose maps are not what it says, or that takes images of one size alone.

    Raises:
        ValueError: it is one.
    """
    height, width = TRIAL
    try:
        maps = body.eval()(torch.zeros(1, 3, height, width))
    except Exception as error:  # timm raises whatever its networks meet
        raise ValueError(
            f"faster_rcnn: timm/{name} does not take images of {height} x {width} px "
            f"({type(error).__name__}: {error}); use a network that takes images of any size"
        ) from error
    body.train()
    found, wanted = [(*each.shape[-2:],) for each in maps], [(height // each, width // each) for each in STRIDES]
    if found != wanted:
        raise ValueError(
            f"faster_rcnn: timm/{name} has maps of {found} for images of {height} x {width} px, and not {wanted}, as "
            "strides of 4 to 32 would have it; use another network"
        )


def _is_in(parameter: str, module: str) -> bool:
    """Return whether a parameter is of a module, or of what timm has flattened it to."""
    return parameter.startswith((f"{module}.", f"{module.replace('.', '_')}."))


def _freeze(body: nn.Module, starts: Sequence[str] | None, stages: int, name: str) -> None:
    """Freeze the first stages of a body, the stem first; the parameters lie in the order of the stages."""
    if starts is None:
        if stages:
            raise ValueError(
                f"faster_rcnn: frozen_stages = {stages}, but the parameters of {name} do not tell where its stages "
                "begin; set frozen_stages to 0"
            )
        return
    if not 0 <= stages <= len(starts) + 1:
        raise ValueError(
            f"faster_rcnn: frozen_stages must be from 0 to {len(starts) + 1}, the stages of {name} with its stem, got "
            f"{stages}"
        )
    if not stages:
        return
    end = starts[stages - 1] if stages <= len(starts) else None
    frozen = takewhile(lambda each: end is None or not f"{each[0]}.".startswith(f"{end}."), body.named_parameters())
    for _, parameter in frozen:
        parameter.requires_grad_(False)

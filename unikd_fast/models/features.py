"""Networks that return features with the logits: stage ends, pre-activations, and the classifier's input."""

import logging
import operator
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from unikd_fast.models.activations import ANOTHER_METHOD, find_classifier, kept, norm_before
from unikd_fast.models.activations import before_activation as find_before_activation
from unikd_fast.models.graph import Forward, Trace, Untraceable, compile_forward, probe, trace
from unikd_fast.models.hooks import HookedForward, logits_of, record_outputs
from unikd_fast.models.levels import Level, Shapes, check_nodes, find_modules, find_stages, node_shapes, prefix_tokens
from unikd_fast.values import Features

_logger = logging.getLogger("unikd_fast")


def resized(images: Tensor, side: int | None) -> Tensor:
    """Return images (N, 3, H, W) as (N, 3, side, side), by antialiased bilinear interpolation in fp32.

    Images of this size, and all if side is None, are returned as they are.

    Example:
        >>> resized(torch.zeros(2, 3, 32, 32), 24).shape
        torch.Size([2, 3, 24, 24])
    """
    if side is None or images.shape[-2:] == (side, side):
        return images
    smaller = F.interpolate(images.float(), (side, side), mode="bilinear", align_corners=False, antialias=True)
    return smaller.to(images.dtype)


class LogitsOnly(nn.Module):
    """Runs a network and returns `Features((), logits)`.

    Attributes:
        resize_to: side that images are resized to first, see `resized`. If None, they are not.

    Args:
        plain: network that maps images (N, 3, H, W) to logits (N, K), to a tuple starting with them (auxiliary heads),
            or to an object or dictionary that has `logits` (Hugging Face).

    Example:
        >>> LogitsOnly(torchvision.models.vit_b_16())(images).levels
        ()
    """

    resize_to: int | None = None

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, images: Tensor) -> Features:
        return Features((), logits_of(self.plain(resized(images, self.resize_to)), self.plain))


class FeatureExtractor(nn.Module):
    """Runs a network and returns its `Features`; built by `extract_features`.

    Attributes:
        plain: the network itself, the only submodule; `extractor.plain.state_dict()` is what is exported.
        level_names: names of L modules of the network, from fine to coarse; empty if levels were not requested.
        levels: how their outputs hold the levels, which `forward` returns as maps (N, C_l, H_l, W_l).
        num_classes: number of classes K.
        image_size: image size given to `extract_features`.
        returned_as_computed: whether a level that the next operation overwrites is returned as it was before.
        norms_before_activation: path of the BatchNorm that computes each level's pre-activation, None if there is none;
            empty if these features were not requested.
        resize_to: side that images are resized to first, see `resized`. If None, they are not.

    Example:
        >>> features = extract_features(build_model("cifar/resnet20", num_classes=100), image_size=32)(images)
        >>> [tuple(level.shape) for level in features.levels]
        [(64, 16, 32, 32), (64, 32, 16, 16), (64, 64, 8, 8)]
    """

    resize_to: int | None = None

    def __init__(
        self,
        plain: nn.Module,
        *,
        train_forward: Forward,
        eval_forward: Forward,
        level_names: tuple[str, ...],
        levels: tuple[Level, ...],
        num_classes: int,
        image_size: int,
        returned_as_computed: bool,
        norms_before_activation: tuple[str | None, ...] = (),
        classifier: str | None = None,
    ) -> None:
        super().__init__()
        self.plain = plain
        self.training = plain.training
        self.level_names = level_names
        self.levels = levels
        self._as_computed = all(level.layout == "map" for level in levels)
        self.num_classes = num_classes
        self.image_size = image_size
        self.returned_as_computed = returned_as_computed
        self.norms_before_activation = norms_before_activation
        self._classifier = classifier
        self._train_forward = train_forward
        self._eval_forward = eval_forward

    @property
    def level_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Return the shape (C_l, H_l, W_l) of each level at image_size."""
        return tuple((level.channels, level.side, level.side) for level in self.levels)

    @property
    def classifier_weight(self) -> nn.Parameter:
        """Return the weight (K, D) of the linear layer that reads the embedding, if that was requested."""
        assert self._classifier is not None
        return self.plain.get_parameter(self._classifier)

    @property
    def embedding_width(self) -> int | None:
        """Return the width D of the classifier's input, or None if it was not requested."""
        return None if self._classifier is None else self.classifier_weight.shape[1]

    def forward(self, images: Tensor) -> Features:
        images = resized(images, self.resize_to)
        forward = self._train_forward if self.plain.training else self._eval_forward
        features = Features(*forward(self.plain, images))
        if self._as_computed:
            return features
        height, width = images.shape[-2:]
        if height != width and any(level.layout == "tokens" for level in self.levels):
            raise ValueError(
                f"extract_features: levels of {type(self.plain).__name__} are tokens, which need square images, "
                f"got {height}x{width} pixels; crop them to squares"
            )
        levels, before = (
            tuple(level.as_map(output) for level, output in zip(self.levels, outputs, strict=False))
            for outputs in (features.levels, features.before_activation)
        )
        return features._replace(levels=levels, before_activation=before)


def extract_features(
    model: nn.Module,
    *,
    image_size: int,
    max_levels: int = 4,
    nodes: Sequence[str] | None = None,
    levels: bool = True,
    before_activation: bool = False,
    embedding: bool = False,
) -> FeatureExtractor:
    """Build the network that also returns features: by its graph, without hooks and copies, or where torch.fx cannot
    trace it, by hooks on its modules.

    The model is left unchanged, including buffers, modes and random state, and shares all parameters with the result.
    Levels are maps: tokens (N, T, C) lose those before the grid, and channels that are last come first, without a copy.
    A level that the next operation overwrites (an in-place activation) is returned overwritten, that is activated,
    unless the caller named it and the network is traced: then it is returned as the node computed it.

    Args:
        model: network that maps images (N, 3, H, W) to logits (N, K).
        image_size: side of the images in pixels, for `level_shapes`; other sizes work if the model allows.
        max_levels: maximum number of stages, counted from the coarsest.
        nodes: names of modules or operations to return instead of the stages, from fine to coarse. If None, stages are
            found.
        levels: whether to return the features at the ends of the stages; if not, any network will do.
        before_activation: whether to return the levels' pre-activations as well, see `models.activations`.
        embedding: whether to return the input of the last linear layer, which computes the logits.

    Raises:
        ValueError: the model has no levels, a node is unknown or holds no square map, the image size does not fit, or
            the network lacks what is requested.

    Example:
        >>> extractor = extract_features(torchvision.models.resnet18(), image_size=224)
        >>> extractor.level_names, extractor.level_shapes[0]
        (('layer1', 'layer2', 'layer3', 'layer4'), (64, 56, 56))
    """
    for argument, number in (("image_size", image_size), ("max_levels", max_levels)):
        if operator.index(number) < 1:
            raise ValueError(f"extract_features: {argument} must be 1 or more, got {number}")
    if before_activation and not levels:
        raise ValueError("extract_features: before_activation needs levels, got levels=False; set levels=True")
    if levels and nodes is not None and not nodes:
        raise ValueError("extract_features: nodes must name at least one level, got []; None finds the stages")
    nodes = nodes if levels else ()
    try:
        return _traced(model, image_size, max_levels, nodes, before_activation=before_activation, embedding=embedding)
    except Untraceable as error:
        extractor = _hooked(model, image_size, max_levels, nodes, embedding=embedding)
        if before_activation:
            raise ValueError(f"extract_features: {error}; {ANOTHER_METHOD}") from error
        _logger.info("levels of %s by hooks: %s", type(model).__name__, error)
        return extractor


def _traced(
    model: nn.Module,
    image_size: int,
    max_levels: int,
    nodes: Sequence[str] | None,
    *,
    before_activation: bool,
    embedding: bool,
) -> FeatureExtractor:
    """Build a FeatureExtractor of the network's graph; without levels if nodes is ().

    Raises:
        Untraceable: there is no graph, or not all levels are tensors in it.
    """
    keys = list(model.state_dict())
    training, evaluation = trace(model, training=True), trace(model, training=False)
    values = probe(model, evaluation, image_size=image_size)
    shapes = node_shapes(evaluation, values)
    if nodes is None:
        names = find_stages(model, evaluation, values, image_size=image_size, max_levels=max_levels)
        if not names:
            outputs = record_outputs(model, image_size=image_size)
            names = find_modules(model, outputs.shapes, max_levels=max_levels)
            if any(shapes.get(name) != outputs.shapes[name] for name in names):
                raise Untraceable(f"its levels {', '.join(names)} are not tensors in the graph")
    else:
        names = check_nodes(model, nodes, shapes) if nodes else ()
    found = _levels(model, names, shapes)
    num_classes = _num_classes(model, values[evaluation.logits].shape)
    classifier = find_classifier(model, evaluation, values).weight if embedding else None

    norms: list[str | None] = []

    def compiled(traced: Trace, mode: str) -> Forward:
        missing = [name for name in names if name not in traced.outputs]
        if missing:
            raise ValueError(f"extract_features: {missing} are not nodes of the graph in {mode} mode; name others")
        nodes_of = [traced.outputs[name] for name in names]
        if nodes is None and not before_activation and not embedding:
            return compile_forward(model, traced, nodes_of)
        now = probe(model, traced, image_size=image_size, training=mode == "train")
        overwritten = [node for node in nodes_of if nodes is not None and now[node].overwritten]
        vector = kept(traced.graph, find_classifier(model, traced, now).embedding, now) if embedding else None
        before = []
        if before_activation:
            named = zip(names, nodes_of, strict=True)
            before = [find_before_activation(model, traced.graph, node, now, name=name) for name, node in named]
            norms[:] = [norm_before(model, node) for node in before]
        return compile_forward(model, traced, nodes_of, overwritten, before_activation=before, embedding=vector)

    train_forward, eval_forward = compiled(training, "train"), compiled(evaluation, "eval")
    extractor = FeatureExtractor(
        model,
        train_forward=train_forward,
        eval_forward=eval_forward,
        level_names=names,
        levels=found,
        num_classes=num_classes,
        image_size=image_size,
        returned_as_computed=nodes is not None,
        norms_before_activation=tuple(norms),
        classifier=classifier,
    )
    assert list(extractor.plain.state_dict()) == keys, "tracing changed the model"
    return extractor


def _hooked(
    model: nn.Module, image_size: int, max_levels: int, nodes: Sequence[str] | None, *, embedding: bool
) -> FeatureExtractor:
    """Build a FeatureExtractor whose levels come from hooks; without levels if nodes is ()."""
    outputs = record_outputs(model, image_size=image_size)
    if nodes is None:
        names = find_modules(model, outputs.shapes, max_levels=max_levels)
    else:
        names = check_nodes(model, nodes, outputs.shapes) if nodes else ()
    if embedding and outputs.classifier is None:
        raise ValueError(
            f"extract_features: the logits of {type(model).__name__} do not come from a linear layer, whose input "
            "would be the embedding; use a method that needs none, such as kd or dkd"
        )
    forward = HookedForward(names, outputs.classifier if embedding else None)
    return FeatureExtractor(
        model,
        train_forward=forward,
        eval_forward=forward,
        level_names=names,
        levels=_levels(model, names, outputs.shapes),
        num_classes=_num_classes(model, outputs.logits),
        image_size=image_size,
        returned_as_computed=False,
        classifier=f"{outputs.classifier}.weight" if embedding else None,
    )


def _levels(model: nn.Module, names: Sequence[str], shapes: Shapes) -> tuple[Level, ...]:
    found = (Level.of(shapes[name], prefix=prefix_tokens(model)) for name in names)
    return tuple(level for level in found if level is not None)


def _num_classes(model: nn.Module, shape: tuple[int, ...] | None) -> int:
    if shape is None or len(shape) != 2:
        raise ValueError(f"extract_features: {type(model).__name__} must return logits (N, K), got {shape} for N = 2")
    return shape[1]

"""A network that returns the features at the end of its stages with its logits."""

import operator
from collections.abc import Sequence

from torch import Tensor, nn

from unikd_fast.models.graph import Forward, Trace, compile_forward, probe, trace
from unikd_fast.models.stages import check_nodes, find_stages
from unikd_fast.values import Features


class FeatureExtractor(nn.Module):
    """Runs a network and returns `Features(levels, logits)`; built by `extract_features`.

    Attributes:
        plain: the network itself, the only submodule: `extractor.plain.state_dict()` is the export.
        level_names: L modules of the network, fine to coarse.
        level_shapes: (C_l, H_l, W_l) of each for images of the size given at building.
        num_classes: K.

    Example:
        >>> features = extract_features(build_model("cifar/resnet20", num_classes=100), image_size=32)(images)
        >>> [tuple(level.shape) for level in features.levels]
        [(64, 16, 32, 32), (64, 32, 16, 16), (64, 64, 8, 8)]
    """

    def __init__(
        self,
        plain: nn.Module,
        *,
        train_forward: Forward,
        eval_forward: Forward,
        level_names: tuple[str, ...],
        level_shapes: tuple[tuple[int, int, int], ...],
        num_classes: int,
    ) -> None:
        super().__init__()
        self.plain = plain
        self.training = plain.training
        self.level_names = level_names
        self.level_shapes = level_shapes
        self.num_classes = num_classes
        self._train_forward = train_forward
        self._eval_forward = eval_forward

    def forward(self, images: Tensor) -> Features:
        forward = self._train_forward if self.plain.training else self._eval_forward
        levels, logits = forward(self.plain, images)
        return Features(levels, logits)


def extract_features(
    model: nn.Module, *, image_size: int, max_levels: int = 4, nodes: Sequence[str] | None = None
) -> FeatureExtractor:
    """Build the network that also returns the features at the end of each stage, without hooks and without copies.

    The model is left as it was, buffers, modes and random state included, and shares everything with the result. A
    level that the next operation overwrites (an activation in place) is returned as overwritten, that is activated,
    unless the caller named it: then as the node computed it.

    Args:
        model: takes images (N, 3, H, W), returns logits (N, K).
        image_size: side of the images in pixels, for `level_shapes`; other sizes run too where the model allows.
        max_levels: how many stages to keep, counted from the coarsest.
        nodes: names of modules or operations to return instead of the stages, fine to coarse.

    Raises:
        ValueError: torch.fx cannot trace the model, it has no convolutional stages, a node is unknown or gives no
            (N, C, H, H), or the image size does not fit.

    Example:
        >>> extractor = extract_features(torchvision.models.resnet18(), image_size=224)
        >>> extractor.level_names, extractor.level_shapes[0]
        (('layer1', 'layer2', 'layer3', 'layer4'), (64, 56, 56))
    """
    for argument, number in (("image_size", image_size), ("max_levels", max_levels)):
        if operator.index(number) < 1:
            raise ValueError(f"extract_features: {argument} must be 1 or more, got {number}")
    keys = list(model.state_dict())
    training, evaluation = trace(model, training=True), trace(model, training=False)
    values = probe(model, evaluation, image_size=image_size)
    if nodes is None:
        names = find_stages(model, evaluation, values, image_size=image_size, max_levels=max_levels)
    else:
        names = check_nodes(nodes, evaluation, values)
    logits_shape = values[evaluation.logits].shape
    if logits_shape is None or len(logits_shape) != 2:
        raise ValueError(
            f"extract_features: {type(model).__name__} must return logits (N, K), got {logits_shape} for N = 2"
        )
    shapes = [values[evaluation.outputs[name]].shape or () for name in names]

    def compiled(traced: Trace, mode: str) -> Forward:
        missing = [name for name in names if name not in traced.outputs]
        if missing:
            raise ValueError(f"extract_features: {missing} are no nodes of the graph in {mode} mode; name others")
        levels = [traced.outputs[name] for name in names]
        overwritten = []
        if nodes is not None:
            now = probe(model, traced, image_size=image_size, training=mode == "train")
            overwritten = [node for node in levels if now[node].overwritten]
        return compile_forward(model, traced, levels, overwritten)

    extractor = FeatureExtractor(
        model,
        train_forward=compiled(training, "train"),
        eval_forward=compiled(evaluation, "eval"),
        level_names=names,
        level_shapes=tuple((channels, height, width) for _, channels, height, width in shapes),
        num_classes=logits_shape[1],
    )
    assert list(extractor.plain.state_dict()) == keys, "tracing changed the model"
    return extractor

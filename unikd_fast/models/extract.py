"""A network that returns features with its logits: at the end of its stages, before activation, of its classifier."""

import operator
from collections.abc import Sequence

from torch import Tensor, nn

from unikd_fast.models.activations import before_activation as find_before_activation
from unikd_fast.models.activations import kept, norm_before
from unikd_fast.models.classifier import find_classifier
from unikd_fast.models.graph import Forward, Trace, compile_forward, trace
from unikd_fast.models.probe import probe
from unikd_fast.models.stages import check_nodes, find_stages
from unikd_fast.values import Features


class FeatureExtractor(nn.Module):
    """Runs a network and returns its `Features`; built by `extract_features`.

    Attributes:
        plain: the network itself, the only submodule: `extractor.plain.state_dict()` is the export.
        level_names: L modules of the network, fine to coarse; none where levels were not asked for.
        level_shapes: (C_l, H_l, W_l) of each for images of the size given at building.
        num_classes: K.
        image_size: that was given at building.
        returned_as_computed: whether a level that the next operation overwrites is returned as it was before.
        norms_before_activation: path of the BatchNorm that gives each level before its activation, None where there is
            none; empty where these features were not asked for.

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
        image_size: int,
        returned_as_computed: bool,
        norms_before_activation: tuple[str | None, ...] = (),
        classifier: str | None = None,
    ) -> None:
        super().__init__()
        self.plain = plain
        self.training = plain.training
        self.level_names = level_names
        self.level_shapes = level_shapes
        self.num_classes = num_classes
        self.image_size = image_size
        self.returned_as_computed = returned_as_computed
        self.norms_before_activation = norms_before_activation
        self._classifier = classifier
        self._train_forward = train_forward
        self._eval_forward = eval_forward

    @property
    def classifier_weight(self) -> nn.Parameter:
        """(K, D) of the linear layer that sees the embedding, where that was asked for."""
        assert self._classifier is not None
        return self.plain.get_parameter(self._classifier)

    @property
    def embedding_width(self) -> int | None:
        """D of the vector that the classifier sees; None where it was not asked for."""
        return None if self._classifier is None else self.classifier_weight.shape[1]

    def forward(self, images: Tensor) -> Features:
        forward = self._train_forward if self.plain.training else self._eval_forward
        return Features(*forward(self.plain, images))


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
    """Build the network that also returns features, without hooks and without copies.

    The model is left as it was, buffers, modes and random state included, and shares everything with the result. A
    level that the next operation overwrites (an activation in place) is returned as overwritten, that is activated,
    unless the caller named it: then as the node computed it.

    Args:
        model: takes images (N, 3, H, W), returns logits (N, K).
        image_size: side of the images in pixels, for `level_shapes`; other sizes run too where the model allows.
        max_levels: how many stages to keep, counted from the coarsest.
        nodes: names of modules or operations to return instead of the stages, fine to coarse.
        levels: whether to return the features at the end of the stages; without, any network will do.
        before_activation: whether to return them before their activation as well, see `models.activations`.
        embedding: whether to return the input of the last linear layer, which gives the logits.

    Raises:
        ValueError: torch.fx cannot trace the model, it has no convolutional stages, a node is unknown or gives no
            (N, C, H, H), the image size does not fit, or the network has not what is asked for.

    Example:
        >>> extractor = extract_features(torchvision.models.resnet18(), image_size=224)
        >>> extractor.level_names, extractor.level_shapes[0]
        (('layer1', 'layer2', 'layer3', 'layer4'), (64, 56, 56))
    """
    for argument, number in (("image_size", image_size), ("max_levels", max_levels)):
        if operator.index(number) < 1:
            raise ValueError(f"extract_features: {argument} must be 1 or more, got {number}")
    if before_activation and not levels:
        raise ValueError("extract_features: before_activation is of the levels, got levels=False; ask for both")
    keys = list(model.state_dict())
    training, evaluation = trace(model, training=True), trace(model, training=False)
    values = probe(model, evaluation, image_size=image_size)
    names: tuple[str, ...] = ()
    if levels and nodes is None:
        names = find_stages(model, evaluation, values, image_size=image_size, max_levels=max_levels)
    elif levels and nodes is not None:
        names = check_nodes(nodes, evaluation, values)
    logits_shape = values[evaluation.logits].shape
    if logits_shape is None or len(logits_shape) != 2:
        raise ValueError(
            f"extract_features: {type(model).__name__} must return logits (N, K), got {logits_shape} for N = 2"
        )
    shapes = [values[evaluation.outputs[name]].shape or () for name in names]
    classifier = find_classifier(model, evaluation, values).weight if embedding else None

    norms: list[str | None] = []

    def compiled(traced: Trace, mode: str) -> Forward:
        missing = [name for name in names if name not in traced.outputs]
        if missing:
            raise ValueError(f"extract_features: {missing} are no nodes of the graph in {mode} mode; name others")
        found = [traced.outputs[name] for name in names]
        if nodes is None and not before_activation and not embedding:
            return compile_forward(model, traced, found)
        now = probe(model, traced, image_size=image_size, training=mode == "train")
        overwritten = [node for node in found if nodes is not None and now[node].overwritten]
        vector = kept(traced.graph, find_classifier(model, traced, now).embedding, now) if embedding else None
        before = []
        if before_activation:
            named = zip(names, found, strict=True)
            before = [find_before_activation(model, traced.graph, node, now, name=name) for name, node in named]
            norms[:] = [norm_before(model, node) for node in before]
        return compile_forward(model, traced, found, overwritten, before_activation=before, embedding=vector)

    train_forward, eval_forward = compiled(training, "train"), compiled(evaluation, "eval")
    extractor = FeatureExtractor(
        model,
        train_forward=train_forward,
        eval_forward=eval_forward,
        level_names=names,
        level_shapes=tuple((channels, height, width) for _, channels, height, width in shapes),
        num_classes=logits_shape[1],
        image_size=image_size,
        returned_as_computed=nodes is not None,
        norms_before_activation=tuple(norms),
        classifier=classifier,
    )
    assert list(extractor.plain.state_dict()) == keys, "tracing changed the model"
    return extractor

"""Networks that return features with the logits: stage ends, pre-activations, and the classifier's input."""

import operator
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from unikd_fast.models.activations import before_activation as find_before_activation
from unikd_fast.models.activations import find_classifier, kept, norm_before
from unikd_fast.models.graph import Forward, NodeValue, Trace, compile_forward, probe, trace
from unikd_fast.values import Features


class LogitsOnly(nn.Module):
    """Runs a network and returns `Features((), logits)`.

    Args:
        plain: network that maps images (N, 3, H, W) to logits (N, K), or to a tuple starting with them (auxiliary
            heads).

    Example:
        >>> LogitsOnly(torchvision.models.vit_b_16())(images).levels
        ()
    """

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, images: Tensor) -> Features:
        output = self.plain(images)
        return Features((), output[0] if isinstance(output, tuple) else output)


# Below this size the last stages of ImageNet networks shrink to 1x1 and look like pooled vectors.
_REFERENCE_SIZE = 128

# Their outputs repeat the features before them.
_NO_FEATURES = (
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.dropout._DropoutNd,
    nn.Identity,
)


class _Candidate(NamedTuple):
    names: list[str]  # a container shares its last child's output
    node: fx.Node
    side: int


def find_stages(
    model: nn.Module, traced: Trace, values: Mapping[fx.Node, NodeValue], *, image_size: int, max_levels: int
) -> tuple[str, ...]:
    """Return the names of the modules that end the coarsest `max_levels` stages, from fine to coarse.

    A class may define them as `stage_modules`; timm's networks carry `feature_info`. Otherwise they are found among the
    4-D outputs of the children and of the children of containers: the last one at each resolution that lies on every
    path to the classifier. Pooling layers do not count, nor does a stem of one convolution if two stages remain.

    Args:
        model: network.
        traced: its evaluation graph.
        values: result of `probe` at image_size.
        image_size: side of the images in pixels.
        max_levels: maximum number of names.

    Raises:
        ValueError: the network has fewer than two convolutional stages.

    Example:
        >>> find_stages(resnet18, traced, probe(resnet18, traced, image_size=224), image_size=224, max_levels=4)
        ('layer1', 'layer2', 'layer3', 'layer4')
    """
    names = _stated(model, traced)
    if names is None:
        if image_size < _REFERENCE_SIZE:
            values = probe(model, traced, image_size=image_size * -(-_REFERENCE_SIZE // image_size))
        names = _found(model, traced, values)
    else:
        names = [name for name in names if _side(values.get(traced.outputs[name])) is not None]
    if len(names) < 2:
        raise ValueError(
            f"extract_features: {type(model).__name__} has no convolutional stages (4-D features N, C, H, W at two "
            f"resolutions or more), found {names}; name its levels with nodes=[...], or use a convolutional network"
        )
    return tuple(names[-max_levels:])


def check_nodes(nodes: Sequence[str], traced: Trace, values: Mapping[fx.Node, NodeValue]) -> tuple[str, ...]:
    """Check the user's nodes: each exists, is (N, C, H, W), and no level is finer than the one before it.

    Raises:
        ValueError: one of these does not hold; for an unknown name, the message lists the nearest ones.

    Example:
        >>> check_nodes(["layer2", "layer4"], traced, probe(model, traced, image_size=64))
        ('layer2', 'layer4')
    """
    if not nodes:
        raise ValueError("extract_features: nodes must name at least one level, got []; None finds the stages")
    for name in nodes:
        if name not in traced.outputs:
            nearest = get_close_matches(name, traced.outputs, n=3, cutoff=0.4)
            raise ValueError(
                f"extract_features: no node {name!r} in the graph; nearest: {', '.join(nearest) or 'none'}"
            )
        value = values.get(traced.outputs[name])
        if _side(value) is None:
            shape = "no tensor" if value is None or value.shape is None else f"shape {value.shape}"
            raise ValueError(
                f"extract_features: node {name!r} gives {shape} for square images; a level must be (N, C, H, H)"
            )
    sides = [_side(values[traced.outputs[name]]) or 0 for name in nodes]
    if sides != sorted(sides, reverse=True):
        listing = ", ".join(f"{name} at {side}" for name, side in zip(nodes, sides, strict=True))
        raise ValueError(f"extract_features: nodes must go from fine to coarse, got {listing}")
    return tuple(nodes)


def _stated(model: nn.Module, traced: Trace) -> list[str] | None:
    names = getattr(model, "stage_modules", None)
    if names is not None:
        unknown = [name for name in names if name not in traced.outputs]
        if unknown:
            raise ValueError(
                f"extract_features: stage_modules of {type(model).__name__} names {unknown}, which its forward does "
                "not call; correct the class"
            )
        return list(names)
    info = getattr(model, "feature_info", None)  # timm: a list of dicts, or a wrapper around one
    entries = info if isinstance(info, list) else getattr(info, "info", [])
    names = [entry["module"] for entry in entries if "module" in entry]
    return names if names and all(name in traced.outputs for name in names) else None


def _found(model: nn.Module, traced: Trace, values: Mapping[fx.Node, NodeValue]) -> list[str]:
    on_every_path = _on_every_path(traced, values)
    order = {node: index for index, node in enumerate(traced.graph.nodes)}
    weights = {node: shapes for node in traced.graph.nodes if (shapes := _weight_shapes(model, node))}
    classifier = max((order[node] for node in weights), default=len(order))
    candidates: dict[fx.Node, _Candidate] = {}
    for name in _shallow_modules(model):
        node = traced.outputs.get(name)
        if node is None or node not in on_every_path or order[node] >= classifier or _repeats(model, node):
            continue
        shape = values[node].shape
        if shape is None or len(shape) != 4 or shape[2] == 1:
            continue
        side = _side(values[node])
        if side is None:
            return []  # (N, H, W, C): a token model
        candidates.setdefault(node, _Candidate([], node, side)).names.append(name)
    last_at_side: dict[int, _Candidate] = {}
    for candidate in sorted(candidates.values(), key=lambda candidate: order[candidate.node]):
        last_at_side[candidate.side] = candidate
    levels = list(last_at_side.values())
    if len(levels) > 2 and _convolutions(weights, order, until=levels[0].node) < 2:
        del levels[0]
    return [_clearest_name(level, levels) for level in levels]


def _shallow_modules(model: nn.Module) -> list[str]:
    names = []
    for name, child in model.named_children():
        names.append(name)
        if isinstance(child, nn.Sequential | nn.ModuleList):
            names += [f"{name}.{inner}" for inner, _ in child.named_children()]
    return names


def _on_every_path(traced: Trace, values: Mapping[fx.Node, NodeValue]) -> set[fx.Node]:
    # Only tensors carry features: the size of an early tensor, used late in a reshape, is not a path around a stage.
    needed = {traced.logits}
    for node in reversed(traced.graph.nodes):
        if node in needed:
            needed.update(source for source in node.all_input_nodes if source in values)
    fed = {node for node in traced.graph.nodes if node.op == "placeholder"}
    for node in traced.graph.nodes:
        if any(source in fed for source in node.all_input_nodes):
            fed.add(node)
    path = [node for node in traced.graph.nodes if node in needed and node in fed]
    position = {node: index for index, node in enumerate(path)}
    # In execution order, a node is on every path if no edge skips it.
    reach, result = 0, set()
    for index, node in enumerate(path):
        if reach <= index:
            result.add(node)
        reach = max([reach, *(position[user] for user in node.users if user in position)])
    return result


def _weight_shapes(model: nn.Module, node: fx.Node) -> list[torch.Size]:
    if node.op == "get_attr":
        owner, _, attribute = str(node.target).rpartition(".")
        parameter = model.get_submodule(owner)._parameters.get(attribute)
        return [] if parameter is None else [parameter.shape]
    if node.op == "call_module":
        return [parameter.shape for parameter in model.get_submodule(str(node.target)).parameters()]
    return []


def _convolutions(weights: Mapping[fx.Node, list[torch.Size]], order: Mapping[fx.Node, int], *, until: fx.Node) -> int:
    executed = (shapes for node, shapes in weights.items() if order[node] <= order[until])
    return sum(len(shape) == 4 for shapes in executed for shape in shapes)


def _repeats(model: nn.Module, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), _NO_FEATURES)


def _side(value: NodeValue | None) -> int | None:
    if value is None or value.shape is None or len(value.shape) != 4 or value.shape[2] != value.shape[3]:
        return None
    return value.shape[2]


def _clearest_name(level: _Candidate, levels: Sequence[_Candidate]) -> str:
    # "layer1" rather than "layer1.1", but "features.18" rather than "features" if other levels lie inside it.
    others = [name for other in levels if other is not level for name in other.names]
    outer_first = sorted(level.names, key=len)
    clear = [name for name in outer_first if not any(other.startswith(f"{name}.") for other in others)]
    return (clear or outer_first)[0]


class FeatureExtractor(nn.Module):
    """Runs a network and returns its `Features`; built by `extract_features`.

    Attributes:
        plain: the network itself, the only submodule; `extractor.plain.state_dict()` is what is exported.
        level_names: names of L modules of the network, from fine to coarse; empty if levels were not requested.
        level_shapes: shape (C_l, H_l, W_l) of each level at image_size.
        num_classes: number of classes K.
        image_size: image size given to `extract_features`.
        returned_as_computed: whether a level that the next operation overwrites is returned as it was before.
        norms_before_activation: path of the BatchNorm that computes each level's pre-activation, None if there is none;
            empty if these features were not requested.

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
        """Return the weight (K, D) of the linear layer that reads the embedding, if that was requested."""
        assert self._classifier is not None
        return self.plain.get_parameter(self._classifier)

    @property
    def embedding_width(self) -> int | None:
        """Return the width D of the classifier's input, or None if it was not requested."""
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

    The model is left unchanged, including buffers, modes and random state, and shares all parameters with the result. A
    level that the next operation overwrites (an in-place activation) is returned overwritten, that is activated, unless
    the caller named it: then it is returned as the node computed it.

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
        ValueError: torch.fx cannot trace the model, it has no convolutional stages, a node is unknown or is not
            (N, C, H, H), the image size does not fit, or the network lacks what is requested.

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
            raise ValueError(f"extract_features: {missing} are not nodes of the graph in {mode} mode; name others")
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

"""Which modules end the stages of a network: stated by the class, by timm's metadata, or found in the graph."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import NamedTuple

import torch
from torch import fx, nn

from unikd_fast.models.graph import Trace
from unikd_fast.models.probe import NodeValue, probe

# Below this side the last stages of ImageNet networks shrink to 1x1 and look like pooled vectors.
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
    """Names of the modules that end the coarsest `max_levels` stages, fine to coarse.

    A class may state them as `stage_modules`; timm's networks carry `feature_info`. Otherwise, among the 4-D outputs of
    the children and of the children of containers, the last at each resolution that every path to the classifier
    passes through. Poolings do not count, nor does a stem of one convolution where two stages remain.

    Args:
        model: the network.
        traced: its evaluation graph.
        values: what its nodes give for images of image_size.
        image_size: side of the images in pixels.
        max_levels: upper limit on the number of names.

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
            f"resolutions or more), found {names}; name its levels with nodes=[...], or take a convolutional network"
        )
    return tuple(names[-max_levels:])


def check_nodes(nodes: Sequence[str], traced: Trace, values: Mapping[fx.Node, NodeValue]) -> tuple[str, ...]:
    """The user's node names, checked: each exists, gives (N, C, H, W), and no level is finer than the one before it.

    Raises:
        ValueError: one of these does not hold; for an unknown name, with the nearest ones.

    Example:
        >>> check_nodes(["layer2", "layer4"], traced, probe(model, traced, image_size=64))
        ('layer2', 'layer4')
    """
    if not nodes:
        raise ValueError("extract_features: nodes must name one level at least, got []; None lets the stages be found")
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
    info = getattr(model, "feature_info", None)  # timm: a list of dicts, or an object around one
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
    # Only tensors carry features: the size of an early tensor, used late in a reshape, is no path around a stage.
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
    # In order of execution a node is on every path where no edge leaps over it.
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
    # "layer1" rather than "layer1.1", but "features.18" rather than "features" where other levels lie inside it.
    others = [name for other in levels if other is not level for name in other.names]
    outer_first = sorted(level.names, key=len)
    clear = [name for name in outer_first if not any(other.startswith(f"{name}.") for other in others)]
    return (clear or outer_first)[0]

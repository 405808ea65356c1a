"""Which modules end a network's stages, and how their outputs become maps (N, C, H, W)."""

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from math import isqrt
from typing import Literal, NamedTuple

import torch
from torch import Tensor, fx, nn

from unikd_fast.models.graph import IMAGES, NodeValue, Trace, Untraceable, probe

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

Shapes = Mapping[str, tuple[int, ...] | None]
"""Shapes of outputs by name, in the order of execution; None for what is not a tensor."""


class Level(NamedTuple):
    """How an output holds a square map: (N, C, H, H), channels last (N, H, H, C), or tokens (N, P + H H, C)."""

    layout: Literal["map", "channels last", "tokens"]
    channels: int
    side: int
    prefix: int = 0  # tokens before the grid: class and register tokens

    @classmethod
    def of(cls, shape: Sequence[int] | None, *, prefix: int | None = None) -> "Level | None":
        """Return how an output of this shape holds a map, or None if it does not.

        Args:
            shape: shape of the output for two square images; others, such as windows (N 16, T, C), hold no map.
            prefix: number of tokens before the grid, if known. If None, as few as leave a square.

        Example:
            >>> Level.of((2, 197, 768))
            Level(layout='tokens', channels=768, side=14, prefix=1)
        """
        if shape is None or len(shape) not in (3, 4) or shape[0] != IMAGES:
            return None
        if len(shape) == 4:
            _, second, third, last = shape
            if third == last:
                return cls("map", second, third)
            return cls("channels last", last, third) if second == third else None
        _, tokens, channels = shape
        known = prefix is not None and isqrt(max(0, tokens - prefix)) ** 2 == tokens - prefix
        before = prefix if known and prefix is not None else tokens - isqrt(tokens) ** 2
        side = isqrt(tokens - before)
        return cls("tokens", channels, side, before) if side > 1 else None

    def as_map(self, output: Tensor) -> Tensor:
        """Return the output as (N, C, H, H), without a copy; for another image size H is another."""
        if self.layout == "map":
            return output
        if self.layout == "channels last":
            return output.permute(0, 3, 1, 2)
        grid = output[:, self.prefix :].transpose(1, 2)
        return grid.unflatten(2, (isqrt(grid.shape[2]), -1))


def prefix_tokens(model: nn.Module) -> int | None:
    """Return the number of tokens before the grid that a network of timm's states; None if it does not."""
    stated = getattr(model, "num_prefix_tokens", None)
    return stated if isinstance(stated, int) else None


def find_stages(
    model: nn.Module, traced: Trace, values: Mapping[fx.Node, NodeValue], *, image_size: int, max_levels: int
) -> tuple[str, ...]:
    """Return the names of the modules that end the coarsest `max_levels` stages, from fine to coarse.

    A class may define them as `stage_modules`; timm's networks carry `feature_info`. Otherwise they are found among the
    4-D outputs of the children and of the children of containers: the last one at each resolution that lies on every
    path to the classifier. Pooling layers do not count, nor does a stem of one convolution if two stages remain. Of
    levels of one size, as a vision transformer has them, `max_levels` are taken at even distances.

    Args:
        model: network.
        traced: its evaluation graph.
        values: result of `probe` at image_size.
        image_size: side of the images in pixels.
        max_levels: maximum number of names.

    Returns:
        Names; empty if the graph shows none, see `find_modules`.

    Raises:
        ValueError: those that the network states are fewer than two levels.

    Example:
        >>> find_stages(resnet18, traced, probe(resnet18, traced, image_size=224), image_size=224, max_levels=4)
        ('layer1', 'layer2', 'layer3', 'layer4')
    """
    names = _stated(model, traced.outputs)
    if names is None:
        if image_size < _REFERENCE_SIZE:
            with suppress(Untraceable):  # a network of one size alone
                values = probe(model, traced, image_size=image_size * -(-_REFERENCE_SIZE // image_size))
        names = _found(model, traced, values)
        if len(names) < 2:
            return ()
    return _coarsest(model, names, node_shapes(traced, values), max_levels)


def find_modules(model: nn.Module, shapes: Shapes, *, max_levels: int) -> tuple[str, ...]:
    """Return the names of the modules that end the coarsest `max_levels` stages, from the shapes of outputs alone.

    The stages are the children of one module, or of a list of lists: of the one whose children have most resolutions,
    the last at each; if all have one, of the one with most children of the same class and shape, at even distances.

    Args:
        model: network.
        shapes: shapes of the modules' outputs by name.
        max_levels: maximum number of names.

    Raises:
        ValueError: the network has fewer than two levels.
    """
    names = _stated(model, shapes)
    if names is None:
        prefix, order = prefix_tokens(model), {name: place for place, name in enumerate(shapes)}
        families = list[dict[str, Level]]()
        for parent, module in model.named_modules():
            called = sorted(_called(module, parent, order), key=order.__getitem__)
            levels = {name: Level.of(shapes[name], prefix=prefix) for name in called}
            families.append({name: level for name, level in levels.items() if level is not None and level.side > 1})
        stages = max(map(_stages_of, families), key=lambda own: (len(own), order[own[-1]] if own else 0), default=[])
        names = stages or max((_most_alike(model, family) for family in families), key=len, default=[])
    return _coarsest(model, names, shapes, max_levels)


def check_nodes(model: nn.Module, nodes: Sequence[str], shapes: Shapes) -> tuple[str, ...]:
    """Check the user's nodes: each exists, is a square map or tokens, and no level is finer than the one before it.

    Raises:
        ValueError: one of these does not hold; for an unknown name, the message lists the nearest ones.

    Example:
        >>> check_nodes(resnet18, ["layer2", "layer4"], shapes)
        ('layer2', 'layer4')
    """
    sides = []
    for name in nodes:
        if name not in shapes:
            nearest = get_close_matches(name, shapes, n=3, cutoff=0.4)
            raise ValueError(
                f"extract_features: no node {name!r} in {type(model).__name__}; nearest: {', '.join(nearest) or 'none'}"
            )
        level = Level.of(shapes[name], prefix=prefix_tokens(model))
        if level is None:
            shape = "no tensor" if shapes[name] is None else f"shape {shapes[name]}"
            raise ValueError(
                f"extract_features: node {name!r} gives {shape} for square images; a level must be (N, C, H, H), "
                "(N, H, H, C) or tokens (N, T, C) with a square grid"
            )
        sides.append(level.side)
    if sides != sorted(sides, reverse=True):
        listing = ", ".join(f"{name} at {side}" for name, side in zip(nodes, sides, strict=True))
        raise ValueError(f"extract_features: nodes must go from fine to coarse, got {listing}")
    return tuple(nodes)


def node_shapes(traced: Trace, values: Mapping[fx.Node, NodeValue]) -> Shapes:
    """Return the shapes of a graph's outputs by name."""
    return {name: values[node].shape if node in values else None for name, node in traced.outputs.items()}


def _coarsest(model: nn.Module, names: Sequence[str], shapes: Shapes, max_levels: int) -> tuple[str, ...]:
    prefix = prefix_tokens(model)
    levels = {name: level for name in names if (level := Level.of(shapes.get(name), prefix=prefix)) is not None}
    if len(levels) < 2:
        raise ValueError(
            f"extract_features: {type(model).__name__} has no two stages that end in maps or tokens, found "
            f"{list(levels)}; name its levels with nodes=[...] (feature_nodes), or use a method on logits, such as kd "
            "or dkd"
        )
    kept = list(levels)
    if len(kept) > max_levels and len({level.side for level in levels.values()}) == 1:
        return tuple(kept[len(kept) * (place + 1) // max_levels - 1] for place in range(max_levels))
    return tuple(kept[-max_levels:])


def _stages_of(family: Mapping[str, Level]) -> list[str]:
    """Return the last child at each resolution, as far as they go from fine to coarse; of one resolution none."""
    last: dict[int, str] = {}
    for name, level in family.items():
        if not last or level.side <= min(last):
            last[level.side] = name
    return list(last.values()) if len(last) > 1 else []


def _most_alike(model: nn.Module, family: Mapping[str, Level]) -> list[str]:
    """Return the children of the most frequent class and shape."""
    kinds = {name: (type(model.get_submodule(name)), *level[:3]) for name, level in family.items()}
    most = max(kinds.values(), key=list(kinds.values()).count, default=None)
    return [name for name, kind in kinds.items() if kind == most]


def _called(module: nn.Module, path: str, names: Container[str]) -> Iterator[str]:
    """Yield the names of the children that forward calls and that make features.

    In a list of lists theirs count as well; beside other modules, a list counts as the last of its own (CoaT).
    """
    for name, child in module.named_children():
        full = f"{path}.{name}".lstrip(".")
        if isinstance(child, nn.ModuleList):
            inner = list(_called(child, full, names))
            yield from inner if isinstance(module, nn.ModuleList) else inner[-1:]
        elif full in names and not isinstance(child, _NO_FEATURES):
            yield full


def _stated(model: nn.Module, outputs: Mapping[str, object]) -> list[str] | None:
    names = getattr(model, "stage_modules", None)
    if names is not None:
        unknown = [name for name in names if name not in outputs]
        if unknown:
            raise ValueError(
                f"extract_features: stage_modules of {type(model).__name__} names {unknown}, which its forward does "
                "not call; correct the class"
            )
        return list(names)
    info = getattr(model, "feature_info", None)  # timm: a list of dicts, or a wrapper around one
    entries = info if isinstance(info, list) else getattr(info, "info", [])
    names = [entry["module"] for entry in entries if "module" in entry]
    return names if names and all(name in outputs for name in names) else None


class _Candidate(NamedTuple):
    names: list[str]  # a container shares its last child's output
    node: fx.Node
    side: int


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

"""A frozen network split at its levels, as functions that gradients can pass through."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from unikd_fast.models.activations import ANOTHER_METHOD
from unikd_fast.models.features import FeatureExtractor
from unikd_fast.models.graph import compiled_code, numbers, probe, trace

Block = Callable[[Tensor], Tensor]


def split_at_levels(extractor: FeatureExtractor) -> list[Block]:
    """Split a network at its L levels: block i maps level i to level i + 1, and the last level to the logits.

    The blocks run the network's own modules in eval mode, even after these were folded or cast: a block casts its input
    to their dtype, and the logits to fp32. The network is frozen; gradients pass through to the input. Autocast around
    a block does not apply inside it.

    Args:
        extractor: extractor with levels; its network is put into eval mode and frozen. Sizes that forward computes from
                the images' shape are those of the image size it was built for.

    Raises:
        ValueError: it has no levels, or a block reads a value from before its own level.

    Example:
        >>> features = extractor(images)
        >>> *inner, last = split_at_levels(extractor)
        >>> torch.equal(last(features.levels[-1]), features.logits)
        True
    """
    model, names = extractor.plain, extractor.level_names
    if not names:
        raise ValueError("split_at_levels: the network was built without levels; pass levels=True to extract_features")
    if any(level.layout != "map" for level in extractor.levels):
        raise ValueError(
            f"split_at_levels: levels of {type(model).__name__} are {extractor.levels[-1].layout}, and blocks read "
            f"maps (N, C, H, W) alone; {ANOTHER_METHOD}"
        )
    model.requires_grad_(False).eval()
    traced = trace(model, training=False)
    values = probe(model, traced, image_size=extractor.image_size)
    known = numbers(model, traced, image_size=extractor.image_size)
    levels = [traced.outputs[name] for name in names]
    for name, level in zip(names, levels, strict=True):
        if values[level].overwritten and not extractor.returned_as_computed:
            _require_idempotent(model, name, level)
    ends = [*levels[1:], traced.logits]
    return [
        _Block(
            model,
            compiled_code(model, _cut(model, traced.graph, start, end, known)),
            copies=values[start].overwritten,
            last=end is ends[-1],
        )
        for start, end in zip(levels, ends, strict=True)
    ]


@dataclass(frozen=True)
class _Block:
    """A part of a network's graph; a deep copy of network and blocks runs the copy."""

    model: nn.Module
    run: Callable[[nn.Module, Tensor], Tensor]
    copies: bool  # whether the level is overwritten inside
    last: bool

    def __call__(self, level: Tensor) -> Tensor:
        if self.model.training:  # a caller switched it
            self.model.eval()
        # Determined in every call: the teacher may fold and cast after it was split. Norms, whose parameters are
        # vectors, stay in fp32.
        dtype = next(parameter.dtype for parameter in self.model.parameters() if parameter.dim() > 1)
        with torch.autocast(level.device.type, enabled=False):
            inside = level.to(dtype)
            if self.copies and inside is level:
                inside = level.clone()
            output = self.run(self.model, inside)
        return output.float() if self.last else output


def _cut(model: nn.Module, graph: fx.Graph, start: fx.Node, end: fx.Node, known: Mapping[fx.Node, Any]) -> fx.Graph:
    """Return the part of a graph between two nodes as a graph of its own."""
    from_images = _after(graph, [node for node in graph.nodes if node.op == "placeholder"])
    from_start = _after(graph, [start])
    needed: set[fx.Node] = set()
    frozen: dict[fx.Node, Any] = {}
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node in needed or node is start:
            continue
        if node in from_images and node not in from_start:
            if node in known:
                frozen[node] = known[node]
                continue
            raise ValueError(
                f"split_at_levels: {type(model).__name__} computes node {str(node)!r} before {str(start)!r} and reads "
                f"it again between there and {str(end)!r}; split it elsewhere (feature_nodes), or use another teacher"
            )
        needed.add(node)
        waiting += node.all_input_nodes
    part = fx.Graph()
    copies: dict[fx.Node, Any] = {start: part.placeholder("level"), **frozen}
    for node in graph.nodes:
        if node in needed:
            copies[node] = _copied(part, node, copies)
    part.output(copies[end])
    part.lint()
    return part


def _copied(part: fx.Graph, node: fx.Node, copies: Mapping[fx.Node, Any]) -> fx.Node:
    arguments, options = fx.map_arg((node.args, node.kwargs), lambda source: copies[source])
    return part.create_node(node.op, node.target, arguments, options, node.name)


def _after(graph: fx.Graph, sources: list[fx.Node]) -> set[fx.Node]:
    """Return these nodes and all nodes whose value depends on one of them."""
    reached = set(sources)
    for node in graph.nodes:
        if any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    return reached


def _require_idempotent(model: nn.Module, name: str, level: fx.Node) -> None:
    """Require that the operation that overwrites the level can be applied twice, as the block will repeat it."""
    for user in level.users:
        rectifies = user.op == "call_module" and isinstance(model.get_submodule(str(user.target)), nn.ReLU | nn.ReLU6)
        if rectifies or getattr(user.target, "__name__", user.target) in ("relu", "relu_", "relu6"):
            return
    raise ValueError(
        f"split_at_levels: level {name!r} of {type(model).__name__} is overwritten by the next operation, which "
        "cannot be repeated; name the levels (feature_nodes)"
    )

"""Pre-activation features of a level and the classifier with its input, found in the graph."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from unikd_fast.models.graph import NodeValue, Trace, imported

ANOTHER_METHOD = "use a method that needs none, such as unikd, at, fitnet or kd"

_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU),
    *(nn.SiLU, nn.Mish, nn.GELU, nn.Hardswish),
)
_ACTIVATION_NAMES = {"relu", "relu_", "relu6", "leaky_relu", "elu", "silu", "mish", "gelu", "hardswish"}
_REARRANGING = (nn.ChannelShuffle, nn.Identity)
_REARRANGING_NAMES = {"cat", "view", "reshape", "permute", "transpose", "contiguous", "flatten"}
_LINEAR = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.Conv2d, nn.Linear)
_LINEAR_NAMES = {"layer_norm", "group_norm"}
_PASSING = (nn.Identity, nn.modules.dropout._DropoutNd)
_SUMS = {"add", "iadd"}


def before_activation(
    model: nn.Module, graph: fx.Graph, level: fx.Node, values: Mapping[fx.Node, NodeValue], *, name: str
) -> fx.Node:
    """Return the node that holds a level before its activation; an in-place activation does not overwrite it.

    A level that no activation follows is that value itself: a linear bottleneck (MobileNetV2), and the sum of a
    residual stream that is never rectified (ConvNeXt, vision transformers).

    Args:
        model: network.
        graph: graph of one mode; nodes are added if the value is missing or would be overwritten.
        level: node of the level.
        values: result of `probe` in the same mode.
        name: name of the level, for messages.

    Raises:
        ValueError: the level has no pre-activation value.

    Example:
        >>> before_activation(resnet18, traced.graph, traced.outputs["layer1"], values, name="layer1").target
        <built-in function add>
    """
    found = _before(model, graph, level, values)
    if found is not None:
        return found
    if values[level].overwritten or any(_is_activation(model, user) for user in level.users):
        return kept(graph, level, values)
    for norm in level.users:
        if _holds_activation(model, norm):
            return _split(graph, norm)
        if _is(model, norm, _BatchNorm) and any(_is_activation(model, user) for user in norm.users):
            return kept(graph, norm, values)
    if _is_linear(model, level) or _is_stream(model, level, values):
        return kept(graph, level, values)
    raise ValueError(
        f"extract_features: level {name!r} of {type(model).__name__} has no value before an activation: it comes "
        f"from {_describe(model, level)}, which is neither an activation, nor read by one, nor a linear layer or sum; "
        "name other levels (feature_nodes), turn off train.activation_checkpointing, which hides them inside blocks, "
        f"or {ANOTHER_METHOD}"
    )


def norm_before(model: nn.Module, before: fx.Node) -> str | None:
    """Return the path of the BatchNorm that computes a pre-activation; for a residual sum, that of the main path.

    Args:
        before: node returned by `before_activation`.

    Example:
        >>> norm_before(resnet18, before_activation(resnet18, graph, layer1, values, name="layer1"))
        'layer1.1.bn2'
    """
    before = _passed(model, before)
    if before.target is _normalise:
        return str(before.all_input_nodes[0].target)
    terms = [_passed(model, term) for term in (before.all_input_nodes if _name(before) in _SUMS else [before])]
    # A term that others are computed from is the skip; so is, by convention, the last one: a projection.
    norms = [term for term in terms if _is(model, term, _BatchNorm) and not any(_feeds(term, other) for other in terms)]
    return str(norms[0].target) if norms else None


def kept(graph: fx.Graph, node: fx.Node, values: Mapping[fx.Node, NodeValue]) -> fx.Node:
    """Return a node with the value as computed: the node itself, or a copy made before the value is overwritten."""
    if not values[node].overwritten:
        return node
    with graph.inserting_after(node):
        return graph.call_method("clone", (node,))


def _before(model: nn.Module, graph: fx.Graph, node: fx.Node, values: Mapping[fx.Node, NodeValue]) -> fx.Node | None:
    """Return what the activation behind this value reads, rearranged like its output; None if there is none."""
    if _is_activation(model, node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return kept(graph, source, values)
    if _holds_activation(model, node):
        return _split(graph, node)
    if not (_is(model, node, _REARRANGING) or _name(node) in _REARRANGING_NAMES):
        return None
    inputs = {source: _before(model, graph, source, values) for source in node.all_input_nodes if source in values}
    if not any(inputs.values()):
        return None
    # Parts of a concatenation that are not the direct output of an activation are taken as they are.
    with graph.inserting_after(node):
        return graph.node_copy(node, lambda source: inputs.get(source) or source)


def _split(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Split the call of a BatchNorm with a built-in activation (timm) in two; the node becomes the second."""
    with graph.inserting_before(node):
        module = graph.get_attr(str(node.target))
        normalised = graph.call_function(_normalise, (module, node.args[0]))
        before = graph.call_method("clone", (normalised,))
    node.op, node.target, node.args, node.kwargs = "call_function", _activate, (module, normalised), {}
    return before


def _normalise(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a BatchNormAct2d up to its activation; if it was folded into the convolution, do nothing."""
    if not isinstance(module, nn.BatchNorm2d):
        return x
    if module.training:
        return nn.BatchNorm2d.forward(module, x)
    no_statistics = module.running_mean is None
    return F.batch_norm(
        x, module.running_mean, module.running_var, module.weight, module.bias, no_statistics, eps=module.eps
    )


def _activate(module: Any, x: Tensor) -> Any:
    """Apply the rest of a BatchNormAct2d, or what replaced it."""
    whole = isinstance(module, nn.BatchNorm2d)
    return module.act(module.drop(x)) if whole else module(x)


def _is_activation(model: nn.Module, node: fx.Node) -> bool:
    return _is(model, node, _ACTIVATIONS) or _name(node) in _ACTIVATION_NAMES


def _holds_activation(model: nn.Module, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    module = model.get_submodule(str(node.target))
    return isinstance(module, imported("timm.layers.BatchNormAct2d")) and isinstance(module.act, _ACTIVATIONS)


def _is_linear(model: nn.Module, node: fx.Node) -> bool:
    """Return whether this is a convolution, linear layer or norm without activation, or a sum of them."""
    if _is(model, node, _LINEAR):
        return not _holds_activation(model, node)
    if _name(node) in _LINEAR_NAMES:
        return True
    if _passes(model, node) or _name(node) in _SUMS:
        return all(_is_linear(model, source) for source in node.all_input_nodes)
    return False


def _is_stream(model: nn.Module, node: fx.Node, values: Mapping[fx.Node, NodeValue]) -> bool:
    """Return whether this is a sum of tensors none of which is the output of an activation, perhaps rearranged."""
    terms = [source for source in node.all_input_nodes if source in values]
    if _name(node) in _SUMS:
        rectified = any(_is_activation(model, term) or _holds_activation(model, term) for term in terms)
        return len(terms) > 1 and not rectified
    rearranges = _is(model, node, _REARRANGING) or _name(node) in _REARRANGING_NAMES - {"cat"}
    if not (rearranges or _passes(model, node)) or len(terms) != 1:
        return False
    return _is_linear(model, terms[0]) or _is_stream(model, terms[0], values)


def _passed(model: nn.Module, node: fx.Node) -> fx.Node:
    """Return what this value was before dropout, stochastic depth, identities and copies."""
    while _passes(model, node) or _name(node) == "clone":
        (node,) = node.all_input_nodes
    return node


def _passes(model: nn.Module, node: fx.Node) -> bool:
    return _is(model, node, (*_PASSING, *imported("torchvision.ops.StochasticDepth", "timm.layers.DropPath")))


def _feeds(source: fx.Node, node: fx.Node) -> bool:
    waiting, seen = [*node.all_input_nodes], set[fx.Node]()
    while waiting:
        current = waiting.pop()
        if current is source:
            return True
        if current not in seen:
            seen.add(current)
            waiting += current.all_input_nodes
    return False


def _is(model: nn.Module, node: fx.Node, kinds: Any) -> bool:
    return node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), kinds)


def _name(node: fx.Node) -> str:
    """Return the name of the called function or method; empty for modules."""
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def _describe(model: nn.Module, node: fx.Node) -> str:
    kind = type(model.get_submodule(str(node.target))).__name__ if node.op == "call_module" else _name(node)
    return f"{kind} (node {str(node)!r})"


_KEEPING_EMBEDDINGS = (nn.Identity, nn.Flatten, nn.modules.dropout._DropoutNd)


class Classifier(NamedTuple):
    """The linear layer that computes the logits."""

    embedding: fx.Node  # its input (N, D)
    weight: str  # path of its weight (K, D) in the network


def find_classifier(model: nn.Module, traced: Trace, values: Mapping[fx.Node, NodeValue]) -> Classifier:
    """Return the linear layer that computes the logits, apart from an identity or flattening after it.

    Raises:
        ValueError: the logits come from another operation, such as a 1x1 convolution.

    Example:
        >>> find_classifier(resnet18, trace(resnet18, training=False), values).weight
        'fc.weight'
    """
    node = traced.logits
    while node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), _KEEPING_EMBEDDINGS):
        (node,) = node.all_input_nodes
    source, weight = node.args[0] if node.args else None, None
    if node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), nn.Linear):
        weight = f"{node.target}.weight"
    elif node.op == "call_function" and node.target is F.linear and isinstance(node.args[1], fx.Node):
        weight = str(node.args[1].target) if node.args[1].op == "get_attr" else None
    shape = values[source].shape if isinstance(source, fx.Node) and source in values else None
    if weight is None or not isinstance(source, fx.Node) or shape is None or len(shape) != 2:
        given = type(model.get_submodule(str(node.target))).__name__ if node.op == "call_module" else node.target
        raise ValueError(
            f"extract_features: {type(model).__name__} has no embedding: its logits come from node {str(node)!r} "
            f"({given}), not from a linear layer on (N, D); take a network that ends in one, or a method without "
            "embeddings, such as unikd or kd"
        )
    return Classifier(source, weight)

"""The last linear layer of a network and what it sees, found in the graph."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import fx, nn
from torch.nn import functional as F

from unikd_fast.models.graph import Trace
from unikd_fast.models.probe import NodeValue

_PASSING = (nn.Identity, nn.Flatten, nn.modules.dropout._DropoutNd)


class Classifier(NamedTuple):
    """The linear layer that gives the logits."""

    embedding: fx.Node  # its input (N, D)
    weight: str  # path of its weight (K, D) in the network


def find_classifier(model: nn.Module, traced: Trace, values: Mapping[fx.Node, NodeValue]) -> Classifier:
    """The linear layer whose output, perhaps through an identity or a flattening, the logits are.

    Raises:
        ValueError: the logits come from something else, such as a 1x1 convolution.

    Example:
        >>> find_classifier(resnet18, trace(resnet18, training=False), values).weight
        'fc.weight'
    """
    node = traced.logits
    while node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), _PASSING):
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
            f"({given}), not from a linear layer on (N, D); take a network that ends in one"
        )
    return Classifier(source, weight)

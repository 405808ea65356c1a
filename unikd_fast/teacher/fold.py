"""Folding BatchNorm into the preceding convolution: in eval mode it is a scale and a shift per channel."""

import logging
import sys
from collections import Counter
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from unikd_fast.teacher.ensemble import Ensemble

_logger = logging.getLogger("unikd_fast")

# Exactly these types: a subclass may compute its weight in every forward pass (weight standardisation).
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# Norms of other packages: if one is not imported, the network has none of its norms.
_OTHER_NORMS = (
    ("timm.layers", "BatchNormAct2d"),
    ("timm.layers", "FrozenBatchNormAct2d"),
    ("torchvision.ops", "FrozenBatchNorm2d"),
)


def fold_batch_norm(network: nn.Module) -> int:
    """Fold each BatchNorm into the preceding convolution, in place, and return how many were folded.

    W' = W γ / sqrt(σ² + ε) and b' = (b - μ) γ / sqrt(σ² + ε) + β, computed in float64 by PyTorch's own
    `fuse_conv_bn_weights` and rounded once to the dtype of W. The norm becomes an identity, or what follows the
    normalisation inside a timm BatchNormAct2d. Frozen BatchNorms of torchvision and timm are folded alike.

    A norm is folded if the graph of the forward pass shows that it is the only user of the convolution's output, that
    each of the two runs once, and that nothing else reads their weights; the output folded away is therefore never a
    feature level or anything else the network returns. All other norms stay, and so does a network that torch.fx cannot
    trace. A norm after a linear layer stays, because the graph has no shapes: on (N, L, C) its channels are L.

    Args:
        network: network in eval mode, preferably in fp32: half-precision weights would be rounded twice. A
            FeatureExtractor, a LogitsOnly, an Ensemble of them, or any module that takes one tensor.

    Raises:
        ValueError: the network is in training mode, where BatchNorm uses the statistics of the batch.

    Example:
        >>> fold_batch_norm(extract_features(torchvision.models.resnet50().eval(), image_size=224))
        53
    """
    if network.training:
        raise ValueError("fold_batch_norm: the network must be in eval mode, got training mode; call network.eval()")
    if isinstance(network, Ensemble):  # one that cannot be traced must not keep the others from it
        return sum(map(fold_batch_norm, network.members))
    if not any(map(_is_norm, network.modules())):
        return 0
    graph = _graph(network)
    if graph is None:
        return 0
    modules = dict(network.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    # Weights and statistics that the graph reads outside the call of their module.
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    owners = Counter(id(p) for module in modules.values() for p in module.parameters(recurse=False))
    folded = 0
    for node in graph.nodes:
        source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if node.op != "call_module" or not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        layer, norm = modules[str(source.target)], modules[str(node.target)]
        once = calls[source.target] == calls[node.target] == 1 and len(source.users) == 1
        alone = not {source.target, node.target} & read and owners[id(getattr(layer, "weight", None))] == 1
        if once and alone and _is_norm(norm) and _fits(layer, norm):
            _fold(layer, norm)
            _replace(network, norm, _after(norm))
            folded += 1
    return folded


class _Tracer(fx.Tracer):
    """Traces only into modules that may hold a pair; modules without BatchNorm are leaves."""

    proxy_buffer_attributes = True  # so that a forward that reads running statistics is seen to do so

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if _is_norm(m) or super().is_leaf_module(m, module_qualified_name):
            return True
        return not isinstance(m, nn.Sequential) and not any(map(_is_norm, m.modules()))


def _graph(network: nn.Module) -> fx.Graph | None:
    """Return the graph of the network's own forward, which has the feature levels among its outputs."""
    attributes = set(vars(network))
    try:
        return _Tracer().trace(network)
    except Exception as error:
        _logger.warning(
            "fold_batch_norm: torch.fx cannot trace %s (%s: %s); its BatchNorms are kept, which is slower but correct",
            type(getattr(network, "plain", network)).__name__,
            type(error).__name__,
            error,
        )
        return None
    finally:
        for name in set(vars(network)) - attributes:  # constants that torch.fx leaves on the traced module
            delattr(network, name)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) or _is_foldable(module)


def _is_foldable(module: nn.Module) -> bool:
    others = (getattr(sys.modules.get(package), name, None) for package, name in _OTHER_NORMS)
    return type(module) in (*_NORMS, *others)


def _fits(layer: nn.Module, norm: Any) -> bool:
    if not _is_foldable(norm):
        return False
    if norm.running_mean is None or norm.running_var is None:  # uses batch statistics in eval mode too
        return False
    if any(module._forward_hooks or module._forward_pre_hooks for module in (layer, norm)):
        return False
    if type(layer) in _CONVOLUTIONS or (type(layer) in _TRANSPOSED and layer.groups == 1):
        return bool(layer.out_channels == len(norm.running_var))
    return False


def _fold(layer: nn.Module, norm: Any) -> None:
    assert isinstance(layer.weight, Tensor)
    device, dtype = layer.weight.device, layer.weight.dtype

    def double(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(device, torch.float64)

    weight, bias = fuse_conv_bn_weights(
        double(layer.weight),  # type: ignore[arg-type]
        double(layer.bias),  # type: ignore[arg-type]
        double(norm.running_mean),  # type: ignore[arg-type]
        double(norm.running_var),  # type: ignore[arg-type]
        norm.eps,
        double(norm.weight),
        double(norm.bias),
        transpose=type(layer) in _TRANSPOSED,
    )
    layer.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    layer.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)


def _after(norm: nn.Module) -> nn.Module:
    rest = [m for m in norm.children() if not isinstance(m, nn.Identity)]  # of BatchNormAct2d: dropout, activation
    return nn.Sequential(*rest).eval() if rest else nn.Identity().eval()


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    places = chain.from_iterable(((m, n) for n, c in m.named_children() if c is old) for m in list(network.modules()))
    for module, name in list(places):  # a module may have several names
        setattr(module, name, new)

"""Convolution weights in oneDNN's own layout, for a bf16 network that is compiled for a CPU."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

_OPERATORS = ("_convolution_pointwise", "_is_mkldnn_bf16_supported", "_is_mkldnn_acl_supported")
_REORDER = "mkldnn_reorder_conv2d_weight"


class PackedConv2d(nn.Conv2d):
    """A convolution that has its weight a second time, in the blocks that oneDNN computes with."""

    packed: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        window = (self.padding, self.stride, self.dilation, self.groups)
        # Inductor fuses an activation and a sum into this operator, and into aten's convolution none.
        operator = torch.ops.mkldnn._convolution_pointwise
        result: Tensor = operator(input, self.packed, self.bias, *window, "none", [], "")
        return result


def has_onednn() -> bool:
    """Whether oneDNN itself convolves bf16 here; on ARM another library does so for it, and fuses nothing.

    Example:
        >>> has_onednn()
        True
    """
    mkldnn, operators = torch.backends.mkldnn, torch.ops.mkldnn
    if not (mkldnn.is_available() and mkldnn.enabled):
        return False
    # PyTorch's own, and no promise: without one of them weights stay plain.
    if not all(hasattr(operators, name) for name in _OPERATORS) or not hasattr(torch.ops.aten, _REORDER):
        return False
    return bool(operators._is_mkldnn_bf16_supported() and not operators._is_mkldnn_acl_supported())


def pack_convolutions(network: nn.Module, batch: Tensor) -> nn.Module:
    """Give a copy with the same tensors whose convolutions have packed weights beside their own.

    Plain weights are reordered in every call: 8 % of a ResNet-50 with batch 8 on two cores, and what Inductor fuses
    into the packed operator is as much again.

    Args:
        network: in bf16, channels_last, in eval mode; unchanged.
        batch: images (N, 3, H, W); other batches must have its shape.

    Example:
        >>> packed = pack_convolutions(network, images)
    """
    network = copy.deepcopy(network, {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())})
    shapes: dict[nn.Conv2d, torch.Size] = {}  # of what reaches each convolution: the blocks depend on it

    def note(conv: Any, inputs: tuple[Any, ...]) -> None:
        if inputs and inputs[0].dim() == 4:
            shapes[conv] = inputs[0].shape

    convs = [m for m in network.modules() if type(m) is nn.Conv2d and m.padding_mode == "zeros"]
    hooks = [conv.register_forward_pre_hook(note) for conv in convs if not isinstance(conv.padding, str)]
    network(batch)
    for hook in hooks:
        hook.remove()
    for conv, shape in shapes.items():
        window = (conv.padding, conv.stride, conv.dilation, conv.groups)
        blocks = torch.ops.aten.mkldnn_reorder_conv2d_weight(conv.weight.to_mkldnn(), *window, shape)
        conv.__class__ = PackedConv2d
        conv.packed = nn.Parameter(blocks, requires_grad=False)
    return network

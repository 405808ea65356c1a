"""The collapsed AFF: the global average of F_R from the features themselves, forward and backward (`reference_pooled`).

    M = taps · [E_1 .. E_L | b_1 .. b_L]      what the taps of the gates see of each channel, (18 G, Σ C_l + L) in fp32
    S_l = M_l F_l + o_l                       a skinny product a level; its maps are scalar
    w = pixel weights of S                    (`pixel_weights.py`)
    A_l = Σ_p w_l(p) F_l(p)                   the weighted average; then pooled = [A | Σ w] · [E | b]ᵀ

    ∂w_l(p) = ∂A_l · F_l(p) + ∂(Σ w_l),    ∂F_l(p) = w_l(p) ∂A_l + M_lᵀ ∂S_l(p),    ∂M_l = Σ ∂S_l F_lᵀ

Three launches forward and four backward, whatever the number of levels. Bytes moved: the features twice forward, twice
backward and their gradient written once; the second reading begins with the images read last, which the L2 still has.
Nothing with D channels is ever stored, and every sum over images or pixels is taken in a fixed order.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unikd_fast.kernels._launch import on_device
from unikd_fast.kernels._pooled_device import average_kernel, project_kernel, weight_gradient_kernel
from unikd_fast.kernels._pooled_gradient_device import feature_gradient_kernel, sum_parts_kernel
from unikd_fast.kernels._pooled_plan import Plan, plan_for
from unikd_fast.kernels.pixel_weights import ScalarMaps, pixel_weights_backward, pixel_weights_forward
from unikd_fast.kernels.reference import autocast_off
from unikd_fast.kernels.reference_pooled import TAPS


def fused_pool(
    features: Sequence[Tensor],
    expand_weights: Sequence[Tensor],
    expand_biases: Sequence[Tensor],
    gate_weights: Sequence[Tensor],
    gate_biases: Sequence[Tensor],
    *,
    upsample: str = "nearest",
) -> Tensor:
    """Give `reference_pooled.pool_collapsed`, (N, D) in fp32; features that are not dense are copied."""
    dtype = functools.reduce(torch.promote_types, (f.dtype for f in features))
    features = [dense(f.to(dtype)) for f in features]
    with autocast_off(features[0].device):  # it would form the composite weights in half precision
        expand = torch.cat([*(w.flatten(1) for w in expand_weights), *(b[:, None] for b in expand_biases)], 1).float()
        halves = [w.reshape(2, -1, TAPS).mT.float() for w in gate_weights]  # (own or coarse, tap, D)
        taps = torch.cat([*(h[1] for h in halves), *(h[0] for h in halves), expand.new_empty(0, len(expand))])
        biases = torch.cat([*(b.float() for b in gate_biases), expand.new_empty(0)])
        return average_levels(features, taps @ expand, biases, upsample) @ expand.t()


def dense(x: Tensor) -> Tensor:
    """Give (N, C, H, W) in one of the two layouts that the kernels read."""
    return x if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def average_levels(features: Sequence[Tensor], composite: Tensor, biases: Tensor, upsample: str) -> Tensor:
    """Give the weighted averages of all channels and the sums of the weights, (N, Σ C_l + L), differentiable once.

    Args:
        features: of each level, dense and in one dtype.
        composite: M, (18 (L - 1), Σ C_l + L) in fp32.
        biases: of the gates, (L - 1,) in fp32.
        upsample: "nearest" or "bilinear".
    """
    if torch.compiler.is_compiling():
        return _forward_operator(list(features), composite, biases, upsample)[0]
    return _Averages.apply(upsample, composite, biases, *features)


def _forward(
    features: Sequence[Tensor], composite: Tensor, biases: Tensor, upsample: str
) -> tuple[Tensor, ScalarMaps]:
    plan = plan_for(features, upsample)
    layout, images, levels = plan.layout, features[0].shape[0], len(features)
    averages = composite.new_zeros(images, plan.columns) if not images else composite.new_empty(images, plan.columns)
    seen, own = (composite.new_empty(images, size) for size in (layout.seen_size, layout.own_size))
    with on_device(composite):
        if levels > 1:
            if images:
                project_kernel[(images * plan.pixel_blocks,)](
                    tuple(features), composite.to(features[0].dtype), composite, seen, own, **plan.project
                )
            maps = pixel_weights_forward(seen, own, biases, layout, upsample)
        else:
            ones = composite.new_ones(images, layout.pixel_size)
            maps = ScalarMaps(seen, ones, composite.new_empty(images, 0), ones / layout.pixel_size)
        if images:
            average_kernel[(images * plan.channel_blocks,)](
                tuple(features), maps.gates, maps.remaining, averages, images, **plan.average
            )
    return averages, maps


def _backward(
    features: Sequence[Tensor],
    composite: Tensor,
    maps: ScalarMaps,
    grad_averages: Tensor,
    wanted: Sequence[bool],  # of the composite matrix, the biases, and each feature
    upsample: str,
) -> list[Tensor | None]:
    plan = plan_for(features, upsample)
    images, gates = features[0].shape[0], len(features) - 1
    grad_averages = grad_averages.contiguous()
    grad_features = [torch.empty_like(f) if w else None for f, w in zip(features, wanted[2:], strict=True)]
    if not images or not gates:
        grad_composite, grad_biases = torch.zeros_like(composite), composite.new_zeros(gates)
    if images:
        matrix = grad_seen = grad_a = parts = None
        with on_device(composite):
            if gates:
                grad_weights = torch.empty_like(maps.gates)
                weight_gradient_kernel[(images * plan.pixel_blocks,)](
                    tuple(features), grad_averages, grad_weights, **plan.weight_gradient
                )
                grad_seen, grad_a, grad_biases = pixel_weights_backward(maps, grad_weights, plan.layout, upsample)
                matrix = composite.to(features[0].dtype)
                parts = composite.new_empty(plan.parts) if wanted[0] else None
            if parts is not None or any(wanted[2:]):
                feature_gradient_kernel[(plan.gradient_programs(images),)](
                    tuple(features), matrix, maps.gates, maps.remaining, grad_averages, grad_seen, grad_a,
                    tuple(grad_features), parts, images, **plan.feature_gradient,
                )  # fmt: skip
            if parts is not None:
                grad_composite = torch.empty_like(composite)
                sum_parts_kernel[(plan.column_blocks, len(composite))](parts, grad_composite, images, **plan.sum_parts)
    return [grad_composite if wanted[0] else None, grad_biases if wanted[1] else None, *grad_features]


class _Averages(torch.autograd.Function):
    """`average_levels` in eager mode, where a custom operator would cost several times the time per call."""

    @staticmethod
    def forward(ctx: Any, upsample: str, composite: Tensor, biases: Tensor, *features: Tensor) -> Tensor:
        averages, maps = _forward(features, composite, biases, upsample)
        ctx.save_for_backward(composite, *maps, *features)
        ctx.upsample = upsample
        return averages

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_averages: Tensor) -> tuple[Tensor | None, ...]:
        composite, *rest = ctx.saved_tensors
        maps, features = ScalarMaps(*rest[:4]), rest[4:]
        grads = _backward(features, composite, maps, grad_averages, ctx.needs_input_grad[1:], ctx.upsample)
        return (None, *grads)


def _forward_op(features: list[Tensor], composite: Tensor, biases: Tensor, upsample: str) -> tuple[Tensor, ...]:
    averages, maps = _forward(features, composite, biases, upsample)
    return (averages, *maps)


def _forward_fake(features: list[Tensor], composite: Tensor, biases: Tensor, upsample: str) -> tuple[Tensor, ...]:
    images, layout = features[0].shape[0], plan_for(features, upsample).layout
    sizes = (layout.seen_size, layout.pixel_size, layout.state_size, layout.pixel_size)
    return tuple(composite.new_empty(images, size) for size in (composite.shape[1], *sizes))


def _backward_op(
    features: list[Tensor],
    composite: Tensor,
    maps: list[Tensor],
    grad_averages: Tensor,
    wanted: list[bool],
    upsample: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    grads = _backward(features, composite, ScalarMaps(*maps), grad_averages, wanted, upsample)
    first, second, *others = (composite.new_empty(0) if g is None else g for g in grads)
    return first, second, others


def _backward_fake(
    features: list[Tensor],
    composite: Tensor,
    maps: list[Tensor],
    grad_averages: Tensor,
    wanted: list[bool],
    upsample: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    shapes = [composite, composite.new_empty(len(features) - 1), *features]
    first, second, *others = (
        torch.empty_like(x) if w else composite.new_empty(0) for x, w in zip(shapes, wanted, strict=True)
    )
    return first, second, others


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, composite, _, ctx.upsample = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(composite, *output[1:], *features)


def _operator_backward(ctx: Any, grad_averages: Tensor, *_: Any) -> tuple[Any, ...]:
    composite, *rest = ctx.saved_tensors
    maps, features = rest[:4], rest[4:]
    of_features, of_composite, of_biases, _ = ctx.needs_input_grad
    # One flag stands for the whole list of features in some versions, and one for each in others.
    each = list(of_features) if isinstance(of_features, list | tuple) else [of_features] * len(features)
    wanted = [of_composite, of_biases, *each]
    composite_grad, biases_grad, feature_grads = _backward_operator(
        features, composite, maps, grad_averages, wanted, ctx.upsample
    )
    return (
        [g if w else None for g, w in zip(feature_grads, each, strict=True)],
        composite_grad if of_composite else None,
        biases_grad if of_biases else None,
        None,
    )


_forward_operator = torch.library.custom_op(
    "unikd_fast::pooled_averages",
    _forward_op,
    mutates_args=(),
    schema="(Tensor[] features, Tensor composite, Tensor biases, str upsample) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_forward_operator.register_fake(_forward_fake)
_backward_operator = torch.library.custom_op(
    "unikd_fast::pooled_averages_backward",
    _backward_op,
    mutates_args=(),
    schema="(Tensor[] features, Tensor composite, Tensor[] maps, Tensor grad_averages, bool[] wanted, str upsample) "
    "-> (Tensor, Tensor, Tensor[])",
)
_backward_operator.register_fake(_backward_fake)
_forward_operator.register_autograd(_operator_backward, setup_context=_setup_context)

"""The collapsed AFF: the global average of F_R from the features themselves, forward and backward (`reference_pooled`).

    M = taps · [E_1 .. E_L | b_1 .. b_L]      what the taps of the gates see of each channel, (18 G, Σ C_l + L) in fp32
    S_l = M_l F_l + o_l                       a skinny product a level; its maps are scalar
    w = pixel weights of S                    (`pixel_weights.py`)
    A_l = Σ_p w_l(p) F_l(p)                   the weighted average; then pooled = [A | Σ w] · [E | b]ᵀ

    ∂w_l(p) = ∂A_l · F_l(p) + ∂(Σ w_l),    ∂F_l(p) = w_l(p) ∂A_l + M_lᵀ ∂S_l(p),    ∂M_l = Σ ∂S_l F_lᵀ

Three launches forward and four backward, whatever the number of levels. Bytes moved: the features twice forward, twice
backward and their gradient written once; the second reading begins with the images read last, which are still in the
L2. Nothing with D channels is stored, and every sum over images or pixels is taken in a fixed order.

For features that are normalised with batch statistics the kernels subtract the means as they read, and the scale is in
M. Their gradient takes two more launches and one more reading: the norm's part needs ∂M, the sum over the batch
(`norm_gradient_kernel`).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unikd_fast.kernels._autograd import FusedFunction
from unikd_fast.kernels._launch import on_device
from unikd_fast.kernels._pooled_device import average_kernel, project_kernel, weight_gradient_kernel
from unikd_fast.kernels._pooled_gradient_device import (
    feature_gradient_kernel,
    norm_gradient_kernel,
    sum_parts_kernel,
)
from unikd_fast.kernels._pooled_plan import Plan, plan_for
from unikd_fast.kernels.pixel_weights import (
    GradMaps,
    ScalarMaps,
    empty_maps,
    pixel_weights_backward,
    pixel_weights_forward,
)
from unikd_fast.kernels.reference import autocast_off
from unikd_fast.kernels.reference_moments import ChannelStatistics
from unikd_fast.kernels.reference_pooled import TAPS


def fused_pool(
    features: Sequence[Tensor],
    expand_weights: Sequence[Tensor],
    expand_biases: Sequence[Tensor],
    gate_weights: Sequence[Tensor],
    gate_biases: Sequence[Tensor],
    *,
    upsample: str = "nearest",
    statistics: Sequence[ChannelStatistics] | None = None,
) -> Tensor:
    """Return `reference_pooled.pool_collapsed`, (N, D) in fp32; features that are not dense are copied."""
    dtype = functools.reduce(torch.promote_types, (f.dtype for f in features))
    features = [dense(f.to(dtype)) for f in features]
    with autocast_off(features[0].device):  # it would form the composite weights in half precision
        expand = torch.cat([*(w.flatten(1) for w in expand_weights), *(b[:, None] for b in expand_biases)], 1).float()
        halves = [w.reshape(2, -1, TAPS).mT.float() for w in gate_weights]  # (own or coarse, tap, D)
        taps = torch.cat([*(h[1] for h in halves), *(h[0] for h in halves), expand.new_empty(0, len(expand))])
        biases = torch.cat([*(b.float() for b in gate_biases), expand.new_empty(0)])
        tensors = [taps @ expand, biases]
        if statistics is not None:
            # As wide as the matrix; its last columns, of the expanders' biases, are left as they are.
            beside = expand.new_zeros(len(features))
            means = torch.cat([*(known.mean.float() for known in statistics), beside])
            scales = torch.cat([*(known.rstd.float() for known in statistics), beside + 1])
            tensors.append(torch.stack([means, scales]))
        return averages([*tensors, *features], upsample=upsample, normalised=statistics is not None) @ expand.t()


def dense(x: Tensor) -> Tensor:
    """Return (N, C, H, W) in one of the two layouts that the kernels support."""
    return x if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


class _Norm(NamedTuple):
    """What kernels subtract from or add to a feature, (Σ C_l + L,) each."""

    mean: Tensor | None
    slope: Tensor | None = None
    offset: Tensor | None = None


_NO_NORM = _Norm(None)


def _split(tensors: Sequence[Tensor], normalised: bool) -> tuple[Tensor, Tensor, Tensor | None, Sequence[Tensor]]:
    """Return the matrix, the gates' biases, the means and scales or None, and the features."""
    return tensors[0], tensors[1], tensors[2] if normalised else None, tensors[3 if normalised else 2 :]


def _allocate(tensors: Sequence[Tensor], *, upsample: str, normalised: bool) -> tuple[Tensor, list[Tensor]]:
    composite, _, _, features = _split(tensors, normalised)
    output = composite.new_empty(features[0].shape[0], composite.shape[1])
    saved = list(empty_maps(composite, features))
    return output, [*saved, torch.empty_like(output)] if normalised else saved


def _forward(
    tensors: Sequence[Tensor], output: Tensor, saved: Sequence[Tensor], *, upsample: str, normalised: bool
) -> None:
    composite, biases, statistics, features = _split(tensors, normalised)
    plan, maps, images = plan_for(features, upsample), ScalarMaps(*saved[:4]), len(output)
    mean, scale = (None, None) if statistics is None else statistics
    if not images:
        return
    with on_device(composite):
        if len(features) > 1:
            own = project(composite, features, maps.seen, plan, mean, scale)
            pixel_weights_forward(maps, own, biases, plan.layout, upsample)
        else:
            maps.gates.fill_(1)
            maps.remaining.fill_(1 / plan.layout.pixel_size)
        average_kernel[(images * plan.channel_blocks,)](
            tuple(features), mean, scale, maps.gates, maps.remaining, output, images, **plan.average
        )
        if normalised:
            saved[-1].copy_(output)


def project(
    composite: Tensor,
    features: Sequence[Tensor],
    seen: Tensor,
    plan: Plan,
    mean: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Launch: fill `seen` with what the taps of the finer gates see, and return what those of the own gates see."""
    images = len(seen)
    own = seen.new_empty(images, plan.layout.own_size)
    matrix = composite if scale is None else composite * scale
    project_kernel[(images * plan.pixel_blocks,)](
        tuple(features), mean, matrix.to(features[0].dtype), composite, seen, own, **plan.project
    )
    return own


def _backward(
    tensors: Sequence[Tensor],
    saved: Sequence[Tensor],
    upstream: Tensor,
    grads: Sequence[Tensor | None],
    *,
    upsample: str,
    normalised: bool,
) -> None:
    composite, _, statistics, features = _split(tensors, normalised)
    plan, maps, images = plan_for(features, upsample), ScalarMaps(*saved[:4]), len(upstream)
    mean, scale = (None, None) if statistics is None else statistics
    upstream = upstream.contiguous()
    unscaled = upstream if scale is None else upstream * scale
    with on_device(composite):
        grad_maps = None
        if len(features) > 1 and images:
            grad_weights = torch.empty_like(maps.gates)
            weight_gradient_kernel[(images * plan.pixel_blocks,)](
                tuple(features), mean, unscaled, grad_weights, **plan.weight_gradient
            )
            grad_maps = pixel_weights_backward(maps, grad_weights, plan.layout, upsample)
        rest = (features, maps.gates, maps.remaining, unscaled, None, grad_maps)
        if mean is None or scale is None:
            feature_gradients(composite, *rest, grads, plan)
            return
        grad_composite, grad_biases, grad_statistics, *grad_features = grads
        if grad_statistics is not None:
            grad_statistics.zero_()  # theirs is in that of the features
        nothing = [None] * len(features)
        grad_composite = torch.empty_like(composite) if grad_composite is None else grad_composite
        feature_gradients(composite, *rest, [grad_composite, grad_biases, *nothing], plan, _Norm(mean))
        slope, offset = torch.empty_like(mean), torch.empty_like(mean)
        norm_gradient_kernel[(plan.norm_programs,)](
            upstream, saved[-1], composite, grad_composite, scale, slope, offset, images, **plan.norm_gradient
        )
        norm = _Norm(mean, slope, offset)
        feature_gradients(composite * scale, *rest, [None, None, *grad_features], plan, norm)


def feature_gradients(
    composite: Tensor,
    features: Sequence[Tensor],
    gates: Tensor,
    remaining: Tensor | None,
    grad_averages: Tensor | None,
    grad_blend: Tensor | None,
    grad_maps: GradMaps | None,
    grads: Sequence[Tensor | None],
    plan: Plan,
    norm: _Norm = _NO_NORM,
) -> None:
    """Launch: fill the gradients of the composite matrix, of the gates' biases and of the features.

    Upstream is the gradient of the averages, or that of the blend of two levels (`feature_fusion`). With means the
    matrix is that on the features less these, and so is its gradient.
    """
    images = len(features[0])
    grad_composite, grad_biases, *grad_features = grads
    if grad_composite is not None:
        grad_composite.zero_()  # a row does not look at every level
    if grad_biases is not None:
        if grad_maps is None:  # no images, or no gates
            grad_biases.zero_()
        else:
            torch.sum(grad_maps.biases, 0, out=grad_biases)
    seen, a = (None, None) if grad_maps is None else (grad_maps.seen, grad_maps.a)
    parts = None if grad_composite is None or grad_maps is None else composite.new_empty(plan.parts)
    if images and (parts is not None or any(g is not None for g in grad_features)):
        matrix = None if grad_maps is None else composite.to(features[0].dtype)
        feature_gradient_kernel[(plan.gradient_programs(images),)](
            tuple(features), *norm, matrix, gates, remaining, grad_averages, grad_blend, seen, a, tuple(grad_features),
            parts, images, **(plan.feature_gradient if grad_blend is None else plan.blend_gradient),
        )  # fmt: skip
    if parts is not None:
        sum_parts_kernel[(plan.sum_programs,)](parts, grad_composite, images, **plan.sum_parts)


# (composite M (18 (L - 1), Σ C_l + L), biases of the gates (L - 1,), means and scales (2, Σ C_l + L) if the features
# are normalised, all in fp32, the features, dense and in one dtype) -> the weighted averages of all channels and the
# sums of the weights, (N, Σ C_l + L).
averages = FusedFunction(
    "pooled_averages",
    settings={"upsample": "str", "normalised": "bool"},
    allocate=_allocate,
    forward=_forward,
    backward=_backward,
)

"""The collapsed AFF in plain PyTorch: the global average of F_R without a single D-channel map.

The features' distribution is predicted from the average of F_R (section 3.2), and with spatial gates F_R is, once the
gates are known, linear in the features. So each level is read twice, once to be projected on the taps of the gates,
once to be averaged with the weight its pixels have in F_R, and everything between is scalar maps:

    pooled = 1/(H_1 W_1) Σ_l [ E_l ( Σ_p w_l(p) F_l(p) ) + bias_l Σ_p w_l(p) ]
    w_l = g_l ⊙ remaining_l,    remaining_1 = 1,    remaining_{l+1} = Upᵀ( (1 - g_l) ⊙ remaining_l ),    g_L = 1

Upᵀ is the adjoint of the upsampling. This is Eq. 4 averaged, not an approximation of it: it follows from the
linearity of E, Up and the average. Letters and the layout of the parameters are those of `reference_fusion`.

Features may be normalised with their batch's statistics, x̂ = (x - μ) r with r = 1 / sqrt(σ² + ε). No x̂ is formed:
projections and averages are those of x, shifted and scaled, and with ∂x̂ of the formulas above

    ∂x = r ( ∂x̂ - mean(∂x̂) - x̂ mean(∂x̂ x̂) ),    Σ ∂x̂ = Σ_n ∂A Σ_p w + Mᵀ Σ ∂S,    Σ ∂x̂ x̂ = Σ_n ∂A A + diag( Mᵀ ∂M )

where the sums are over the channel's pixels in the batch, M are the taps on E and S what they see (`_Project`).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from unikd_fast.kernels.reference import autocast_off
from unikd_fast.kernels.reference_fusion import resize, resize_adjoint
from unikd_fast.kernels.reference_moments import ChannelStatistics

TAPS = 9  # of a 3x3 gate
Moments = tuple[Tensor | None, Tensor | None]
"""μ and r of a level's channels, (C_l,) each, or None twice."""


def pool_collapsed(
    features: Sequence[Tensor],
    expand_weights: Sequence[Tensor],
    expand_biases: Sequence[Tensor],
    gate_weights: Sequence[Tensor],
    gate_biases: Sequence[Tensor],
    *,
    upsample: str = "nearest",
    statistics: Sequence[ChannelStatistics] | None = None,
) -> Tensor:
    """Give the mean over H_1 x W_1 of `fuse_stagewise`, for spatial gates; the formula stands above.

    Args:
        features: L tensors (N, C_l, H_l, W_l), fine to coarse, contiguous or channels_last.
        expand_weights: weights of the 1x1 convolutions E_l, (D, C_l, 1, 1).
        expand_biases: their biases, (D,).
        gate_weights: weights of the 3x3 convolutions of the gates, (1, 2D, 3, 3).
        gate_biases: their biases, (1,).
        upsample: "nearest" or "bilinear" (align_corners=False).
        statistics: those of each level's features as they are given, to normalise them with. The gradient goes through
            them as if they were computed here.

    Returns:
        (N, D) in fp32, or fp64 if a feature is fp64, under autocast too. Features in half precision are multiplied
        as they are; the composite weights, gates and pixel weights are formed in fp32. Differentiable once.

    Example:
        >>> features = [torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)]
        >>> expand = [torch.randn(5, 4, 1, 1), torch.randn(5, 6, 1, 1)]
        >>> pool_collapsed(features, expand, [torch.zeros(5)] * 2, [torch.randn(1, 10, 3, 3)], [torch.zeros(1)]).shape
        torch.Size([2, 5])
    """
    exact = torch.float64 if any(feature.dtype == torch.float64 for feature in features) else torch.float32
    expand = [weight.flatten(1).to(exact) for weight in expand_weights]  # (D, C_l)
    biases = [bias.to(exact) for bias in expand_biases]
    taps = [weight.reshape(2, -1, TAPS).to(exact) for weight in gate_weights]  # own half, coarse half
    if statistics is not None and not _takes_handles():
        features = [
            F.batch_norm(feature, None, None, training=True, eps=known.eps)
            for feature, known in zip(features, statistics, strict=True)
        ]
        statistics = None
    moments: list[Moments] = [(None, None)] * len(features)
    if statistics is not None:
        moments = [(known.mean.to(exact), known.rstd.to(exact)) for known in statistics]
    with autocast_off(features[0].device):  # it would form the composite weights in half precision
        projections, factors = [], []
        for level, feature in enumerate(features):
            composite = taps_on(level, taps, expand[level])  # (9 * gates, D)
            seen, factor = _project(feature, composite @ expand[level], moments[level])
            seen = seen + (composite @ biases[level])[:, None]
            projections.append(seen.unflatten(2, feature.shape[-2:]))
            factors.append(factor)
        weights = pixel_weights(projections, [bias.to(exact) for bias in gate_biases], upsample)
        return _pool(features, factors, expand, biases, weights, moments)


def taps_on(level: int, taps: Sequence[Tensor], expand: Tensor) -> Tensor:
    """Stack the taps that look at E_l(F_l), (9 * gates, D): every finer gate's coarse half, then the own gate's."""
    columns = [taps[gate][1] for gate in range(level)]
    if level < len(taps):
        columns.append(taps[level][0])
    return torch.cat(columns, dim=1).t() if columns else expand.new_empty(0, expand.shape[0])


def pixel_weights(projections: Sequence[Tensor], gate_biases: Sequence[Tensor], upsample: str) -> list[Tensor]:
    """Give the weight of each pixel of each level in the average of F_R, w_l / (H_1 W_1), (N, H_l W_l); they sum to 1.

    Args:
        projections: what the taps of the gates saw of each level, (N, 9 * gates, H_l, W_l), see `taps_on`.
        gate_biases: (1,) each.
        upsample: "nearest" or "bilinear".
    """
    gates = _gates(projections, gate_biases, upsample)
    n, _, height, width = projections[0].shape
    remaining = projections[0].new_full((n, 1, height, width), 1 / (height * width))
    weights = []
    for level, gate in enumerate(gates):
        weights.append((remaining * gate).flatten(1))
        remaining = resize_adjoint(remaining * (1 - gate), projections[level + 1].shape[-2:], upsample)
    return [*weights, remaining.flatten(1)]


def _gates(projections: Sequence[Tensor], biases: Sequence[Tensor], upsample: str) -> list[Tensor]:
    """Run Eq. 4 on the projections (N, 9 * gates, H_l, W_l) alone and give the gates g_l (N, 1, H_l, W_l).

    Projection commutes with Up and with a spatial gate, so the taps of R_l obey the recursion that R_l obeys.
    """
    gates: list[Tensor] = []
    state = projections[-1]  # the taps of R_{l+1} for gates 1..l
    for level in reversed(range(len(biases))):
        seen = projections[level]
        coarse = resize(state, seen.shape[-2:], upsample)
        finer = TAPS * level
        gate = torch.sigmoid(_sum_taps(seen[:, finer:] + coarse[:, finer:]) + biases[level])
        state = torch.lerp(coarse[:, :finer], seen[:, :finer], gate)
        gates.insert(0, gate)
    return gates


def _sum_taps(taps: Tensor) -> Tensor:
    """Finish a zero-padded 3x3 convolution from what its taps saw, (N, 9, H, W): shift each and add, (N, 1, H, W).

    Rows first, then columns. `fold` says the same in one call, but compiles to atomic adds: not the same twice.
    """
    h, w = taps.shape[-2:]
    padded = F.pad(taps.unflatten(1, (3, 3)), (1, 1, 1, 1))
    rows = padded[:, 0, :, :h] + padded[:, 1, :, 1 : h + 1] + padded[:, 2, :, 2:]
    return (rows[:, 0, :, :w] + rows[:, 1, :, 1 : w + 1] + rows[:, 2, :, 2:])[:, None]


def _pool(
    features: Sequence[Tensor],
    factors: Sequence[Tensor | None],
    expand: Sequence[Tensor],
    biases: Sequence[Tensor],
    weights: Sequence[Tensor],
    moments: Sequence[Moments],
) -> Tensor:
    """Average each level with its pixels' weights in F_R, then expand the averages: (N, D)."""
    pooled: Tensor | None = None
    for level, (feature, weight) in enumerate(zip(features, weights, strict=True)):
        averaged = _average(feature.flatten(2), weight, factors[level], moments[level])  # (N, C_l)
        part = torch.addmm(weight.sum(1, keepdim=True) * biases[level], averaged, expand[level].t())
        pooled = part if pooled is None else pooled + part
    assert pooled is not None
    return pooled


# A level is read by two products, and autograd would write its gradient three times: once for each and once for the
# sum. The gradient of the average is an outer product, so instead its two factors travel from _Average to _Project,
# as the "gradient" of a tensor that exists for that alone, and _Project writes dF = Mᵀ dP + dA wᵀ in one product. What
# normalised features need besides, Σ_n ∂A A, travels with them.


# Compiled by torch 2.11 that gradient does not arrive: what the handle brings is lost. 2.15 was seen to do it right.
_COMPILES_HANDLES = torch.__version__ >= "2.15"


def _takes_handles() -> bool:
    return _COMPILES_HANDLES or not torch.compiler.is_compiling()


def _project(feature: Tensor, rows: Tensor, moments: Moments) -> tuple[Tensor, Tensor | None]:
    if _takes_handles():
        seen, handle = _Project.apply(feature, rows, *moments)
        return seen, handle
    return torch.bmm(rows.to(feature.dtype).expand(len(feature), -1, -1), feature.flatten(2)).to(rows.dtype), None


def _average(feature: Tensor, weight: Tensor, handle: Tensor | None, moments: Moments) -> Tensor:
    if handle is None:
        return torch.bmm(feature.to(weight.dtype), weight[:, :, None])[:, :, 0]
    averaged: Tensor = _Average.apply(feature, weight, handle, *moments)
    return averaged


class _Project(torch.autograd.Function):
    """M x̂ for a feature (N, C, H, W) and rows M (R, C), (N, R, P); and the handle that `_Average` takes.

    The handle is (N, C + P), and (N, C + P + C) for normalised features.
    """

    @staticmethod
    def forward(feature: Tensor, rows: Tensor, mean: Tensor | None, rstd: Tensor | None) -> tuple[Tensor, Tensor]:
        # On a flattened feature the batched product is a view in both layouts; a 1x1 conv2d copies the contiguous one.
        flat = feature.flatten(2)
        n, channels, pixels = flat.shape
        size = channels + pixels
        read = (rows if rstd is None else rows * rstd).to(feature.dtype)
        seen = torch.bmm(read.expand(n, -1, -1), flat).to(rows.dtype)
        if mean is not None:
            seen = seen - (read.to(rows.dtype) @ mean)[:, None]  # of what was multiplied, not of what was meant
            size += channels
        # Never read: expanded, it takes up no memory.
        return seen, rows.new_zeros(()).expand(n, size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_seen: Tensor, factors: Tensor) -> tuple[Tensor | None, ...]:
        feature, rows, mean, rstd = ctx.saved_tensors
        wanted, wants_rows = ctx.needs_input_grad[:2]
        grad_feature = grad_rows = None
        if wants_rows or (wanted and mean is not None):
            multiplied = grad_seen.to(feature.dtype)
            grad_rows = torch.bmm(multiplied, feature.flatten(2).transpose(1, 2)).to(rows.dtype).sum(0)
            if mean is not None:
                total = multiplied.to(rows.dtype).sum((0, 2))  # (R,)
                grad_rows = torch.addr(grad_rows, total, mean, alpha=-1) * rstd
        if wanted:
            sizes = (feature.shape[1], feature.shape[2] * feature.shape[3])
            grad_average, weight = factors[:, : sum(sizes)].split(sizes, dim=1)
            left, right = [rows.expand(len(feature), -1, -1), grad_average[:, None]], [grad_seen, weight[:, None]]
            if mean is None:
                grad_feature = _outer_sum(left, right, feature)
            else:
                drift = (grad_average * weight.sum(1, keepdim=True)).sum(0) + total @ rows
                stretch = factors[:, sum(sizes) :].sum(0) + (grad_rows * rows).sum(0)
                grad_feature = _through_the_norm(left, right, feature, mean, rstd, drift, stretch)
        return grad_feature, grad_rows if wants_rows else None, None, None


def _through_the_norm(
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    feature: Tensor,
    mean: Tensor,
    rstd: Tensor,
    drift: Tensor,
    stretch: Tensor,
) -> Tensor:
    """Give the gradient of a feature from that of the normalised one, leftᵀ right, and its two sums (C,)."""
    count = feature.numel() // feature.shape[1]
    slope = -stretch * rstd.square() / count
    offset = -drift * rstd / count - slope * mean
    scaled = [part * rstd for part in left]
    if feature.dtype == rstd.dtype:  # the offset as one more row, and the rest into the product where it lies
        n, pixels = len(feature), right[0].shape[2]
        rows = offset.expand(n, 1, -1), offset.new_ones(()).expand(n, 1, pixels)
        return _outer_sum([*scaled, rows[0]], [*right, rows[1]], feature).addcmul_(feature, slope[:, None, None])
    rest = torch.addcmul(offset[:, None, None], feature.to(rstd.dtype), slope[:, None, None])
    return _outer_sum(scaled, right, feature).add_(rest)


def _outer_sum(lefts: Sequence[Tensor], rights: Sequence[Tensor], like: Tensor) -> Tensor:
    """Give leftᵀ right, left (N, R, C) and right (N, R, P) of parts, in shape, layout and dtype of `like` (N, C, H, W).

    Written into a tensor of its own and not viewed as one: autograd adds the network's own gradient of a level in place
    where it can, and into a view it cannot.
    """
    left, right = (torch.cat(list(parts), dim=1).to(like.dtype) for parts in (lefts, rights))
    if like.is_contiguous():
        result = torch.empty_like(like)
        torch.bmm(left.transpose(1, 2), right, out=result.view(len(like), like.shape[1], -1))
    elif like.is_contiguous(memory_format=torch.channels_last):
        result = torch.empty_like(like)
        by_pixel = result.permute(0, 2, 3, 1)
        torch.bmm(right.transpose(1, 2), left, out=by_pixel.view(len(like), -1, like.shape[1]))
    else:
        result = torch.bmm(left.transpose(1, 2), right).unflatten(2, like.shape[2:])
    return result


class _Average(torch.autograd.Function):
    """A = x̂ w for a feature (N, C, P) and weights w (N, P); the handle takes the gradient to `_Project`."""

    @staticmethod
    def forward(feature: Tensor, weight: Tensor, handle: Tensor, mean: Tensor | None, rstd: Tensor | None) -> Tensor:
        # Not in half precision: the average may be large against what is left when a bias takes its mean away.
        averaged = torch.bmm(feature.to(weight.dtype), weight[:, :, None])[:, :, 0]
        if mean is None or rstd is None:
            return averaged
        return (averaged - weight.sum(1, keepdim=True) * mean) * rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
        feature, weight, _, mean, rstd = inputs
        ctx.save_for_backward(feature, weight, mean, rstd, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_average: Tensor) -> tuple[Tensor | None, ...]:
        feature, weight, mean, rstd, averaged = ctx.saved_tensors
        grad_weight = factors = None
        if ctx.needs_input_grad[1]:
            read = (grad_average if rstd is None else grad_average * rstd).to(feature.dtype)
            grad_weight = torch.bmm(read[:, None], feature)[:, 0].to(weight.dtype)
            if mean is not None:
                grad_weight = grad_weight - (read.to(weight.dtype) @ mean)[:, None]
        if ctx.needs_input_grad[2]:
            scale = _half_way(feature)
            parts = [grad_average / scale, weight * scale]
            factors = torch.cat(parts if mean is None else [*parts, grad_average * averaged], dim=1)
        return None, grad_weight, factors, None, None


def _half_way(feature: Tensor) -> float:
    """Scale for weights that sum to one: as they are they fall below the range of fp16, times P their sums leave it."""
    return feature.shape[2] ** 0.5

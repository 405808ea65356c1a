"""The two products that read a level of features, plain or normalised, and the one that writes its gradient.

Autograd would write that gradient three times: once for each product and once for the sum. The gradient of the average
is an outer product, so its two factors are passed from `_Average` to `_Project` instead, as the "gradient" of a tensor
made for this purpose, the handle, and `_Project` writes ∂x = Mᵀ ∂S + ∂A wᵀ in one product.

Features may be normalised with their batch's statistics, x̂ = (x - μ) r with r = 1 / sqrt(σ² + ε). No x̂ is formed:
projections and averages are those of x, shifted and scaled, and with that ∂x̂

    ∂x = r ( ∂x̂ - mean(∂x̂) - x̂ mean(∂x̂ x̂) ),    Σ ∂x̂ = Σ_n ∂A Σ_p w + Mᵀ Σ ∂S,    Σ ∂x̂ x̂ = Σ_n ∂A A + diag( Mᵀ ∂M )

where the sums are over the channel's pixels in the batch, M are the rows to project on and S = M x̂. Σ_n ∂A A, which
this needs as well, is passed in the same way.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Moments = tuple[Tensor | None, Tensor | None]
"""μ and r of a level's channels, (C,) each, or None twice."""

# Compiled by torch 2.11 the gradient of the handle is lost; by 2.15 it arrives.
_COMPILES_HANDLES = torch.__version__ >= "2.15"


def takes_handles() -> bool:
    """Tell whether gradients travel by handles here, in eager mode or while compiling."""
    return _COMPILES_HANDLES or not torch.compiler.is_compiling()


def project(feature: Tensor, rows: Tensor, offset: Tensor, moments: Moments) -> tuple[Tensor, Tensor | None]:
    """Return M x̂ + o, (N, R, P), and the handle for `average`.

    Args:
        feature: x, (N, C, H, W).
        rows: M, (R, C).
        offset: o, (R,).
        moments: moments to normalise x with; the caller passes (None, None) where there are no handles.
    """
    if takes_handles():
        seen, handle = _Project.apply(feature, rows, offset, *moments)
        return seen, handle
    seen = torch.bmm(rows.to(feature.dtype).expand(len(feature), -1, -1), feature.flatten(2))
    return seen.to(rows.dtype) + offset[:, None], None


def average(feature: Tensor, weight: Tensor, handle: Tensor | None, moments: Moments) -> Tensor:
    """Return A = x̂ w, (N, C), for x (N, C, P) and weights w (N, P)."""
    if handle is None:
        return _weighted_sum(feature, weight)
    averaged: Tensor = _Average.apply(feature, weight, handle, *moments)
    return averaged


class _Project(torch.autograd.Function):
    """M x̂ + o for a feature (N, C, H, W), rows M (R, C) and an offset o (R,): (N, R, P); and the handle that `_Average`
    takes.

    The handle is (N, C + P), and (N, C + P + C) for normalised features.
    """

    @staticmethod
    def forward(
        feature: Tensor, rows: Tensor, offset: Tensor, mean: Tensor | None, rstd: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # On a flattened feature the batched product is a view in both layouts; a 1x1 conv2d copies the contiguous one.
        flat = feature.flatten(2)
        n, channels, pixels = flat.shape
        size = channels + pixels
        read = (rows if rstd is None else rows * rstd).to(feature.dtype)
        seen = torch.bmm(read.expand(n, -1, -1), flat).to(rows.dtype)
        if mean is not None:
            offset = offset - read.to(rows.dtype) @ mean  # of what was multiplied, not of what was meant
            size += channels
        # The handle is never read: expanded, it takes up no memory.
        return seen.add_(offset[:, None]), rows.new_zeros(()).expand(n, size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
        feature, rows, _, mean, rstd = inputs
        ctx.save_for_backward(feature, rows, mean, rstd)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_seen: Tensor, factors: Tensor) -> tuple[Tensor | None, ...]:
        feature, rows, mean, rstd = ctx.saved_tensors
        wanted, wants_rows, wants_offset = ctx.needs_input_grad[:3]
        grad_feature = grad_rows = None
        grad_offset = grad_seen.sum((0, 2))
        if wants_rows or (wanted and mean is not None):
            multiplied = grad_seen.to(feature.dtype)
            grad_rows = torch.bmm(multiplied, feature.flatten(2).transpose(1, 2)).to(rows.dtype).sum(0)
            if mean is not None:
                total = grad_offset if multiplied is grad_seen else multiplied.to(rows.dtype).sum((0, 2))  # (R,)
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
        return grad_feature, grad_rows if wants_rows else None, grad_offset if wants_offset else None, None, None


def _through_the_norm(
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    feature: Tensor,
    mean: Tensor,
    rstd: Tensor,
    drift: Tensor,
    stretch: Tensor,
) -> Tensor:
    """Return the gradient of a feature from that of the normalised one, leftᵀ right, and its two sums (C,)."""
    count = feature.numel() // feature.shape[1]
    slope = -stretch * rstd.square() / count
    offset = -drift * rstd / count - slope * mean
    scaled = [part * rstd for part in left]
    if feature.dtype == rstd.dtype:  # the offset as one more row of the product, which is added to the rest
        n, pixels = len(feature), right[0].shape[2]
        rows = offset.expand(n, 1, -1), offset.new_ones(()).expand(n, 1, pixels)
        return _outer_sum([*scaled, rows[0]], [*right, rows[1]], feature, onto=feature * slope[:, None, None])
    rest = torch.addcmul(offset[:, None, None], feature.to(rstd.dtype), slope[:, None, None])
    return _outer_sum(scaled, right, feature).add_(rest)


def _outer_sum(
    lefts: Sequence[Tensor], rights: Sequence[Tensor], like: Tensor, *, onto: Tensor | None = None
) -> Tensor:
    """Return leftᵀ right, left (N, R, C) and right (N, R, P) given in parts, with shape, layout and dtype of `like`.

    The result (N, C, H, W) is a tensor of its own and not a view: autograd adds the network's own gradient of a level
    in place where it can, and into a view it cannot. A tensor `onto` which it is added is overwritten.
    """
    left, right = (torch.cat(list(parts), dim=1).to(like.dtype) for parts in (lefts, rights))
    images, channels, pixels = len(left), left.shape[2], right.shape[2]  # -1 would stand for nothing of no images
    result = torch.empty_like(like) if onto is None else onto
    if result.is_contiguous():
        flat, factors = result.view(images, channels, pixels), (left.transpose(1, 2), right)
    elif result.is_contiguous(memory_format=torch.channels_last):
        flat, factors = result.permute(0, 2, 3, 1).view(images, pixels, channels), (right.transpose(1, 2), left)
    else:
        product = torch.bmm(left.transpose(1, 2), right).unflatten(2, like.shape[2:])
        return product if onto is None else onto.add_(product)
    if onto is None:
        torch.bmm(*factors, out=flat)
    else:
        flat.baddbmm_(*factors)
    return result


class _Average(torch.autograd.Function):
    """A = x̂ w for a feature (N, C, P) and weights w (N, P); the handle takes the gradient to `_Project`."""

    @staticmethod
    def forward(feature: Tensor, weight: Tensor, handle: Tensor, mean: Tensor | None, rstd: Tensor | None) -> Tensor:
        # Not in half precision: the average may be large against what is left when a bias takes its mean away.
        averaged = _weighted_sum(feature, weight)
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


def _weighted_sum(feature: Tensor, weight: Tensor) -> Tensor:
    """Return Σ_p w(p) x(p), (N, C), for x (N, C, P) and weights w (N, P)."""
    # A row by a matrix: a matrix by a column, the same product, takes up to ten times as long on a CPU.
    return torch.bmm(weight[:, None], feature.to(weight.dtype).transpose(1, 2))[:, 0]


def _half_way(feature: Tensor) -> float:
    """Scale for weights that sum to one: as they are they fall below the range of fp16, times P their sums leave it."""
    return feature.shape[2] ** 0.5

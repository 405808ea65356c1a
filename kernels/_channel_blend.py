"""The stage of `feature_fusion` with a gate per channel: cuDNN's convolutions, and the rest fused around them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unikd_fast.kernels._blend_plan import blend_plan, laid_out_as, level_of, strides
from unikd_fast.kernels._channel_blend_device import (
    channel_blend_kernel,
    channel_coarse_gradient_kernel,
    channel_fine_gradient_kernel,
)
from unikd_fast.kernels._fused_function import FusedFunction
from unikd_fast.kernels._launch import on_device
from unikd_fast.kernels.reference_pooled import TAPS


def channel_blend(
    fine: Tensor, coarse: Tensor, gate_weight: Tensor, gate_bias: Tensor, *, upsample: str, pool: bool
) -> Tensor:
    """Give `feature_fusion.fused_blend` for gates (D, 2D, 3, 3); fine and coarse dense and in one dtype."""
    width = fine.shape[1]
    own_weight, above_weight = gate_weight.to(fine.dtype).split(width, dim=1)
    own = F.conv2d(fine, own_weight, gate_bias.to(fine.dtype), padding=1)
    taps = []
    if fine.shape == coarse.shape:
        own = own + F.conv2d(coarse, above_weight, padding=1)
    else:
        # Tap by tap at the coarse size: Up commutes with what mixes channels, not with shifts.
        by_tap = above_weight.permute(2, 3, 0, 1).reshape(TAPS * width, width, 1, 1)
        taps = [laid_out_as(coarse, F.conv2d(coarse, by_tap))]
    return _blends([laid_out_as(fine, own), fine, coarse, *taps], upsample=upsample, pool=pool)


def _allocate(tensors: Sequence[Tensor], *, upsample: str, pool: bool) -> tuple[Tensor, list[Tensor]]:
    fine = tensors[1]
    output = fine.new_empty(fine.shape[:2], dtype=torch.float32) if pool else torch.empty_like(fine)
    return output, [torch.empty_like(fine)]  # a


def _of_taps(taps: Tensor) -> dict[str, Any]:
    channel, pixel = strides(level_of(taps))
    return {"TAPS_SC": channel, "TAPS_SP": pixel}


def _forward(tensors: Sequence[Tensor], output: Tensor, saved: Sequence[Tensor], *, upsample: str, pool: bool) -> None:
    own, fine, coarse, *taps = tensors
    plan, images = blend_plan(fine, coarse, upsample), len(fine)
    if not images:
        return
    parts = output.new_empty(images, plan.blocks, fine.shape[1]) if pool else None
    with on_device(fine):
        channel_blend_kernel[(images * plan.blocks,)](
            own, taps[0] if taps else None, fine, coarse, saved[0], None if pool else output, parts,
            **_of_taps(taps[0] if taps else coarse), **plan.constants,
        )  # fmt: skip
        if parts is not None:
            torch.sum(parts, 1, out=output).div_(plan.pixels)


def _backward(
    tensors: Sequence[Tensor],
    saved: Sequence[Tensor],
    upstream: Tensor,
    grads: Sequence[Tensor | None],
    *,
    upsample: str,
    pool: bool,
) -> None:
    _, fine, coarse, *taps = tensors
    grad_a, grad_fine, grad_coarse, *grad_taps = grads
    plan, images, a = blend_plan(fine, coarse, upsample), len(fine), saved[0]
    if not images:
        return
    grad = None if pool else laid_out_as(fine, upstream)
    grad_mean = upstream.contiguous() if pool else None
    grad_a = torch.empty_like(a) if grad_a is None else grad_a
    with on_device(fine):
        channel_fine_gradient_kernel[(images * plan.blocks,)](
            a, fine, coarse, grad, grad_mean, grad_a, grad_fine, **plan.constants,
        )  # fmt: skip
        channel_coarse_gradient_kernel[(images * plan.coarse_blocks, 1 + TAPS * len(taps))](
            a, grad_a, grad, grad_mean, grad_coarse, grad_taps[0] if taps else None,
            **_of_taps(taps[0] if taps else coarse), **plan.constants, **plan.reach,
        )  # fmt: skip


# (what the convolution makes of E, E, R_{l+1}, and what it makes of R_{l+1} tap by tap) -> R_l or its mean.
_blends = FusedFunction(
    "channel_blend",
    settings={"upsample": "str", "pool": "bool"},
    allocate=_allocate,
    forward=_forward,
    backward=_backward,
)

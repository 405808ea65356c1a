"""One stage of the AFF, fused: R_l = g E + (1 - g) Up(R_{l+1}) without the concatenation or the upsampled map (Eq. 4).

The gate is one map. Its 3x3 convolution is a projection of each half on its nine taps, at its own size, and then shifts
and adds of scalar maps: the projections and gates of the collapsed AFF for two levels. Three launches forward, four
backward. Bytes moved, with P those of E and a quarter of the pixels above it: E and R_{l+1} twice and the result, 3.5 P
forward of at least 2.25 P; 6.75 P backward of at least 3.5 P. A gate per channel has no kernel.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from unikd_fast.kernels._autograd import FusedFunction
from unikd_fast.kernels._blend_device import blend_kernel, gate_gradient_kernel
from unikd_fast.kernels._launch import MAX_PROGRAMS, Launch, describe, on_device
from unikd_fast.kernels._pooled_plan import Level, layout_of, levels_of, plan_for
from unikd_fast.kernels.pixel_weights import (
    ScalarMaps,
    empty_maps,
    pixel_weights_backward,
    pixel_weights_forward,
)
from unikd_fast.kernels.pooled_fusion import averages, dense, feature_gradients, project
from unikd_fast.kernels.reference import autocast_off
from unikd_fast.kernels.reference_fusion import check_blend
from unikd_fast.kernels.reference_pooled import TAPS


def fused_blend(
    fine: Tensor,
    coarse: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    *,
    upsample: str = "nearest",
    pool: bool = False,
) -> Tensor:
    """Return `reference_fusion.blend`; inputs that are not dense are copied. Differentiable once."""
    check_blend(fine, coarse, gate_weight, gate_bias)
    if len(gate_weight) > 1:
        raise ValueError(
            f"blend: the kernel needs one gate map, gate_weight (1, {2 * fine.shape[1]}, 3, 3), got "
            f"{tuple(gate_weight.shape)}; use impl='reference'"
        )
    dtype = torch.promote_types(fine.dtype, coarse.dtype)
    fine, coarse = dense(fine.to(dtype)), dense(coarse.to(dtype))
    width = fine.shape[1]
    with autocast_off(fine.device):
        own, above = gate_weight.reshape(2, width, TAPS).mT.float()
        taps = torch.cat([above, own])
        # As two levels whose expanders are the identity.
        composite = torch.cat([taps, taps, taps.new_zeros(2 * TAPS, 2)], dim=1)
        tensors = [composite, gate_bias.float(), fine, coarse]
        if pool:
            average = averages(tensors, upsample=upsample, normalised=False)
            return average[:, :width] + average[:, width : 2 * width]
        return _blends(tensors, upsample=upsample)


class BlendPlan(NamedTuple):
    """Sizes, and arguments of the kernels that see both levels; none depends on the number of images."""

    blocks: int  # of fine pixels
    constants: dict[str, Any]


def blend_plan(fine: Tensor, coarse: Tensor, upsample: str) -> BlendPlan:
    return plan_of(*levels_of([fine, coarse]), upsample, fine.device)


@functools.lru_cache(maxsize=256)
def plan_of(fine: Level, coarse: Level, upsample: str, device: torch.device) -> BlendPlan:
    channels, h, w, _ = fine
    _, small_h, small_w, _ = coarse
    description = describe(device)
    launch = Launch(1, 64, True, 128 // description.warp_size, MAX_PROGRAMS, description.amd)
    block_p, block_c = 32, min(64, max(16, triton.next_power_of_2(channels)))
    return BlendPlan(
        math.ceil(h * w / block_p),
        {
            "H": h,
            "W": w,
            "SMALL_H": small_h,
            "SMALL_W": small_w,
            "C": channels,
            "LAYOUT": layout_of(*fine[1:]),
            "SMALL_LAYOUT": layout_of(*coarse[1:]),
            "NEAREST": upsample == "nearest",
            "BLOCK_P": block_p,
            "BLOCK_C": block_c,
            **launch.options,
        },
    )


def _laid_out_as(x: Tensor, upstream: Tensor) -> Tensor:
    """Return a gradient in the layout of `x`; that of an average, for example, is expanded."""
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return upstream.contiguous(memory_format=layout)


def _allocate(tensors: Sequence[Tensor], *, upsample: str) -> tuple[Tensor, list[Tensor]]:
    composite, _, *levels = tensors
    return torch.empty_like(levels[0]), [empty_maps(composite, levels).gates]


def _forward(tensors: Sequence[Tensor], output: Tensor, saved: Sequence[Tensor], *, upsample: str) -> None:
    composite, bias, *levels = tensors
    plan = plan_for(levels, upsample)
    if not len(output):
        return
    with on_device(output):
        maps = empty_maps(composite, levels)._replace(gates=saved[0])
        own = project(composite, levels, maps.seen, plan)
        pixel_weights_forward(maps, own, bias, plan.layout, upsample)
        blend = blend_plan(levels[0], levels[1], upsample)
        blend_kernel[(len(output) * blend.blocks,)](
            *levels, maps.gates, output, **blend.constants,
        )  # fmt: skip


def _backward(
    tensors: Sequence[Tensor],
    saved: Sequence[Tensor],
    upstream: Tensor,
    grads: Sequence[Tensor | None],
    *,
    upsample: str,
) -> None:
    composite, _, *levels = tensors
    plan, gates = plan_for(levels, upsample), saved[0]
    upstream = _laid_out_as(levels[0], upstream)
    grad_maps = None
    with on_device(gates):
        if len(gates):
            # The gates' gradient in the place of the weights': of weights that are the gates, where all remains.
            grad_gates = torch.zeros_like(gates)
            blend = blend_plan(levels[0], levels[1], upsample)
            gate_gradient_kernel[(len(gates) * blend.blocks,)](
                *levels, upstream, grad_gates, **blend.constants,
            )  # fmt: skip
            # Between two levels nothing is blended that a finer gate would look at.
            maps = ScalarMaps(gates, gates, gates, torch.ones_like(gates))
            grad_maps = pixel_weights_backward(maps, grad_gates, plan.layout, upsample)
        feature_gradients(composite, levels, gates, None, None, upstream, grad_maps, grads, plan)


# (taps twice (18, 2 D + 2) in fp32, the gate's bias (1,) in fp32, E, R_{l+1}, dense and in one dtype) -> R_l.
_blends = FusedFunction("blend", settings={"upsample": "str"}, allocate=_allocate, forward=_forward, backward=_backward)

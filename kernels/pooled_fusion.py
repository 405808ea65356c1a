"""The collapsed AFF: the global average of F_R from the features themselves, forward and backward (`reference_pooled`).

    S_l = M_l F_l + o_l          what the taps of the gates see: a skinny product, M_l = taps · E_l in fp32
    w = pixel weights of S       scalar maps, one launch for all levels (`pixel_weights.py`)
    A_l = Σ_p w_l(p) F_l(p)      the weighted average, expanded afterwards: pooled = Σ_l E_l A_l + b_l Σ_p w_l(p)

    ∂w_l(p) = ∂A_l · F_l(p) + ∂(Σ w_l),    ∂F_l(p) = w_l(p) ∂A_l + M_lᵀ ∂S_l(p),    ∂M_l = Σ ∂S_l F_lᵀ

Bytes moved: the features twice forward, twice backward and their gradient written once; the second reading of an image
comes from the L2 where few images are under way. Nothing with D channels is ever stored, and every sum over images or
pixels is taken in a fixed order.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from unikd_fast.kernels._launch import MAX_PROGRAMS, Launch, describe, on_device
from unikd_fast.kernels.pixel_weights import (
    Saved,
    geometry,
    pixel_weights_backward,
    pixel_weights_forward,
    rows_of_level,
)
from unikd_fast.kernels.reference import autocast_off
from unikd_fast.kernels.reference_pooled import TAPS, taps_on

# Groups of images whose share of ∂M is summed by one program; the groups are summed in their order.
GROUPS = 32


@triton.jit
def _load_feature(ptr, c, p, C, P, SC: tl.constexpr, SP: tl.constexpr, EXACT: tl.constexpr):
    """A tile (channels, pixels), 0 outside."""
    offsets = c[:, None].to(tl.int64) * SC + p[None, :].to(tl.int64) * SP
    x = tl.load(ptr + offsets, mask=(c < C)[:, None] & (p < P)[None, :], other=0.0)
    if EXACT:
        x = x.to(tl.float32)
    return x


@triton.jit
def _project_kernel(
    feature_ptr,  # (N, C, P), strides below
    matrix_ptr,  # (R, C) in the feature's dtype
    offset_ptr,  # (R,) fp32
    seen_ptr,  # (N, R, P) fp32, image stride SEEN_N
    P: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    R_PADDED: tl.constexpr,
    SEEN_N: tl.constexpr,
    SN: tl.constexpr,
    SC: tl.constexpr,
    SP: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    r = tl.arange(0, R_PADDED).to(tl.int64)
    total = tl.zeros([R_PADDED, BLOCK_P], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        x = _load_feature(feature_ptr + image * SN, c, p, C, P, SC, SP, EXACT)
        m = tl.load(matrix_ptr + r[:, None] * C + c[None, :], mask=(r < R)[:, None] & (c < C)[None, :], other=0.0)
        total += tl.dot(m.to(x.dtype), x, input_precision="ieee")
    total += tl.load(offset_ptr + r, mask=r < R, other=0.0)[:, None]
    out = seen_ptr + image * SEEN_N + r[:, None] * P + p[None, :]
    tl.store(out, total, mask=(r < R)[:, None] & (p < P)[None, :])


@triton.jit
def _average_kernel(
    feature_ptr,
    weight_ptr,  # (N, P) fp32, image stride WEIGHT_N
    average_ptr,  # (N, C) fp32
    P: tl.constexpr,
    C: tl.constexpr,
    WEIGHT_N: tl.constexpr,
    SN: tl.constexpr,
    SC: tl.constexpr,
    SP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        x = _load_feature(feature_ptr + image * SN, c, p, C, P, SC, SP, True)
        w = tl.load(weight_ptr + image * WEIGHT_N + p, mask=p < P, other=0.0)
        total += tl.sum(x * w[None, :], axis=1)
    tl.store(average_ptr + image * C + c, total, mask=c < C)


@triton.jit
def _weight_gradient_kernel(
    feature_ptr,
    grad_average_ptr,  # (N, C) fp32
    grad_mass_ptr,  # (N,) fp32
    grad_weight_ptr,  # (N, P) fp32, image stride WEIGHT_N
    P: tl.constexpr,
    C: tl.constexpr,
    WEIGHT_N: tl.constexpr,
    SN: tl.constexpr,
    SC: tl.constexpr,
    SP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    total = tl.zeros([BLOCK_P], tl.float32) + tl.load(grad_mass_ptr + image)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        x = _load_feature(feature_ptr + image * SN, c, p, C, P, SC, SP, True)
        g = tl.load(grad_average_ptr + image * C + c, mask=c < C, other=0.0)
        total += tl.sum(x * g[:, None], axis=0)
    tl.store(grad_weight_ptr + image * WEIGHT_N + p, total, mask=p < P)


@triton.jit(do_not_specialize=["N"])
def _feature_gradient_kernel(
    feature_ptr,
    matrix_ptr,  # (R, C) fp32, or None where no gate looks at this level
    weight_ptr,  # (N, P) fp32
    grad_average_ptr,  # (N, C) fp32
    grad_seen_ptr,  # (N, R, P) fp32
    grad_feature_ptr,  # as the feature, or None
    grad_matrix_ptr,  # (groups, R, C) fp32, or None
    N,
    P: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    R_PADDED: tl.constexpr,
    SEEN_N: tl.constexpr,
    WEIGHT_N: tl.constexpr,
    SN: tl.constexpr,
    SC: tl.constexpr,
    SP: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.arange(0, R_PADDED).to(tl.int64)
    element = feature_ptr.dtype.element_ty
    if EXACT:
        element = tl.float32
    total = tl.zeros([R_PADDED, BLOCK_C], tl.float32)
    if matrix_ptr is not None:
        m = tl.load(matrix_ptr + r[:, None] * C + c[None, :], mask=(r < R)[:, None] & (c < C)[None, :], other=0.0)
        m_t = tl.trans(m).to(element)
    for image in range(tl.program_id(1), N, tl.num_programs(1)):
        at = (0 * tl.program_id(1) + image).to(tl.int64)  # the interpreter counts in Python
        g = tl.load(grad_average_ptr + at * C + c, mask=c < C, other=0.0)
        for start in range(0, P, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            inside = (c < C)[:, None] & (p < P)[None, :]
            if matrix_ptr is not None:
                ptrs = grad_seen_ptr + at * SEEN_N + r[:, None] * P + p[None, :]
                seen = tl.load(ptrs, mask=(r < R)[:, None] & (p < P)[None, :], other=0.0).to(element)
            if grad_matrix_ptr is not None:
                x = _load_feature(feature_ptr + at * SN, c, p, C, P, SC, SP, EXACT)
                total += tl.dot(seen, tl.trans(x), input_precision="ieee")
            if grad_feature_ptr is not None:
                w = tl.load(weight_ptr + at * WEIGHT_N + p, mask=p < P, other=0.0)
                grad = g[:, None] * w[None, :]
                if matrix_ptr is not None:
                    grad += tl.dot(m_t, seen, input_precision="ieee")
                out = grad_feature_ptr + at * SN + c[:, None].to(tl.int64) * SC + p[None, :].to(tl.int64) * SP
                tl.store(out, grad.to(grad_feature_ptr.dtype.element_ty), mask=inside)
    if grad_matrix_ptr is not None:
        out = grad_matrix_ptr + tl.program_id(1) * (R * C) + r[:, None] * C + c[None, :]
        tl.store(out, total, mask=(r < R)[:, None] & (c < C)[None, :])


class _Level:
    """One level of features as the kernels see it: (N, C, P) with its strides."""

    def __init__(self, feature: Tensor) -> None:
        dense = feature.is_contiguous() or feature.is_contiguous(memory_format=torch.channels_last)
        self.feature = feature if dense else feature.contiguous()
        self.images, self.channels = feature.shape[:2]
        self.pixels = feature.shape[2] * feature.shape[3]
        channels_last = not self.feature.is_contiguous()
        sc, sp = (1, self.channels) if channels_last else (self.pixels, 1)
        device = describe(feature.device)
        launch = Launch(1, 64, True, 128 // device.warp_size, MAX_PROGRAMS, device.amd)
        # The interpreter multiplies half precision wrongly; a product in fp32 takes its operands in registers.
        exact = feature.dtype == torch.float32 or os.environ.get("TRITON_INTERPRET") == "1"
        block = 32 if feature.dtype == torch.float32 else 64
        self.block_p = min(block, max(16, triton.next_power_of_2(self.pixels)))
        self.block_c = min(block, max(16, triton.next_power_of_2(self.channels)))
        self.strides = {"SN": self.channels * self.pixels, "SC": sc, "SP": sp}
        self.blocks = {"BLOCK_P": self.block_p, "BLOCK_C": self.block_c, **launch.options}
        # Two products and two sums at a time need the registers of twice the threads.
        wide = launch._replace(num_warps=2 * launch.num_warps)
        self.wide_blocks = self.blocks | {"BLOCK_P": min(self.block_p, 32)} | wide.options
        self.exact = exact

    def pixel_grid(self) -> tuple[int, int]:
        return math.ceil(self.pixels / self.block_p), self.images

    def channel_grid(self, second: int) -> tuple[int, int]:
        return math.ceil(self.channels / self.block_c), second


class _Averages(torch.autograd.Function):
    """(A_1 .. A_L, Σ w_1 .. Σ w_L) of features, M_l, o_l and the gates' biases."""

    @staticmethod
    def forward(ctx: Any, upsample: str, levels: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        features, matrices = tensors[:levels], tensors[levels : 2 * levels]
        offsets, biases = tensors[2 * levels : 3 * levels], tensors[3 * levels :]
        seen_levels = [_Level(f) for f in features]
        images, device = features[0].shape[0], features[0].device
        layout = geometry(tuple((f.shape[2], f.shape[3]) for f in features), upsample, device)
        seen = torch.empty(images, max(layout.seen_size, 1), dtype=torch.float32, device=device)
        saved: Saved | None = None
        with on_device(seen):
            for i, level in enumerate(seen_levels):
                rows = rows_of_level(i, levels)
                if rows and images:
                    _project_kernel[level.pixel_grid()](
                        level.feature, matrices[i].to(level.feature.dtype), offsets[i],
                        seen[:, layout.seen[i] :], level.pixels, level.channels, R=rows,
                        R_PADDED=max(16, triton.next_power_of_2(rows)), SEEN_N=seen.shape[1], EXACT=level.exact,
                        **level.strides, **level.blocks,
                    )  # fmt: skip
            if levels > 1:
                weights, saved = pixel_weights_forward(seen, torch.cat(biases), layout, upsample)
            else:
                weights = seen.new_full((images, layout.pixel_size), 1 / layout.pixel_size)
            averages = [seen.new_empty(images, level.channels) for level in seen_levels]
            for i, (level, average) in enumerate(zip(seen_levels, averages, strict=True)):
                if images:
                    _average_kernel[level.channel_grid(images)](
                        level.feature, weights[:, layout.pixels[i] :], average, level.pixels, level.channels,
                        WEIGHT_N=layout.pixel_size, **level.strides, **level.blocks,
                    )  # fmt: skip
        masses = [w.sum(1) for w in weights.split([level.pixels for level in seen_levels], dim=1)]
        ctx.save_for_backward(*features, *matrices, weights, *(saved or ()))
        ctx.layout, ctx.upsample, ctx.levels = layout, upsample, levels
        return (*averages, *masses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        levels, layout = ctx.levels, ctx.layout
        features, matrices = ctx.saved_tensors[:levels], ctx.saved_tensors[levels : 2 * levels]
        weights, *scalar_maps = ctx.saved_tensors[2 * levels :]
        grad_averages = [g.contiguous() for g in upstream[:levels]]
        grad_masses = [g.contiguous() for g in upstream[levels:]]
        seen_levels = [_Level(f) for f in features]
        images = features[0].shape[0]
        needs = ctx.needs_input_grad[2:]
        grads: list[Tensor | None] = [None] * len(needs)
        grad_seen = weights  # not read where there are no gates
        with on_device(weights):
            if levels > 1:
                grad_weights = torch.empty_like(weights)
                for i, level in enumerate(seen_levels):
                    if images:
                        _weight_gradient_kernel[level.pixel_grid()](
                            level.feature, grad_averages[i], grad_masses[i], grad_weights[:, layout.pixels[i] :],
                            level.pixels, level.channels, WEIGHT_N=layout.pixel_size, **level.strides, **level.blocks,
                        )  # fmt: skip
                grad_seen, grad_biases = pixel_weights_backward(Saved(*scalar_maps), grad_weights, layout, ctx.upsample)
                for i in range(levels - 1):
                    grads[3 * levels + i] = grad_biases[i : i + 1]
            for i, level in enumerate(seen_levels):
                rows = rows_of_level(i, levels)
                grads[i] = torch.empty_like(level.feature) if needs[i] else None
                groups = min(GROUPS, max(images, 1))
                parts = weights.new_zeros(groups, rows, level.channels) if rows and needs[levels + i] else None
                if images and (grads[i] is not None or parts is not None):
                    _feature_gradient_kernel[level.channel_grid(groups)](
                        level.feature, matrices[i] if rows else None, weights[:, layout.pixels[i] :], grad_averages[i],
                        grad_seen[:, layout.seen[i] :] if rows else None, grads[i], parts, images, level.pixels,
                        level.channels, R=rows, R_PADDED=max(16, triton.next_power_of_2(max(rows, 1))),
                        SEEN_N=grad_seen.shape[1], WEIGHT_N=layout.pixel_size, EXACT=level.exact,
                        **level.strides, **level.wide_blocks,
                    )  # fmt: skip
                if needs[levels + i]:
                    grads[levels + i] = torch.zeros_like(matrices[i]) if parts is None else parts.sum(0)
                if needs[2 * levels + i]:
                    maps = grad_seen[:, layout.seen[i] : layout.seen[i] + rows * level.pixels]
                    grads[2 * levels + i] = maps.unflatten(1, (rows, level.pixels)).sum((0, 2)) if rows else None
        return (None, None, *grads)


def fused_pool(
    features: Sequence[Tensor],
    expand_weights: Sequence[Tensor],
    expand_biases: Sequence[Tensor],
    gate_weights: Sequence[Tensor],
    gate_biases: Sequence[Tensor],
    *,
    upsample: str = "nearest",
) -> Tensor:
    """Give `reference_pooled.pool_collapsed`, (N, D) in fp32."""
    levels = len(features)
    with autocast_off(features[0].device):  # it would form the composite weights in half precision
        expand = [weight.flatten(1).float() for weight in expand_weights]  # (D, C_l)
        biases = [bias.float() for bias in expand_biases]
        taps = [weight.reshape(2, -1, TAPS).float() for weight in gate_weights]
        composites = [taps_on(i, taps, expand[i]) for i in range(levels)]  # (R_l, D)
        matrices = [m @ e for m, e in zip(composites, expand, strict=True)]
        offsets = [m @ b for m, b in zip(composites, biases, strict=True)]
        results = _Averages.apply(
            upsample, levels, *features, *matrices, *offsets, *(b.float().reshape(1) for b in gate_biases)
        )
        averages, masses = results[:levels], results[levels:]
        pooled: Tensor | None = None
        for average, mass, weight, bias in zip(averages, masses, expand, biases, strict=True):
            part = torch.addmm(mass[:, None] * bias, average, weight.t())
            pooled = part if pooled is None else pooled + part
    assert pooled is not None
    return pooled


def bytes_moved(features: Sequence[Tensor], *, backward: bool = False) -> int:
    """Give the least there is to move: the features once; backward read once and their gradients written."""
    return sum(f.numel() * f.element_size() for f in features) * (2 if backward else 1)

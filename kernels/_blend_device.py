"""Device code of `feature_fusion` on maps of D channels: R = g E + (1 - g) Up(R'), forward and backward.

Maps are (N, C, P) with strides (C P, SC, SP), as in `_pooled_device`; gates are (N, GATE_N), the finer level's first.
"""

import triton
import triton.language as tl

from unikd_fast.kernels._pooled_device import load_feature
from unikd_fast.kernels._resize_device import corners, first_reached, nearest_at, reach_weight


@triton.jit
def sources(
    y, x, mask,
    H: tl.constexpr, W: tl.constexpr, SMALL_H: tl.constexpr, SMALL_W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr,
    NEAREST: tl.constexpr,
):  # fmt: skip
    """The coarse pixels that Up at (y, x) combines, and their weights; nearest uses the first only."""
    if NEAREST:
        q = nearest_at(y, x, H, W, SMALL_H, SMALL_W, RY, RX)
        one = tl.where(mask, 1.0, 0.0)
        return q, q, q, q, one, one, one, one
    else:
        return corners(y, x, H, W, SMALL_H, SMALL_W)


@triton.jit
def resample(
    ptr, c, q00, q01, q10, q11, w00, w01, w10, w11, mask,
    SC: tl.constexpr, SP: tl.constexpr, NEAREST: tl.constexpr,
):  # fmt: skip
    """Up of a tile of channels at the pixels with the given `sources`, in fp32; 0 where masked."""
    at = ptr + c[:, None].to(tl.int64) * SC
    x = tl.load(at + q00[None, :].to(tl.int64) * SP, mask=mask, other=0.0).to(tl.float32)
    if NEAREST:
        return x
    else:
        x *= w00[None, :]
        x += tl.load(at + q01[None, :].to(tl.int64) * SP, mask=mask, other=0.0).to(tl.float32) * w01[None, :]
        x += tl.load(at + q10[None, :].to(tl.int64) * SP, mask=mask, other=0.0).to(tl.float32) * w10[None, :]
        return x + tl.load(at + q11[None, :].to(tl.int64) * SP, mask=mask, other=0.0).to(tl.float32) * w11[None, :]


@triton.jit
def blend_kernel(
    fine_ptr,  # (N, C, H W)
    coarse_ptr,  # (N, C, SMALL_H SMALL_W)
    gate_ptr,  # (N, GATE_N)
    out_ptr,  # as fine
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    SMALL_H: tl.constexpr,
    SMALL_W: tl.constexpr,
    SC: tl.constexpr,
    SP: tl.constexpr,
    SMALL_SC: tl.constexpr,
    SMALL_SP: tl.constexpr,
    GATE_N: tl.constexpr,
    RY: tl.constexpr,
    RX: tl.constexpr,
    NEAREST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    P: tl.constexpr = H * W
    BLOCKS: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    image = (tl.program_id(0) // BLOCKS).to(tl.int64)
    p = tl.program_id(0) % BLOCKS * BLOCK_P + tl.arange(0, BLOCK_P)
    gate = tl.load(gate_ptr + image * GATE_N + p, mask=p < P, other=0.0)[None, :]
    q00, q01, q10, q11, w00, w01, w10, w11 = sources(p // W, p % W, p < P, H, W, SMALL_H, SMALL_W, RY, RX, NEAREST)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (c < C)[:, None] & (p < P)[None, :]
        fine = load_feature(fine_ptr + image * (C * P), c, p, C, P, SC, SP, True)
        coarse = resample(
            coarse_ptr + image * (C * SMALL_H * SMALL_W), c, q00, q01, q10, q11, w00, w01, w10, w11, inside,
            SMALL_SC, SMALL_SP, NEAREST,
        )  # fmt: skip
        out = out_ptr + image * (C * P) + c[:, None].to(tl.int64) * SC + p[None, :].to(tl.int64) * SP
        result = gate * fine + (1.0 - gate) * coarse
        tl.store(out, result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gate_gradient_kernel(
    fine_ptr,
    coarse_ptr,
    grad_ptr,  # (N, C, H W), as fine
    grad_gate_ptr,  # (N, GATE_N)
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    SMALL_H: tl.constexpr,
    SMALL_W: tl.constexpr,
    SC: tl.constexpr,
    SP: tl.constexpr,
    SMALL_SC: tl.constexpr,
    SMALL_SP: tl.constexpr,
    GATE_N: tl.constexpr,
    RY: tl.constexpr,
    RX: tl.constexpr,
    NEAREST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """∂g(p) = Σ_c ∂R(c, p) (E - Up(R'))(c, p)."""
    P: tl.constexpr = H * W
    BLOCKS: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    image = (tl.program_id(0) // BLOCKS).to(tl.int64)
    p = tl.program_id(0) % BLOCKS * BLOCK_P + tl.arange(0, BLOCK_P)
    q00, q01, q10, q11, w00, w01, w10, w11 = sources(p // W, p % W, p < P, H, W, SMALL_H, SMALL_W, RY, RX, NEAREST)
    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (c < C)[:, None] & (p < P)[None, :]
        fine = load_feature(fine_ptr + image * (C * P), c, p, C, P, SC, SP, True)
        grad = load_feature(grad_ptr + image * (C * P), c, p, C, P, SC, SP, True)
        coarse = resample(
            coarse_ptr + image * (C * SMALL_H * SMALL_W), c, q00, q01, q10, q11, w00, w01, w10, w11, inside,
            SMALL_SC, SMALL_SP, NEAREST,
        )  # fmt: skip
        total += grad * (fine - coarse)
    tl.store(grad_gate_ptr + image * GATE_N + p, tl.sum(total, axis=0), mask=p < P)


@triton.jit
def through_the_blend(
    grad, gates, c, p,
    LEVEL: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, SMALL_H: tl.constexpr,
    SMALL_W: tl.constexpr, SC: tl.constexpr, SP: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr,
    REACH_Y: tl.constexpr, REACH_X: tl.constexpr, NEAREST: tl.constexpr,
):  # fmt: skip
    """g ∂R at the fine pixels p, or Upᵀ( (1 - g) ∂R ) at the coarse ones; `grad` and `gates` of one image."""
    total = tl.zeros([c.shape[0], p.shape[0]], tl.float32)
    if LEVEL == 0:
        gate = tl.load(gates + p, mask=p < H * W, other=0.0)
        total += load_feature(grad, c, p, C, H * W, SC, SP, True) * gate[None, :]
    else:
        there = p < SMALL_H * SMALL_W
        y = p // SMALL_W
        x = p % SMALL_W
        first_y, first_x = first_reached(y, x, H, W, SMALL_H, SMALL_W, RY, RX, NEAREST)
        for dy in range(REACH_Y):
            for dx in range(REACH_X):
                fy = first_y + dy
                fx = first_x + dx
                inside = there & (fy < H) & (fx < W)
                at = tl.where(inside, fy * W + fx, 0)
                weight = reach_weight(y, x, fy, fx, inside, H, W, SMALL_H, SMALL_W, RY, RX, NEAREST)
                share = weight * (1.0 - tl.load(gates + at, mask=inside, other=0.0))
                looked_at = (c < C)[:, None] & (weight != 0.0)[None, :]
                offsets = c[:, None].to(tl.int64) * SC + at[None, :].to(tl.int64) * SP
                total += tl.load(grad + offsets, mask=looked_at, other=0.0).to(tl.float32) * share[None, :]
    return total

"""Device code of `feature_fusion` on maps of D channels: R = g E + (1 - g) Up(R'), forward and backward.

Maps are (N, C, P) in the layouts of `_pooled_device`; gates are (N, P + SMALL_P), the finer level's first.
"""

import triton
import triton.language as tl

from unikd_fast.kernels._pooled_device import load_feature, offsets_in_image, pixels_of
from unikd_fast.kernels._resize_device import axis, corners, first_reached, nearest_at, reach_weight


@triton.jit
def sources(y, x, mask, Y, X, NEAREST: tl.constexpr):
    """The coarse pixels that Up at (y, x) combines, and their weights; nearest uses the first only."""
    if NEAREST:
        q = nearest_at(y, x, Y, X)
        one = tl.where(mask, 1.0, 0.0)
        return q, q, q, q, one, one, one, one
    else:
        return corners(y, x, Y, X)


@triton.jit
def resample(
    ptr, c, q00, q01, q10, q11, w00, w01, w10, w11, mask, P,
    C: tl.constexpr, LAYOUT: tl.constexpr, NEAREST: tl.constexpr,
):  # fmt: skip
    """Up of a tile of channels at the pixels with the given `sources`, in fp32; 0 where masked."""
    x = tl.load(ptr + offsets_in_image(c[:, None], q00[None, :], P, C, LAYOUT), mask=mask, other=0.0).to(tl.float32)
    if NEAREST:
        return x
    else:
        x01 = tl.load(ptr + offsets_in_image(c[:, None], q01[None, :], P, C, LAYOUT), mask=mask, other=0.0).to(
            tl.float32
        )
        x10 = tl.load(ptr + offsets_in_image(c[:, None], q10[None, :], P, C, LAYOUT), mask=mask, other=0.0).to(
            tl.float32
        )
        x11 = tl.load(ptr + offsets_in_image(c[:, None], q11[None, :], P, C, LAYOUT), mask=mask, other=0.0).to(
            tl.float32
        )
        return x * w00[None, :] + x01 * w01[None, :] + x10 * w10[None, :] + x11 * w11[None, :]


@triton.jit(do_not_specialize=["H", "W", "SMALL_H", "SMALL_W"])
def blend_kernel(
    fine_ptr,  # (N, C, H W)
    coarse_ptr,  # (N, C, SMALL_H SMALL_W)
    gate_ptr,  # (N, H W + SMALL_H SMALL_W)
    out_ptr,  # as fine
    H,
    W,
    SMALL_H,
    SMALL_W,
    C: tl.constexpr,
    LAYOUT: tl.constexpr,
    SMALL_LAYOUT: tl.constexpr,
    NEAREST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    P = pixels_of(H, W, LAYOUT)
    SMALL_P = pixels_of(SMALL_H, SMALL_W, SMALL_LAYOUT)
    blocks = tl.cdiv(P, BLOCK_P)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    gate = tl.load(gate_ptr + image * (P + SMALL_P) + p, mask=p < P, other=0.0)[None, :]
    q00, q01, q10, q11, w00, w01, w10, w11 = sources(p // W, p % W, p < P, axis(H, SMALL_H), axis(W, SMALL_W), NEAREST)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (c < C)[:, None] & (p < P)[None, :]
        fine = load_feature(fine_ptr + image * (C * P), c[:, None], p[None, :], P, C, LAYOUT, True)
        coarse = resample(
            coarse_ptr + image * (C * SMALL_P), c, q00, q01, q10, q11, w00, w01, w10, w11, inside, SMALL_P,
            C, SMALL_LAYOUT, NEAREST,
        )  # fmt: skip
        out = out_ptr + image * (C * P) + offsets_in_image(c[:, None], p[None, :], P, C, LAYOUT)
        result = gate * fine + (1.0 - gate) * coarse
        tl.store(out, result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["H", "W", "SMALL_H", "SMALL_W"])
def gate_gradient_kernel(
    fine_ptr,
    coarse_ptr,
    grad_ptr,  # (N, C, H W), as fine
    grad_gate_ptr,  # (N, H W + SMALL_H SMALL_W)
    H,
    W,
    SMALL_H,
    SMALL_W,
    C: tl.constexpr,
    LAYOUT: tl.constexpr,
    SMALL_LAYOUT: tl.constexpr,
    NEAREST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """∂g(p) = Σ_c ∂R(c, p) (E - Up(R'))(c, p)."""
    P = pixels_of(H, W, LAYOUT)
    SMALL_P = pixels_of(SMALL_H, SMALL_W, SMALL_LAYOUT)
    blocks = tl.cdiv(P, BLOCK_P)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    q00, q01, q10, q11, w00, w01, w10, w11 = sources(p // W, p % W, p < P, axis(H, SMALL_H), axis(W, SMALL_W), NEAREST)
    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (c < C)[:, None] & (p < P)[None, :]
        fine = load_feature(fine_ptr + image * (C * P), c[:, None], p[None, :], P, C, LAYOUT, True)
        grad = load_feature(grad_ptr + image * (C * P), c[:, None], p[None, :], P, C, LAYOUT, True)
        coarse = resample(
            coarse_ptr + image * (C * SMALL_P), c, q00, q01, q10, q11, w00, w01, w10, w11, inside, SMALL_P,
            C, SMALL_LAYOUT, NEAREST,
        )  # fmt: skip
        total += grad * (fine - coarse)
    tl.store(grad_gate_ptr + image * (P + SMALL_P) + p, tl.sum(total, axis=0), mask=p < P)


@triton.jit
def through_the_blend(
    grad, gates, c, p, H, W, SMALL_H, SMALL_W, REACH_Y, REACH_X,
    LEVEL: tl.constexpr, C: tl.constexpr, LAYOUT: tl.constexpr, NEAREST: tl.constexpr,
):  # fmt: skip
    """g ∂R at the fine pixels p, or Upᵀ( (1 - g) ∂R ) at the coarse ones; `grad` and `gates` of one image."""
    P = pixels_of(H, W, LAYOUT)
    total = tl.zeros([c.shape[0], p.shape[0]], tl.float32)
    if LEVEL == 0:
        gate = tl.load(gates + p, mask=p < P, other=0.0)
        total += load_feature(grad, c[:, None], p[None, :], P, C, LAYOUT, True) * gate[None, :]
    else:
        Y = axis(H, SMALL_H)
        X = axis(W, SMALL_W)
        there = p < SMALL_H * SMALL_W
        y = p // SMALL_W
        x = p % SMALL_W
        first_y = first_reached(y, Y, NEAREST)
        first_x = first_reached(x, X, NEAREST)
        for dy in range(REACH_Y):
            fy = first_y + dy
            weight_y = tl.where(there, reach_weight(y, fy, Y, NEAREST), 0.0)
            for dx in range(REACH_X):
                fx = first_x + dx
                weight = weight_y * reach_weight(x, fx, X, NEAREST)
                at = tl.where(weight != 0.0, fy * W + fx, 0)
                share = weight * (1.0 - tl.load(gates + at, mask=weight != 0.0, other=0.0))
                looked_at = (c < C)[:, None] & (weight != 0.0)[None, :]
                offsets = offsets_in_image(c[:, None], at[None, :], P, C, LAYOUT)
                total += tl.load(grad + offsets, mask=looked_at, other=0.0).to(tl.float32) * share[None, :]
    return total

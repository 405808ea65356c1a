"""Device code of `feature_fusion` for gates of one map a channel: R = g E + (1 - g) Up(R'), g = sigmoid(a).

    a = own + Σ_t shift_t( Up(T_t) )

`own` is what cuDNN made of E; T (N, 9 C, P'), tap by tap, is what it made of R' before Up, or None where `own`
is all of a.
"""

import triton
import triton.language as tl

from unikd_fast.kernels._blend_device import resample, sources
from unikd_fast.kernels._pooled_device import load_feature
from unikd_fast.kernels._resize_device import first_reached, reach_weight


@triton.jit
def _upstream(grad, grad_mean, c, p, C, P: tl.constexpr, SC: tl.constexpr, SP: tl.constexpr):
    """A tile of ∂R: given as it is, or by the gradient of its mean over the pixels."""
    if grad_mean is not None:
        g = tl.load(grad_mean + c, mask=c < C, other=0.0) / P
        return tl.where((p < P)[None, :], g[:, None], 0.0)
    else:
        return load_feature(grad, c, p, C, P, SC, SP, True)


@triton.jit
def channel_blend_kernel(
    own_ptr,  # (N, C, P), as fine
    taps_ptr,  # (N, 9 C, SMALL_P), or None
    fine_ptr,
    coarse_ptr,
    a_ptr,  # as fine
    out_ptr,  # as fine, or None
    part_ptr,  # (N, blocks, C) sums over the pixels of a block, or None
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    SMALL_H: tl.constexpr,
    SMALL_W: tl.constexpr,
    SC: tl.constexpr,
    SP: tl.constexpr,
    SMALL_SC: tl.constexpr,
    SMALL_SP: tl.constexpr,
    TAPS_SC: tl.constexpr,
    TAPS_SP: tl.constexpr,
    RY: tl.constexpr,
    RX: tl.constexpr,
    NEAREST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    P: tl.constexpr = H * W
    SMALL_P: tl.constexpr = SMALL_H * SMALL_W
    BLOCKS: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    image = (tl.program_id(0) // BLOCKS).to(tl.int64)
    block = tl.program_id(0) % BLOCKS
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    y = p // W
    x = p % W
    q00, q01, q10, q11, w00, w01, w10, w11 = sources(y, x, p < P, H, W, SMALL_H, SMALL_W, RY, RX, NEAREST)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (c < C)[:, None] & (p < P)[None, :]
        a = load_feature(own_ptr + image * (C * P), c, p, C, P, SC, SP, True)
        if taps_ptr is not None:
            for tap in range(9):
                ty = y + (tap // 3 - 1)
                tx = x + (tap % 3 - 1)
                there = (p < P) & (ty >= 0) & (ty < H) & (tx >= 0) & (tx < W)
                t00, t01, t10, t11, v00, v01, v10, v11 = sources(
                    tl.where(there, ty, 0), tl.where(there, tx, 0), there, H, W, SMALL_H, SMALL_W, RY, RX, NEAREST,
                )  # fmt: skip
                a += resample(
                    taps_ptr + image * (9 * C * SMALL_P), tap * C + c, t00, t01, t10, t11, v00, v01, v10, v11,
                    (c < C)[:, None] & there[None, :], TAPS_SC, TAPS_SP, NEAREST,
                )  # fmt: skip
        offsets = image * (C * P) + c[:, None].to(tl.int64) * SC + p[None, :].to(tl.int64) * SP
        tl.store(a_ptr + offsets, a.to(a_ptr.dtype.element_ty), mask=inside)
        gate = 1.0 / (1.0 + tl.exp(-a))
        fine = load_feature(fine_ptr + image * (C * P), c, p, C, P, SC, SP, True)
        coarse = resample(
            coarse_ptr + image * (C * SMALL_P), c, q00, q01, q10, q11, w00, w01, w10, w11, inside,
            SMALL_SC, SMALL_SP, NEAREST,
        )  # fmt: skip
        result = gate * fine + (1.0 - gate) * coarse
        if out_ptr is not None:
            tl.store(out_ptr + offsets, result.to(out_ptr.dtype.element_ty), mask=inside)
        if part_ptr is not None:
            part = part_ptr + (image * BLOCKS + block) * C
            tl.store(part + c, tl.sum(tl.where(inside, result, 0.0), axis=1), mask=c < C)


@triton.jit
def channel_fine_gradient_kernel(
    a_ptr,
    fine_ptr,
    coarse_ptr,
    grad_ptr,  # as fine, or None
    grad_mean_ptr,  # (N, C), or None
    grad_a_ptr,  # as fine
    grad_fine_ptr,  # as fine, or None
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    SMALL_H: tl.constexpr,
    SMALL_W: tl.constexpr,
    SC: tl.constexpr,
    SP: tl.constexpr,
    SMALL_SC: tl.constexpr,
    SMALL_SP: tl.constexpr,
    RY: tl.constexpr,
    RX: tl.constexpr,
    NEAREST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """∂a = ∂R (E - Up(R')) g (1 - g),    ∂E = g ∂R."""
    P: tl.constexpr = H * W
    BLOCKS: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    image = (tl.program_id(0) // BLOCKS).to(tl.int64)
    p = tl.program_id(0) % BLOCKS * BLOCK_P + tl.arange(0, BLOCK_P)
    q00, q01, q10, q11, w00, w01, w10, w11 = sources(p // W, p % W, p < P, H, W, SMALL_H, SMALL_W, RY, RX, NEAREST)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (c < C)[:, None] & (p < P)[None, :]
        at = image * (C * P)
        gate = 1.0 / (1.0 + tl.exp(-load_feature(a_ptr + at, c, p, C, P, SC, SP, True)))
        fine = load_feature(fine_ptr + at, c, p, C, P, SC, SP, True)
        coarse = resample(
            coarse_ptr + image * (C * SMALL_H * SMALL_W), c, q00, q01, q10, q11, w00, w01, w10, w11, inside,
            SMALL_SC, SMALL_SP, NEAREST,
        )  # fmt: skip
        grad_mean = grad_mean_ptr
        if grad_mean_ptr is not None:
            grad_mean = grad_mean_ptr + image * C
        upstream = grad_ptr
        if grad_ptr is not None:
            upstream = grad_ptr + at
        grad = _upstream(upstream, grad_mean, c, p, C, P, SC, SP)
        offsets = at + c[:, None].to(tl.int64) * SC + p[None, :].to(tl.int64) * SP
        grad_a = grad * (fine - coarse) * gate * (1.0 - gate)
        tl.store(grad_a_ptr + offsets, grad_a.to(grad_a_ptr.dtype.element_ty), mask=inside)
        if grad_fine_ptr is not None:
            tl.store(grad_fine_ptr + offsets, (gate * grad).to(grad_fine_ptr.dtype.element_ty), mask=inside)


@triton.jit
def channel_coarse_gradient_kernel(
    a_ptr,
    grad_a_ptr,
    grad_ptr,  # as fine, or None
    grad_mean_ptr,  # (N, C), or None
    grad_coarse_ptr,  # as coarse, or None
    grad_taps_ptr,  # as the taps, or None
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    SMALL_H: tl.constexpr,
    SMALL_W: tl.constexpr,
    SC: tl.constexpr,
    SP: tl.constexpr,
    SMALL_SC: tl.constexpr,
    SMALL_SP: tl.constexpr,
    TAPS_SC: tl.constexpr,
    TAPS_SP: tl.constexpr,
    RY: tl.constexpr,
    RX: tl.constexpr,
    NEAREST: tl.constexpr,
    REACH_Y: tl.constexpr,
    REACH_X: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """∂R' = Upᵀ( (1 - g) ∂R ),    ∂T_t = Upᵀ( ∂a, shifted back ); program 0 of the second axis does ∂R'."""
    P: tl.constexpr = H * W
    SMALL_P: tl.constexpr = SMALL_H * SMALL_W
    BLOCKS: tl.constexpr = (SMALL_P + BLOCK_P - 1) // BLOCK_P
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    image = (tl.program_id(0) // (BLOCKS * BLOCKS_C)).to(tl.int64)
    block = tl.program_id(0) % (BLOCKS * BLOCKS_C)
    p = block // BLOCKS_C * BLOCK_P + tl.arange(0, BLOCK_P)
    c = block % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)
    tap = tl.program_id(1) - 1
    at = image * (C * P)
    y = p // SMALL_W
    x = p % SMALL_W
    first_y, first_x = first_reached(y, x, H, W, SMALL_H, SMALL_W, RY, RX, NEAREST)
    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for dy in range(REACH_Y):
        for dx in range(REACH_X):
            fy = first_y + dy
            fx = first_x + dx
            inside = (p < SMALL_P) & (fy < H) & (fx < W)
            weight = reach_weight(y, x, fy, fx, inside, H, W, SMALL_H, SMALL_W, RY, RX, NEAREST)
            if tap < 0:
                q = tl.where(weight != 0.0, fy * W + fx, P)  # P is masked
                upstream = grad_ptr
                if grad_ptr is not None:
                    upstream = grad_ptr + at
                grad_mean = grad_mean_ptr
                if grad_mean_ptr is not None:
                    grad_mean = grad_mean_ptr + image * C
                gate = 1.0 / (1.0 + tl.exp(-load_feature(a_ptr + at, c, q, C, P, SC, SP, True)))
                grad = (1.0 - gate) * _upstream(upstream, grad_mean, c, q, C, P, SC, SP)
            else:
                sy = fy - (tap // 3 - 1)
                sx = fx - (tap % 3 - 1)
                there = (weight != 0.0) & (sy >= 0) & (sy < H) & (sx >= 0) & (sx < W)
                grad = load_feature(grad_a_ptr + at, c, tl.where(there, sy * W + sx, P), C, P, SC, SP, True)
            total += grad * weight[None, :]
    inside = (c < C)[:, None] & (p < SMALL_P)[None, :]
    if tap < 0:
        if grad_coarse_ptr is not None:
            out = grad_coarse_ptr + image * (C * SMALL_P)
            out += c[:, None].to(tl.int64) * SMALL_SC + p[None, :].to(tl.int64) * SMALL_SP
            tl.store(out, total.to(grad_coarse_ptr.dtype.element_ty), mask=inside)
    else:
        if grad_taps_ptr is not None:
            out = grad_taps_ptr + image * (9 * C * SMALL_P)
            out += (tap * C + c)[:, None].to(tl.int64) * TAPS_SC + p[None, :].to(tl.int64) * TAPS_SP
            tl.store(out, total.to(grad_taps_ptr.dtype.element_ty), mask=inside)

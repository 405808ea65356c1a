"""Device code of resizing: Up at fine pixels, and the fine pixels that Upᵀ collects at coarse ones.

Sources and weights are those of PyTorch's interpolation of SMALL_H x SMALL_W to H x W. They are not kept in tables: a
captured graph would read these long after the call that made them. RY and RX are r where the fine position i is a copy
of the coarse i // r, else 0 (`pixel_weights.axis_of`).
"""

import triton
import triton.language as tl


@triton.jit
def _nearest(fine, SIZE: tl.constexpr, SMALL: tl.constexpr, RATIO: tl.constexpr):
    """The coarse position that a fine one copies, along one axis."""
    if RATIO > 0:
        return fine // RATIO
    else:
        return tl.minimum((fine.to(tl.float32) * (SMALL / SIZE)).to(tl.int32), SMALL - 1)


@triton.jit
def _between(fine, SIZE: tl.constexpr, SMALL: tl.constexpr):
    """The two coarse positions around a fine one along one axis, equal if the second's weight is 0; that weight."""
    at = tl.maximum((fine.to(tl.float32) + 0.5) * (SMALL / SIZE) - 0.5, 0.0)
    first = tl.minimum(at.to(tl.int32), SMALL - 1)
    weight = tl.where(first == SMALL - 1, 0.0, at - first.to(tl.float32))
    return first, first + (weight > 0.0).to(tl.int32), weight


@triton.jit
def nearest_at(
    y, x, H: tl.constexpr, W: tl.constexpr, SMALL_H: tl.constexpr, SMALL_W: tl.constexpr,
    RY: tl.constexpr, RX: tl.constexpr,
):  # fmt: skip
    """The coarse pixel that the fine pixels (y, x) copy."""
    return _nearest(y, H, SMALL_H, RY) * SMALL_W + _nearest(x, W, SMALL_W, RX)


@triton.jit
def corners(y, x, H: tl.constexpr, W: tl.constexpr, SMALL_H: tl.constexpr, SMALL_W: tl.constexpr):
    """The four coarse pixels around the fine pixels (y, x), and their weights."""
    y0, y1, wy1 = _between(y, H, SMALL_H)
    x0, x1, wx1 = _between(x, W, SMALL_W)
    wy0 = 1.0 - wy1
    wx0 = 1.0 - wx1
    y0 *= SMALL_W
    y1 *= SMALL_W
    return y0 + x0, y0 + x1, y1 + x0, y1 + x1, wy0 * wx0, wy0 * wx1, wy1 * wx0, wy1 * wx1


@triton.jit
def up(
    map_ptr, y, x, mask,
    H: tl.constexpr, W: tl.constexpr, SMALL_H: tl.constexpr, SMALL_W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr,
    NEAREST: tl.constexpr,
):  # fmt: skip
    """Up(map) at the fine pixels (y, x), 0 where masked."""
    if NEAREST:
        return tl.load(map_ptr + nearest_at(y, x, H, W, SMALL_H, SMALL_W, RY, RX), mask=mask, other=0.0)
    else:
        p00, p01, p10, p11, w00, w01, w10, w11 = corners(y, x, H, W, SMALL_H, SMALL_W)
        total = w00 * tl.load(map_ptr + p00, mask=mask, other=0.0)
        total += w01 * tl.load(map_ptr + p01, mask=mask, other=0.0)
        total += w10 * tl.load(map_ptr + p10, mask=mask, other=0.0)
        return total + w11 * tl.load(map_ptr + p11, mask=mask, other=0.0)


@triton.jit
def _first(small, SIZE: tl.constexpr, SMALL: tl.constexpr, RATIO: tl.constexpr, NEAREST: tl.constexpr):
    """The first fine position that looks at a coarse one along one axis (`pixel_weights.axis_of`)."""
    if RATIO > 0:
        return small * RATIO
    elif NEAREST:
        return (small * SIZE + (SMALL - 1)) // SMALL
    else:
        return tl.maximum((2 * small - 1) * SIZE + SMALL, 0) // (2 * SMALL)


@triton.jit
def first_reached(
    y, x, H: tl.constexpr, W: tl.constexpr, SMALL_H: tl.constexpr, SMALL_W: tl.constexpr,
    RY: tl.constexpr, RX: tl.constexpr, NEAREST: tl.constexpr,
):  # fmt: skip
    """The first fine row and column that look at the coarse pixels (y, x)."""
    return _first(y, H, SMALL_H, RY, NEAREST), _first(x, W, SMALL_W, RX, NEAREST)


@triton.jit
def _along(small, fine, SIZE: tl.constexpr, SMALL: tl.constexpr, NEAREST: tl.constexpr):
    """The weights of the coarse positions at the fine ones along one axis."""
    if NEAREST:
        return tl.where(_nearest(fine, SIZE, SMALL, 0) == small, 1.0, 0.0)
    else:
        first, second, weight = _between(fine, SIZE, SMALL)
        return tl.where(first == small, 1.0 - weight, tl.where(second == small, weight, 0.0))


@triton.jit
def reach_weight(
    y, x, fy, fx, inside,
    H: tl.constexpr, W: tl.constexpr, SMALL_H: tl.constexpr, SMALL_W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr,
    NEAREST: tl.constexpr,
):  # fmt: skip
    """The weights of the coarse pixels (y, x) at the fine ones (fy, fx); 0 outside."""
    weight = tl.where(inside, 1.0, 0.0)
    if RY == 0:
        weight *= _along(y, fy, H, SMALL_H, NEAREST)
    if RX == 0:
        weight *= _along(x, fx, W, SMALL_W, NEAREST)
    return weight

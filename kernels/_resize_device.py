"""Device code of resizing: Up at fine pixels, and whom Upᵀ reaches from coarse ones (`_resize_tables`).

A transition is one step from a coarse level to a finer one: `it` and `ft` point to its tables,

    it = [y.i0 (H), y.i1 (H), x.i0 (W), x.i1 (W), y.start (h), x.start (w)],    ft = [y.w0, y.w1, x.w0, x.w1]

and RY, RX are its ratios. Where a ratio is not 0, nothing is looked up.
"""

import triton
import triton.language as tl


@triton.jit
def nearest_at(
    it, y, x, mask, H: tl.constexpr, W: tl.constexpr, SMALL_W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr
):
    """The coarse pixel that the fine pixels (y, x) copy."""
    if RY > 0:
        y0 = y // RY
    else:
        y0 = tl.load(it + y, mask=mask, other=0)
    if RX > 0:
        x0 = x // RX
    else:
        x0 = tl.load(it + 2 * H + x, mask=mask, other=0)
    return y0 * SMALL_W + x0


@triton.jit
def corners(it, ft, y, x, mask, H: tl.constexpr, W: tl.constexpr, SMALL_W: tl.constexpr):
    """The four coarse pixels around the fine pixels (y, x), and their weights."""
    y0 = tl.load(it + y, mask=mask, other=0) * SMALL_W
    y1 = tl.load(it + H + y, mask=mask, other=0) * SMALL_W
    x0 = tl.load(it + 2 * H + x, mask=mask, other=0)
    x1 = tl.load(it + 2 * H + W + x, mask=mask, other=0)
    wy0 = tl.load(ft + y, mask=mask, other=0.0)
    wy1 = tl.load(ft + H + y, mask=mask, other=0.0)
    wx0 = tl.load(ft + 2 * H + x, mask=mask, other=0.0)
    wx1 = tl.load(ft + 2 * H + W + x, mask=mask, other=0.0)
    return y0 + x0, y0 + x1, y1 + x0, y1 + x1, wy0 * wx0, wy0 * wx1, wy1 * wx0, wy1 * wx1


@triton.jit
def up(
    map_ptr, it, ft, y, x, mask,
    H: tl.constexpr, W: tl.constexpr, SMALL_W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr,
    NEAREST: tl.constexpr,
):  # fmt: skip
    """Up(map) at the fine pixels (y, x), 0 where masked."""
    if NEAREST:
        return tl.load(map_ptr + nearest_at(it, y, x, mask, H, W, SMALL_W, RY, RX), mask=mask, other=0.0)
    else:
        p00, p01, p10, p11, w00, w01, w10, w11 = corners(it, ft, y, x, mask, H, W, SMALL_W)
        total = w00 * tl.load(map_ptr + p00, mask=mask, other=0.0)
        total += w01 * tl.load(map_ptr + p01, mask=mask, other=0.0)
        total += w10 * tl.load(map_ptr + p10, mask=mask, other=0.0)
        return total + w11 * tl.load(map_ptr + p11, mask=mask, other=0.0)


@triton.jit
def first_reached(
    it, y, x, mask,
    H: tl.constexpr, W: tl.constexpr, SMALL_H: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr,
):  # fmt: skip
    """The first fine row and column that look at the coarse pixels (y, x)."""
    if RY > 0:
        fy = y * RY
    else:
        fy = tl.load(it + 2 * H + 2 * W + y, mask=mask, other=0)
    if RX > 0:
        fx = x * RX
    else:
        fx = tl.load(it + 2 * H + 2 * W + SMALL_H + x, mask=mask, other=0)
    return fy, fx


@triton.jit
def reach_weight(it, ft, y, x, fy, fx, inside, H: tl.constexpr, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr):
    """With what weight the fine pixels (fy, fx) look at the coarse ones (y, x), 0 outside."""
    weight = tl.where(inside, 1.0, 0.0)
    if RY == 0:
        weight *= _along(it, ft, y, fy, inside, H)
    if RX == 0:
        weight *= _along(it + 2 * H, ft + 2 * H, x, fx, inside, W)
    return weight


@triton.jit
def _along(it, ft, at, fine, inside, SIZE: tl.constexpr):
    """The same along one axis."""
    first = tl.load(it + fine, mask=inside, other=-1) == at
    second = tl.load(it + SIZE + fine, mask=inside, other=-1) == at
    w = tl.where(first, tl.load(ft + fine, mask=inside, other=0.0), 0.0)
    return w + tl.where(second, tl.load(ft + SIZE + fine, mask=inside, other=0.0), 0.0)

"""Device code of resizing: Up at fine pixels, and the fine pixels that Upᵀ collects at coarse ones.

Sources and weights are those of PyTorch's interpolation of SMALL_H x SMALL_W to H x W. They are not kept in tables of
the host: a captured graph would read these long after the call that made them. Sizes are arguments of the launch, not
constants of the kernel; Y and X are the two axes, see `axis`.
"""

import triton
import triton.language as tl


@triton.jit
def axis(SIZE, SMALL):
    """What the other functions take of an axis: its fine and coarse positions, and PyTorch's scale."""
    return SIZE, SMALL, tl.div_rn(SMALL.to(tl.float32), SIZE.to(tl.float32))


@triton.jit
def _nearest(fine, AXIS):
    """The coarse position that a fine one copies, along one axis."""
    return tl.minimum((fine.to(tl.float32) * AXIS[2]).to(tl.int32), AXIS[1] - 1)


@triton.jit
def _between(fine, AXIS):
    """The two coarse positions around a fine one along one axis, equal if the second's weight is 0; that weight."""
    at = tl.maximum((fine.to(tl.float32) + 0.5) * AXIS[2] - 0.5, 0.0)
    first = tl.minimum(at.to(tl.int32), AXIS[1] - 1)
    weight = tl.where(first == AXIS[1] - 1, 0.0, at - first.to(tl.float32))
    return first, first + (weight > 0.0).to(tl.int32), weight


@triton.jit
def up_along(ptr, stride, position, mask, AXIS, NEAREST: tl.constexpr):
    """Up along one axis, of what lies `stride` apart, at the fine positions; 0 where masked."""
    if NEAREST:
        return tl.load(ptr + _nearest(position, AXIS) * stride, mask=mask, other=0.0)
    else:
        first, second, weight = _between(position, AXIS)
        total = (1.0 - weight) * tl.load(ptr + first * stride, mask=mask, other=0.0)
        return total + weight * tl.load(ptr + second * stride, mask=mask, other=0.0)


@triton.jit
def nearest_at(y, x, Y, X):
    """The coarse pixel that the fine pixels (y, x) copy."""
    return _nearest(y, Y) * X[1] + _nearest(x, X)


@triton.jit
def corners(y, x, Y, X):
    """The four coarse pixels around the fine pixels (y, x), and their weights."""
    y0, y1, wy1 = _between(y, Y)
    x0, x1, wx1 = _between(x, X)
    wy0 = 1.0 - wy1
    wx0 = 1.0 - wx1
    y0 *= X[1]
    y1 *= X[1]
    return y0 + x0, y0 + x1, y1 + x0, y1 + x1, wy0 * wx0, wy0 * wx1, wy1 * wx0, wy1 * wx1


@triton.jit
def up(map_ptr, y, x, mask, Y, X, NEAREST: tl.constexpr):
    """Up(map) at the fine pixels (y, x), 0 where masked."""
    if NEAREST:
        return tl.load(map_ptr + nearest_at(y, x, Y, X), mask=mask, other=0.0)
    else:
        p00, p01, p10, p11, w00, w01, w10, w11 = corners(y, x, Y, X)
        total = w00 * tl.load(map_ptr + p00, mask=mask, other=0.0)
        total += w01 * tl.load(map_ptr + p01, mask=mask, other=0.0)
        total += w10 * tl.load(map_ptr + p10, mask=mask, other=0.0)
        return total + w11 * tl.load(map_ptr + p11, mask=mask, other=0.0)


@triton.jit
def first_reached(small, AXIS, NEAREST: tl.constexpr):
    """The first fine position that looks at a coarse one along one axis (`pixel_weights.reach_of`)."""
    if NEAREST:
        return (small * AXIS[0] + (AXIS[1] - 1)) // AXIS[1]
    else:
        return tl.maximum((2 * small - 1) * AXIS[0] + AXIS[1], 0) // (2 * AXIS[1])


@triton.jit
def reach_weight(small, fine, AXIS, NEAREST: tl.constexpr):
    """The weights of the coarse positions at the fine ones along one axis; 0 outside."""
    if NEAREST:
        weight = tl.where(_nearest(fine, AXIS) == small, 1.0, 0.0)
    else:
        first, second, share = _between(fine, AXIS)
        weight = tl.where(first == small, 1.0 - share, tl.where(second == small, share, 0.0))
    return tl.where(fine < AXIS[0], weight, 0.0)

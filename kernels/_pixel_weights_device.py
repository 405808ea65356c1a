"""Device code of `pixel_weights`: the gates' recursion and the weights' recursion on the maps of one image, and back.

A program takes one image through all levels. What one thread stores and another loads lies on two sides of a barrier.
"""

import triton
import triton.language as tl


@triton.jit
def _up(map_ptr, it, ft, y, x, mask, H: tl.constexpr, W: tl.constexpr, SMALL_W: tl.constexpr, NEAREST: tl.constexpr):
    """Up(map) at the fine pixels (y, x), 0 where masked."""
    y0 = tl.load(it + y, mask=mask, other=0)
    x0 = tl.load(it + 2 * H + x, mask=mask, other=0)
    corner = tl.load(map_ptr + y0 * SMALL_W + x0, mask=mask, other=0.0)
    if NEAREST:
        return corner
    else:
        y1 = tl.load(it + H + y, mask=mask, other=0)
        x1 = tl.load(it + 2 * H + W + x, mask=mask, other=0)
        wy0 = tl.load(ft + y, mask=mask, other=0.0)
        wy1 = tl.load(ft + H + y, mask=mask, other=0.0)
        wx0 = tl.load(ft + 2 * H + x, mask=mask, other=0.0)
        wx1 = tl.load(ft + 2 * H + W + x, mask=mask, other=0.0)
        top = wx0 * corner + wx1 * tl.load(map_ptr + y0 * SMALL_W + x1, mask=mask, other=0.0)
        low0 = tl.load(map_ptr + y1 * SMALL_W + x0, mask=mask, other=0.0)
        low1 = tl.load(map_ptr + y1 * SMALL_W + x1, mask=mask, other=0.0)
        return wy0 * top + wy1 * (wx0 * low0 + wx1 * low1)


@triton.jit
def _reached(it, ft, at, fine, mask, SIZE: tl.constexpr):
    """With what weight the fine positions look at the coarse ones `at`, along one axis."""
    w = tl.where(tl.load(it + fine, mask=mask, other=-1) == at, tl.load(ft + fine, mask=mask, other=0.0), 0.0)
    second = tl.load(it + SIZE + fine, mask=mask, other=-1) == at
    return w + tl.where(second, tl.load(ft + SIZE + fine, mask=mask, other=0.0), 0.0)


@triton.jit
def _gate(
    own, above, state, gates, bias, it, ft,
    LEVEL: tl.constexpr, H: tl.constexpr, W: tl.constexpr, SMALL_H: tl.constexpr, SMALL_W: tl.constexpr,
    NEAREST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gate of a level, and what the finer gates' taps see of the blend."""
    P: tl.constexpr = H * W
    SMALL_P: tl.constexpr = SMALL_H * SMALL_W
    FINER: tl.constexpr = 9 * LEVEL
    for start in range(0, P, BLOCK):
        p = start + tl.arange(0, BLOCK)
        y = p // W
        x = p % W
        a = tl.zeros([BLOCK], tl.float32) + bias
        for tap in range(9):
            ty = y + (tap // 3 - 1)
            tx = x + (tap % 3 - 1)
            inside = (p < P) & (ty >= 0) & (ty < H) & (tx >= 0) & (tx < W)
            a += tl.load(own + (FINER + tap) * P + ty * W + tx, mask=inside, other=0.0)
            a += _up(above + (FINER + tap) * SMALL_P, it, ft, ty, tx, inside, H, W, SMALL_W, NEAREST)
        gate = 1.0 / (1.0 + tl.exp(-a))
        tl.store(gates + p, gate, mask=p < P)
        for tap in range(FINER):
            coarse = _up(above + tap * SMALL_P, it, ft, y, x, p < P, H, W, SMALL_W, NEAREST)
            fine = tl.load(own + tap * P + p, mask=p < P, other=0.0)
            tl.store(state + tap * P + p, coarse + gate * (fine - coarse), mask=p < P)


@triton.jit
def _what_remains(
    gates, remaining, it, ft, p,
    H: tl.constexpr, W: tl.constexpr, FINE_H: tl.constexpr, FINE_W: tl.constexpr,
    REACH_Y: tl.constexpr, REACH_X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Upᵀ of what the finer level's gates left over, at the pixels p."""
    left = tl.zeros([BLOCK], tl.float32)
    y = p // W
    x = p % W
    y_start = tl.load(it + 2 * FINE_H + 2 * FINE_W + y, mask=p < H * W, other=0)
    x_start = tl.load(it + 2 * FINE_H + 2 * FINE_W + H + x, mask=p < H * W, other=0)
    for dy in range(REACH_Y):
        fy = y_start + dy
        wy = _reached(it, ft, y, fy, (p < H * W) & (fy < FINE_H), FINE_H)
        for dx in range(REACH_X):
            fx = x_start + dx
            inside = (p < H * W) & (fy < FINE_H) & (fx < FINE_W)
            wx = _reached(it + 2 * FINE_H, ft + 2 * FINE_H, x, fx, inside, FINE_W)
            gate = tl.load(gates + fy * FINE_W + fx, mask=inside, other=1.0)
            above = tl.load(remaining + fy * FINE_W + fx, mask=inside, other=0.0)
            # Where this pixel is not looked at, what is there must not reach it: 0 · inf.
            left += tl.where(inside & (wy * wx != 0.0), wy * wx * (1.0 - gate) * above, 0.0)
    return left


@triton.jit
def pixel_weights_kernel(
    seen_ptr,  # (N, SEEN_SIZE)
    bias_ptr,  # (L - 1,)
    integers_ptr,
    floats_ptr,
    gate_ptr,  # (N, PIXEL_SIZE), the coarsest level unused
    state_ptr,  # (N, STATE_SIZE)
    remaining_ptr,  # (N, PIXEL_SIZE)
    weight_ptr,  # (N, PIXEL_SIZE)
    L: tl.constexpr,
    HS: tl.constexpr,
    WS: tl.constexpr,
    PIXELS: tl.constexpr,
    SEEN: tl.constexpr,
    STATE: tl.constexpr,
    PIXEL_SIZE: tl.constexpr,
    SEEN_SIZE: tl.constexpr,
    STATE_SIZE: tl.constexpr,
    INTEGERS: tl.constexpr,
    FLOATS: tl.constexpr,
    REACH_Y: tl.constexpr,
    REACH_X: tl.constexpr,
    NEAREST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    seen = seen_ptr + image * SEEN_SIZE
    gates = gate_ptr + image * PIXEL_SIZE
    states = state_ptr + image * STATE_SIZE
    remaining = remaining_ptr + image * PIXEL_SIZE
    weights = weight_ptr + image * PIXEL_SIZE
    for back in tl.static_range(L - 1):  # coarse to fine
        above = states + STATE[L - 1 - back]
        if back == 0:
            above = seen + SEEN[L - 1]
        _gate(
            seen + SEEN[L - 2 - back], above, states + STATE[L - 2 - back], gates + PIXELS[L - 2 - back],
            tl.load(bias_ptr + L - 2 - back), integers_ptr + INTEGERS[L - 2 - back], floats_ptr + FLOATS[L - 2 - back],
            L - 2 - back, HS[L - 2 - back], WS[L - 2 - back], HS[L - 1 - back], WS[L - 1 - back], NEAREST, BLOCK,
        )  # fmt: skip
        tl.debug_barrier()
    for level in tl.static_range(L):  # fine to coarse
        for start in range(0, HS[level] * WS[level], BLOCK):
            p = start + tl.arange(0, BLOCK)
            inside = p < HS[level] * WS[level]
            left = tl.full([BLOCK], 1.0, tl.float32) / (HS[0] * WS[0])
            if level > 0:
                left = _what_remains(
                    gates + PIXELS[level - 1], remaining + PIXELS[level - 1],
                    integers_ptr + INTEGERS[level - 1], floats_ptr + FLOATS[level - 1], p,
                    HS[level], WS[level], HS[level - 1], WS[level - 1], REACH_Y[level - 1], REACH_X[level - 1], BLOCK,
                )  # fmt: skip
            tl.store(remaining + PIXELS[level] + p, left, mask=inside)
            share = left
            if level < L - 1:
                share = left * tl.load(gates + PIXELS[level] + p, mask=inside, other=0.0)
            tl.store(weights + PIXELS[level] + p, share, mask=inside)
        tl.debug_barrier()


@triton.jit
def _gate_gradient(
    own, above, grad_own, grad_state, grad_gates, gates, it, ft,
    LEVEL: tl.constexpr, H: tl.constexpr, W: tl.constexpr, SMALL_H: tl.constexpr, SMALL_W: tl.constexpr,
    NEAREST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the gradients of the weights and of the blend to that of a, in place; its sum is the bias's."""
    P: tl.constexpr = H * W
    SMALL_P: tl.constexpr = SMALL_H * SMALL_W
    FINER: tl.constexpr = 9 * LEVEL
    bias_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, P, BLOCK):
        p = start + tl.arange(0, BLOCK)
        gate = tl.load(gates + p, mask=p < P, other=0.0)
        grad = tl.load(grad_gates + p, mask=p < P, other=0.0)
        for tap in range(FINER):
            coarse = _up(above + tap * SMALL_P, it, ft, p // W, p % W, p < P, H, W, SMALL_W, NEAREST)
            fine = tl.load(own + tap * P + p, mask=p < P, other=0.0)
            blended = tl.load(grad_state + tap * P + p, mask=p < P, other=0.0)
            grad += blended * (fine - coarse)
            tl.store(grad_own + tap * P + p, blended * gate, mask=p < P)
        grad = grad * gate * (1.0 - gate)
        tl.store(grad_gates + p, grad, mask=p < P)
        bias_sum += tl.where(p < P, grad, 0.0)
    return tl.sum(bias_sum, axis=0)


@triton.jit
def _tap_gradients(grad_own, grad_gates, LEVEL: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr):
    """Each tap of a gate gets the gradient of a, shifted back."""
    P: tl.constexpr = H * W
    for start in range(0, P, BLOCK):
        p = start + tl.arange(0, BLOCK)
        for tap in range(9):
            ty = p // W - (tap // 3 - 1)
            tx = p % W - (tap % 3 - 1)
            inside = (p < P) & (ty >= 0) & (ty < H) & (tx >= 0) & (tx < W)
            grad = tl.load(grad_gates + ty * W + tx, mask=inside, other=0.0)
            tl.store(grad_own + (9 * LEVEL + tap) * P + p, grad, mask=p < P)


@triton.jit
def _gradient_above(
    grad_above, grad_own, grad_state, gates, it, ft,
    LEVEL: tl.constexpr, H: tl.constexpr, W: tl.constexpr, SMALL_H: tl.constexpr, SMALL_W: tl.constexpr,
    REACH_Y: tl.constexpr, REACH_X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Upᵀ of what Up(Z) got: of the blended maps what the gate left over, of the gate's own taps all."""
    P: tl.constexpr = H * W
    SMALL_P: tl.constexpr = SMALL_H * SMALL_W
    FINER: tl.constexpr = 9 * LEVEL
    for start in range(0, SMALL_P, BLOCK):
        p = start + tl.arange(0, BLOCK)
        y = p // SMALL_W
        x = p % SMALL_W
        y_start = tl.load(it + 2 * H + 2 * W + y, mask=p < SMALL_P, other=0)
        x_start = tl.load(it + 2 * H + 2 * W + SMALL_H + x, mask=p < SMALL_P, other=0)
        for tap in range(FINER + 9):
            total = tl.zeros([BLOCK], tl.float32)
            for dy in range(REACH_Y):
                fy = y_start + dy
                wy = _reached(it, ft, y, fy, (p < SMALL_P) & (fy < H), H)
                for dx in range(REACH_X):
                    fx = x_start + dx
                    inside = (p < SMALL_P) & (fy < H) & (fx < W)
                    wx = _reached(it + 2 * H, ft + 2 * H, x, fx, inside, W)
                    at = fy * W + fx
                    blended = inside & (tap < FINER)
                    grad = tl.load(grad_state + tap * P + at, mask=blended, other=0.0)
                    grad *= 1.0 - tl.load(gates + at, mask=blended, other=0.0)
                    grad += tl.load(grad_own + tap * P + at, mask=inside & (tap >= FINER), other=0.0)
                    total += tl.where(inside & (wy * wx != 0.0), wy * wx * grad, 0.0)
            tl.store(grad_above + tap * SMALL_P + p, total, mask=p < SMALL_P)


@triton.jit
def pixel_weights_backward_kernel(
    seen_ptr,  # as forward had and left them
    integers_ptr,
    floats_ptr,
    gate_ptr,
    state_ptr,
    remaining_ptr,
    grad_weight_ptr,  # (N, PIXEL_SIZE)
    grad_remaining_ptr,  # (N, PIXEL_SIZE)
    grad_gate_ptr,  # (N, PIXEL_SIZE), of g and then of a
    grad_state_ptr,  # (N, STATE_SIZE)
    grad_seen_ptr,  # (N, SEEN_SIZE)
    grad_bias_ptr,  # (N, L - 1)
    L: tl.constexpr,
    HS: tl.constexpr,
    WS: tl.constexpr,
    PIXELS: tl.constexpr,
    SEEN: tl.constexpr,
    STATE: tl.constexpr,
    PIXEL_SIZE: tl.constexpr,
    SEEN_SIZE: tl.constexpr,
    STATE_SIZE: tl.constexpr,
    INTEGERS: tl.constexpr,
    FLOATS: tl.constexpr,
    REACH_Y: tl.constexpr,
    REACH_X: tl.constexpr,
    NEAREST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    seen = seen_ptr + image * SEEN_SIZE
    gates = gate_ptr + image * PIXEL_SIZE
    states = state_ptr + image * STATE_SIZE
    remaining = remaining_ptr + image * PIXEL_SIZE
    grad_weights = grad_weight_ptr + image * PIXEL_SIZE
    grad_remaining = grad_remaining_ptr + image * PIXEL_SIZE
    grad_gates = grad_gate_ptr + image * PIXEL_SIZE
    grad_states = grad_state_ptr + image * STATE_SIZE
    grad_seen = grad_seen_ptr + image * SEEN_SIZE
    for back in tl.static_range(L):  # the weights, coarse to fine: the adjoint of Upᵀ is Up
        for start in range(0, HS[L - 1 - back] * WS[L - 1 - back], BLOCK):
            p = start + tl.arange(0, BLOCK)
            inside = p < HS[L - 1 - back] * WS[L - 1 - back]
            at = PIXELS[L - 1 - back] + p
            grad = tl.load(grad_weights + at, mask=inside, other=0.0)
            if back > 0:
                passed = _up(
                    grad_remaining + PIXELS[L - back],
                    integers_ptr + INTEGERS[L - 1 - back], floats_ptr + FLOATS[L - 1 - back],
                    p // WS[L - 1 - back], p % WS[L - 1 - back], inside,
                    HS[L - 1 - back], WS[L - 1 - back], WS[L - back], NEAREST,
                )  # fmt: skip
                gate = tl.load(gates + at, mask=inside, other=0.0)
                left = tl.load(remaining + at, mask=inside, other=0.0)
                tl.store(grad_gates + at, left * (grad - passed), mask=inside)
                grad = grad * gate + passed * (1.0 - gate)
            tl.store(grad_remaining + at, grad, mask=inside)
        tl.debug_barrier()
    for level in tl.static_range(L - 1):  # the gates, fine to coarse
        above = states + STATE[level + 1]
        grad_above = grad_states + STATE[level + 1]
        if level == L - 2:
            above = seen + SEEN[level + 1]
            grad_above = grad_seen + SEEN[level + 1]
        it = integers_ptr + INTEGERS[level]
        ft = floats_ptr + FLOATS[level]
        bias_sum = _gate_gradient(
            seen + SEEN[level], above, grad_seen + SEEN[level], grad_states + STATE[level],
            grad_gates + PIXELS[level], gates + PIXELS[level], it, ft,
            level, HS[level], WS[level], HS[level + 1], WS[level + 1], NEAREST, BLOCK,
        )  # fmt: skip
        tl.store(grad_bias_ptr + image * (L - 1) + level, bias_sum)
        tl.debug_barrier()
        _tap_gradients(grad_seen + SEEN[level], grad_gates + PIXELS[level], level, HS[level], WS[level], BLOCK)
        tl.debug_barrier()
        _gradient_above(
            grad_above, grad_seen + SEEN[level], grad_states + STATE[level], gates + PIXELS[level], it, ft,
            level, HS[level], WS[level], HS[level + 1], WS[level + 1], REACH_Y[level], REACH_X[level], BLOCK,
        )  # fmt: skip
        tl.debug_barrier()

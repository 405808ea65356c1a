"""Device code of `pixel_weights`: the gates' recursion and the weights' recursion on the maps of one image, and back.

A program takes one image through all levels. A barrier separates what one thread stores from what another loads.
"""

import triton
import triton.language as tl

from unikd_fast.kernels._resize_device import first_reached, reach_weight, up


@triton.jit
def _tap(
    own, above, y, x, mask, tap, FINER: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    SMALL_H: tl.constexpr, SMALL_W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr, NEAREST: tl.constexpr,
):  # fmt: skip
    """What one tap of the 3x3 gates at (y, x) sees of its own and of the upsampled level."""
    ty = y + (tap // 3 - 1)
    tx = x + (tap % 3 - 1)
    inside = mask & (ty >= 0) & (ty < H) & (tx >= 0) & (tx < W)
    a = tl.load(own + tap * (H * W) + ty * W + tx, mask=inside, other=0.0)
    map_ptr = above + (FINER + tap) * (SMALL_H * SMALL_W)
    return a + up(map_ptr, ty, tx, inside, H, W, SMALL_H, SMALL_W, RY, RX, NEAREST)


@triton.jit
def _gate(
    seen, own, above, state, gates, bias,
    LEVEL: tl.constexpr, H: tl.constexpr, W: tl.constexpr, SMALL_H: tl.constexpr, SMALL_W: tl.constexpr,
    RY: tl.constexpr, RX: tl.constexpr, NEAREST: tl.constexpr, BLOCK: tl.constexpr,
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
        # All taps' loads at once hide their latency, if there are registers for them: bilinear has four for each tap.
        if NEAREST:
            for tap in tl.static_range(9):
                a += _tap(own, above, y, x, p < P, tap, FINER, H, W, SMALL_H, SMALL_W, RY, RX, NEAREST)
        else:
            for tap in range(9):
                a += _tap(own, above, y, x, p < P, tap, FINER, H, W, SMALL_H, SMALL_W, RY, RX, NEAREST)
        gate = 1.0 / (1.0 + tl.exp(-a))
        tl.store(gates + p, gate, mask=p < P)
        for tap in range(FINER):
            coarse = up(above + tap * SMALL_P, y, x, p < P, H, W, SMALL_H, SMALL_W, RY, RX, NEAREST)
            fine = tl.load(seen + tap * P + p, mask=p < P, other=0.0)
            tl.store(state + tap * P + p, coarse + gate * (fine - coarse), mask=p < P)


@triton.jit
def _what_remains(
    gates, remaining, p,
    H: tl.constexpr, W: tl.constexpr, SMALL_H: tl.constexpr, SMALL_W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr,
    REACH_Y: tl.constexpr, REACH_X: tl.constexpr, NEAREST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Upᵀ of what the finer level's gates leave over, at the coarse pixels p."""
    left = tl.zeros([BLOCK], tl.float32)
    y = p // SMALL_W
    x = p % SMALL_W
    first_y, first_x = first_reached(y, x, H, W, SMALL_H, SMALL_W, RY, RX, NEAREST)
    for dy in range(REACH_Y):
        for dx in range(REACH_X):
            fy = first_y + dy
            fx = first_x + dx
            inside = (p < SMALL_H * SMALL_W) & (fy < H) & (fx < W)
            weight = reach_weight(y, x, fy, fx, inside, H, W, SMALL_H, SMALL_W, RY, RX, NEAREST)
            gate = tl.load(gates + fy * W + fx, mask=inside, other=1.0)
            above = tl.load(remaining + fy * W + fx, mask=inside, other=0.0)
            # A fine pixel that does not look here must not contribute: 0 · inf is NaN.
            left += tl.where(weight != 0.0, weight * (1.0 - gate) * above, 0.0)
    return left


@triton.jit
def pixel_weights_kernel(
    seen_ptr,  # (N, SEEN_SIZE)
    own_ptr,  # (N, OWN_SIZE)
    bias_ptr,  # (L - 1,)
    gate_ptr,  # (N, PIXEL_SIZE), 1 at the coarsest level
    state_ptr,  # (N, STATE_SIZE)
    remaining_ptr,  # (N, PIXEL_SIZE)
    L: tl.constexpr,
    HS: tl.constexpr,
    WS: tl.constexpr,
    PIXELS: tl.constexpr,
    SEEN: tl.constexpr,
    OWN: tl.constexpr,
    STATE: tl.constexpr,
    PIXEL_SIZE: tl.constexpr,
    SEEN_SIZE: tl.constexpr,
    OWN_SIZE: tl.constexpr,
    STATE_SIZE: tl.constexpr,
    RYS: tl.constexpr,
    RXS: tl.constexpr,
    REACH_Y: tl.constexpr,
    REACH_X: tl.constexpr,
    NEAREST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    seen = seen_ptr + image * SEEN_SIZE
    own = own_ptr + image * OWN_SIZE
    gates = gate_ptr + image * PIXEL_SIZE
    states = state_ptr + image * STATE_SIZE
    remaining = remaining_ptr + image * PIXEL_SIZE
    for back in tl.static_range(L - 1):  # coarse to fine
        above = states + STATE[L - 1 - back]
        if back == 0:
            above = seen + SEEN[L - 1]
        _gate(
            seen + SEEN[L - 2 - back], own + OWN[L - 2 - back], above, states + STATE[L - 2 - back],
            gates + PIXELS[L - 2 - back], tl.load(bias_ptr + L - 2 - back),
            L - 2 - back, HS[L - 2 - back], WS[L - 2 - back], HS[L - 1 - back], WS[L - 1 - back],
            RYS[L - 2 - back], RXS[L - 2 - back], NEAREST, BLOCK,
        )  # fmt: skip
        tl.debug_barrier()
    for level in tl.static_range(L):  # fine to coarse
        for start in range(0, HS[level] * WS[level], BLOCK):
            p = start + tl.arange(0, BLOCK)
            inside = p < HS[level] * WS[level]
            left = tl.full([BLOCK], 1.0, tl.float32) / (HS[0] * WS[0])
            if level > 0:
                left = _what_remains(
                    gates + PIXELS[level - 1], remaining + PIXELS[level - 1], p,
                    HS[level - 1], WS[level - 1], HS[level], WS[level], RYS[level - 1], RXS[level - 1],
                    REACH_Y[level - 1], REACH_X[level - 1], NEAREST, BLOCK,
                )  # fmt: skip
            tl.store(remaining + PIXELS[level] + p, left, mask=inside)
            if level == L - 1:
                tl.store(gates + PIXELS[level] + p, tl.full([BLOCK], 1.0, tl.float32), mask=inside)
        tl.debug_barrier()


@triton.jit
def _gate_gradient(
    seen, above, grad_seen, grad_state, grad_gates, gates,
    LEVEL: tl.constexpr, H: tl.constexpr, W: tl.constexpr, SMALL_H: tl.constexpr, SMALL_W: tl.constexpr,
    RY: tl.constexpr, RX: tl.constexpr, NEAREST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the gradients of the weights and of the blend to that of a, in place; its sum is the bias's."""
    P: tl.constexpr = H * W
    SMALL_P: tl.constexpr = SMALL_H * SMALL_W
    bias_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, P, BLOCK):
        p = start + tl.arange(0, BLOCK)
        gate = tl.load(gates + p, mask=p < P, other=0.0)
        grad = tl.load(grad_gates + p, mask=p < P, other=0.0)
        for tap in range(9 * LEVEL):
            coarse = up(above + tap * SMALL_P, p // W, p % W, p < P, H, W, SMALL_H, SMALL_W, RY, RX, NEAREST)
            fine = tl.load(seen + tap * P + p, mask=p < P, other=0.0)
            blended = tl.load(grad_state + tap * P + p, mask=p < P, other=0.0)
            grad += blended * (fine - coarse)
            tl.store(grad_seen + tap * P + p, blended * gate, mask=p < P)
        grad = grad * gate * (1.0 - gate)
        tl.store(grad_gates + p, grad, mask=p < P)
        bias_sum += tl.where(p < P, grad, 0.0)
    return tl.sum(bias_sum, axis=0)


@triton.jit
def _gradient_above(
    grad_above, grad_state, grad_gates, gates,
    LEVEL: tl.constexpr, H: tl.constexpr, W: tl.constexpr, SMALL_H: tl.constexpr, SMALL_W: tl.constexpr,
    RY: tl.constexpr, RX: tl.constexpr, REACH_Y: tl.constexpr, REACH_X: tl.constexpr, NEAREST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Upᵀ of what Up(Z) got: of the blended maps what the gate left over, of the gate's own taps all of a, shifted."""
    SMALL_P: tl.constexpr = SMALL_H * SMALL_W
    FINER: tl.constexpr = 9 * LEVEL
    for start in range(0, SMALL_P, BLOCK):
        p = start + tl.arange(0, BLOCK)
        y = p // SMALL_W
        x = p % SMALL_W
        first_y, first_x = first_reached(y, x, H, W, SMALL_H, SMALL_W, RY, RX, NEAREST)
        for tap in range(FINER + 9):
            total = tl.zeros([BLOCK], tl.float32)
            shift_y = (tap - FINER) // 3 - 1
            shift_x = (tap - FINER) % 3 - 1
            for dy in range(REACH_Y):
                for dx in range(REACH_X):
                    fy = first_y + dy
                    fx = first_x + dx
                    inside = (p < SMALL_P) & (fy < H) & (fx < W)
                    weight = reach_weight(y, x, fy, fx, inside, H, W, SMALL_H, SMALL_W, RY, RX, NEAREST)
                    if tap < FINER:
                        grad = tl.load(grad_state + tap * (H * W) + fy * W + fx, mask=inside, other=0.0)
                        grad *= 1.0 - tl.load(gates + fy * W + fx, mask=inside, other=0.0)
                    else:
                        sy = fy - shift_y
                        sx = fx - shift_x
                        there = inside & (sy >= 0) & (sy < H) & (sx >= 0) & (sx < W)
                        grad = tl.load(grad_gates + sy * W + sx, mask=there, other=0.0)
                    total += tl.where(weight != 0.0, weight * grad, 0.0)
            tl.store(grad_above + tap * SMALL_P + p, total, mask=p < SMALL_P)


@triton.jit
def pixel_weights_backward_kernel(
    seen_ptr,  # as forward had and left them
    gate_ptr,
    state_ptr,
    remaining_ptr,
    grad_weight_ptr,  # (N, PIXEL_SIZE), replaced by the gradient of what remains
    grad_gate_ptr,  # (N, PIXEL_SIZE), of g and then of a
    grad_state_ptr,  # (N, STATE_SIZE)
    grad_seen_ptr,  # (N, SEEN_SIZE)
    grad_bias_ptr,  # (N, L - 1)
    L: tl.constexpr,
    HS: tl.constexpr,
    WS: tl.constexpr,
    PIXELS: tl.constexpr,
    SEEN: tl.constexpr,
    OWN: tl.constexpr,
    STATE: tl.constexpr,
    PIXEL_SIZE: tl.constexpr,
    SEEN_SIZE: tl.constexpr,
    OWN_SIZE: tl.constexpr,
    STATE_SIZE: tl.constexpr,
    RYS: tl.constexpr,
    RXS: tl.constexpr,
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
    grad_gates = grad_gate_ptr + image * PIXEL_SIZE
    grad_states = grad_state_ptr + image * STATE_SIZE
    grad_seen = grad_seen_ptr + image * SEEN_SIZE
    for back in tl.static_range(L):  # the weights, coarse to fine: the adjoint of Upᵀ is Up
        for start in range(0, HS[L - 1 - back] * WS[L - 1 - back], BLOCK):
            p = start + tl.arange(0, BLOCK)
            inside = p < HS[L - 1 - back] * WS[L - 1 - back]
            at = PIXELS[L - 1 - back] + p
            if back > 0:
                grad = tl.load(grad_weights + at, mask=inside, other=0.0)
                passed = up(
                    grad_weights + PIXELS[L - back],
                    p // WS[L - 1 - back], p % WS[L - 1 - back], inside,
                    HS[L - 1 - back], WS[L - 1 - back], HS[L - back], WS[L - back],
                    RYS[L - 1 - back], RXS[L - 1 - back], NEAREST,
                )  # fmt: skip
                gate = tl.load(gates + at, mask=inside, other=0.0)
                left = tl.load(remaining + at, mask=inside, other=0.0)
                tl.store(grad_gates + at, left * (grad - passed), mask=inside)
                tl.store(grad_weights + at, grad * gate + passed * (1.0 - gate), mask=inside)
        tl.debug_barrier()
    for level in tl.static_range(L - 1):  # the gates, fine to coarse
        above = states + STATE[level + 1]
        grad_above = grad_states + STATE[level + 1]
        if level == L - 2:
            above = seen + SEEN[level + 1]
            grad_above = grad_seen + SEEN[level + 1]
        bias_sum = _gate_gradient(
            seen + SEEN[level], above, grad_seen + SEEN[level], grad_states + STATE[level],
            grad_gates + PIXELS[level], gates + PIXELS[level],
            level, HS[level], WS[level], HS[level + 1], WS[level + 1], RYS[level], RXS[level], NEAREST, BLOCK,
        )  # fmt: skip
        tl.store(grad_bias_ptr + image * (L - 1) + level, bias_sum)
        tl.debug_barrier()
        _gradient_above(
            grad_above, grad_states + STATE[level], grad_gates + PIXELS[level], gates + PIXELS[level],
            level, HS[level], WS[level], HS[level + 1], WS[level + 1], RYS[level], RXS[level],
            REACH_Y[level], REACH_X[level], NEAREST, BLOCK,
        )  # fmt: skip
        tl.debug_barrier()

"""Device code of `pixel_weights`: the gates' recursion and the weights' recursion on the maps of one image, and back.

A program takes one image through all levels. A barrier separates what one thread stores from what another loads. Taps
come in groups of nine, one a gate. Where each pixel must know its sources, tiles are (groups, pixels) and a row of taps
is unrolled: their loads are under way together, and the sources are found once for all. Upᵀ goes along x and then along
y, each over taps and pixels as one flat axis, so that small maps fill the lanes; what it collects along an axis, and
with which weights, is the same for all taps and is tabulated in the scratch memory of the image.
"""

import triton
import triton.language as tl

from unikd_fast.kernels._pooled_device import (
    number,
    pixels_before,
    quotient,
    reciprocal_of,
    seen_before,
    within,
)
from unikd_fast.kernels._resize_device import axis, first_reached, reach_weight, up, up_along


@triton.jit
def _tabulate(table, Y, X, reach, NEAREST: tl.constexpr, BLOCK: tl.constexpr):
    """Of each coarse row and then of each column the first fine one that looks at it, and the weights from there on."""
    count = Y[1] + X[1]
    for start in range(0, count, BLOCK):
        j = start + tl.arange(0, BLOCK)
        along_x = j >= Y[1]
        # Of each lane its axis.
        AXIS = (tl.where(along_x, X[0], Y[0]), tl.where(along_x, X[1], Y[1]), tl.where(along_x, X[2], Y[2]))
        s = tl.where(along_x, j - Y[1], j)
        first = first_reached(s, AXIS, NEAREST)
        tl.store(table + j, first.to(tl.float32), mask=j < count)
        for d in range(reach):
            tl.store(table + count + j * reach + d, reach_weight(s, first + d, AXIS, NEAREST), mask=j < count)


@triton.jit
def _collect_along_x(
    maps, gates, out, table, rows, H, W, SMALL_H, SMALL_W, reach,
    SHIFTED: tl.constexpr, GATED: tl.constexpr, NEAREST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Upᵀ along x of (rows, W), to (rows, SMALL_W).

    GATED takes what the gates leave over of one map. SHIFTED takes one map of H rows three times, moved by a column to
    the left, not at all, and to the right.
    """
    STEP: tl.constexpr = 2 if NEAREST else 4
    reciprocal = reciprocal_of(SMALL_W)
    for start in range(0, rows * SMALL_W, BLOCK):
        j = start + tl.arange(0, BLOCK)
        there = j < rows * SMALL_W
        row = quotient(j, reciprocal)
        s = j - row * SMALL_W
        first = tl.load(table + SMALL_H + s).to(tl.int32)
        weights = table + (SMALL_H + SMALL_W) + (SMALL_H + s) * reach
        if SHIFTED:
            copy = (row >= H).to(tl.int32) + (row >= 2 * H).to(tl.int32)
            row -= copy * H
            first -= copy - 1
        at = row * W + first
        total = tl.zeros([BLOCK], tl.float32)
        for d in range(0, reach, STEP):
            for e in tl.static_range(STEP):
                weight = tl.load(weights + d + e)
                # A fine pixel that does not look here must not contribute: 0 · inf is NaN.
                mask = there & (weight != 0.0)
                if SHIFTED:
                    mask = mask & within(first + (d + e), W)
                value = tl.load(maps + (d + e) + at, mask=mask, other=0.0)
                if GATED:
                    value *= 1.0 - tl.load(gates + (d + e) + at, mask=mask, other=0.0)
                total += weight * value
        tl.store(out + j, total, mask=there)


@triton.jit
def _collect_along_y(
    columns, out, table, count, H, SMALL_H, SMALL_W, reach,
    SHIFTED: tl.constexpr, NEAREST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Upᵀ along y of `count` maps (H, SMALL_W), to (SMALL_H, SMALL_W).

    SHIFTED takes three maps, each moved by a row up, not at all, and down: the nine taps of a gate.
    """
    STEP: tl.constexpr = 2 if NEAREST else 4
    by_width = reciprocal_of(SMALL_W)
    by_height = reciprocal_of(SMALL_H)
    for start in range(0, count * SMALL_H * SMALL_W, BLOCK):
        j = start + tl.arange(0, BLOCK)
        there = j < count * SMALL_H * SMALL_W
        row = quotient(j, by_width)
        x = j - row * SMALL_W
        source = quotient(row, by_height)
        s = row - source * SMALL_H
        first = tl.load(table + s).to(tl.int32)
        weights = table + (SMALL_H + SMALL_W) + s * reach
        if SHIFTED:
            first -= source // 3 - 1
            source = source % 3
        at = (source * H + first) * SMALL_W + x
        total = tl.zeros([BLOCK], tl.float32)
        for d in range(0, reach, STEP):
            for e in tl.static_range(STEP):
                weight = tl.load(weights + d + e)
                mask = there & (weight != 0.0)
                if SHIFTED:
                    mask = mask & within(first + (d + e), H)
                total += weight * tl.load(columns + (d + e) * SMALL_W + at, mask=mask, other=0.0)
        tl.store(out + j, total, mask=there)


@triton.jit
def _up_along_x(above, out, H, W, SMALL_H, SMALL_W, NEAREST: tl.constexpr, BLOCK: tl.constexpr):
    """What a gate's rows of taps see of the level above, upsampled along x: sums of three, (3, SMALL_H, W)."""
    X = axis(W, SMALL_W)
    by_width = reciprocal_of(W)
    for start in range(0, 3 * SMALL_H * W, BLOCK):
        j = start + tl.arange(0, BLOCK)
        row = quotient(j, by_width)
        x = j - row * W
        tap_row = (row >= SMALL_H).to(tl.int32) + (row >= 2 * SMALL_H).to(tl.int32)
        at = (2 * tap_row * SMALL_H + row) * SMALL_W  # of the maps 3 tap_row; a map has SMALL_H rows
        total = tl.zeros([BLOCK], tl.float32)
        for column in tl.static_range(3):
            mask = (j < 3 * SMALL_H * W) & within(x + (column - 1), W)
            total += up_along(above + column * SMALL_H * SMALL_W + at, 1, x + (column - 1), mask, X, NEAREST)
        tl.store(out + j, total, mask=j < 3 * SMALL_H * W)


@triton.jit
def _gate(
    seen, own, above, along_x, state, gates, bias, H, W, SMALL_H, SMALL_W, TAP_ROWS,
    LEVEL: tl.constexpr, GROUPS: tl.constexpr, NEAREST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gate of a level, and what the finer gates' taps see of the blend."""
    P = H * W
    SMALL_P = SMALL_H * SMALL_W
    Y = axis(H, SMALL_H)
    X = axis(W, SMALL_W)
    by_width = reciprocal_of(W)
    # Nothing is blended at the finest level, and nearest looks at one pixel: two a thread have registers.
    PIXELS: tl.constexpr = 2 * BLOCK if LEVEL == 0 and NEAREST else BLOCK // GROUPS
    for start in range(0, P, PIXELS):
        p = start + tl.arange(0, PIXELS)
        y = quotient(p, by_width)
        x = p - y * W
        a = tl.zeros([PIXELS], tl.float32) + bias
        for row in range(TAP_ROWS):
            ty = y + (row - 1)
            there = (p < P) & within(ty, H)
            a += up_along(along_x + row * (SMALL_H * W) + x, W, ty, there, Y, NEAREST)
            for column in tl.static_range(3):
                shift = (row - 1) * W + (column - 1)
                inside = there & within(x + (column - 1), W)
                a += tl.load(own + ((3 * row + column) * P + shift) + p, mask=inside, other=0.0)
        gate = 1.0 / (1.0 + tl.exp(-a))
        tl.store(gates + p, gate, mask=p < P)
        if LEVEL > 0:
            group = tl.arange(0, GROUPS)[:, None].to(tl.int64)
            inside = (group < LEVEL) & (p < P)[None, :]
            for row in range(TAP_ROWS):
                for column in tl.static_range(3):
                    tap = 9 * group + (3 * row + column)
                    coarse = up(above + tap * SMALL_P, y[None, :], x[None, :], inside, Y, X, NEAREST)
                    fine = tl.load(seen + tap * P + p[None, :], mask=inside, other=0.0)
                    tl.store(state + tap * P + p[None, :], coarse + gate[None, :] * (fine - coarse), mask=inside)


@triton.jit(do_not_specialize=["TABLES", "SCRATCH", "TAP_ROWS"])
def pixel_weights_kernel(
    seen_ptr,  # (N, what the finer gates' taps see)
    own_ptr,  # (N, what the own gate's taps see)
    bias_ptr,  # (L - 1,)
    gate_ptr,  # (N, pixels of all levels), 1 at the coarsest
    state_ptr,  # (N, as `seen` but of the coarsest level)
    remaining_ptr,  # (N, pixels of all levels)
    scratch_ptr,  # (N, SCRATCH)
    HS,  # of each level, `number`
    WS,
    REACH,  # of each transition, in whole steps
    TABLES,  # of the scratch memory of an image
    SCRATCH,
    TAP_ROWS,  # 3; a constant number of loops would be unrolled, for which there are no registers
    L: tl.constexpr,
    GROUPS: tl.constexpr,
    NEAREST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    seen = seen_ptr + image * seen_before(HS, WS, L)
    own = own_ptr + image * (9 * pixels_before(HS, WS, L - 1))
    gates = gate_ptr + image * pixels_before(HS, WS, L)
    states = state_ptr + image * seen_before(HS, WS, L - 1)
    remaining = remaining_ptr + image * pixels_before(HS, WS, L)
    table = scratch_ptr + image * SCRATCH
    columns = table + TABLES
    for back in tl.static_range(L - 1):  # coarse to fine
        above = states + seen_before(HS, WS, L - 1 - back)
        if back == 0:
            above = seen + seen_before(HS, WS, L - 1)
        _up_along_x(
            above + 9 * (L - 2 - back) * number(HS, L - 1 - back) * number(WS, L - 1 - back), columns,
            number(HS, L - 2 - back), number(WS, L - 2 - back), number(HS, L - 1 - back), number(WS, L - 1 - back),
            NEAREST, 2 * BLOCK,
        )  # fmt: skip
        tl.debug_barrier()
        _gate(
            seen + seen_before(HS, WS, L - 2 - back), own + 9 * pixels_before(HS, WS, L - 2 - back), above, columns,
            states + seen_before(HS, WS, L - 2 - back), gates + pixels_before(HS, WS, L - 2 - back),
            tl.load(bias_ptr + L - 2 - back), number(HS, L - 2 - back), number(WS, L - 2 - back),
            number(HS, L - 1 - back), number(WS, L - 1 - back), TAP_ROWS,
            L - 2 - back, GROUPS[L - 2 - back], NEAREST, BLOCK,
        )  # fmt: skip
        tl.debug_barrier()
    for start in range(0, number(HS, 0) * number(WS, 0), BLOCK):
        p = start + tl.arange(0, BLOCK)
        share = tl.full([BLOCK], 1.0, tl.float32) / (number(HS, 0) * number(WS, 0)).to(tl.float32)
        tl.store(remaining + p, share, mask=p < number(HS, 0) * number(WS, 0))
    for level in tl.static_range(L - 1):  # fine to coarse
        H = number(HS, level)
        W = number(WS, level)
        SMALL_H = number(HS, level + 1)
        SMALL_W = number(WS, level + 1)
        reach = number(REACH, level)
        at = pixels_before(HS, WS, level)
        tl.debug_barrier()
        _tabulate(table, axis(H, SMALL_H), axis(W, SMALL_W), reach, NEAREST, BLOCK)
        tl.debug_barrier()
        _collect_along_x(
            remaining + at, gates + at, columns, table, H, H, W, SMALL_H, SMALL_W, reach, False, True, NEAREST,
            2 * BLOCK,
        )  # fmt: skip
        tl.debug_barrier()
        _collect_along_y(
            columns, remaining + pixels_before(HS, WS, level + 1), table, 1, H, SMALL_H, SMALL_W, reach,
            False, NEAREST, 2 * BLOCK,
        )  # fmt: skip
    for start in range(0, number(HS, L - 1) * number(WS, L - 1), BLOCK):
        p = start + tl.arange(0, BLOCK)
        ones = tl.full([BLOCK], 1.0, tl.float32)
        tl.store(gates + pixels_before(HS, WS, L - 1) + p, ones, mask=p < number(HS, L - 1) * number(WS, L - 1))


@triton.jit
def _weight_gradient_above(
    grad_weights, grad_above, grad_gates, gates, remaining, H, W, SMALL_H, SMALL_W,
    NEAREST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the gradient of the weights to the gate's and, in place, that of what remains; Up is the adjoint of Upᵀ."""
    Y = axis(H, SMALL_H)
    X = axis(W, SMALL_W)
    by_width = reciprocal_of(W)
    for start in range(0, H * W, BLOCK):
        p = start + tl.arange(0, BLOCK)
        inside = p < H * W
        y = quotient(p, by_width)
        grad = tl.load(grad_weights + p, mask=inside, other=0.0)
        passed = up(grad_above, y, p - y * W, inside, Y, X, NEAREST)
        gate = tl.load(gates + p, mask=inside, other=0.0)
        left = tl.load(remaining + p, mask=inside, other=0.0)
        tl.store(grad_gates + p, left * (grad - passed), mask=inside)
        tl.store(grad_weights + p, grad * gate + passed * (1.0 - gate), mask=inside)


@triton.jit
def _gate_gradient(
    seen, above, grad_seen, grad_state, grad_gates, gates, H, W, SMALL_H, SMALL_W, TAP_ROWS,
    LEVEL: tl.constexpr, GROUPS: tl.constexpr, NEAREST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the gradients of the weights and of the blend to that of a, in place; its sum is the bias's.

    The gradient of the blend is replaced by what it leaves for the coarser level.
    """
    P = H * W
    SMALL_P = SMALL_H * SMALL_W
    Y = axis(H, SMALL_H)
    X = axis(W, SMALL_W)
    by_width = reciprocal_of(W)
    PIXELS: tl.constexpr = 2 * BLOCK if LEVEL == 0 else BLOCK // GROUPS
    bias_sum = tl.zeros([PIXELS], tl.float32)
    for start in range(0, P, PIXELS):
        p = start + tl.arange(0, PIXELS)
        gate = tl.load(gates + p, mask=p < P, other=0.0)
        grad = tl.load(grad_gates + p, mask=p < P, other=0.0)
        if LEVEL > 0:
            row = quotient(p, by_width)
            y = row[None, :]
            x = (p - row * W)[None, :]
            group = tl.arange(0, GROUPS)[:, None].to(tl.int64)
            inside = (group < LEVEL) & (p < P)[None, :]
            through = tl.zeros([GROUPS, PIXELS], tl.float32)
            for tap_row in range(TAP_ROWS):
                for column in tl.static_range(3):
                    tap = 9 * group + (3 * tap_row + column)
                    at = tap * P + p[None, :]
                    coarse = up(above + tap * SMALL_P, y, x, inside, Y, X, NEAREST)
                    fine = tl.load(seen + at, mask=inside, other=0.0)
                    blended = tl.load(grad_state + at, mask=inside, other=0.0)
                    through += blended * (fine - coarse)
                    tl.store(grad_seen + at, blended * gate[None, :], mask=inside)
                    tl.store(grad_state + at, blended * (1.0 - gate[None, :]), mask=inside)
            grad += tl.sum(through, axis=0)
            tl.debug_barrier()  # several threads have loaded what one of them replaces
        grad = grad * gate * (1.0 - gate)
        tl.store(grad_gates + p, grad, mask=p < P)
        bias_sum += tl.where(p < P, grad, 0.0)
    return tl.sum(bias_sum, axis=0)


@triton.jit
def _gradient_above(
    grad_above, grad_state, grad_gates, table, columns, H, W, SMALL_H, SMALL_W, reach,
    LEVEL: tl.constexpr, NEAREST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Upᵀ of what Up(Z) got: of the blended maps what the gate left over, of the gate's own taps all of a, shifted."""
    shifted = columns + 9 * LEVEL * H * SMALL_W
    if LEVEL > 0:
        _collect_along_x(
            grad_state, grad_state, columns, table, 9 * LEVEL * H, H, W, SMALL_H, SMALL_W, reach,
            False, False, NEAREST, BLOCK,
        )  # fmt: skip
    _collect_along_x(
        grad_gates, grad_gates, shifted, table, 3 * H, H, W, SMALL_H, SMALL_W, reach, True, False, NEAREST, BLOCK
    )  # fmt: skip
    tl.debug_barrier()
    if LEVEL > 0:
        _collect_along_y(
            columns, grad_above, table, 9 * LEVEL, H, SMALL_H, SMALL_W, reach, False, NEAREST, BLOCK
        )  # fmt: skip
    _collect_along_y(
        shifted, grad_above + 9 * LEVEL * SMALL_H * SMALL_W, table, 9, H, SMALL_H, SMALL_W, reach, True, NEAREST, BLOCK
    )  # fmt: skip


@triton.jit(do_not_specialize=["TABLES", "SCRATCH", "TAP_ROWS"])
def pixel_weights_backward_kernel(
    seen_ptr,  # as forward had and left them
    gate_ptr,
    state_ptr,
    remaining_ptr,
    grad_weight_ptr,  # (N, pixels of all levels), replaced by the gradient of what remains
    grad_gate_ptr,  # (N, pixels of all levels), of g and then of a
    grad_state_ptr,  # as the states; in the end what they leave for the coarser level
    grad_seen_ptr,  # as `seen`
    grad_bias_ptr,  # (N, L - 1)
    scratch_ptr,  # (N, SCRATCH)
    HS,
    WS,
    REACH,
    TABLES,  # of the scratch memory of an image
    SCRATCH,
    TAP_ROWS,  # 3; a constant number of loops would be unrolled, for which there are no registers
    L: tl.constexpr,
    GROUPS: tl.constexpr,
    NEAREST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    seen = seen_ptr + image * seen_before(HS, WS, L)
    gates = gate_ptr + image * pixels_before(HS, WS, L)
    states = state_ptr + image * seen_before(HS, WS, L - 1)
    remaining = remaining_ptr + image * pixels_before(HS, WS, L)
    grad_weights = grad_weight_ptr + image * pixels_before(HS, WS, L)
    grad_gates = grad_gate_ptr + image * pixels_before(HS, WS, L)
    grad_states = grad_state_ptr + image * seen_before(HS, WS, L - 1)
    grad_seen = grad_seen_ptr + image * seen_before(HS, WS, L)
    table = scratch_ptr + image * SCRATCH
    columns = table + TABLES
    for back in tl.static_range(L - 1):  # the weights, coarse to fine
        at = pixels_before(HS, WS, L - 2 - back)
        _weight_gradient_above(
            grad_weights + at, grad_weights + pixels_before(HS, WS, L - 1 - back), grad_gates + at, gates + at,
            remaining + at, number(HS, L - 2 - back), number(WS, L - 2 - back), number(HS, L - 1 - back),
            number(WS, L - 1 - back), NEAREST, 2 * BLOCK,
        )  # fmt: skip
        tl.debug_barrier()
    for level in tl.static_range(L - 1):  # the gates, fine to coarse
        H = number(HS, level)
        W = number(WS, level)
        SMALL_H = number(HS, level + 1)
        SMALL_W = number(WS, level + 1)
        reach = number(REACH, level)
        above = states + seen_before(HS, WS, level + 1)
        grad_above = grad_states + seen_before(HS, WS, level + 1)
        if level == L - 2:
            above = seen + seen_before(HS, WS, level + 1)
            grad_above = grad_seen + seen_before(HS, WS, level + 1)
        at = pixels_before(HS, WS, level)
        _tabulate(table, axis(H, SMALL_H), axis(W, SMALL_W), reach, NEAREST, BLOCK)
        bias_sum = _gate_gradient(
            seen + seen_before(HS, WS, level), above, grad_seen + seen_before(HS, WS, level),
            grad_states + seen_before(HS, WS, level), grad_gates + at, gates + at,
            H, W, SMALL_H, SMALL_W, TAP_ROWS, level, GROUPS[level], NEAREST, BLOCK,
        )  # fmt: skip
        tl.store(grad_bias_ptr + image * (L - 1) + level, bias_sum)
        tl.debug_barrier()
        _gradient_above(
            grad_above, grad_states + seen_before(HS, WS, level), grad_gates + at, table, columns,
            H, W, SMALL_H, SMALL_W, reach, level, NEAREST, 2 * BLOCK,
        )  # fmt: skip
        tl.debug_barrier()

"""Device code of `pooled_fusion` and `feature_fusion`, backward: the gradients of features and matrix, in one pass.

    ∂F(p) = w(p) ∂A + Mᵀ ∂S(p),    ∂M = Σ ∂S(p) F(p)ᵀ

If two levels were blended and not averaged, w ∂A is replaced by the gradient through the blend (`_blend_device`). If
the features were normalised, x̂ = (x - μ) r, this is r ∂x̂ and Σ ∂S (x - μ)ᵀ, and the norm's own part is added in a
second pass, when its two sums per channel are known:

    ∂x = r ∂x̂ + slope (x - μ) + offset,    slope = -r² Σ ∂x̂ x̂ / n,    offset = -r Σ ∂x̂ / n

With the averages A of x̂, the sums of their weights, M on x̂ and what its rows saw, S, those sums are

    Σ ∂x̂    = Σ_n ∂A Σ_p w + Mᵀ Σ ∂S,        Σ ∂x̂ x̂ = Σ_n ∂A A + diag( Mᵀ ∂M ),    ∂M = r Σ ∂S (x - μ)ᵀ

A program takes a block of channels through a fixed share of all images and pixels and leaves its part of ∂M; the parts
are added by a second kernel in their order.
"""

import triton
import triton.language as tl

from unikd_fast.kernels._blend_device import through_the_blend
from unikd_fast.kernels._pooled_device import (
    CHANNELS_LAST,
    load_centred,
    number,
    offsets_in_image,
    pixels_before,
    pixels_of,
    quotient,
    reciprocal_of,
    row_of,
    seen_before,
    within,
)


@triton.jit
def groups_of(N, LARGEST, P, BLOCK_P: tl.constexpr):
    """The number of programs that share the pixels of a level."""
    return tl.minimum(N * tl.cdiv(P, BLOCK_P), LARGEST)


@triton.jit
def parts_before(GROUPS, LEVEL: tl.constexpr, ROWS: tl.constexpr, CS: tl.constexpr):
    """Where the parts of ∂M of a level begin."""
    total = 0
    for i in tl.static_range(LEVEL):
        total += number(GROUPS, i) * (ROWS[i] * (CS[i] + 1))
    return total


@triton.jit
def _seen_gradient(
    grad_seen, grad_a, item, N, r, HS, WS,
    L: tl.constexpr, LEVEL: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """∂S at the pixels of an item, (rows, pixels), 0 past the last: for the own gate's taps it is ∂a, shifted back."""
    GATES: tl.constexpr = L - 1
    H = number(HS, LEVEL)
    W = number(WS, LEVEL)
    P = H * W
    blocks_p = tl.cdiv(P, BLOCK_P)
    image = (N - 1 - item // blocks_p).to(tl.int64)
    p = item % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    p = tl.where(image >= 0, p, P)
    grad_seen += image * seen_before(HS, WS, L)
    grad_a += image * pixels_before(HS, WS, L)
    blended = grad_seen + r[:, None].to(tl.int64) * P + p[None, :]
    inside = (r < 9 * LEVEL)[:, None] & (p < P)[None, :]
    if LEVEL < GATES:
        tap = r - 9 * LEVEL
        row = quotient(p, reciprocal_of(W))
        y = row[None, :] - (tap // 3 - 1)[:, None]
        x = (p - row * W)[None, :] - (tap % 3 - 1)[:, None]
        there = (p < P)[None, :] & within(y, H) & within(x, W) & ((tap >= 0) & (tap < 9))[:, None]
        shifted = grad_a + (p[None, :] - ((tap // 3 - 1) * W + (tap % 3 - 1))[:, None])
        if LEVEL == 0:
            return tl.load(shifted, mask=there, other=0.0)
        return tl.load(tl.where((tap < 0)[:, None], blended, shifted), mask=inside | there, other=0.0)
    else:
        return tl.load(blended, mask=inside, other=0.0)


@triton.jit
def _feature_gradient(
    feature, mean, slope, offset, matrix, gates, remaining, grad_average, grad_blend, grad_seen, grad_a, grad_feature,
    parts, N, program, groups, HS, WS, REACH_Y, REACH_X,
    L: tl.constexpr, LEVEL: tl.constexpr, C: tl.constexpr, LAYOUT: tl.constexpr, FINE_LAYOUT: tl.constexpr,
    COLUMN: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, ROWS_PADDED: tl.constexpr, EXACT: tl.constexpr,
    NEAREST: tl.constexpr, STAGES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    P = pixels_of(number(HS, LEVEL), number(WS, LEVEL), LAYOUT)
    blocks_p = tl.cdiv(P, BLOCK_P)
    pixel_size = pixels_before(HS, WS, L)
    element = feature.dtype.element_ty
    if EXACT:
        element = tl.float32
    c = program % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)
    group = program // BLOCKS_C
    r = tl.arange(0, ROWS_PADDED)
    rows = row_of(r, LEVEL, L - 1).to(tl.int64)
    total = tl.zeros([ROWS_PADDED, BLOCK_C], tl.float32)
    bias_total = tl.zeros([ROWS_PADDED, BLOCK_P], tl.float32)
    if ROWS > 0:
        inside = (r < ROWS)[:, None] & (c < C)[None, :]
        m = tl.load(matrix + COLUMN + rows[:, None] * COLUMNS + c[None, :], mask=inside, other=0.0).to(element)
        ahead = _seen_gradient(grad_seen, grad_a, group, N, r, HS, WS, L, LEVEL, BLOCK_P)
    # Tiles that no product takes are loaded ahead only if the loop says so.
    AHEAD: tl.constexpr = STAGES if slope is not None and LAYOUT == CHANNELS_LAST else None
    for counted in tl.range(group, N * blocks_p, groups, num_stages=AHEAD):
        item = 0 * group + counted  # the interpreter counts in Python
        # The last image first: it was read last, and may still be in the cache.
        image = (N - 1 - item // blocks_p).to(tl.int64)
        p = item % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
        at = image * (C * P)
        if ROWS > 0:
            bias_total += ahead
            seen = ahead.to(element)
            # Loaded an item ahead, in registers: as an operand it would be read in fp32 from shared memory, twice.
            ahead = _seen_gradient(grad_seen, grad_a, item + groups, N, r, HS, WS, L, LEVEL, BLOCK_P)
        if parts is not None:
            if ROWS > 0:
                x = load_centred(feature + at, mean, c[None, :], p[:, None], P, C, LAYOUT, COLUMN, EXACT)
                total = tl.dot(seen, x, total, input_precision="ieee")
        if grad_feature is not None:
            if grad_blend is not None:
                grad = tl.trans(
                    through_the_blend(
                        grad_blend + image * (C * number(HS, 0) * number(WS, 0)), gates + image * pixel_size, c, p,
                        number(HS, 0), number(WS, 0), number(HS, 1 % L), number(WS, 1 % L), number(REACH_Y, 0),
                        number(REACH_X, 0), LEVEL, C, FINE_LAYOUT, NEAREST,
                    )
                )  # fmt: skip
            else:
                w = tl.load(gates + image * pixel_size + p, mask=p < P, other=0.0)
                w *= tl.load(remaining + image * pixel_size + p, mask=p < P, other=0.0)
                grad = tl.load(grad_average + image * COLUMNS + c, mask=c < C, other=0.0)[None, :] * w[:, None]
            if ROWS > 0:
                grad = tl.dot(tl.trans(seen), m, grad, input_precision="ieee")
            if slope is not None:
                x = load_centred(feature + at, mean, c[None, :], p[:, None], P, C, LAYOUT, COLUMN, True)
                grad += x * tl.load(slope + COLUMN + c, mask=c < C, other=0.0)[None, :]
                grad += tl.load(offset + COLUMN + c, mask=c < C, other=0.0)[None, :]
            out = grad_feature + at + offsets_in_image(c[None, :], p[:, None], P, C, LAYOUT)
            tl.store(out, grad.to(grad_feature.dtype.element_ty), mask=(c < C)[None, :] & (p < P)[:, None])
    if parts is not None:
        if ROWS > 0:
            part = parts + group * (ROWS * (C + 1)) + r.to(tl.int64) * (C + 1)
            tl.store(part[:, None] + c[None, :], total, mask=(r < ROWS)[:, None] & (c < C)[None, :])
            if program % BLOCKS_C == 0:
                tl.store(part + C, tl.sum(bias_total, axis=1), mask=r < ROWS)


@triton.jit(do_not_specialize=["N"])
def feature_gradient_kernel(
    features,
    mean_ptr,  # (COLUMNS,), or None
    slope_ptr,  # (COLUMNS,), or None
    offset_ptr,
    matrix_ptr,  # (18 G, COLUMNS) in the features' dtype, or None without gates
    gate_ptr,  # (N, pixels of all levels)
    remaining_ptr,  # the same
    grad_average_ptr,  # (N, COLUMNS), or None for a blend
    grad_blend_ptr,  # (N, C, P) of the finer of two levels, as it; or None for averages
    grad_seen_ptr,  # (N, what the finer gates' taps see), or None without gates
    grad_a_ptr,  # (N, pixels of all levels)
    grad_features,  # as the features, or None
    parts_ptr,  # (groups, rows, C + 1) of each level, or None
    N,
    HS,  # of each level, `number`
    WS,
    GROUPS,  # at most, of each level
    REACH_Y,  # of each transition, and one more
    REACH_X,
    L: tl.constexpr,
    CS: tl.constexpr,
    LAYOUTS: tl.constexpr,
    COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    NEAREST: tl.constexpr,
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first = 0
    for i in tl.static_range(L):
        groups = groups_of(N, number(GROUPS, i), number(HS, i) * number(WS, i), BLOCK_P)
        end = first + groups * ((CS[i] + BLOCK_C - 1) // BLOCK_C)
        if (tl.program_id(0) >= first) & (tl.program_id(0) < end):
            parts = parts_ptr
            if parts_ptr is not None:
                parts = parts_ptr + parts_before(GROUPS, i, ROWS, CS)
            grad_seen = grad_seen_ptr
            grad_a = grad_a_ptr
            if L > 1:
                grad_seen = grad_seen_ptr + seen_before(HS, WS, i)
                grad_a = grad_a_ptr + pixels_before(HS, WS, i)
            gates = gate_ptr
            remaining = remaining_ptr
            grad_average = grad_average_ptr
            if grad_blend_ptr is None:
                gates = gate_ptr + pixels_before(HS, WS, i)
                remaining = remaining_ptr + pixels_before(HS, WS, i)
                grad_average = grad_average_ptr + COLUMN[i]
            _feature_gradient(
                features[i], mean_ptr, slope_ptr, offset_ptr, matrix_ptr, gates, remaining, grad_average,
                grad_blend_ptr, grad_seen, grad_a, grad_features[i], parts, N,
                tl.program_id(0) - first, groups, HS, WS, REACH_Y, REACH_X,
                L, i, CS[i], LAYOUTS[i], LAYOUTS[0], COLUMN[i], COLUMNS, ROWS[i], ROWS_PADDED[i], EXACT,
                NEAREST, STAGES, BLOCK_P, BLOCK_C,
            )  # fmt: skip
        first = end


@triton.jit
def _sum_parts(
    parts, out, bias, groups, r, block,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row r of a level for a block of its columns, the bias after the channels."""
    c = block * BLOCK + tl.arange(0, BLOCK)
    g = tl.arange(0, 16)
    total = tl.zeros([16, BLOCK], tl.float32)
    for start in range(0, groups, 16):
        offsets = (start + g)[:, None].to(tl.int64) * (ROWS * (C + 1)) + r * (C + 1) + c[None, :]
        total += tl.load(parts + offsets, mask=(start + g < groups)[:, None] & (c <= C)[None, :], other=0.0)
    result = tl.sum(total, axis=0)
    tl.store(out + c, result, mask=c < C)
    tl.store(bias + 0 * c, result, mask=c == C)


@triton.jit(do_not_specialize=["N"])
def sum_parts_kernel(
    parts_ptr,
    grad_matrix_ptr,  # (18 G, COLUMNS), 0 where a row does not look at a level
    N,
    HS,
    WS,
    GROUPS,
    L: tl.constexpr,
    CS: tl.constexpr,
    COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for i in tl.static_range(L):
        if (tl.program_id(0) >= FIRST[i]) & (tl.program_id(0) < FIRST[i + 1]):
            r = (tl.program_id(0) - FIRST[i]) % ROWS[i]
            row = r
            if r >= 9 * i:
                row = r + 9 * (L - 1)
            out = grad_matrix_ptr + row.to(tl.int64) * COLUMNS
            _sum_parts(
                parts_ptr + parts_before(GROUPS, i, ROWS, CS), out + COLUMN[i], out + COLUMN[L] + i,
                groups_of(N, number(GROUPS, i), number(HS, i) * number(WS, i), BLOCK_P), r,
                (tl.program_id(0) - FIRST[i]) // ROWS[i], CS[i], ROWS[i], BLOCK,
            )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def norm_gradient_kernel(
    upstream_ptr,  # (N, COLUMNS), of the averages and of the sums of the weights
    average_ptr,  # (N, COLUMNS), these
    composite_ptr,  # (ROWS, COLUMNS), M
    grad_composite_ptr,  # (ROWS, COLUMNS), Σ ∂S (x - μ)ᵀ, replaced by ∂M; and Σ ∂S of each level
    rstd_ptr,  # (COLUMNS,)
    slope_ptr,  # (COLUMNS,), filled where there are channels
    offset_ptr,
    N,
    HS,
    WS,
    L: tl.constexpr,
    COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Slope and offset of each channel; a program takes a block of channels through all images and rows, in order."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < COLUMN[L]
    level = tl.zeros([BLOCK_C], tl.int32)
    pixels = tl.zeros([BLOCK_C], tl.int32) + number(HS, 0) * number(WS, 0)
    for i in tl.static_range(1, L):
        level = tl.where(c >= COLUMN[i], i, level)
        pixels = tl.where(c >= COLUMN[i], number(HS, i) * number(WS, i), pixels)
    beside = COLUMN[L] + level
    drift = tl.zeros([BLOCK, BLOCK_C], tl.float32)
    stretch = tl.zeros([BLOCK, BLOCK_C], tl.float32)
    rstd = tl.load(rstd_ptr + c, mask=inside, other=0.0)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        row = n[:, None].to(tl.int64) * COLUMNS
        mask = (n < N)[:, None] & inside[None, :]
        grad = tl.load(upstream_ptr + row + c[None, :], mask=mask, other=0.0)
        drift += grad * tl.load(average_ptr + row + beside[None, :], mask=mask, other=0.0)
        stretch += grad * tl.load(average_ptr + row + c[None, :], mask=mask, other=0.0)
    for start in range(0, ROWS, BLOCK):
        r = start + tl.arange(0, BLOCK)
        row = r[:, None].to(tl.int64) * COLUMNS
        mask = (r < ROWS)[:, None] & inside[None, :]
        m = tl.load(composite_ptr + row + c[None, :], mask=mask, other=0.0)
        grad = tl.load(grad_composite_ptr + row + c[None, :], mask=mask, other=0.0) * rstd[None, :]
        tl.store(grad_composite_ptr + row + c[None, :], grad, mask=mask)
        drift += m * tl.load(grad_composite_ptr + row + beside[None, :], mask=mask, other=0.0)
        stretch += m * grad
    share = rstd / (pixels.to(tl.float32) * N)
    tl.store(slope_ptr + c, -rstd * share * tl.sum(stretch, axis=0), mask=inside)
    tl.store(offset_ptr + c, -share * tl.sum(drift, axis=0), mask=inside)

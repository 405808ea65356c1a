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
from unikd_fast.kernels._pooled_device import load_centred, row_of


@triton.jit
def groups_of(N, LARGEST: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """The number of programs that share the pixels of a level."""
    return tl.minimum(N * ((P + BLOCK_P - 1) // BLOCK_P), LARGEST)


@triton.jit
def _seen_gradient(grad_seen, grad_a, r, p, LEVEL: tl.constexpr, GATES: tl.constexpr, H: tl.constexpr, W: tl.constexpr):
    """∂S at the pixels p, (rows, pixels): for the own gate's taps it is ∂a, shifted back."""
    P: tl.constexpr = H * W
    total = tl.zeros([r.shape[0], p.shape[0]], tl.float32)
    if LEVEL > 0:
        inside = (r < 9 * LEVEL)[:, None] & (p < P)[None, :]
        total += tl.load(grad_seen + r[:, None].to(tl.int64) * P + p[None, :], mask=inside, other=0.0)
    if LEVEL < GATES:
        tap = r - 9 * LEVEL
        y = (p // W)[None, :] - (tap // 3 - 1)[:, None]
        x = (p % W)[None, :] - (tap % 3 - 1)[:, None]
        inside = ((tap >= 0) & (tap < 9))[:, None] & (p < P)[None, :] & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        total += tl.load(grad_a + y * W + x, mask=inside, other=0.0)
    return total


@triton.jit
def _feature_gradient(
    feature, mean, slope, offset, matrix, gates, remaining, grad_average, grad_blend, grad_seen, grad_a, grad_feature,
    parts, N, program, groups,
    LEVEL: tl.constexpr, GATES: tl.constexpr, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    SC: tl.constexpr, SP: tl.constexpr, COLUMN: tl.constexpr, COLUMNS: tl.constexpr, PIXEL_SIZE: tl.constexpr,
    SEEN_SIZE: tl.constexpr, ROWS: tl.constexpr, ROWS_PADDED: tl.constexpr, EXACT: tl.constexpr,
    FINE_H: tl.constexpr, FINE_W: tl.constexpr, SMALL_H: tl.constexpr, SMALL_W: tl.constexpr,
    FINE_SC: tl.constexpr, FINE_SP: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr,
    REACH_Y: tl.constexpr, REACH_X: tl.constexpr, NEAREST: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = H * W
    BLOCKS_P: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    element = feature.dtype.element_ty
    if EXACT:
        element = tl.float32
    c = program % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)
    group = program // BLOCKS_C
    r = tl.arange(0, ROWS_PADDED)
    rows = row_of(r, LEVEL, GATES).to(tl.int64)
    total = tl.zeros([ROWS_PADDED, BLOCK_C], tl.float32)
    bias_total = tl.zeros([ROWS_PADDED], tl.float32)
    if ROWS > 0:
        inside = (r < ROWS)[:, None] & (c < C)[None, :]
        m = tl.load(matrix + COLUMN + rows[:, None] * COLUMNS + c[None, :], mask=inside, other=0.0)
        m_t = tl.trans(m).to(element)
    for item in range(group, N * BLOCKS_P, groups):
        image = (0 * group + item).to(tl.int64) // BLOCKS_P  # the interpreter counts in Python
        p = item % BLOCKS_P * BLOCK_P + tl.arange(0, BLOCK_P)
        at = image * (C * P)
        if ROWS > 0:
            seen = _seen_gradient(grad_seen + image * SEEN_SIZE, grad_a + image * PIXEL_SIZE, r, p, LEVEL, GATES, H, W)
            bias_total += tl.sum(seen, axis=1)
            seen = seen.to(element)
        if parts is not None:
            if ROWS > 0:
                x = load_centred(feature + at, mean, c, p, C, P, SC, SP, COLUMN, EXACT)
                total += tl.dot(seen, tl.trans(x), input_precision="ieee")
        if grad_feature is not None:
            if grad_blend is not None:
                grad = through_the_blend(
                    grad_blend + image * (C * FINE_H * FINE_W), gates + image * PIXEL_SIZE, c, p, LEVEL, C,
                    FINE_H, FINE_W, SMALL_H, SMALL_W, FINE_SC, FINE_SP, RY, RX, REACH_Y, REACH_X,
                    NEAREST,
                )  # fmt: skip
            else:
                w = tl.load(gates + image * PIXEL_SIZE + p, mask=p < P, other=0.0)
                w *= tl.load(remaining + image * PIXEL_SIZE + p, mask=p < P, other=0.0)
                grad = tl.load(grad_average + image * COLUMNS + c, mask=c < C, other=0.0)[:, None] * w[None, :]
            if ROWS > 0:
                grad += tl.dot(m_t, seen, input_precision="ieee")
            if slope is not None:
                x = load_centred(feature + at, mean, c, p, C, P, SC, SP, COLUMN, True)
                grad += x * tl.load(slope + COLUMN + c, mask=c < C, other=0.0)[:, None]
                grad += tl.load(offset + COLUMN + c, mask=c < C, other=0.0)[:, None]
            out = grad_feature + at + c[:, None].to(tl.int64) * SC + p[None, :].to(tl.int64) * SP
            tl.store(out, grad.to(grad_feature.dtype.element_ty), mask=(c < C)[:, None] & (p < P)[None, :])
    if parts is not None:
        if ROWS > 0:
            part = parts + group * (ROWS * (C + 1)) + r.to(tl.int64) * (C + 1)
            tl.store(part[:, None] + c[None, :], total, mask=(r < ROWS)[:, None] & (c < C)[None, :])
            if program % BLOCKS_C == 0:
                tl.store(part + C, bias_total, mask=r < ROWS)


@triton.jit(do_not_specialize=["N"])
def feature_gradient_kernel(
    features,
    mean_ptr,  # (COLUMNS,), or None
    slope_ptr,  # (COLUMNS,), or None
    offset_ptr,
    matrix_ptr,  # (18 G, COLUMNS) in the features' dtype, or None without gates
    gate_ptr,  # (N, PIXEL_SIZE)
    remaining_ptr,  # (N, PIXEL_SIZE)
    grad_average_ptr,  # (N, COLUMNS), or None for a blend
    grad_blend_ptr,  # (N, C, P) of the finer of two levels, as it; or None for averages
    grad_seen_ptr,  # (N, SEEN_SIZE), or None without gates
    grad_a_ptr,  # (N, PIXEL_SIZE), or None without gates
    grad_features,  # as the features, or None
    parts_ptr,  # (groups, rows, C + 1) of each level, or None
    N,
    L: tl.constexpr,
    HS: tl.constexpr,
    WS: tl.constexpr,
    CS: tl.constexpr,
    SCS: tl.constexpr,
    SPS: tl.constexpr,
    COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIXELS: tl.constexpr,
    PIXEL_SIZE: tl.constexpr,
    SEEN: tl.constexpr,
    SEEN_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    RYS: tl.constexpr,
    RXS: tl.constexpr,
    REACH_Y: tl.constexpr,
    REACH_X: tl.constexpr,
    NEAREST: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first = 0
    for i in tl.static_range(L):
        groups = groups_of(N, GROUPS[i], HS[i] * WS[i], BLOCK_P)
        end = first + groups * ((CS[i] + BLOCK_C - 1) // BLOCK_C)
        if (tl.program_id(0) >= first) & (tl.program_id(0) < end):
            parts = parts_ptr
            if parts_ptr is not None:
                parts = parts_ptr + PARTS[i]
            grad_seen = grad_seen_ptr
            grad_a = grad_a_ptr
            if L > 1:
                grad_seen = grad_seen_ptr + SEEN[i]
                grad_a = grad_a_ptr + PIXELS[i]
            gates = gate_ptr
            remaining = remaining_ptr
            grad_average = grad_average_ptr
            if grad_blend_ptr is None:
                gates = gate_ptr + PIXELS[i]
                remaining = remaining_ptr + PIXELS[i]
                grad_average = grad_average_ptr + COLUMN[i]
            _feature_gradient(
                features[i], mean_ptr, slope_ptr, offset_ptr, matrix_ptr, gates, remaining, grad_average,
                grad_blend_ptr, grad_seen, grad_a, grad_features[i], parts, N,
                tl.program_id(0) - first, groups,
                i, L - 1, HS[i], WS[i], CS[i], SCS[i], SPS[i], COLUMN[i], COLUMNS, PIXEL_SIZE, SEEN_SIZE,
                ROWS[i], ROWS_PADDED[i], EXACT, HS[0], WS[0], HS[1 % L], WS[1 % L], SCS[0], SPS[0],
                RYS[0], RXS[0], REACH_Y[0], REACH_X[0], NEAREST, BLOCK_P, BLOCK_C,
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
    L: tl.constexpr,
    PS: tl.constexpr,
    CS: tl.constexpr,
    COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
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
                parts_ptr + PARTS[i], out + COLUMN[i], out + COLUMN[L] + i,
                groups_of(N, GROUPS[i], PS[i], BLOCK_P), r, (tl.program_id(0) - FIRST[i]) // ROWS[i],
                CS[i], ROWS[i], BLOCK,
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
    L: tl.constexpr,
    PS: tl.constexpr,
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
    pixels = tl.full([BLOCK_C], PS[0], tl.int32)
    for i in tl.static_range(1, L):
        level = tl.where(c >= COLUMN[i], i, level)
        pixels = tl.where(c >= COLUMN[i], PS[i], pixels)
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

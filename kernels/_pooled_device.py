"""Device code of `pooled_fusion` that reads the features, all levels in one launch.

A level's feature is (N, C, P) with strides (C P, SC, SP). The composite matrix (18 G, COLUMNS) has the taps of the G
gates as rows, first those that look at Up(R), gate by gate, then those that look at the gate's own level; its columns
are the channels of all levels and then the expanders' biases, one a level. So level i is seen by the rows 0 .. 9i and,
if it has a gate, by nine more; `row_of` maps their running number to the row. From normalised features the kernels
subtract the channel's mean as they read; the scale is in the matrix and is applied to the result.
"""

import triton
import triton.language as tl


@triton.jit
def load_feature(ptr, c, p, C, P, SC: tl.constexpr, SP: tl.constexpr, EXACT: tl.constexpr):
    """A tile (channels, pixels), 0 outside."""
    offsets = c[:, None].to(tl.int64) * SC + p[None, :].to(tl.int64) * SP
    x = tl.load(ptr + offsets, mask=(c < C)[:, None] & (p < P)[None, :], other=0.0)
    if EXACT:
        x = x.to(tl.float32)
    return x


@triton.jit
def load_centred(ptr, mean, c, p, C, P, SC: tl.constexpr, SP: tl.constexpr, COLUMN: tl.constexpr, EXACT: tl.constexpr):
    """The same minus the channels' means, if given; pixels outside are then not 0."""
    x = load_feature(ptr, c, p, C, P, SC, SP, EXACT)
    if mean is not None:
        x = (x.to(tl.float32) - tl.load(mean + COLUMN + c, mask=c < C, other=0.0)[:, None]).to(x.dtype)
    return x


@triton.jit
def row_of(r, LEVEL: tl.constexpr, GATES: tl.constexpr):
    return tl.where(r < 9 * LEVEL, r, r + 9 * GATES)


@triton.jit
def _project(
    feature, mean, matrix, composite, seen, own, block,
    LEVEL: tl.constexpr, GATES: tl.constexpr, C: tl.constexpr, P: tl.constexpr, SC: tl.constexpr, SP: tl.constexpr,
    COLUMN: tl.constexpr, BIAS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, ROWS_PADDED: tl.constexpr,
    EXACT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    r = tl.arange(0, ROWS_PADDED)
    rows = row_of(r, LEVEL, GATES).to(tl.int64)
    total = tl.zeros([ROWS_PADDED, BLOCK_P], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        x = load_centred(feature, mean, c, p, C, P, SC, SP, COLUMN, EXACT)
        inside = (r < ROWS)[:, None] & (c < C)[None, :]
        m = tl.load(matrix + COLUMN + rows[:, None] * COLUMNS + c[None, :], mask=inside, other=0.0)
        total += tl.dot(m.to(x.dtype), x, input_precision="ieee")
    total += tl.load(composite + BIAS + rows * COLUMNS, mask=r < ROWS, other=0.0)[:, None]
    inside = (r < ROWS)[:, None] & (p < P)[None, :]
    if LEVEL > 0:
        out = seen + r[:, None].to(tl.int64) * P + p[None, :]
        tl.store(out, total, mask=inside & (r < 9 * LEVEL)[:, None])
    if LEVEL < GATES:
        out = own + (r - 9 * LEVEL)[:, None].to(tl.int64) * P + p[None, :]
        tl.store(out, total, mask=inside & (r >= 9 * LEVEL)[:, None])


@triton.jit
def project_kernel(
    features,  # of each level
    mean_ptr,  # (COLUMNS,), or None
    matrix_ptr,  # (18 G, COLUMNS) in the features' dtype
    composite_ptr,  # the same in fp32, for the biases
    seen_ptr,  # (N, SEEN_SIZE)
    own_ptr,  # (N, OWN_SIZE)
    L: tl.constexpr,
    CS: tl.constexpr,
    PS: tl.constexpr,
    SCS: tl.constexpr,
    SPS: tl.constexpr,
    COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
    SEEN: tl.constexpr,
    SEEN_SIZE: tl.constexpr,
    OWN: tl.constexpr,
    OWN_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    FIRST: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_PS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image = (tl.program_id(0) // FIRST[L]).to(tl.int64)
    # The coarse levels have few pixels and many channels: their programs take longest, and start first.
    block = FIRST[L] - 1 - tl.program_id(0) % FIRST[L]
    for i in tl.static_range(L):
        if (block >= FIRST[i]) & (block < FIRST[i + 1]):
            _project(
                features[i] + image * (CS[i] * PS[i]), mean_ptr, matrix_ptr, composite_ptr,
                seen_ptr + image * SEEN_SIZE + SEEN[i], own_ptr + image * OWN_SIZE + OWN[i], block - FIRST[i],
                i, L - 1, CS[i], PS[i], SCS[i], SPS[i], COLUMN[i], COLUMN[L] + i, COLUMNS, ROWS[i], ROWS_PADDED[i],
                EXACT, BLOCK_PS[i], BLOCK_C,
            )  # fmt: skip


@triton.jit
def _average(
    feature, mean, rstd, gates, remaining, average, mass, block,
    C: tl.constexpr, P: tl.constexpr, SC: tl.constexpr, SP: tl.constexpr, COLUMN: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    weights = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        w = tl.load(gates + p, mask=p < P, other=0.0) * tl.load(remaining + p, mask=p < P, other=0.0)
        x = load_centred(feature, mean, c, p, C, P, SC, SP, COLUMN, True)
        total += x * w[None, :]
        weights += w
    result = tl.sum(total, axis=1)
    if rstd is not None:
        result *= tl.load(rstd + COLUMN + c, mask=c < C, other=0.0)
    tl.store(average + c, result, mask=c < C)
    if block == 0:
        tl.store(mass, tl.sum(weights, axis=0))


@triton.jit(do_not_specialize=["N"])
def average_kernel(
    features,
    mean_ptr,  # (COLUMNS,), or None
    rstd_ptr,
    gate_ptr,  # (N, PIXEL_SIZE)
    remaining_ptr,  # (N, PIXEL_SIZE)
    average_ptr,  # (N, COLUMNS): the averages of all channels, and the sum of the weights of each level
    N,
    L: tl.constexpr,
    CS: tl.constexpr,
    PS: tl.constexpr,
    SCS: tl.constexpr,
    SPS: tl.constexpr,
    COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIXELS: tl.constexpr,
    PIXEL_SIZE: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_PS: tl.constexpr,
    BLOCK_CS: tl.constexpr,
):
    # The last image first: the projections read it last, and it may still be in the cache.
    image = (N - 1 - tl.program_id(0) // FIRST[L]).to(tl.int64)
    block = tl.program_id(0) % FIRST[L]
    for i in tl.static_range(L):
        if (block >= FIRST[i]) & (block < FIRST[i + 1]):
            at = image * PIXEL_SIZE + PIXELS[i]
            out = average_ptr + image * COLUMNS
            _average(
                features[i] + image * (CS[i] * PS[i]), mean_ptr, rstd_ptr, gate_ptr + at, remaining_ptr + at,
                out + COLUMN[i], out + COLUMN[L] + i, block - FIRST[i],
                CS[i], PS[i], SCS[i], SPS[i], COLUMN[i], BLOCK_PS[i], BLOCK_CS[i],
            )  # fmt: skip


@triton.jit
def _weight_gradient(
    feature, mean, grad_average, grad_mass, grad_weight, block,
    C: tl.constexpr, P: tl.constexpr, SC: tl.constexpr, SP: tl.constexpr, COLUMN: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        x = load_centred(feature, mean, c, p, C, P, SC, SP, COLUMN, True)
        total += x * tl.load(grad_average + c, mask=c < C, other=0.0)[:, None]
    tl.store(grad_weight + p, tl.sum(total, axis=0) + tl.load(grad_mass), mask=p < P)


@triton.jit
def weight_gradient_kernel(
    features,
    mean_ptr,  # (COLUMNS,), or None
    grad_average_ptr,  # (N, COLUMNS), of the averages before they are scaled
    grad_weight_ptr,  # (N, PIXEL_SIZE)
    L: tl.constexpr,
    CS: tl.constexpr,
    PS: tl.constexpr,
    SCS: tl.constexpr,
    SPS: tl.constexpr,
    COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIXELS: tl.constexpr,
    PIXEL_SIZE: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_PS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image = (tl.program_id(0) // FIRST[L]).to(tl.int64)
    block = FIRST[L] - 1 - tl.program_id(0) % FIRST[L]
    for i in tl.static_range(L):
        if (block >= FIRST[i]) & (block < FIRST[i + 1]):
            grad = grad_average_ptr + image * COLUMNS
            _weight_gradient(
                features[i] + image * (CS[i] * PS[i]), mean_ptr, grad + COLUMN[i], grad + COLUMN[L] + i,
                grad_weight_ptr + image * PIXEL_SIZE + PIXELS[i], block - FIRST[i],
                CS[i], PS[i], SCS[i], SPS[i], COLUMN[i], BLOCK_PS[i], BLOCK_C,
            )  # fmt: skip

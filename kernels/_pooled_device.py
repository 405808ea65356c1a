"""Device code of `pooled_fusion` that reads the features, all levels in one launch.

A level's feature is (N, C, P), channels last or contiguous (`_pooled_plan.layout_of`). Its height and width are
arguments of the launch, so that an image of another size runs the same code; channels are constants. The composite
matrix (18 G, COLUMNS) has the taps of the G gates as rows, first those that look at Up(R), gate by gate, then those
that look at the gate's own level; its columns are the channels of all levels and then the expanders' biases, one a
level. So level i is seen by the rows 0 .. 9i and, if it has a gate, by nine more; `row_of` maps their running number to
the row. From normalised features the kernels subtract the channel's mean as they read; the scale is in the matrix and
is applied to the result.
"""

import triton
import triton.language as tl

# Layouts. Of contiguous features 16 bytes are loaded at a time only if each channel begins at a multiple of them.
CHANNELS_LAST = tl.constexpr(0)
WHOLE_CHANNELS = tl.constexpr(1)
CONTIGUOUS = tl.constexpr(2)


@triton.jit
def number(numbers, AT: tl.constexpr):
    """One of the numbers of a tuple that `pixel_weights.varying` made."""
    return numbers[AT] // 2


@triton.jit
def within(position, SIZE):
    """0 <= position < SIZE, in one comparison: a negative number is large without its sign."""
    return position.to(tl.uint32, bitcast=True) < SIZE.to(tl.uint32, bitcast=True)


@triton.jit
def reciprocal_of(divisor):
    """What `quotient` takes: 2^31 / divisor, rounded up."""
    return 2147483647 // divisor + 1


@triton.jit
def quotient(n, reciprocal):
    """n // divisor in two instructions, exact for n * divisor < 2^31 (`pixel_weights.geometry` sees to it)."""
    return tl.umulhi(2 * n, reciprocal)


@triton.jit
def pixels_of(H, W, LAYOUT: tl.constexpr):
    """H W, which of whole channels the compiler is to know as a multiple of 8."""
    if LAYOUT == WHOLE_CHANNELS:
        return H * W // 8 * 8
    else:
        return H * W


@triton.jit
def pixels_before(HS, WS, LEVEL: tl.constexpr):
    """Where a level begins in a buffer of one map a level; of all levels, its size."""
    total = 0
    for i in tl.static_range(LEVEL):
        total += number(HS, i) * number(WS, i)
    return total


@triton.jit
def seen_before(HS, WS, LEVEL: tl.constexpr):
    """The same in what the finer gates' taps see, nine maps for each finer level."""
    total = 0
    for i in tl.static_range(1, LEVEL):
        total += 9 * i * number(HS, i) * number(WS, i)
    return total


@triton.jit
def offsets_in_image(c, p, P, C: tl.constexpr, LAYOUT: tl.constexpr):
    """Offsets of a tile in the feature of one image, which has fewer than 2^31 values.

    c and p are a column and a row, for a tile (channels, pixels), or the other way round.
    """
    if LAYOUT == CHANNELS_LAST:
        return c + p * C
    else:
        return c * P + p


@triton.jit
def load_feature(ptr, c, p, P, C: tl.constexpr, LAYOUT: tl.constexpr, EXACT: tl.constexpr):
    """A tile, 0 outside."""
    x = tl.load(ptr + offsets_in_image(c, p, P, C, LAYOUT), mask=(c < C) & (p < P), other=0.0)
    if EXACT:
        x = x.to(tl.float32)
    return x


@triton.jit
def load_centred(
    ptr, mean, c, p, P, C: tl.constexpr, LAYOUT: tl.constexpr, COLUMN: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """The same minus the channels' means, if given; pixels outside are then not 0."""
    x = load_feature(ptr, c, p, P, C, LAYOUT, EXACT)
    if mean is not None:
        x = (x.to(tl.float32) - tl.load(mean + COLUMN + c.to(tl.int64), mask=c < C, other=0.0)).to(x.dtype)
    return x


@triton.jit
def row_of(r, LEVEL: tl.constexpr, GATES: tl.constexpr):
    return tl.where(r < 9 * LEVEL, r, r + 9 * GATES)


@triton.jit
def _project(
    feature, mean, matrix, composite, seen, own, block, P,
    LEVEL: tl.constexpr, GATES: tl.constexpr, C: tl.constexpr, LAYOUT: tl.constexpr,
    COLUMN: tl.constexpr, BIAS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, ROWS_PADDED: tl.constexpr,
    EXACT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    r = tl.arange(0, ROWS_PADDED)
    rows = row_of(r, LEVEL, GATES).to(tl.int64)
    total = tl.zeros([ROWS_PADDED, BLOCK_P], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        x = load_centred(feature, mean, c[:, None], p[None, :], P, C, LAYOUT, COLUMN, EXACT)
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
def blocks_before(HS, WS, LEVEL: tl.constexpr, BLOCK_P: tl.constexpr):
    """The number of blocks of pixels of the levels before one."""
    total = 0
    for i in tl.static_range(LEVEL):
        total += tl.cdiv(number(HS, i) * number(WS, i), BLOCK_P)
    return total


@triton.jit
def project_kernel(
    features,  # of each level
    mean_ptr,  # (COLUMNS,), or None
    matrix_ptr,  # (18 G, COLUMNS) in the features' dtype
    composite_ptr,  # the same in fp32, for the biases
    seen_ptr,  # (N, what the finer gates' taps see)
    own_ptr,  # (N, what the own gate's taps see)
    HS,  # of each level, `number`
    WS,
    L: tl.constexpr,
    CS: tl.constexpr,
    LAYOUTS: tl.constexpr,
    COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks = blocks_before(HS, WS, L, BLOCK_P)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    # The coarse levels have few pixels and many channels: their programs take longest, and start first.
    block = blocks - 1 - tl.program_id(0) % blocks
    seen = seen_ptr + image * seen_before(HS, WS, L)
    own = own_ptr + image * (9 * pixels_before(HS, WS, L - 1))
    for i in tl.static_range(L):
        first = blocks_before(HS, WS, i, BLOCK_P)
        if (block >= first) & (block < blocks_before(HS, WS, i + 1, BLOCK_P)):
            P = pixels_of(number(HS, i), number(WS, i), LAYOUTS[i])
            _project(
                features[i] + image * (CS[i] * P), mean_ptr, matrix_ptr, composite_ptr,
                seen + seen_before(HS, WS, i), own + 9 * pixels_before(HS, WS, i), block - first, P,
                i, L - 1, CS[i], LAYOUTS[i], COLUMN[i], COLUMN[L] + i, COLUMNS, ROWS[i], ROWS_PADDED[i],
                EXACT, BLOCK_P, BLOCK_C,
            )  # fmt: skip


@triton.jit
def _average(
    feature, mean, rstd, gates, remaining, average, mass, block, P,
    C: tl.constexpr, LAYOUT: tl.constexpr, COLUMN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    weights = tl.zeros([BLOCK_P], tl.float32)
    for start in tl.range(0, P, BLOCK_P, num_stages=3):
        p = start + tl.arange(0, BLOCK_P)
        w = tl.load(gates + p, mask=p < P, other=0.0) * tl.load(remaining + p, mask=p < P, other=0.0)
        x = load_centred(feature, mean, c[:, None], p[None, :], P, C, LAYOUT, COLUMN, True)
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
    gate_ptr,  # (N, pixels of all levels)
    remaining_ptr,  # the same
    average_ptr,  # (N, COLUMNS): the averages of all channels, and the sum of the weights of each level
    N,
    HS,
    WS,
    L: tl.constexpr,
    CS: tl.constexpr,
    LAYOUTS: tl.constexpr,
    COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_CS: tl.constexpr,
):
    # The last image first: the projections read it last, and it may still be in the cache.
    image = (N - 1 - tl.program_id(0) // FIRST[L]).to(tl.int64)
    block = tl.program_id(0) % FIRST[L]
    out = average_ptr + image * COLUMNS
    for i in tl.static_range(L):
        if (block >= FIRST[i]) & (block < FIRST[i + 1]):
            P = pixels_of(number(HS, i), number(WS, i), LAYOUTS[i])
            at = image * pixels_before(HS, WS, L) + pixels_before(HS, WS, i)
            _average(
                features[i] + image * (CS[i] * P), mean_ptr, rstd_ptr, gate_ptr + at, remaining_ptr + at,
                out + COLUMN[i], out + COLUMN[L] + i, block - FIRST[i], P,
                CS[i], LAYOUTS[i], COLUMN[i], BLOCK_P, BLOCK_CS[i],
            )  # fmt: skip


@triton.jit
def _weight_gradient(
    feature, mean, grad_average, grad_mass, grad_weight, block, P,
    C: tl.constexpr, LAYOUT: tl.constexpr, COLUMN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for start in tl.range(0, C, BLOCK_C, num_stages=3):
        c = start + tl.arange(0, BLOCK_C)
        x = load_centred(feature, mean, c[:, None], p[None, :], P, C, LAYOUT, COLUMN, True)
        total += x * tl.load(grad_average + c, mask=c < C, other=0.0)[:, None]
    tl.store(grad_weight + p, tl.sum(total, axis=0) + tl.load(grad_mass), mask=p < P)


@triton.jit
def weight_gradient_kernel(
    features,
    mean_ptr,  # (COLUMNS,), or None
    grad_average_ptr,  # (N, COLUMNS), of the averages before they are scaled
    grad_weight_ptr,  # (N, pixels of all levels)
    HS,
    WS,
    L: tl.constexpr,
    CS: tl.constexpr,
    LAYOUTS: tl.constexpr,
    COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks = blocks_before(HS, WS, L, BLOCK_P)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    block = blocks - 1 - tl.program_id(0) % blocks
    grad = grad_average_ptr + image * COLUMNS
    for i in tl.static_range(L):
        first = blocks_before(HS, WS, i, BLOCK_P)
        if (block >= first) & (block < blocks_before(HS, WS, i + 1, BLOCK_P)):
            P = pixels_of(number(HS, i), number(WS, i), LAYOUTS[i])
            _weight_gradient(
                features[i] + image * (CS[i] * P), mean_ptr, grad + COLUMN[i], grad + COLUMN[L] + i,
                grad_weight_ptr + image * pixels_before(HS, WS, L) + pixels_before(HS, WS, i), block - first, P,
                CS[i], LAYOUTS[i], COLUMN[i], BLOCK_P, BLOCK_C,
            )  # fmt: skip

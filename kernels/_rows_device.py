"""Device functions of rows: their tiles, loads, stores, moments, and sums over programs. Everything is fp32.

A tile holds whole rows, (ROWS, BLOCK_K), with sums (ROWS, 1), or a block of one row, (LANES, LANE), with sums (1, 1).
Of class maps, whose rows are pixels side by side, it holds a block of the classes of neighbours, (ROWS, BLOCK_K).
"""

import triton
import triton.language as tl

# A maximum before there is one, and what stands past the last class: a difference of two is 0, that of two -inf NaN. A
# row without a logit above it gives NaN.
LOWEST = tl.constexpr(-1e36)


@triton.jit
def scalar(value, IS_POINTER: tl.constexpr):
    """A number, passed by value or in a 0-d tensor."""
    if IS_POINTER:
        return tl.load(value).to(tl.float32)
    else:
        return value


@triton.jit
def labelled_rows(labels_ptr, N, ignore_index):
    """The number of rows with a label, at least 1."""
    count = 0
    for start in range(0, N, 1024):
        at = start + tl.arange(0, 1024)
        # Pad with 0: -100 would wrap around in small integer types.
        label = tl.load(labels_ptr + at, mask=at < N, other=0).to(tl.int64)
        count += tl.sum(((at < N) & (label != ignore_index)).to(tl.int32), axis=0)
    return tl.maximum(count, 1).to(tl.float32)


@triton.jit
def row_pointers(ptr, rows, stride: tl.constexpr):
    """Pointers (ROWS, 1). The product is taken in 64 bits: N K may exceed 2^31."""
    return ptr + rows[:, None].to(tl.int64) * stride


@triton.jit
def tile_count(N, inner, ROWS: tl.constexpr, PIXELS: tl.constexpr):
    """The number of tiles of N rows, and of rows on the inner axis: of pixels it comes divided by PIXELS.

    So the compiler sees what divides it, and that a mask is the same for neighbours: then they are loaded together.
    """
    if PIXELS > 0:
        return N // (inner * PIXELS) * tl.cdiv(inner * PIXELS, ROWS), inner * PIXELS
    else:
        return tl.cdiv(N, ROWS), inner


@triton.jit
def tile_rows(tile, N, inner, ROWS: tl.constexpr, PIXELS: tl.constexpr):
    """The rows of a tile, (ROWS,), whether they exist, and where they are on both axes (`on_axes`).

    Pixels of one image alone, or the compiler would not see that they lie side by side.
    """
    if PIXELS > 0:
        tiles = tl.cdiv(inner, ROWS)
        pixels = tile % tiles * ROWS + tl.arange(0, ROWS)
        image = tile // tiles + tl.zeros([ROWS], tl.int32)
        rows = image * inner + pixels
        return rows, pixels < inner, (rows, image, pixels)
    else:
        rows = tile * ROWS + tl.arange(0, ROWS)
        return rows, rows < N, on_axes(rows, inner)


@triton.jit
def on_axes(rows, inner):
    """Rows, (ROWS,), and where they are on the outer and on the inner of two axes (`_launch.Rows`)."""
    return rows, rows // inner, rows % inner


@triton.jit
def logit_pointers(ptr, at, outer_stride, stride: tl.constexpr):
    """Pointers (ROWS, 1) to rows of logits, `at` as `on_axes` has it; outer_stride is None if there is one axis."""
    rows, outer, within = at
    if outer_stride is None:
        return row_pointers(ptr, rows, stride)
    else:
        return ptr + (outer[:, None].to(tl.int64) * outer_stride + within[:, None].to(tl.int64) * stride)


@triton.jit
def gradient_pointers(ptr, at, outer_stride, stride: tl.constexpr, K: tl.constexpr, STRIDED: tl.constexpr):
    """Pointers (ROWS, 1) to rows of a gradient: with the strides of the logits if STRIDED, else dense."""
    if ptr is None:
        return None
    elif STRIDED:
        return logit_pointers(ptr, at, outer_stride, stride)
    else:
        return row_pointers(ptr, at[0], K)


@triton.jit
def col_pointers(row_ptrs, cols, stride: tl.constexpr):
    if stride == 1 and cols.shape[1] > 1:
        return row_ptrs + cols
    else:
        return row_ptrs + cols.to(tl.int64) * stride


@triton.jit
def tile_pointers(row_ptrs, cols, stride: tl.constexpr):
    return col_pointers(row_ptrs, cols[None, :], stride)


@triton.jit
def load_logits(row_ptrs, cols, live, stride: tl.constexpr, K: tl.constexpr):
    """Logits (ROWS, BLOCK_K) in fp32, -inf past the last class, 0 in rows that are not live."""
    inside = (cols < K)[None, :]
    ptrs = tile_pointers(row_ptrs, cols, stride)
    x = tl.load(ptrs, mask=live[:, None] & inside, other=0).to(tl.float32)
    return tl.where(inside, x, -float("inf"))


@triton.jit
def load_tile(row_ptrs, cols, live, stride: tl.constexpr, PADDED: tl.constexpr, K: tl.constexpr):
    """Logits at the classes of a tile (`tile_cols`), in fp32; LOWEST past the last class if PADDED."""
    ptrs = col_pointers(row_ptrs, cols, stride)
    if not PADDED:
        return tl.load(ptrs, mask=live[:, None], other=0).to(tl.float32)
    inside = cols < K
    if ptrs.dtype.element_ty == tl.bfloat16 or ptrs.dtype.element_ty == tl.float32:
        return tl.load(ptrs, mask=live[:, None] & inside, other=LOWEST).to(tl.float32)
    return tl.where(inside, tl.load(ptrs, mask=live[:, None] & inside, other=0).to(tl.float32), LOWEST)


@triton.jit
def tile_cols(block, BLOCK_K: tl.constexpr, LANE: tl.constexpr, SINGLE: tl.constexpr):
    """Classes of a tile: (1, BLOCK_K) of its rows, or those of a block, (LANES, LANE), neighbours in one lane."""
    if SINGLE:
        return block * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    else:
        lanes = tl.arange(0, BLOCK_K // LANE)[:, None] * LANE
        return block * BLOCK_K + lanes + tl.arange(0, LANE)[None, :]


@triton.jit
def tile_sum(x, SINGLE: tl.constexpr):
    """Sum over the classes of a tile as `tile_cols` has them, (ROWS, 1)."""
    if SINGLE:
        return row_sum(x)
    else:
        return tl.sum(row_sum(x), axis=0)[:, None]


@triton.jit
def added(total, x, ONLY: tl.constexpr):
    """The tile that sums the tiles of a row, with one more: the only one as it is, of pixels its sum over classes."""
    if ONLY:
        return x
    elif total.shape[1] < x.shape[1]:
        return total + row_sum(x)
    else:
        return total + x


@triton.jit
def store_cols(row_ptrs, cols, live, x, stride: tl.constexpr, PADDED: tl.constexpr, K: tl.constexpr):
    ptrs = col_pointers(row_ptrs, cols, stride)
    mask = live[:, None]
    if PADDED:
        mask = mask & (cols < K)
    tl.store(ptrs, x.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def without_class(x, cols, excluded):
    """A tile of logits with LOWEST for the excluded class of each row, (ROWS, 1), or as it is, for None."""
    if excluded is None:
        return x
    else:
        return tl.where(cols == excluded, LOWEST, x)


@triton.jit
def teacher_scale(scale_ptr, rows, live, ROWS: tl.constexpr):
    """Scales (ROWS, 1) of teacher rows, 1 unless stored; a constant row's is 0, under which nothing would be lower."""
    if scale_ptr is None:
        return tl.full([ROWS, 1], 1.0, tl.float32)
    else:
        return tl.maximum(tl.load(scale_ptr + rows, mask=live, other=1.0).to(tl.float32)[:, None], 1e-30)


@triton.jit
def store_class(row_ptrs, col, live, x, stride: tl.constexpr):
    """Store one class, (1, 1), after the row was stored, also by other threads."""
    tl.debug_barrier()
    ptrs = col_pointers(row_ptrs, col, stride)
    tl.store(ptrs, x.to(ptrs.dtype.element_ty), mask=live[:, None])


@triton.jit
def add_to_class(row_ptrs, which, live, x, stride: tl.constexpr):
    """Add x, (ROWS, 1), to one stored class of each pixel: that of `which`, 1 + the class; 0 is none."""
    tl.debug_barrier()
    ptrs = col_pointers(row_ptrs, which - 1, stride)
    mask = live[:, None] & (which > 0)
    tl.store(ptrs, (tl.load(ptrs, mask=mask, other=0).to(tl.float32) + x).to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def store_tile(row_ptrs, cols, live, x, K: tl.constexpr):
    ptrs = row_ptrs + cols[None, :]
    tl.store(ptrs, x.to(ptrs.dtype.element_ty), mask=live[:, None] & (cols < K)[None, :])


@triton.jit
def row_sum(x):
    return tl.sum(x, axis=1)[:, None]


@triton.jit
def mean_std(
    ptrs, live, scale, COUNT: tl.constexpr, COL: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Mean (before the scale) and standard deviation (after it) of each row; its squares are divided by COUNT."""
    SINGLE: tl.constexpr = K <= BLOCK_K
    POWER: tl.constexpr = triton.next_power_of_2(K)
    # Distances from the first element: in a constant row each is 0, and so is the deviation. In a unit that rounds
    # nothing and in which their sum does not leave the range.
    first = tl.load(ptrs, mask=live[:, None], other=0).to(tl.float32)
    distance = tl.zeros([ROWS, BLOCK_K], tl.float32)
    size = distance
    x = distance
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        x = tl.where((cols < K)[None, :], load_logits(ptrs, cols, live, COL, K), first)
        distance = added(distance, x * (0.5 / POWER) - first * (0.5 / POWER), SINGLE)
        size = tl.abs(x) if SINGLE else tl.maximum(size, tl.abs(x))
    mean = 2.0 * (0.5 * first + row_sum(distance) * (POWER / K))
    largest = tl.max(size, axis=1)[:, None]
    # In units of the power of two below the largest, which rounds nothing, no square leaves the range.
    exponent = tl.minimum(tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 1), 253)
    unit = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    total = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        if not SINGLE:
            x = load_logits(ptrs, cols, live, COL, K)
        away = x * inverse - mean * inverse
        total = added(total, tl.where((cols < K)[None, :], away * away, 0.0), SINGLE)
    total = row_sum(total)
    # Once a row, and squares and differences of what is divided by it follow: rounded, not approximate.
    return mean, scale * unit * tl.sqrt_rn(tl.div_rn(total, tl.full([ROWS, 1], COUNT, tl.float32)))


@triton.jit
def standardization_share(dot, std, K: tl.constexpr):
    """The factor of z' that standardisation subtracts from the gradient of z', where dot is Σ gradient z'.

    The mean subtracts nothing from a gradient that sums to 0, the deviation this share; in a constant row it is 0.
    """
    return tl.where(std == 0, 0.0, dot / ((K - 1) * tl.where(std == 0, 1.0, std)))


@triton.jit
def block_sum(x):
    """The sum of a (ROWS, 1) column."""
    return tl.sum(tl.sum(x, axis=1), axis=0)


@triton.jit
def last_to_arrive(partial_ptr, SUMS: tl.constexpr):
    """Whether this program is the last of the launch; if so, it sees all that the others stored before.

    It takes an integer ticket, stored after the partial sums and 0 at the start. It is not a lock: no program waits.
    """
    tl.debug_barrier()
    ticket_ptr = (partial_ptr + SUMS).to(tl.pointer_type(tl.int32), bitcast=True)
    return tl.atomic_add(ticket_ptr, 1) == tl.num_programs(0) - 1


@triton.jit
def sum_of_partials(partial_ptr):
    """Sum over programs in a fixed order, bypassing the L1 cache, which may be older than other programs' stores.

    512 at a time, or they would take more registers of a single warp than all else.
    """
    at = tl.arange(0, 512)
    total = tl.zeros([512], tl.float32)
    for start in range(0, tl.num_programs(0), 512):
        mask = start + at < tl.num_programs(0)
        total += tl.load(partial_ptr + start + at, mask=mask, other=0.0, cache_modifier=".cg")
    return tl.sum(total, axis=0)


@triton.jit
def store_total(loss_ptr, partial_ptr, accumulated, MAX_PROGRAMS: tl.constexpr):
    """Let the last program store the sum over programs of what each has accumulated."""
    tl.store(partial_ptr + tl.program_id(0), accumulated)
    if last_to_arrive(partial_ptr, MAX_PROGRAMS):
        tl.store(loss_ptr, sum_of_partials(partial_ptr))


@triton.jit
def added_losses(accumulated, loss_ptr, losses, rows, inside, PER_ROW: tl.constexpr):
    """What a program has accumulated, with the losses (ROWS, 1) of a tile; if PER_ROW they are stored instead."""
    if PER_ROW:
        tl.store(row_pointers(loss_ptr, rows, 1), losses, mask=inside[:, None])
        return accumulated
    else:
        return accumulated + block_sum(losses)


@triton.jit
def times_upstream(weight, upstream_ptr, rows, inside, PER_ROW: tl.constexpr, ROWS: tl.constexpr):
    """The factor of each row's gradient (ROWS, 1): weight, times the upstream gradient if it is given."""
    factor = tl.full([ROWS, 1], 1.0, tl.float32) * weight
    if upstream_ptr is not None:
        if PER_ROW:
            factor *= tl.load(upstream_ptr + rows, mask=inside, other=0.0).to(tl.float32)[:, None]
        else:
            factor *= tl.load(upstream_ptr).to(tl.float32)
    return factor

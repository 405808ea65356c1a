"""Device functions that the loss kernels share. Everything is fp32.

A tile holds whole rows, (ROWS, BLOCK_K), with sums (ROWS, 1), or a block of one row, (LANES, LANE), with sums (1, 1).
Letters as in `reference`: p the teacher's and q the student's probabilities, φ(u) = eᵘ - 1 - u.
"""

import triton
import triton.language as tl

FORWARD = tl.constexpr(0)
REVERSE = tl.constexpr(1)
JSD = tl.constexpr(2)

LN2 = tl.constexpr(0.6931471805599453)
# A maximum before there is one, and what stands past the last class: a difference of two is 0, that of two -inf NaN. A
# row without a logit above it gives NaN.
LOWEST = tl.constexpr(-1e36)
# Below, the error of a row's divergence, some ε, is too much.
CLOSE_BELOW = tl.constexpr(2.0**-6)
CLOSE_BELOW_LOGS = tl.constexpr(2.0**-5)  # of sums of p ln(p / m), to whose error each logarithm adds its own
# A class has more than half of a distribution if Σ exp(z - max z) is below.
DOMINANT_SUM = tl.constexpr(2.0)
SMALLEST = tl.constexpr(2.0**-126)


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
def logit_pointers(ptr, rows, inner, outer_stride, stride: tl.constexpr):
    """Pointers (ROWS, 1) to rows of logits on two axes (`_launch.Rows`), or on one: outer_stride is None."""
    if outer_stride is None:
        return row_pointers(ptr, rows, stride)
    else:
        outer = (rows // inner)[:, None].to(tl.int64) * outer_stride
        return ptr + (outer + (rows % inner)[:, None].to(tl.int64) * stride)


@triton.jit
def tile_pointers(row_ptrs, cols, stride: tl.constexpr):
    if stride == 1:
        return row_ptrs + cols[None, :]
    else:
        return row_ptrs + cols[None, :].to(tl.int64) * stride


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
    if stride == 1:
        ptrs = row_ptrs + cols
    else:
        ptrs = row_ptrs + cols.to(tl.int64) * stride
    if not PADDED:
        return tl.load(ptrs, mask=live[:, None], other=0).to(tl.float32)
    inside = cols < K
    if ptrs.dtype.element_ty == tl.bfloat16 or ptrs.dtype.element_ty == tl.float32:
        return tl.load(ptrs, mask=live[:, None] & inside, other=LOWEST).to(tl.float32)
    return tl.where(inside, tl.load(ptrs, mask=live[:, None] & inside, other=0).to(tl.float32), LOWEST)


@triton.jit
def tile_cols(block, BLOCK_K: tl.constexpr, LANE: tl.constexpr, SINGLE: tl.constexpr):
    """Classes of a tile: all of them, (1, BLOCK_K), or those of a block, (LANES, LANE), neighbours in one lane."""
    if SINGLE:
        return tl.arange(0, BLOCK_K)[None, :]
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
def added(total, x, SINGLE: tl.constexpr):
    """The tile that sums the tiles of a row, with one more; the only one as it is."""
    if SINGLE:
        return x
    else:
        return total + x


@triton.jit
def store_cols(row_ptrs, cols, live, x, PADDED: tl.constexpr, K: tl.constexpr):
    ptrs = row_ptrs + cols
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
def total_of(sums, largest):
    """The sum of a row, or NaN if there is nothing in it: then what stands past the last class would be counted."""
    return tl.where(largest > LOWEST, sums, float("nan"))


@triton.jit
def stored_scale(scale_ptr, rows, live):
    """Scales (ROWS, 1) of stored teacher rows; a constant row has 0, under which nothing would be lower than it."""
    return tl.maximum(tl.load(scale_ptr + rows, mask=live, other=1.0).to(tl.float32)[:, None], 1e-30)


@triton.jit
def exponents(x, factor, largest):
    """factor (x - largest): exactly 0 at the largest, of whatever size it is."""
    return (x - largest) * factor


@triton.jit
def lane_sum(total, top, new, x, factor):
    """Σ 2^(factor (x - top)) of each lane, (LANES, 1), for a new maximum and with x, (LANES, LANE)."""
    return total * tl.exp2((top - new) * factor) + row_sum(tl.exp2(exponents(x, factor, new)))


@triton.jit
def lane_sums(
    student_rows, teacher_rows, live, l_s, l_t, excluded,
    STUDENT_COL: tl.constexpr, TEACHER_COL: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """Maxima of each lane of a row in blocks, and Σ 2^(l (z - maximum)): the student's, and the teacher's."""
    max_s = tl.full([BLOCK_K // LANE, 1], LOWEST, tl.float32)
    max_t = max_s
    sum_s = tl.zeros([BLOCK_K // LANE, 1], tl.float32)
    sum_t = sum_s
    for i in range((K + BLOCK_K - 1) // BLOCK_K):
        cols = tile_cols(i, BLOCK_K, LANE, False)
        s = load_tile(student_rows, cols, live, STUDENT_COL, K % BLOCK_K != 0, K)
        t = load_tile(teacher_rows, cols, live, TEACHER_COL, K % BLOCK_K != 0, K)
        s = without_class(s, cols, excluded)
        t = without_class(t, cols, excluded)
        new_s = tl.maximum(max_s, tl.max(s, axis=1)[:, None])
        new_t = tl.maximum(max_t, tl.max(t, axis=1)[:, None])
        sum_s = lane_sum(sum_s, max_s, new_s, s, l_s)
        sum_t = lane_sum(sum_t, max_t, new_t, t, l_t)
        max_s = new_s
        max_t = new_t
    return max_s, sum_s, max_t, sum_t


@triton.jit
def join_lanes(top, total, factor):
    """The maximum of all lanes, (1, 1), the sums with respect to it, (LANES, 1), and their sum, (1, 1)."""
    largest = tl.max(top, axis=0)[:, None]
    total = total * tl.exp2((top - largest) * factor)
    return largest, total, total_of(tl.sum(total, axis=0)[:, None], largest)


@triton.jit
def is_close(divergence, live, below: tl.constexpr, CARE: tl.constexpr):
    """Whether the divergence of a live row, (ROWS, 1), is too small to be accurate, or not finite."""
    if CARE == 0:
        return False
    elif CARE == 2:
        return True
    else:
        accurate = (divergence >= below) & (divergence < float("inf"))
        return tl.max(tl.where(live[:, None] & (accurate == 0), 1, 0)) > 0


@triton.jit
def has_dominant_class(sum_t, live):
    """Whether a class has most of the teacher's probability in a row: then q - p cancels there."""
    return tl.min(tl.where(live[:, None], sum_t, DOMINANT_SUM)) < DOMINANT_SUM


@triton.jit
def change(p, q, log_ratio, CARE: tl.constexpr):
    """q - p; log_ratio is log2(q / p)."""
    if CARE == 2:  # few classes: what one gains, another loses
        u = log_ratio * LN2
        return tl.where(tl.abs(u) < 0.5, p * (u + phi_near(u)), q - p)
    else:
        return q - p


@triton.jit
def without_cancellation(moved, p):
    """q - p of rows, (ROWS, BLOCK_K), that sum to 0: what they sum to is rounding, of p and q each in proportion."""
    return moved - p * row_sum(moved)


@triton.jit
def dominant_class(
    student_rows, teacher_rows, live, excluded, l_s, l_t, lanes, max_s, max_t, sums_s, sums_t, r_s, r_t,
    STUDENT_COL: tl.constexpr, TEACHER_COL: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """The dominant class of a row in blocks, its q - p, (1, 1), and its p: q - p is minus the sum over the others.

    The lane that holds the class, known by its maximum in `lanes`, has lost the digits of the others: it is summed
    again.
    """
    BLOCKS: tl.constexpr = triton.next_power_of_2((K + BLOCK_K - 1) // BLOCK_K)
    of_lane = tl.arange(0, BLOCK_K // LANE)[:, None]
    lane = tl.min(tl.where(lanes == max_t, of_lane, BLOCK_K // LANE - 1))
    cols = tl.arange(0, BLOCKS)[:, None] * BLOCK_K + (lane * LANE + tl.arange(0, LANE)[None, :])
    s = without_class(load_tile(student_rows, cols, live, STUDENT_COL, True, K), cols, excluded)
    t = without_class(load_tile(teacher_rows, cols, live, TEACHER_COL, True, K), cols, excluded)
    e_s = tl.exp2(exponents(s, l_s, max_s))
    e_t = tl.exp2(exponents(t, l_t, max_t))
    top = t == max_t  # one alone, or the sum would be 2
    others_s = tl.sum(tl.where(of_lane == lane, 0.0, sums_s)) + tl.sum(tl.where(top, 0.0, e_s))
    others_t = tl.sum(tl.where(of_lane == lane, 0.0, sums_t)) + tl.sum(tl.where(top, 0.0, e_t))
    moved = others_t * r_t - others_s * r_s
    col = tl.max(tl.max(tl.where(top, cols, 0), axis=1), axis=0) + tl.zeros([1, 1], tl.int64)
    return col, moved, tl.sum(tl.where(top, e_t, 0.0)) * r_t


@triton.jit
def store_class(row_ptrs, col, live, x):
    """Store one class, (1, 1), after the row was stored, also by other threads."""
    tl.debug_barrier()
    ptrs = row_ptrs + col
    tl.store(ptrs, x.to(ptrs.dtype.element_ty), mask=live[:, None])


@triton.jit
def close_kl(
    student_rows, teacher_rows, live, excluded, l_s, l_t, max_s, max_t, r_s, r_t, log_ratio,
    STUDENT_COL: tl.constexpr, TEACHER_COL: tl.constexpr, K: tl.constexpr, SINGLE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """KL(p || q) of rows (ROWS, 1), summed without cancellation."""
    HEIGHT: tl.constexpr = ROWS if SINGLE else BLOCK_K // LANE
    terms = tl.zeros([HEIGHT, BLOCK_K if SINGLE else LANE], tl.float32)
    shift = terms
    for i in range((K + BLOCK_K - 1) // BLOCK_K):
        cols = tile_cols(i, BLOCK_K, LANE, SINGLE)
        s = load_tile(student_rows, cols, live, STUDENT_COL, K % BLOCK_K != 0, K)
        t = load_tile(teacher_rows, cols, live, TEACHER_COL, K % BLOCK_K != 0, K)
        d_s = exponents(without_class(s, cols, excluded), l_s, max_s)
        d_t = exponents(without_class(t, cols, excluded), l_t, max_t)
        q, p, u = close_probabilities(d_s, d_t, r_s, r_t, log_ratio)
        terms = added(terms, kl_terms(p, q, u), SINGLE)
        shift = added(shift, shift_terms(p, q, u), SINGLE)
    return without_shift(tile_sum(terms, SINGLE), tile_sum(shift, SINGLE), 0.0, FORWARD)


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
    mean = tl.zeros([ROWS, 1], tl.float32)
    largest = tl.zeros([ROWS, 1], tl.float32)
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        x = tl.where((cols < K)[None, :], load_logits(ptrs, cols, live, COL, K), 0.0)
        mean += row_sum(x * (1.0 / K))
        largest = tl.maximum(largest, tl.max(tl.abs(x), axis=1)[:, None])
    # In units of the power of two below the largest, which rounds nothing, no square leaves the range.
    exponent = tl.minimum(tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 1), 253)
    unit = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    total = tl.zeros([ROWS, 1], tl.float32)
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        x = load_logits(ptrs, cols, live, COL, K) * inverse - mean * inverse
        total += row_sum(tl.where((cols < K)[None, :], x * x, 0.0))
    # Once a row, and squares and differences of what is divided by it follow: rounded, not approximate.
    return mean, scale * unit * tl.sqrt_rn(tl.div_rn(total, tl.full([ROWS, 1], COUNT, tl.float32)))


@triton.jit
def standardization_share(dot, std, K: tl.constexpr):
    """The factor of z' that standardisation subtracts from the gradient of z', where dot is Σ gradient z'.

    The mean subtracts nothing from a gradient that sums to 0, the deviation this share; in a constant row it is 0.
    """
    return tl.where(std == 0, 0.0, dot / ((K - 1) * tl.where(std == 0, 1.0, std)))


@triton.jit
def exp(x):
    """eˣ to 3 ulp for any x: `tl.exp` on a GPU is 2^(x log2 e) of the rounded product, and off by |x| / 3 ulp.

    What the product and log2 e lose to rounding is a factor of the result; past 2^±150 the result is 0 or inf anyway.
    """
    high = x * 1.4426950216293335  # log2 e in fp32, and what it lacks
    low = tl.fma(x, 1.925963033500e-08, tl.fma(x, 1.4426950216293335, -high))
    return tl.exp2(high) * (1.0 + tl.where(tl.abs(high) < 150, low, 0.0) * 0.6931471805599453)


@triton.jit
def phi_near(u):
    """φ(u) for |u| < 1/2 by its series, to the last bit of fp32."""
    s = 1.0 / 5040 + u * (1.0 / 40320)
    s = 1.0 / 720 + u * s
    s = 1.0 / 120 + u * s
    s = 1.0 / 24 + u * s
    s = 1.0 / 6 + u * s
    s = 0.5 + u * s
    return u * u * s


@triton.jit
def expm1(u):
    return tl.where(tl.abs(u) < 0.5, u + phi_near(u), exp(u) - 1.0)


@triton.jit
def log1p(w):
    """ln(1 + w) for w > -1: the rounding of 1 + w is divided out (Kahan)."""
    y = 1.0 + w
    return tl.where(y == 1.0, w, tl.log(y) * (w / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def phi(u):
    return tl.where(tl.abs(u) < 0.5, phi_near(u), exp(u) - 1.0 - u)


@triton.jit
def log2_quotient(a, b):
    """log2(a / b) of positive numbers, exact where they are close: the quotient would be rounded to that of others."""
    distance = log1p(tl.abs(a - b) / tl.minimum(a, b)) * (1 / LN2)
    return tl.where(a < b, -distance, distance)


@triton.jit
def close_probabilities(d_s, d_t, r_s, r_t, log_ratio):
    """q, p and u = ln q - ln p from exponents of base 2, reciprocal sums and log2 of the sums' ratio."""
    return tl.exp2(d_s) * r_s, tl.exp2(d_t) * r_t, ((d_s - d_t) - log_ratio) * LN2


@triton.jit
def mixture(d_s, d_t, log_ratio, beta):
    """(1 - β) q and β p, both times Σ 2^d_s, and log2 of both over m = β p + (1 - β) q.

    Times that sum the largest are about 1 and their logarithms about 0, where fp32 is fine.
    """
    log_q = d_s + tl.log2(1 - beta)
    log_p = d_t + (tl.log2(beta) + log_ratio)
    q = tl.exp2(log_q)
    p = tl.exp2(log_p)
    log_m = tl.log2(tl.maximum(p + q, SMALLEST))
    return q, p, log_q - log_m, log_p - log_m


@triton.jit
def difference(p, q, u):
    """q - p; of a class that dominates p (eᵘ - 1), u = ln q - ln p: q and p are close to 1 then, and u to 0."""
    return tl.where((p > 0.5) & (tl.abs(u) < 0.5), p * (u + phi_near(u)), q - p)


@triton.jit
def kl_terms(p, q, u):
    """p φ(u), u = ln q - ln p: terms that sum to KL(p || q) over all classes."""
    u = tl.where(p > 0, u, 1.0)  # where p is 0 the second form gives q, whatever u is
    return tl.where(tl.abs(u) < 0.5, p * phi_near(u), (q - p) - p * u)


@triton.jit
def shift_terms(p, q, u):
    """Terms that sum to e^δ - 1 over all classes, δ the common error of u = ln q - ln p in a row.

    It is the error of the logarithm of the sums; where both sides are nearly uniform it exceeds u.
    """
    return tl.where((p > 0) & (tl.abs(u) < 0.5), p * (u + phi_near(u)), q - p)


@triton.jit
def without_shift(divergence, shift, beta, KIND: tl.constexpr):
    """The divergence of a row without the contribution of δ, δ²/2 in each KL: Σ p φ(u + δ) = Σ p φ(u) + φ(δ)."""
    added = 0.5 * shift * shift
    if KIND == JSD:
        added *= beta * (1 - beta)
    left = divergence - added
    return tl.where(left < 0, 0.0, left)


@triton.jit
def mixture_log_ratios(u, beta):
    """ln m - ln p and ln m - ln q, m = beta p + (1 - beta) q; from u = ln q - ln p alone, so ln m loses nothing."""
    near = log1p((1 - beta) * expm1(tl.where(tl.abs(u) < 0.5, u, 0.0)))
    a = tl.exp(-tl.abs(u))
    far = tl.log(tl.where(u >= 0, (1 - beta) + beta * a, beta + (1 - beta) * a))
    to_p = tl.where(tl.abs(u) < 0.5, near, tl.where(u >= 0, u + far, far))
    to_q = tl.where(tl.abs(u) < 0.5, near - u, tl.where(u >= 0, far, far - u))
    return to_p, to_q


@triton.jit
def divergence_terms(u, p, q, beta, KIND: tl.constexpr):
    """Terms of the divergence, u = ln q - ln p; for JSD those of KL(p || m) and KL(q || m), else the second is 0."""
    if KIND == FORWARD:
        return kl_terms(p, q, u), 0.0 * p
    elif KIND == REVERSE:
        return kl_terms(q, p, -u), 0.0 * p
    else:
        to_p, to_q = mixture_log_ratios(u, beta)
        m = beta * p + (1 - beta) * q
        return kl_terms(p, m, to_p), kl_terms(q, m, to_q)


@triton.jit
def student_slope(u, q, beta, KIND: tl.constexpr):
    """s in the student's gradient q (s - Σ q s); 0 where the gradient has another form."""
    if KIND == FORWARD:
        return 0.0 * q
    elif KIND == REVERSE:
        return tl.where(q > 0, u, 0.0)
    else:
        _, to_q = mixture_log_ratios(u, beta)
        return -(1 - beta) * tl.where(q > 0, to_q, 0.0)


@triton.jit
def teacher_slope(u, p, beta, KIND: tl.constexpr):
    """The same for the teacher, under p."""
    if KIND == FORWARD:
        return -tl.where(p > 0, u, 0.0)
    elif KIND == REVERSE:
        return 0.0 * p
    else:
        to_p, _ = mixture_log_ratios(u, beta)
        return -beta * tl.where(p > 0, to_p, 0.0)


@triton.jit
def student_gradient(u, p, q, centre, beta, KIND: tl.constexpr):
    """Derivative of the divergence by the student's scaled logits; centre is Σ q `student_slope`.

    That is the divergence itself, but summed like this it contains the common error of u in a row, which cancels in
    the difference: at a high temperature that error is all there is.
    """
    if KIND == FORWARD:
        return difference(p, q, u)
    else:
        return q * (student_slope(u, q, beta, KIND) - centre)


@triton.jit
def teacher_gradient(u, p, q, centre, beta, KIND: tl.constexpr):
    if KIND == REVERSE:
        return -difference(p, q, u)
    else:
        return p * (teacher_slope(u, p, beta, KIND) - centre)


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
def sum_of_partials(partial_ptr, MAX_PROGRAMS: tl.constexpr):
    """Sum over programs in a fixed order, bypassing the L1 cache, which may be older than other programs' stores."""
    programs = tl.arange(0, MAX_PROGRAMS)
    x = tl.load(partial_ptr + programs, mask=programs < tl.num_programs(0), other=0.0, cache_modifier=".cg")
    return tl.sum(x, axis=0)


@triton.jit
def store_total(loss_ptr, partial_ptr, accumulated, MAX_PROGRAMS: tl.constexpr):
    """Let the last program store the sum over programs of what each has accumulated."""
    tl.store(partial_ptr + tl.program_id(0), accumulated)
    if last_to_arrive(partial_ptr, MAX_PROGRAMS):
        tl.store(loss_ptr, sum_of_partials(partial_ptr, MAX_PROGRAMS))


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

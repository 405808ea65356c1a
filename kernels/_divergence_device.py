"""Device functions of divergences on tiles of rows (`_rows_device`). Everything is fp32.

Letters as in `reference`: p the teacher's and q the student's probabilities, φ(u) = eᵘ - 1 - u.
"""

import triton
import triton.language as tl

from unikd_fast.kernels._rows_device import LOWEST, added, load_tile, row_sum, tile_cols, tile_sum, without_class

FORWARD = tl.constexpr(0)
REVERSE = tl.constexpr(1)
JSD = tl.constexpr(2)

LN2 = tl.constexpr(0.6931471805599453)
# Below, the error of a row's divergence, some ε, is too much.
CLOSE_BELOW = tl.constexpr(2.0**-6)
CLOSE_BELOW_LOGS = tl.constexpr(2.0**-5)  # of sums of p ln(p / m), to whose error each logarithm adds its own
# A class has more than half of a distribution if Σ exp(z - max z) is below.
DOMINANT_SUM = tl.constexpr(2.0)
SMALLEST = tl.constexpr(2.0**-126)


@triton.jit
def total_of(sums, largest):
    """The sum of a row, or NaN if there is nothing in it: then what stands past the last class would be counted."""
    return tl.where(largest > LOWEST, sums, float("nan"))


@triton.jit
def exponents(x, factor, largest):
    """factor (x - largest): exactly 0 at the largest, of whatever size it is."""
    return (x - largest) * factor


@triton.jit
def lane_sum(total, top, new, x, factor):
    """Σ 2^(factor (x - top)) of each lane, (LANES, 1), for a new maximum and with x, (LANES, LANE)."""
    return total * tl.exp2((top - new) * factor) + row_sum(tl.exp2(exponents(x, factor, new)))


@triton.jit
def join_lanes(top, total, factor, SINGLE: tl.constexpr):
    """The maximum of all lanes, (1, 1), the sums with respect to it, (LANES, 1), and their sum, (1, 1).

    In a tile of several rows each row is a lane.
    """
    if SINGLE:
        return top, total, total_of(total, top)
    else:
        largest = tl.max(top, axis=0)[:, None]
        total = total * tl.exp2((top - largest) * factor)
        return largest, total, total_of(tl.sum(total, axis=0)[:, None], largest)


@triton.jit
def load_pair(
    student_rows, teacher_rows, cols, live,
    STUDENT_COL: tl.constexpr, TEACHER_COL: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Logits of student and teacher at the classes of a tile."""
    s = load_tile(student_rows, cols, live, STUDENT_COL, PADDED, K)
    return s, load_tile(teacher_rows, cols, live, TEACHER_COL, PADDED, K)


@triton.jit
def row_sums(
    student_rows, teacher_rows, live, excluded, l_s, l_t, l_1,
    STUDENT_COL: tl.constexpr, TEACHER_COL: tl.constexpr, K: tl.constexpr, SINGLE: tl.constexpr,
    BLOCK_K: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """Read rows without their excluded class, and sum 2^(l (z - max z)); the student's with l_1 too if there is one.

    Returns the logits on chip, or (); the teacher's maxima and both sums of a row's lanes, on chip of the row; what
    `forward_terms` needs of a row; the sums of student and teacher, and the student's with l_1.
    """
    HEIGHT: tl.constexpr = student_rows.shape[0] if SINGLE else BLOCK_K // LANE
    if SINGLE and K <= BLOCK_K:
        cols = tile_cols(0, BLOCK_K, LANE, True)
        tiles = load_pair(student_rows, teacher_rows, cols, live, STUDENT_COL, TEACHER_COL, K, K % BLOCK_K != 0)
        s = without_class(tiles[0], cols, excluded)
        t = without_class(tiles[1], cols, excluded)
        max_s = tl.max(s, axis=1)[:, None]
        max_t = tl.max(t, axis=1)[:, None]
        sum_s = total_of(row_sum(tl.exp2(exponents(s, l_s, max_s))), max_s)
        sum_t = total_of(row_sum(tl.exp2(exponents(t, l_t, max_t))), max_t)
        lanes = (max_t, sum_s, sum_t)
        sum_1 = sum_s
        if l_1 is not None:
            sum_1 = total_of(row_sum(tl.exp2(exponents(s, l_1, max_s))), max_s)
    else:
        tiles = ()
        lanes_s = tl.full([HEIGHT, 1], LOWEST, tl.float32)
        lanes_t = lanes_s
        sums_s = tl.zeros([HEIGHT, 1], tl.float32)
        sums_t = sums_s
        sums_1 = sums_s
        for i in range((K + BLOCK_K - 1) // BLOCK_K):
            cols = tile_cols(i, BLOCK_K, LANE, SINGLE)
            s, t = load_pair(student_rows, teacher_rows, cols, live, STUDENT_COL, TEACHER_COL, K, K % BLOCK_K != 0)
            s = without_class(s, cols, excluded)
            t = without_class(t, cols, excluded)
            new_s = tl.maximum(lanes_s, tl.max(s, axis=1)[:, None])
            new_t = tl.maximum(lanes_t, tl.max(t, axis=1)[:, None])
            if l_1 is not None:
                sums_1 = lane_sum(sums_1, lanes_s, new_s, s, l_1)
            sums_s = lane_sum(sums_s, lanes_s, new_s, s, l_s)
            sums_t = lane_sum(sums_t, lanes_t, new_t, t, l_t)
            lanes_s = new_s
            lanes_t = new_t
        max_s, sums_s, sum_s = join_lanes(lanes_s, sums_s, l_s, SINGLE)
        max_t, sums_t, sum_t = join_lanes(lanes_t, sums_t, l_t, SINGLE)
        lanes = (lanes_t, sums_s, sums_t)
        sum_1 = sum_s
        if l_1 is not None:
            _max, _sums, sum_1 = join_lanes(lanes_s, sums_1, l_1, SINGLE)
    r_s = tl.div_rn(1.0, sum_s)
    r_t = tl.div_rn(1.0, sum_t)
    # The last so that it is that of q and p as they are rounded.
    return tiles, lanes, (l_s, l_t, max_s, max_t, r_s, r_t, log2_quotient(r_t, r_s)), sum_s, sum_t, sum_1


@triton.jit
def is_close(divergence, live, below: tl.constexpr, CARE: tl.constexpr):
    """Whether the divergence of a live row, (ROWS, 1), is too small to be accurate, or not finite."""
    if CARE == 0:
        return False
    elif CARE >= 2:
        return True
    else:
        accurate = (divergence >= below) & (divergence < float("inf"))
        return tl.max(tl.where(live[:, None] & (accurate == 0), 1, 0)) > 0


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
def forward_terms(s, t, row, CARE: tl.constexpr):
    """p, q, and the terms of `forward_kl`: p log2(q / p), or p φ(u) if CARE is 3, and q - p; row is of `row_sums`."""
    l_s, l_t, max_s, max_t, r_s, r_t, log_ratio = row
    d_s = exponents(s, l_s, max_s)
    d_t = exponents(t, l_t, max_t)
    p = tl.exp2(d_t) * r_t
    q = tl.exp2(d_s) * r_s
    u = (d_s - d_t) - log_ratio
    if CARE == 3:
        u = tl.where(p > 0, u * LN2, 1.0)
        phi = phi_near(u)
        moved = tl.where(tl.abs(u) < 0.5, p * (u + phi), q - p)
        return p, q, tl.where(tl.abs(u) < 0.5, p * phi, moved - p * u), moved
    else:
        return p, q, p * u, change(p, q, u, CARE)


@triton.jit
def forward_kl(
    student_rows, teacher_rows, live, excluded, row, terms, balance,
    STUDENT_COL: tl.constexpr, TEACHER_COL: tl.constexpr, K: tl.constexpr, SINGLE: tl.constexpr,
    BLOCK_K: tl.constexpr, LANE: tl.constexpr, CARE: tl.constexpr,
):  # fmt: skip
    """KL(p || q) of rows (ROWS, 1) from the sums of `forward_terms`; close rows are summed without cancellation."""
    if CARE == 3:
        divergence = without_shift(tile_sum(terms, SINGLE), tile_sum(balance, SINGLE), 0.0, FORWARD)
    else:
        divergence = tile_sum(balance, SINGLE) - LN2 * tile_sum(terms, SINGLE)
        if is_close(divergence, live, CLOSE_BELOW, CARE):
            terms = tl.zeros_like(terms)
            shift = terms
            for i in range((K + BLOCK_K - 1) // BLOCK_K):
                cols = tile_cols(i, BLOCK_K, LANE, SINGLE)
                s, t = load_pair(student_rows, teacher_rows, cols, live, STUDENT_COL, TEACHER_COL, K, K % BLOCK_K != 0)
                q, p, u = close_probabilities(without_class(s, cols, excluded), without_class(t, cols, excluded), row)
                terms = added(terms, kl_terms(p, q, u), K <= BLOCK_K)
                shift = added(shift, shift_terms(p, q, u), K <= BLOCK_K)
            divergence = without_shift(tile_sum(terms, SINGLE), tile_sum(shift, SINGLE), 0.0, FORWARD)
    return divergence


@triton.jit
def dominant_class(
    student_rows, teacher_rows, live, excluded, row, lanes, sum_t,
    STUDENT_COL: tl.constexpr, TEACHER_COL: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """Whether a class has most of the teacher's probability in a row in blocks; which, its q - p, (1, 1), and its p.

    There q - p cancels: it is minus the sum over the others. The lane that holds the class, known by its maximum, has
    lost the digits of the others: it is summed again.
    """
    BLOCKS: tl.constexpr = triton.next_power_of_2((K + BLOCK_K - 1) // BLOCK_K)
    col = tl.zeros([1, 1], tl.int64)
    moved = tl.zeros([1, 1], tl.float32)
    top_p = moved
    dominated = tl.min(tl.where(live[:, None], sum_t, DOMINANT_SUM)) < DOMINANT_SUM
    if dominated:
        lanes_t, sums_s, sums_t = lanes
        l_s, l_t, max_s, max_t, r_s, r_t, _log_ratio = row
        of_lane = tl.arange(0, BLOCK_K // LANE)[:, None]
        lane = tl.min(tl.where(lanes_t == max_t, of_lane, BLOCK_K // LANE - 1))
        cols = tl.arange(0, BLOCKS)[:, None] * BLOCK_K + (lane * LANE + tl.arange(0, LANE)[None, :])
        s, t = load_pair(student_rows, teacher_rows, cols, live, STUDENT_COL, TEACHER_COL, K, True)
        s = without_class(s, cols, excluded)
        t = without_class(t, cols, excluded)
        e_s = tl.exp2(exponents(s, l_s, max_s))
        e_t = tl.exp2(exponents(t, l_t, max_t))
        top = t == max_t  # one alone, or the sum would be 2
        others_s = tl.sum(tl.where(of_lane == lane, 0.0, sums_s)) + tl.sum(tl.where(top, 0.0, e_s))
        others_t = tl.sum(tl.where(of_lane == lane, 0.0, sums_t)) + tl.sum(tl.where(top, 0.0, e_t))
        moved += others_t * r_t - others_s * r_s
        col += tl.max(tl.max(tl.where(top, cols, 0), axis=1), axis=0)
        top_p += tl.sum(tl.where(top, e_t, 0.0)) * r_t
    return dominated, col, moved, top_p


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
def close_probabilities(s, t, row):
    """q, p and u = ln q - ln p; row is that of `row_sums`."""
    l_s, l_t, max_s, max_t, r_s, r_t, log_ratio = row
    d_s = exponents(s, l_s, max_s)
    d_t = exponents(t, l_t, max_t)
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
def kl_terms(p, q, u):
    """p φ(u), u = ln q - ln p: terms that sum to KL(p || q) over all classes."""
    u = tl.where(p > 0, u, 1.0)  # where p is 0 the second form gives q, whatever u is
    return tl.where(tl.abs(u) < 0.5, p * phi_near(u), (q - p) - p * u)


@triton.jit
def shift_terms(p, q, u):
    """q - p from u = ln q - ln p: terms that sum to e^δ - 1 over all classes, δ the common error of u in a row.

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
    """s in the student's gradient q (s - Σ q s) of reverse KL and JSD."""
    if KIND == REVERSE:
        return tl.where(q > 0, u, 0.0)
    else:
        _, to_q = mixture_log_ratios(u, beta)
        return -(1 - beta) * tl.where(q > 0, to_q, 0.0)


@triton.jit
def teacher_slope(u, p, beta, KIND: tl.constexpr):
    """The same for the teacher, under p, of forward KL and JSD."""
    if KIND == FORWARD:
        return -tl.where(p > 0, u, 0.0)
    else:
        to_p, _ = mixture_log_ratios(u, beta)
        return -beta * tl.where(p > 0, to_p, 0.0)


@triton.jit
def student_gradient(u, p, q, centre, beta, KIND: tl.constexpr):
    """Derivative of the divergence by the student's scaled logits; centre is Σ q `student_slope`, or that of q - p.

    The first is the divergence itself and the second 0, but summed like this they contain the common error of u in a
    row, which cancels in the difference: at a high temperature that error is all there is.
    """
    if KIND == FORWARD:
        return shift_terms(p, q, u) - p * centre
    else:
        return q * (student_slope(u, q, beta, KIND) - centre)


@triton.jit
def teacher_gradient(u, p, q, centre, beta, KIND: tl.constexpr):
    if KIND == REVERSE:
        return -shift_terms(p, q, u) - p * centre
    else:
        return p * (teacher_slope(u, p, beta, KIND) - centre)

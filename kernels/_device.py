"""Device functions that the loss kernels share. Everything is fp32; tiles are (ROWS, BLOCK_K), row sums (ROWS, 1).

Letters as in `reference`: p the teacher's and q the student's probabilities, φ(u) = eᵘ - 1 - u.
"""

import triton
import triton.language as tl

FORWARD = tl.constexpr(0)
REVERSE = tl.constexpr(1)
JSD = tl.constexpr(2)


@triton.jit
def scalar(value, IS_POINTER: tl.constexpr):
    """A number, passed by value or in a 0-d tensor."""
    if IS_POINTER:
        return tl.load(value).to(tl.float32)
    else:
        return value


@triton.jit
def row_pointers(ptr, rows, stride: tl.constexpr):
    """Pointers (ROWS, 1). The product is taken in 64 bits: N K may exceed 2^31."""
    return ptr + rows[:, None].to(tl.int64) * stride


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
def online_max_sum(top, count, rest, x, factor):
    """Update the maximum of x, its count, and Σ exp(factor (x - maximum)) of the other entries by one more tile.

    Σ exp = count + rest. The two are kept apart because rest is small where one class dominates: added to 1 its digits
    would be lost, and with them the difference of two such sums. factor > 0 is (ROWS, 1).
    """
    new = tl.maximum(top, tl.max(x, axis=1)[:, None])
    at = tl.where(new == -float("inf"), 0.0, new)  # -inf - -inf is NaN
    is_top = x == new
    same = top == new
    carried = tl.where(same, rest, (rest + count) * tl.exp((top - at) * factor))
    count = tl.where(same, count, 0.0) + row_sum(is_top.to(tl.float32))
    return new, count, carried + row_sum(tl.where(is_top, 0.0, tl.exp((x - at) * factor)))


@triton.jit
def log_sum(count, rest):
    """ln(count + rest), exact where rest is small."""
    return tl.log(count) + log1p(rest / count)


@triton.jit
def log_ratio_of(n_s, rest_s, n_t, rest_t):
    """ln(n_s + rest_s) - ln(n_t + rest_t), from the difference of the sums: each logarithm has an error of ε ln K."""
    difference = (n_s - n_t) + (rest_s - rest_t)
    distance = log1p(tl.abs(difference) / tl.minimum(n_s + rest_s, n_t + rest_t))
    return tl.where(difference < 0, -distance, distance)


@triton.jit
def probabilities(s, t, max_s, max_t, f_s, f_t, sum_s, sum_t, log_ratio):
    """q, p and u = ln q - ln p of a tile of student and teacher logits.

    max and sum are those of `online_max_sum`, f its factors; log_ratio is that of the two sums.
    """
    d_s = (s - max_s) * f_s
    d_t = (t - max_t) * f_t
    return tl.exp(d_s) / sum_s, tl.exp(d_t) / sum_t, (d_s - d_t) - log_ratio


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

"""Divergence of two softmax distributions and its gradient in one pass over the logits (Eq. 1 and 2).

    L = τ² D( softmax(z_t / τ), softmax(z_s / τ) ),    ∂L/∂z_s = τ ( p_s - p_t )  for the forward KL

D is one of `reference.divergence_rows`, the logits standardised first on request. Bytes moved: z_s and z_t read, the
gradient written: 3 N K size while a row fits on chip. Longer rows are read once more, backwards, so that the tail of
the first reading is still in the L2; for reverse KL, JSD, standardisation and the teacher's gradient more often, since
each needs a sum over the whole row first.

With e = 2^(f z - f max z), p = e_t / Σ e_t, q likewise and u = log2(q / p) the forward KL is summed as

    Σ (q - p) - ln 2 Σ p u

where the first sum is not quite 0, and takes away what a common error of u adds to the second. Where the result is
small or not finite, the row is read again and its terms are summed without cancellation
(`_divergence_device.forward_kl`). Instructions an element: docs/kernels.md.
"""

import triton
import triton.language as tl
from torch import Tensor

from unikd_fast.kernels._autograd import FusedLoss, Tensors
from unikd_fast.kernels._divergence_device import (
    CLOSE_BELOW,
    CLOSE_BELOW_LOGS,
    FORWARD,
    JSD,
    LN2,
    REVERSE,
    close_probabilities,
    divergence_terms,
    dominant_class,
    exponents,
    forward_kl,
    forward_terms,
    is_close,
    load_pair,
    mixture,
    row_sums,
    shift_terms,
    student_gradient,
    student_slope,
    teacher_gradient,
    teacher_slope,
    without_cancellation,
    without_shift,
)
from unikd_fast.kernels._launch import (
    LOG2E,
    MAX_PROGRAMS,
    care_for,
    flat,
    inner_rows,
    lane_of,
    logit_rows,
    normalizer_of,
    normalizer_or_rows,
    partial_sums,
    programs_for,
    row_launch_for,
)
from unikd_fast.kernels._rows_device import (
    add_to_class,
    added,
    added_losses,
    gradient_pointers,
    logit_pointers,
    mean_std,
    scalar,
    standardization_share,
    store_class,
    store_cols,
    store_total,
    teacher_scale,
    tile_cols,
    tile_count,
    tile_rows,
    tile_sum,
    times_upstream,
)
from unikd_fast.kernels.reference import DIVERGENCES


@triton.jit
def _terms(s, t, row, beta, KIND: tl.constexpr):
    """Terms of the sums A and B of `_divergence`; row is that of `row_sums`."""
    l_s, l_t, max_s, max_t, r_s, r_t, log_ratio = row
    d_s = exponents(s, l_s, max_s)
    d_t = exponents(t, l_t, max_t)
    if KIND == JSD:
        q, p, log_q, log_p = mixture(d_s, d_t, log_ratio, beta)
        return p * (log_p - tl.log2(beta)), q * (log_q - tl.log2(1 - beta))
    else:
        q, p = tl.exp2(d_s) * r_s, tl.exp2(d_t) * r_t
        if KIND == FORWARD:
            return p * ((d_s - d_t) - log_ratio), q - p
        else:
            return q * ((d_s - d_t) - log_ratio), p - q


@triton.jit
def _divergence(a, b, r_s, beta, KIND: tl.constexpr):
    """The divergence of rows and the centres of `_gradients`, the student's and the teacher's.

    A = Σ p log2(q / p) and B = Σ (q - p), which is not quite 0, or the same with q and p exchanged and the other sign;
    for JSD A = β Σ p log2(p / m) and B = (1 - β) Σ q log2(q / m), before they are divided by the student's sum.
    """
    if KIND == FORWARD:
        return b - LN2 * a, a, a
    elif KIND == REVERSE:
        return b + LN2 * a, a, a
    else:
        return LN2 * (a + b) * r_s, b * r_s / (1 - beta) + tl.log2(1 - beta), a * r_s / beta + tl.log2(beta)


@triton.jit
def _close_terms(s, t, row, beta, KIND: tl.constexpr):
    """Terms of the divergence of close distributions, of its common error, and of the gradients' centres."""
    q, p, u = close_probabilities(s, t, row)
    one, two = divergence_terms(u, p, q, beta, KIND)
    if KIND == JSD:
        one = beta * one + (1 - beta) * two
    shift = shift_terms(p, q, u)
    centre_s = shift if KIND == FORWARD else q * student_slope(u, q, beta, KIND)
    centre_t = -shift if KIND == REVERSE else p * teacher_slope(u, p, beta, KIND)
    return one, shift, centre_s, centre_t


@triton.jit
def _gradients(s, t, row, centres, beta, KIND: tl.constexpr, CLOSE: tl.constexpr):
    """Derivatives of the divergence by the scaled logits of student and teacher."""
    centre_s, centre_t = centres
    l_s, l_t, max_s, max_t, r_s, r_t, log_ratio = row
    d_s = exponents(s, l_s, max_s)
    d_t = exponents(t, l_t, max_t)
    if CLOSE:
        q, p, u = close_probabilities(s, t, row)
        return student_gradient(u, p, q, centre_s, beta, KIND), teacher_gradient(u, p, q, centre_t, beta, KIND)
    elif KIND == JSD:
        q, p, log_q, log_p = mixture(d_s, d_t, log_ratio, beta)
        return q * ((log_q - centre_s) * (LN2 * r_s)), p * ((log_p - centre_t) * (LN2 * r_s))
    else:
        q = tl.exp2(d_s) * r_s
        p = tl.exp2(d_t) * r_t
        if KIND == FORWARD:
            return q - p, p * ((centre_t - ((d_s - d_t) - log_ratio)) * LN2)
        else:
            return q * ((((d_s - d_t) - log_ratio) - centre_s) * LN2), p - q


@triton.jit
def _store_gradients(
    student_rows, teacher_rows, student_grads, teacher_grads, inside, live, read, row, centres, standard,
    f_s, f_t, row_weight, inverse_temperature, beta,
    STUDENT_COL: tl.constexpr, TEACHER_COL: tl.constexpr,
    STUDENT_GRAD_COL: tl.constexpr, TEACHER_GRAD_COL: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr,
    STANDARDIZED: tl.constexpr, SINGLE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr, LANE: tl.constexpr, CLOSE: tl.constexpr,
):  # fmt: skip
    """Write the wanted gradients of a tile of rows."""
    PADDED: tl.constexpr = K % BLOCK_K != 0
    BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    if STANDARDIZED:
        mean_s, mean_t, a_s, a_t, std_s, std_t = standard
        dot_s = tl.zeros([HEIGHT, WIDTH], tl.float32)  # Σ gradient z', of the standardised logits z'
        dot_t = dot_s
        for i in range(BLOCKS):
            cols = tile_cols(i, BLOCK_K, LANE, SINGLE)
            s, t = load_pair(student_rows, teacher_rows, cols, read, STUDENT_COL, TEACHER_COL, K, PADDED)
            g_s, g_t = _gradients(s, t, row, centres, beta, KIND, CLOSE)
            dot_s = added(dot_s, tl.where(cols < K, g_s * ((s - mean_s) * a_s), 0.0), BLOCKS == 1)
            dot_t = added(dot_t, tl.where(cols < K, g_t * ((t - mean_t) * a_t), 0.0), BLOCKS == 1)
        share_s = standardization_share(tile_sum(dot_s, SINGLE) * inverse_temperature, std_s, K)
        share_t = standardization_share(tile_sum(dot_t, SINGLE) * inverse_temperature, std_t, K)
    for i in range(BLOCKS):
        cols = tile_cols(BLOCKS - 1 - i, BLOCK_K, LANE, SINGLE)
        s, t = load_pair(student_rows, teacher_rows, cols, read, STUDENT_COL, TEACHER_COL, K, PADDED)
        g_s, g_t = _gradients(s, t, row, centres, beta, KIND, CLOSE)
        g_s *= f_s * row_weight
        g_t *= f_t * row_weight
        if STANDARDIZED:
            g_s -= (share_s * row_weight) * ((s - mean_s) * a_s)
            g_t -= (share_t * row_weight) * ((t - mean_t) * a_t)
        if student_grads is not None:
            g = tl.where(live[:, None], g_s, 0.0)
            store_cols(student_grads, cols, inside, g, STUDENT_GRAD_COL, PADDED, K)
        if teacher_grads is not None:
            g = tl.where(live[:, None], g_t, 0.0)
            store_cols(teacher_grads, cols, inside, g, TEACHER_GRAD_COL, PADDED, K)


@triton.jit(do_not_specialize=["N", "inner"])
def _softmax_kl_kernel(
    student_ptr,  # (N, K)
    teacher_ptr,  # (N, K)
    scale_ptr,  # (N,) of stored teacher rows, or None
    mask_ptr,  # (N,) bool, or None
    normalizer,  # number, or 0-d
    upstream_ptr,  # 0-d, (N,), or None
    loss_ptr,  # (N,) if PER_ROW, else 0-d; None to leave it out
    partial_ptr,  # (PROGRAMS + 1,)
    student_grad_ptr,  # (N, K), or None
    teacher_grad_ptr,
    N,
    inner,  # rows of the inner of two axes, of pixels divided by PIXELS
    student_outer,  # stride of the outer one, or None if there is one axis
    teacher_outer,
    inverse_temperature,
    exponent_scale,  # log2 e / τ, rounded once
    weight,  # of a row's divergence
    beta,
    STUDENT_ROW: tl.constexpr,
    STUDENT_COL: tl.constexpr,
    TEACHER_ROW: tl.constexpr,
    TEACHER_COL: tl.constexpr,
    STUDENT_GRAD_STRIDED: tl.constexpr,  # with the strides of the logits, else dense
    TEACHER_GRAD_STRIDED: tl.constexpr,
    K: tl.constexpr,
    KIND: tl.constexpr,
    STANDARDIZED: tl.constexpr,
    PER_ROW: tl.constexpr,
    NORMALIZER_IS_POINTER: tl.constexpr,
    SINGLE: tl.constexpr,  # a tile holds whole rows
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LANE: tl.constexpr,  # neighbours in one lane
    CARE: tl.constexpr,
    PIXELS: tl.constexpr,  # the power of 2 that divides those of an image if tiles run along them, else 0
    PROGRAMS: tl.constexpr,
):
    HEIGHT: tl.constexpr = ROWS if SINGLE else BLOCK_K // LANE
    PADDED: tl.constexpr = K % BLOCK_K != 0
    BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    WIDTH: tl.constexpr = LANE if not SINGLE else BLOCK_K if BLOCKS == 1 else 1
    STUDENT_GRAD_COL: tl.constexpr = STUDENT_COL if STUDENT_GRAD_STRIDED else 1
    TEACHER_GRAD_COL: tl.constexpr = TEACHER_COL if TEACHER_GRAD_STRIDED else 1
    WANT_GRAD: tl.constexpr = student_grad_ptr is not None or teacher_grad_ptr is not None
    # The gradient does not depend on the row's loss, so that both come from one pass.
    FUSED_PASS: tl.constexpr = KIND == FORWARD and not STANDARDIZED and teacher_grad_ptr is None
    per_row_weight = weight / scalar(normalizer, NORMALIZER_IS_POINTER)
    accumulated = 0.0
    tiles_of_rows, inner = tile_count(N, inner, ROWS, PIXELS)
    for tile in range(tl.program_id(0), tiles_of_rows, tl.num_programs(0)):
        rows, inside, at = tile_rows(tile, N, inner, ROWS, PIXELS)
        live = inside
        if mask_ptr is not None:
            live = inside & (tl.load(mask_ptr + rows, mask=inside, other=1) == 0)
        read = inside if PIXELS > 0 else live  # a mask that differs from pixel to pixel would make the loads narrow
        student_rows = logit_pointers(student_ptr, at, student_outer, STUDENT_ROW)
        teacher_rows = logit_pointers(teacher_ptr, at, teacher_outer, TEACHER_ROW)
        student_grads = gradient_pointers(student_grad_ptr, at, student_outer, STUDENT_ROW, K, STUDENT_GRAD_STRIDED)
        teacher_grads = gradient_pointers(teacher_grad_ptr, at, teacher_outer, TEACHER_ROW, K, TEACHER_GRAD_STRIDED)
        a_s = tl.full([ROWS, 1], 1.0, tl.float32)
        a_t = teacher_scale(scale_ptr, rows, live, ROWS)
        if STANDARDIZED:
            mean_s, std_s = mean_std(student_rows, read, a_s, K - 1, STUDENT_COL, K, BLOCK_K, ROWS)
            mean_t, std_t = mean_std(teacher_rows, read, a_t, K - 1, TEACHER_COL, K, BLOCK_K, ROWS)
            a_s = 1.0 / (std_s + 1e-7)
            a_t = a_t / (std_t + 1e-7)
        f_s = a_s * inverse_temperature  # (ROWS, 1): softmax of f z
        f_t = a_t * inverse_temperature
        l_s = a_s * exponent_scale
        l_t = a_t * exponent_scale

        tiles, lanes, row, _sum_s, sum_t, _sum_1 = row_sums(
            student_rows, teacher_rows, read, None, l_s, l_t, None, STUDENT_COL, TEACHER_COL, K, SINGLE, BLOCK_K, LANE
        )  # fmt: skip
        row_weight = times_upstream(per_row_weight, upstream_ptr, rows, inside, PER_ROW, ROWS)

        terms = tl.zeros([HEIGHT, WIDTH], tl.float32)
        if FUSED_PASS:
            balance = terms
            if not SINGLE:
                dominated, top_class, top_moved, _p = dominant_class(
                    student_rows, teacher_rows, live, None, row, lanes, sum_t,
                    STUDENT_COL, TEACHER_COL, K, BLOCK_K, LANE,
                )  # fmt: skip
            top = tl.zeros([ROWS, 1], tl.int32)  # 1 + the dominant class of a pixel
            for i in range(BLOCKS):
                cols = tile_cols(BLOCKS - 1 - i, BLOCK_K, LANE, SINGLE)
                if BLOCKS == 1:
                    s, t = tiles
                else:
                    s, t = load_pair(student_rows, teacher_rows, cols, read, STUDENT_COL, TEACHER_COL, K, PADDED)
                p, _q, term, moved = forward_terms(s, t, row, CARE)
                terms = added(terms, term, BLOCKS == 1)
                balance = added(balance, moved, BLOCKS == 1)
                if student_grad_ptr is not None:
                    if BLOCKS == 1:
                        moved = without_cancellation(moved, p)
                    elif SINGLE:
                        top = added(top, tl.where(p > 0.5, cols + 1, 0), False)
                    g = moved * (row_weight * f_s)
                    if mask_ptr is not None:
                        g = tl.where(live[:, None], g, 0.0)
                    store_cols(student_grads, cols, inside, g, STUDENT_GRAD_COL, PADDED, K)
            if student_grad_ptr is not None and BLOCKS > 1:
                if SINGLE:  # what they sum to is the error of the class with more than half of a pixel
                    add_to_class(student_grads, top, live, -balance * (row_weight * f_s), STUDENT_GRAD_COL)
                elif dominated:
                    g = top_moved * (row_weight * f_s)
                    store_class(student_grads, top_class, live, g, STUDENT_GRAD_COL)
            if loss_ptr is not None:
                divergence = forward_kl(
                    student_rows, teacher_rows, live, None, row, terms, balance,
                    STUDENT_COL, TEACHER_COL, K, SINGLE, BLOCK_K, LANE, CARE,
                )  # fmt: skip
        else:
            others = terms
            for i in range(BLOCKS):
                cols = tile_cols(i, BLOCK_K, LANE, SINGLE)
                if BLOCKS == 1:
                    s, t = tiles
                else:
                    s, t = load_pair(student_rows, teacher_rows, cols, read, STUDENT_COL, TEACHER_COL, K, PADDED)
                of_a, of_b = _terms(s, t, row, beta, KIND)
                terms = added(terms, of_a, BLOCKS == 1)
                others = added(others, of_b, BLOCKS == 1)
            a = tile_sum(terms, SINGLE)
            b = tile_sum(others, SINGLE)
            divergence, centre_s, centre_t = _divergence(a, b, row[4], beta, KIND)
            close = is_close(divergence, live, CLOSE_BELOW_LOGS if KIND == JSD else CLOSE_BELOW, CARE)
            if close:
                terms = tl.zeros([HEIGHT, WIDTH], tl.float32)
                shift = terms
                slopes_s = terms
                slopes_t = terms
                for i in range(BLOCKS):
                    cols = tile_cols(i, BLOCK_K, LANE, SINGLE)
                    s, t = load_pair(student_rows, teacher_rows, cols, read, STUDENT_COL, TEACHER_COL, K, PADDED)
                    one, error, of_s, of_t = _close_terms(s, t, row, beta, KIND)
                    terms = added(terms, one, BLOCKS == 1)
                    shift = added(shift, error, BLOCKS == 1)
                    slopes_s = added(slopes_s, of_s, BLOCKS == 1)
                    slopes_t = added(slopes_t, of_t, BLOCKS == 1)
                divergence = without_shift(tile_sum(terms, SINGLE), tile_sum(shift, SINGLE), beta, KIND)
                centre_s = tile_sum(slopes_s, SINGLE)
                centre_t = tile_sum(slopes_t, SINGLE)
            if WANT_GRAD:
                centres = (centre_s, centre_t)
                standard = (mean_s, mean_t, a_s, a_t, std_s, std_t) if STANDARDIZED else ()
                if close:
                    _store_gradients(
                        student_rows, teacher_rows, student_grads, teacher_grads, inside, live, read, row, centres,
                        standard, f_s, f_t, row_weight, inverse_temperature, beta, STUDENT_COL, TEACHER_COL,
                        STUDENT_GRAD_COL, TEACHER_GRAD_COL, K, KIND,
                        STANDARDIZED, SINGLE, HEIGHT, WIDTH, BLOCK_K, LANE, True,
                    )  # fmt: skip
                else:
                    _store_gradients(
                        student_rows, teacher_rows, student_grads, teacher_grads, inside, live, read, row, centres,
                        standard, f_s, f_t, row_weight, inverse_temperature, beta, STUDENT_COL, TEACHER_COL,
                        STUDENT_GRAD_COL, TEACHER_GRAD_COL, K, KIND,
                        STANDARDIZED, SINGLE, HEIGHT, WIDTH, BLOCK_K, LANE, False,
                    )  # fmt: skip

        if loss_ptr is not None:
            losses = tl.where(live[:, None], divergence * per_row_weight, 0.0)
            accumulated = added_losses(accumulated, loss_ptr, losses, rows, inside, PER_ROW)
    if loss_ptr is not None and not PER_ROW:
        store_total(loss_ptr, partial_ptr, accumulated, PROGRAMS)


def _launch(
    tensors: Tensors,  # student (..., K), teacher (..., K), scale (...,), mask (...,), normalizer 0-d
    outputs: Tensors,
    gradients: Tensors,
    upstream: Tensors,
    *,
    temperature: float,
    weight: float,
    divergence: str,
    beta: float,
    standardized: bool,
    per_row: bool,
    normalizer_value: float,
) -> None:
    student, teacher, scale, mask, normalizer = tensors
    assert student is not None
    assert teacher is not None
    s, t = logit_rows(student, teacher)
    rows, classes = s.number, student.shape[-1]
    if gradients[1] is not None:
        numbers = 5
    elif divergence == "jsd":
        numbers = 4
    else:
        numbers = 3 if divergence == "reverse" or standardized else 1
    launch = row_launch_for(s, t, numbers=numbers)
    _softmax_kl_kernel[(programs_for(launch, rows, student.device),)](
        s.tensor,
        t.tensor,
        flat(scale),
        flat(mask),
        normalizer_or_rows(normalizer_value, normalizer, rows),
        upstream[0],
        outputs[0],
        partial_sums(outputs[0]),
        *gradients[:2],
        rows,
        inner_rows(s, t) // max(launch.pixels, 1),
        s.outer_stride,
        t.outer_stride,
        1.0 / temperature,
        LOG2E / temperature,
        weight,
        beta,
        s.row_stride,
        s.class_stride,
        t.row_stride,
        t.class_stride,
        s.holds(gradients[0]),
        t.holds(gradients[1]),
        classes,
        KIND=DIVERGENCES.index(divergence),
        STANDARDIZED=standardized,
        PER_ROW=per_row,
        NORMALIZER_IS_POINTER=normalizer is not None,
        SINGLE=launch.single,
        ROWS=launch.rows,
        BLOCK_K=launch.block_k,
        LANE=lane_of(student),
        CARE=care_for(classes, launch),
        PIXELS=launch.pixels,
        PROGRAMS=MAX_PROGRAMS,
        **launch.options,
    )


_loss = FusedLoss(
    "softmax_kl",
    inputs=("student_logits", "teacher_logits", "scale", "ignore_mask", "normalizer"),
    gradient_of=(0, 0, -1, -1, -1),
    settings={
        "temperature": "float",
        "weight": "float",
        "divergence": "str",
        "beta": "float",
        "standardized": "bool",
        "per_row": "bool",
        "normalizer_value": "float",
    },
    outputs=1,
    launch=_launch,
    logits=True,
)


def fused_softmax_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    scale: Tensor | None = None,
    *,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    scale_by_t2: bool = True,
    ignore_mask: Tensor | None = None,
    divergence: str = "forward",
    beta: float = 0.5,
    standardized: bool = False,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Return `reference.softmax_kl` from one launch; `scale` (...,) multiplies the teacher's stored rows."""
    weight = temperature**2 if scale_by_t2 else 1.0
    if reduction == "mean":
        weight /= student_logits.shape[-1]
    value, tensor = normalizer_of(student_logits, reduction, ignore_mask, normalizer)
    (loss,) = _loss(
        (student_logits, teacher_logits, scale, ignore_mask, tensor),
        temperature=float(temperature),
        weight=weight,
        divergence=divergence,
        beta=float(beta),
        standardized=standardized,
        per_row=reduction == "none",
        normalizer_value=value,
    )
    return loss


def bytes_moved(rows: int, classes: int, element_bytes: int) -> int:
    """Return the least there is to move: both logits read, the gradient written."""
    return 3 * rows * classes * element_bytes

"""Decoupled knowledge distillation and its gradient in one launch (Zhao et al., CVPR 2022, Eq. 7; `reference.dkd`).

    L = τ² ( α KL(b_t || b_s) + β KL(p̂_t || p̂_s) ),    b = (p_y, 1 - p_y),  p̂ = p without y, renormalised

    ∂L/∂z_y = τ α (q_y - p_y),    ∂L/∂z_k = τ ( β (q̂_k - p̂_k) - α (q_y - p_y) q̂_k )

p_y is computed from the log-odds z_y/τ - lse of the others, so that neither p_y nor 1 - p_y loses digits near 0 or 1.
The sums over the others are those of `softmax_kl`. Bytes moved: 3 N K size; the second reading of a long row hits the
cache.
"""

import triton
import triton.language as tl
from torch import Tensor

from unikd_fast.kernels._autograd import FusedLoss, Tensors
from unikd_fast.kernels._divergence_device import (
    CLOSE_BELOW_LOGS,
    LN2,
    dominant_class,
    exp,
    expm1,
    exponents,
    forward_kl,
    forward_terms,
    is_close,
    load_pair,
    log1p,
    phi_near,
    row_sums,
    without_cancellation,
)
from unikd_fast.kernels._launch import (
    COUNTED_IN_KERNEL,
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
    labelled_rows,
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
    without_class,
)
from unikd_fast.kernels.reference import is_ignored


@triton.jit
def _sigmoids(top, total, odds):
    """σ(odds), σ(-odds) and e^-|odds| of odds = top - ln total, without the rounding of that logarithm."""
    negative = odds < 0
    e = exp(tl.where(negative, top, -top))
    e = tl.where(negative, e / total, e * total)
    large = 1.0 / (1.0 + e)
    return tl.where(negative, e * large, large), tl.where(negative, large, e * large), e


@triton.jit
def _far_log_ratio(odds_s, odds_t, delta, tail):
    """ln σ(odds_s) - ln σ(odds_t); tail is the difference of ln(1 + e^-|odds|), delta that of the odds, more exact."""
    both = (odds_s < 0) & (odds_t < 0)
    return tl.where(both, delta, tl.minimum(odds_s, 0.0) - tl.minimum(odds_t, 0.0)) - tail


@triton.jit
def _log_ratio(p, moved, far):
    """ln((p + moved) / p), from moved itself where it is small."""
    near = (p > 0) & (tl.abs(moved) < 0.5 * p)
    return tl.where(near, log1p(moved / tl.where(near, p, 1.0)), far)


@triton.jit
def _kl_term(p, moved, u):
    """`kl_terms` of two classes: one gains what the other loses, so that `moved` cancels in the sum."""
    u = tl.where(p > 0, u, 1.0)
    return tl.where(tl.abs(u) < 0.5, p * phi_near(u), moved - p * u)


@triton.jit(do_not_specialize=["N", "inner"])
def _dkd_kernel(
    student_ptr,  # (N, K)
    teacher_ptr,  # (N, K)
    scale_ptr,  # (N,), or None
    labels_ptr,  # (N,) integer
    normalizer,
    alpha,
    beta,
    upstream_ptr,
    loss_ptr,
    partial_ptr,
    grad_ptr,  # (N, K), or None
    N,
    inner,  # rows of the inner of two axes, of pixels divided by PIXELS
    student_outer,  # stride of the outer one, or None if there is one axis
    teacher_outer,
    ignore_index,
    inverse_temperature,
    exponent_scale,  # log2 e / τ, rounded once
    weight,
    STUDENT_ROW: tl.constexpr,
    STUDENT_COL: tl.constexpr,
    TEACHER_ROW: tl.constexpr,
    TEACHER_COL: tl.constexpr,
    GRAD_STRIDED: tl.constexpr,  # with the strides of the student's logits, else dense
    K: tl.constexpr,
    STANDARDIZED: tl.constexpr,
    PER_ROW: tl.constexpr,
    COUNT_LABELS: tl.constexpr,
    NORMALIZER_IS_POINTER: tl.constexpr,
    ALPHA_IS_POINTER: tl.constexpr,
    BETA_IS_POINTER: tl.constexpr,
    SINGLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LANE: tl.constexpr,
    CARE: tl.constexpr,
    PIXELS: tl.constexpr,  # the power of 2 that divides those of an image if tiles run along them, else 0
    PROGRAMS: tl.constexpr,
):
    HEIGHT: tl.constexpr = ROWS if SINGLE else BLOCK_K // LANE
    BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    WIDTH: tl.constexpr = LANE if not SINGLE else BLOCK_K if BLOCKS == 1 else 1
    PADDED: tl.constexpr = K % BLOCK_K != 0
    GRAD_COL: tl.constexpr = STUDENT_COL if GRAD_STRIDED else 1
    if COUNT_LABELS:
        per_row_weight = weight / labelled_rows(labels_ptr, N, ignore_index)
    else:
        per_row_weight = weight / scalar(normalizer, NORMALIZER_IS_POINTER)
    w_target = scalar(alpha, ALPHA_IS_POINTER)
    w_others = scalar(beta, BETA_IS_POINTER) if K > 2 else 0.0  # one other class has all that the target leaves
    accumulated = 0.0
    tiles_of_rows, inner = tile_count(N, inner, ROWS, PIXELS)
    for tile in range(tl.program_id(0), tiles_of_rows, tl.num_programs(0)):
        rows, inside, at = tile_rows(tile, N, inner, ROWS, PIXELS)
        label = tl.load(labels_ptr + rows, mask=inside, other=0).to(tl.int64)
        live = inside & (label != ignore_index)
        wrong = live & ((label < 0) | (label >= K))
        target = tl.where(live & (wrong == 0), label, 0).to(tl.int32)[:, None]
        read = inside if PIXELS > 0 else live  # a mask that differs from pixel to pixel would make the loads narrow
        student_rows = logit_pointers(student_ptr, at, student_outer, STUDENT_ROW)
        teacher_rows = logit_pointers(teacher_ptr, at, teacher_outer, TEACHER_ROW)
        grads = gradient_pointers(grad_ptr, at, student_outer, STUDENT_ROW, K, GRAD_STRIDED)
        a_s = tl.full([ROWS, 1], 1.0, tl.float32)
        a_t = teacher_scale(scale_ptr, rows, live, ROWS)
        if STANDARDIZED:
            mean_s, std_s = mean_std(student_rows, read, a_s, K - 1, STUDENT_COL, K, BLOCK_K, ROWS)
            _, std_t = mean_std(teacher_rows, read, a_t, K - 1, TEACHER_COL, K, BLOCK_K, ROWS)
            a_s = 1.0 / (std_s + 1e-7)
            a_t = a_t / (std_t + 1e-7)
        f_s = a_s * inverse_temperature
        l_s = a_s * exponent_scale
        l_t = a_t * exponent_scale
        # From here on p and q are of the classes other than the target.
        tiles, lanes, row, sum_s, sum_t, _sum_1 = row_sums(
            student_rows, teacher_rows, read, target, l_s, l_t, None, STUDENT_COL, TEACHER_COL, K, SINGLE, BLOCK_K, LANE
        )  # fmt: skip
        _l_s, _l_t, max_s, max_t, r_s, r_t, log_ratio = row
        z_s = tl.load(student_rows + target.to(tl.int64) * STUDENT_COL, mask=live[:, None], other=0.0).to(tl.float32)
        z_t = tl.load(teacher_rows + target.to(tl.int64) * TEACHER_COL, mask=live[:, None], other=0).to(tl.float32)
        above_s = (z_s - max_s) * f_s
        above_t = (z_t - max_t) * (a_t * inverse_temperature)
        odds_s = above_s - tl.log(sum_s)
        odds_t = above_t - tl.log(sum_t)
        in_s, out_s, e_s = _sigmoids(above_s, sum_s, odds_s)
        in_t, out_t, e_t = _sigmoids(above_t, sum_t, odds_t)
        # σ(a) - σ(b) = σ(a) σ(-b) (1 - e^(b - a)), from the difference of the odds, more accurate than either.
        delta = (above_s - above_t) - LN2 * log_ratio
        moved = tl.where(delta >= 0, -in_s * out_t * expm1(-delta), in_t * out_s * expm1(delta))
        moved = tl.where(((in_s == 0) & (in_t == 0)) | ((out_s == 0) & (out_t == 0)), 0.0, moved)  # delta may be NaN
        tail = tl.log((1.0 + e_s) / (1.0 + e_t))
        tckd = -tl.where(in_t > 0, in_t * _far_log_ratio(odds_s, odds_t, delta, tail), 0.0)
        tckd -= tl.where(out_t > 0, out_t * _far_log_ratio(-odds_s, -odds_t, -delta, tail), 0.0)
        if is_close(tckd, live, 2 * CLOSE_BELOW_LOGS, CARE):
            tail = log1p(e_s) - log1p(e_t)
            tckd = _kl_term(in_t, moved, _log_ratio(in_t, moved, _far_log_ratio(odds_s, odds_t, delta, tail)))
            tckd += _kl_term(out_t, -moved, _log_ratio(out_t, -moved, _far_log_ratio(-odds_s, -odds_t, -delta, tail)))
        pull = w_target * moved  # α (q_y - p_y)

        row_weight = times_upstream(per_row_weight, upstream_ptr, rows, inside, PER_ROW, ROWS)
        row_weight = tl.where(wrong[:, None], float("nan"), row_weight)
        if not SINGLE:
            dominated, top_class, top_moved, top_p = dominant_class(
                student_rows, teacher_rows, live, target, row, lanes, sum_t, STUDENT_COL, TEACHER_COL, K, BLOCK_K, LANE
            )  # fmt: skip
        share = tl.zeros([ROWS, 1], tl.float32)
        if STANDARDIZED and grad_ptr is not None:
            dot = tl.zeros([HEIGHT, WIDTH], tl.float32)
            for i in range(BLOCKS):
                cols = tile_cols(i, BLOCK_K, LANE, SINGLE)
                s, t = load_pair(student_rows, teacher_rows, cols, read, STUDENT_COL, TEACHER_COL, K, PADDED)
                p = tl.exp2(exponents(without_class(t, cols, target), l_t, max_t)) * r_t
                q = tl.exp2(exponents(without_class(s, cols, target), l_s, max_s)) * r_s
                g = tl.where(cols == target, pull, w_others * (q - p) - pull * q)
                dot = added(dot, tl.where(cols < K, g * ((s - mean_s) * a_s), 0.0), BLOCKS == 1)
            share = standardization_share(tile_sum(dot, SINGLE) * inverse_temperature, std_s, K)
        terms = tl.zeros([HEIGHT, WIDTH], tl.float32)
        balance = terms
        top = tl.zeros([ROWS, 1], tl.int32)  # 1 + the dominant class of a pixel
        for i in range(BLOCKS):
            cols = tile_cols(BLOCKS - 1 - i, BLOCK_K, LANE, SINGLE)
            if BLOCKS == 1:
                s, t = tiles
            else:
                s, t = load_pair(student_rows, teacher_rows, cols, read, STUDENT_COL, TEACHER_COL, K, PADDED)
            s1 = without_class(s, cols, target)
            p, q, term, moved_other = forward_terms(s1, without_class(t, cols, target), row, CARE)
            terms = added(terms, term, BLOCKS == 1)
            balance = added(balance, moved_other, BLOCKS == 1)
            if grad_ptr is not None:
                if BLOCKS == 1:
                    moved_other = without_cancellation(moved_other, p)
                elif SINGLE:
                    top = added(top, tl.where(p > 0.5, cols + 1, 0), False)
                g = tl.where(cols == target, pull, w_others * moved_other - pull * q) * (f_s * row_weight)
                if STANDARDIZED:
                    g -= (share * row_weight) * ((s - mean_s) * a_s)
                g = tl.where(live[:, None], g, 0.0)
                store_cols(grads, cols, inside, g, GRAD_COL, PADDED, K)
        if grad_ptr is not None and BLOCKS > 1:
            if SINGLE:  # what they sum to is the error of the class with more than half of a pixel
                add_to_class(grads, top, live, -balance * (w_others * f_s * row_weight), GRAD_COL)
            elif dominated:
                g = (w_others * top_moved - pull * (top_moved + top_p)) * (f_s * row_weight)
                if STANDARDIZED:
                    s = tl.load(student_rows + top_class * STUDENT_COL, mask=live[:, None], other=0).to(tl.float32)
                    g -= (share * row_weight) * ((s - mean_s) * a_s)
                store_class(grads, top_class, live, g, GRAD_COL)
        if loss_ptr is not None:
            nckd = forward_kl(
                student_rows, teacher_rows, live, target, row, terms, balance,
                STUDENT_COL, TEACHER_COL, K, SINGLE, BLOCK_K, LANE, CARE,
            )  # fmt: skip
            losses = tl.where(live[:, None], (w_target * tckd + w_others * nckd) * per_row_weight, 0.0)
            losses = tl.where(wrong[:, None], float("nan"), losses)
            accumulated = added_losses(accumulated, loss_ptr, losses, rows, inside, PER_ROW)
    if loss_ptr is not None and not PER_ROW:
        store_total(loss_ptr, partial_ptr, accumulated, PROGRAMS)


def _launch(
    tensors: Tensors,  # student (..., K), teacher (..., K), scale (...,), labels (...,), normalizer, alpha, beta 0-d
    outputs: Tensors,
    gradients: Tensors,
    upstream: Tensors,
    *,
    alpha_value: float,
    beta_value: float,
    temperature: float,
    weight: float,
    ignore_index: int,
    standardized: bool,
    per_row: bool,
    normalizer_value: float,  # 0: the number of rows with a label
) -> None:
    student, teacher, scale, labels, normalizer, alpha, beta = tensors
    assert student is not None
    assert teacher is not None
    assert labels is not None
    s, t = logit_rows(student, teacher)
    rows, classes = s.number, student.shape[-1]
    count = normalizer is None and normalizer_value == 0
    if count and rows > COUNTED_IN_KERNEL:
        count, normalizer = False, (~is_ignored(labels, ignore_index)).sum().clamp(min=1)
    launch = row_launch_for(s, t, numbers=4 if standardized else 2)
    _dkd_kernel[(programs_for(launch, rows, student.device),)](
        s.tensor,
        t.tensor,
        flat(scale),
        flat(labels),
        normalizer_or_rows(normalizer_value, normalizer, rows),
        alpha_value if alpha is None else alpha,
        beta_value if beta is None else beta,
        upstream[0],
        outputs[0],
        partial_sums(outputs[0]),
        gradients[0],
        rows,
        inner_rows(s, t) // max(launch.pixels, 1),
        s.outer_stride,
        t.outer_stride,
        ignore_index,
        1.0 / temperature,
        LOG2E / temperature,
        weight,
        s.row_stride,
        s.class_stride,
        t.row_stride,
        t.class_stride,
        s.holds(gradients[0]),
        classes,
        STANDARDIZED=standardized,
        PER_ROW=per_row,
        COUNT_LABELS=count,
        NORMALIZER_IS_POINTER=normalizer is not None,
        ALPHA_IS_POINTER=alpha is not None,
        BETA_IS_POINTER=beta is not None,
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
    "dkd",
    inputs=("student_logits", "teacher_logits", "scale", "labels", "normalizer", "alpha", "beta"),
    gradient_of=(0, -1, -1, -1, -1, -1, -1),
    settings={
        "alpha_value": "float",
        "beta_value": "float",
        "temperature": "float",
        "weight": "float",
        "ignore_index": "int",
        "standardized": "bool",
        "per_row": "bool",
        "normalizer_value": "float",
    },
    outputs=1,
    launch=_launch,
    logits=True,
)


def fused_dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    scale: Tensor | None,
    labels: Tensor,
    *,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 8.0,
    temperature: float = 4.0,
    reduction: str = "batchmean",
    ignore_index: int = -100,
    standardized: bool = False,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Return `reference.dkd` from one launch; the teacher is a constant."""
    weight = temperature**2 / (student_logits.shape[-1] if reduction == "mean" else 1)
    value, tensor = normalizer_of(student_logits, reduction, None, normalizer)
    weights = [x if isinstance(x, Tensor) else None for x in (alpha, beta)]
    (loss,) = _loss(
        (student_logits, teacher_logits, scale, labels, tensor, *weights),
        alpha_value=1.0 if isinstance(alpha, Tensor) else float(alpha),
        beta_value=1.0 if isinstance(beta, Tensor) else float(beta),
        temperature=float(temperature),
        weight=weight,
        ignore_index=ignore_index,
        standardized=standardized,
        per_row=reduction == "none",
        normalizer_value=value,
    )
    return loss


def bytes_moved(rows: int, classes: int, element_bytes: int) -> int:
    """Return the least there is to move: both logits read, the gradient written."""
    return 3 * rows * classes * element_bytes

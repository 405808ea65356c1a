"""Decoupled knowledge distillation and its gradient in one launch (Zhao et al., CVPR 2022, Eq. 7; `reference.dkd`).

    L = τ² ( α KL(b_t || b_s) + β KL(p̂_t || p̂_s) ),    b = (p_y, 1 - p_y),  p̂ = p without y, renormalised

    ∂L/∂z_y = τ α (q_y - p_y),    ∂L/∂z_k = τ ( β (q̂_k - p̂_k) - α (q_y - p_y) q̂_k )

p_y is computed from the log-odds z_y/τ - lse of the others, so that neither p_y nor 1 - p_y loses digits near 0 or 1.
Bytes moved: 3 N K size; the second reading of a row hits the cache.
"""

import triton
import triton.language as tl
from torch import Tensor

from unikd_fast.kernels._autograd import FusedLoss, Tensors
from unikd_fast.kernels._device import (
    block_sum,
    difference,
    exp,
    expm1,
    kl_terms,
    load_logits,
    log1p,
    log_ratio_of,
    log_sum,
    mean_std,
    online_max_sum,
    phi_near,
    probabilities,
    row_pointers,
    row_sum,
    scalar,
    standardization_share,
    store_tile,
    store_total,
    times_upstream,
)
from unikd_fast.kernels._launch import (
    MAX_PROGRAMS,
    flat,
    normalizer_of,
    normalizer_or_rows,
    partial_sums,
    programs_for,
    row_launch_for,
    rows_of,
    strides,
)
from unikd_fast.kernels.reference import is_ignored


@triton.jit
def _others(ptrs, target, live, factor, COL: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr):
    """`online_max_sum` over all classes but the target."""
    top = tl.full([ROWS, 1], -float("inf"), tl.float32)
    count = tl.zeros([ROWS, 1], tl.float32)
    rest = count
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        x = load_logits(ptrs, cols, live, COL, K)
        x = tl.where(cols[None, :] == target, -float("inf"), x)
        top, count, rest = online_max_sum(top, count, rest, x, factor)
    return top, count, rest


@triton.jit
def _sigmoids(top, total, odds):
    """σ(odds), σ(-odds) and ln(1 + e^-|odds|) of odds = top - ln total, without the rounding of that logarithm."""
    negative = odds < 0
    e = exp(tl.where(negative, top, -top))
    e = tl.where(negative, e / total, e * total)
    small = e / (1.0 + e)
    large = 1.0 / (1.0 + e)
    return tl.where(negative, small, large), tl.where(negative, large, small), log1p(e)


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


@triton.jit(do_not_specialize=["N"])
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
    grad_ptr,  # (N, K) dense, or None
    N,
    ignore_index,
    inverse_temperature,
    weight,
    STUDENT_ROW: tl.constexpr,
    STUDENT_COL: tl.constexpr,
    TEACHER_ROW: tl.constexpr,
    TEACHER_COL: tl.constexpr,
    K: tl.constexpr,
    STANDARDIZED: tl.constexpr,
    PER_ROW: tl.constexpr,
    NORMALIZER_IS_POINTER: tl.constexpr,
    ALPHA_IS_POINTER: tl.constexpr,
    BETA_IS_POINTER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    per_row_weight = weight / scalar(normalizer, NORMALIZER_IS_POINTER)
    w_target = scalar(alpha, ALPHA_IS_POINTER)
    w_others = scalar(beta, BETA_IS_POINTER)
    accumulated = 0.0
    for tile in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        inside = rows < N
        label = tl.load(labels_ptr + rows, mask=inside, other=0).to(tl.int64)
        live = inside & (label != ignore_index)
        wrong = live & ((label < 0) | (label >= K))
        target = tl.where(live & (wrong == 0), label, 0)[:, None]
        student_rows = row_pointers(student_ptr, rows, STUDENT_ROW)
        teacher_rows = row_pointers(teacher_ptr, rows, TEACHER_ROW)
        a_s = tl.full([ROWS, 1], 1.0, tl.float32)
        a_t = a_s
        if scale_ptr is not None:
            a_t = tl.load(scale_ptr + rows, mask=live, other=1.0).to(tl.float32)[:, None]
        if STANDARDIZED:
            mean_s, std_s = mean_std(student_rows, live, a_s, K - 1, STUDENT_COL, K, BLOCK_K, ROWS)
            _, std_t = mean_std(teacher_rows, live, a_t, K - 1, TEACHER_COL, K, BLOCK_K, ROWS)
            a_s = 1.0 / (std_s + 1e-7)
            a_t = a_t / (std_t + 1e-7)
        f_s = a_s * inverse_temperature
        f_t = a_t * inverse_temperature
        max_s, n_s, rest_s = _others(student_rows, target, live, f_s, STUDENT_COL, K, BLOCK_K, ROWS)
        max_t, n_t, rest_t = _others(teacher_rows, target, live, f_t, TEACHER_COL, K, BLOCK_K, ROWS)
        z_s = tl.load(student_rows + target * STUDENT_COL, mask=live[:, None], other=0.0).to(tl.float32)
        z_t = tl.load(teacher_rows + target * TEACHER_COL, mask=live[:, None], other=0).to(tl.float32)
        sum_s = n_s + rest_s
        sum_t = n_t + rest_t
        log_ratio = log_ratio_of(n_s, rest_s, n_t, rest_t)
        top_s = (z_s - max_s) * f_s
        top_t = (z_t - max_t) * f_t
        odds_s = top_s - log_sum(n_s, rest_s)
        odds_t = top_t - log_sum(n_t, rest_t)
        in_s, out_s, tail_s = _sigmoids(top_s, sum_s, odds_s)
        in_t, out_t, tail_t = _sigmoids(top_t, sum_t, odds_t)
        tail = tail_s - tail_t
        # σ(a) - σ(b) = σ(a) σ(-b) (1 - e^(b - a)), from the difference of the odds, more accurate than either.
        delta = (top_s - top_t) - log_ratio
        moved = tl.where(delta >= 0, -in_s * out_t * expm1(-delta), in_t * out_s * expm1(delta))
        moved = tl.where(((in_s == 0) & (in_t == 0)) | ((out_s == 0) & (out_t == 0)), 0.0, moved)  # delta may be NaN
        tckd = _kl_term(in_t, moved, _log_ratio(in_t, moved, _far_log_ratio(odds_s, odds_t, delta, tail)))
        tckd += _kl_term(out_t, -moved, _log_ratio(out_t, -moved, _far_log_ratio(-odds_s, -odds_t, -delta, tail)))
        pull = w_target * moved  # α (q_y - p_y)

        row_weight = times_upstream(per_row_weight, upstream_ptr, rows, inside, PER_ROW, ROWS)
        row_weight = tl.where(wrong[:, None], float("nan"), row_weight)
        nckd = tl.zeros([ROWS, 1], tl.float32)
        share = tl.zeros([ROWS, 1], tl.float32)
        if STANDARDIZED and grad_ptr is not None:
            dot = tl.zeros([ROWS, 1], tl.float32)
            for start in range(0, K, BLOCK_K):
                cols = start + tl.arange(0, BLOCK_K)
                s = load_logits(student_rows, cols, live, STUDENT_COL, K)
                t = load_logits(teacher_rows, cols, live, TEACHER_COL, K)
                q, p, u = probabilities(s, t, max_s, max_t, f_s, f_t, sum_s, sum_t, log_ratio)
                g = tl.where(cols[None, :] == target, pull, w_others * difference(p, q, u) - pull * q)
                dot += row_sum(tl.where((cols < K)[None, :], g * ((s - mean_s) * a_s), 0.0))
            share = standardization_share(dot * inverse_temperature, std_s, K)
        for start in range(0, K, BLOCK_K):
            cols = start + tl.arange(0, BLOCK_K)
            s = load_logits(student_rows, cols, live, STUDENT_COL, K)
            t = load_logits(teacher_rows, cols, live, TEACHER_COL, K)
            is_target = cols[None, :] == target
            q, p, u = probabilities(s, t, max_s, max_t, f_s, f_t, sum_s, sum_t, log_ratio)
            nckd += row_sum(tl.where(is_target, 0.0, kl_terms(p, q, u)))
            if grad_ptr is not None:
                g = tl.where(is_target, pull, w_others * difference(p, q, u) - pull * q) * f_s
                if STANDARDIZED:
                    g -= share * ((s - mean_s) * a_s)
                g = tl.where(live[:, None], g * row_weight, 0.0)
                store_tile(row_pointers(grad_ptr, rows, K), cols, inside, g, K)
        if loss_ptr is not None:
            losses = tl.where(live[:, None], (w_target * tckd + w_others * nckd) * per_row_weight, 0.0)
            losses = tl.where(wrong[:, None], float("nan"), losses)
            if PER_ROW:
                tl.store(row_pointers(loss_ptr, rows, 1), losses, mask=inside[:, None])
            else:
                accumulated += block_sum(losses)
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
    normalizer_value: float,
) -> None:
    student, teacher, scale, labels, normalizer, alpha, beta = tensors
    assert student is not None
    assert teacher is not None
    s, t = rows_of(student), rows_of(teacher)
    rows, classes = s.shape
    launch = row_launch_for(s, t, heavy=True)
    _dkd_kernel[(programs_for(launch, rows, s.device),)](
        s,
        t,
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
        ignore_index,
        1.0 / temperature,
        weight,
        *strides(s),
        *strides(t),
        classes,
        STANDARDIZED=standardized,
        PER_ROW=per_row,
        NORMALIZER_IS_POINTER=normalizer is not None,
        ALPHA_IS_POINTER=alpha is not None,
        BETA_IS_POINTER=beta is not None,
        ROWS=launch.rows,
        BLOCK_K=launch.block_k,
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
    value, tensor = 1.0, None
    if reduction in ("batchmean", "mean"):
        # The rows kept are those with a label; counting them stays on the device.
        value, tensor = normalizer_of(student_logits, reduction, is_ignored(labels, ignore_index), normalizer)
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

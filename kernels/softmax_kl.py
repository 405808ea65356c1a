"""Divergence of two softmax distributions and its gradient in one pass over the logits (Eq. 1 and 2).

    L = τ² D( softmax(z_t / τ), softmax(z_s / τ) ),    ∂L/∂z_s = τ ( p_s - p_t )  for the forward KL

D is one of `reference.divergence_rows`, the logits standardised first on request. Bytes moved: z_s and z_t read, the
gradient written: 3 N K size while a row fits on chip. Longer rows are read once more, backwards, so that the tail of
the first reading is still in the L2; for reverse KL, JSD, standardisation and the teacher's gradient more often, since
each needs a sum over the whole row first.
"""

import triton
import triton.language as tl
from torch import Tensor

from unikd_fast.kernels._autograd import FusedLoss, Tensors
from unikd_fast.kernels._device import (
    block_sum,
    difference,
    divergence_terms,
    load_logits,
    log_ratio_of,
    mean_std,
    online_max_sum,
    probabilities,
    row_pointers,
    row_sum,
    scalar,
    shift_terms,
    standardization_share,
    store_tile,
    store_total,
    student_gradient,
    student_slope,
    teacher_gradient,
    teacher_slope,
    times_upstream,
    without_shift,
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
from unikd_fast.kernels.reference import DIVERGENCES


@triton.jit(do_not_specialize=["N"])
def _softmax_kl_kernel(
    student_ptr,  # (N, K)
    teacher_ptr,  # (N, K)
    scale_ptr,  # (N,) of stored teacher rows, or None
    mask_ptr,  # (N,) bool, or None
    normalizer,  # number, or 0-d
    upstream_ptr,  # 0-d, (N,), or None
    loss_ptr,  # (N,) if PER_ROW, else 0-d; None to leave it out
    partial_ptr,  # (PROGRAMS + 1,)
    student_grad_ptr,  # (N, K) contiguous, or None
    teacher_grad_ptr,
    N,
    inverse_temperature,
    weight,  # of a row's divergence
    beta,
    STUDENT_ROW: tl.constexpr,
    STUDENT_COL: tl.constexpr,
    TEACHER_ROW: tl.constexpr,
    TEACHER_COL: tl.constexpr,
    K: tl.constexpr,
    KIND: tl.constexpr,
    STANDARDIZED: tl.constexpr,
    PER_ROW: tl.constexpr,
    NORMALIZER_IS_POINTER: tl.constexpr,
    SINGLE: tl.constexpr,  # a tile holds whole rows
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    WANT_GRAD: tl.constexpr = student_grad_ptr is not None or teacher_grad_ptr is not None
    # The gradient does not depend on the row's loss, so that both come from one pass.
    FUSED_PASS: tl.constexpr = KIND == 0 and not STANDARDIZED and teacher_grad_ptr is None
    per_row_weight = weight / scalar(normalizer, NORMALIZER_IS_POINTER)
    accumulated = 0.0
    for tile in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        inside = rows < N
        live = inside
        if mask_ptr is not None:
            live = inside & (tl.load(mask_ptr + rows, mask=inside, other=1) == 0)
        student_rows = row_pointers(student_ptr, rows, STUDENT_ROW)
        teacher_rows = row_pointers(teacher_ptr, rows, TEACHER_ROW)
        a_s = tl.full([ROWS, 1], 1.0, tl.float32)
        a_t = a_s
        if scale_ptr is not None:
            a_t = tl.load(scale_ptr + rows, mask=live, other=1.0).to(tl.float32)[:, None]
        if STANDARDIZED:
            mean_s, std_s = mean_std(student_rows, live, a_s, K - 1, STUDENT_COL, K, BLOCK_K, ROWS)
            mean_t, std_t = mean_std(teacher_rows, live, a_t, K - 1, TEACHER_COL, K, BLOCK_K, ROWS)
            a_s = 1.0 / (std_s + 1e-7)
            a_t = a_t / (std_t + 1e-7)
        f_s = a_s * inverse_temperature  # (ROWS, 1): softmax of f z
        f_t = a_t * inverse_temperature

        if SINGLE:
            cols0 = tl.arange(0, BLOCK_K)
            s0 = load_logits(student_rows, cols0, live, STUDENT_COL, K)
            t0 = load_logits(teacher_rows, cols0, live, TEACHER_COL, K)
            max_s = tl.max(s0, axis=1)[:, None]
            max_t = tl.max(t0, axis=1)[:, None]
            n_s = row_sum((s0 == max_s).to(tl.float32))
            n_t = row_sum((t0 == max_t).to(tl.float32))
            rest_s = row_sum(tl.where(s0 == max_s, 0.0, tl.exp((s0 - max_s) * f_s)))
            rest_t = row_sum(tl.where(t0 == max_t, 0.0, tl.exp((t0 - max_t) * f_t)))
        else:
            max_s = tl.full([ROWS, 1], -float("inf"), tl.float32)
            max_t = max_s
            n_s = tl.zeros([ROWS, 1], tl.float32)
            n_t = n_s
            rest_s = n_s
            rest_t = n_s
            for i in range(BLOCKS):
                cols = i * BLOCK_K + tl.arange(0, BLOCK_K)
                s = load_logits(student_rows, cols, live, STUDENT_COL, K)
                t = load_logits(teacher_rows, cols, live, TEACHER_COL, K)
                max_s, n_s, rest_s = online_max_sum(max_s, n_s, rest_s, s, f_s)
                max_t, n_t, rest_t = online_max_sum(max_t, n_t, rest_t, t, f_t)
        sum_s = n_s + rest_s
        sum_t = n_t + rest_t
        log_ratio = log_ratio_of(n_s, rest_s, n_t, rest_t)

        row_weight = times_upstream(per_row_weight, upstream_ptr, rows, inside, PER_ROW, ROWS)
        d1 = tl.zeros([ROWS, 1], tl.float32)
        d2 = tl.zeros([ROWS, 1], tl.float32)
        shift = tl.zeros([ROWS, 1], tl.float32)
        centre_s = tl.zeros([ROWS, 1], tl.float32)
        centre_t = tl.zeros([ROWS, 1], tl.float32)
        for i in range(BLOCKS):
            cols = (BLOCKS - 1 - i) * BLOCK_K + tl.arange(0, BLOCK_K)
            if SINGLE:
                s = s0
                t = t0
            else:
                s = load_logits(student_rows, cols, live, STUDENT_COL, K)
                t = load_logits(teacher_rows, cols, live, TEACHER_COL, K)
            q, p, u = probabilities(s, t, max_s, max_t, f_s, f_t, sum_s, sum_t, log_ratio)
            terms1, terms2 = divergence_terms(u, p, q, beta, KIND)
            d1 += row_sum(terms1)
            d2 += row_sum(terms2)
            shift += row_sum(shift_terms(p, q, u))
            if student_grad_ptr is not None and KIND != 0:
                centre_s += row_sum(q * student_slope(u, q, beta, KIND))
            if teacher_grad_ptr is not None and KIND != 1:
                centre_t += row_sum(p * teacher_slope(u, p, beta, KIND))
            if FUSED_PASS and WANT_GRAD:
                g = difference(p, q, u) * (row_weight * f_s)
                store_tile(row_pointers(student_grad_ptr, rows, K), cols, inside, tl.where(live[:, None], g, 0.0), K)

        if WANT_GRAD and not FUSED_PASS:
            dot_s = tl.zeros([ROWS, 1], tl.float32)  # Σ gradient z', of the standardised logits z'
            dot_t = tl.zeros([ROWS, 1], tl.float32)
            if STANDARDIZED:
                for i in range(BLOCKS):
                    cols = i * BLOCK_K + tl.arange(0, BLOCK_K)
                    s = load_logits(student_rows, cols, live, STUDENT_COL, K)
                    t = load_logits(teacher_rows, cols, live, TEACHER_COL, K)
                    q, p, u = probabilities(s, t, max_s, max_t, f_s, f_t, sum_s, sum_t, log_ratio)
                    if student_grad_ptr is not None:
                        g = student_gradient(u, p, q, centre_s, beta, KIND)
                        dot_s += row_sum(tl.where((cols < K)[None, :], g * ((s - mean_s) * a_s), 0.0))
                    if teacher_grad_ptr is not None:
                        g = teacher_gradient(u, p, q, centre_t, beta, KIND)
                        dot_t += row_sum(tl.where((cols < K)[None, :], g * ((t - mean_t) * a_t), 0.0))
            for i in range(BLOCKS):
                cols = (BLOCKS - 1 - i) * BLOCK_K + tl.arange(0, BLOCK_K)
                s = load_logits(student_rows, cols, live, STUDENT_COL, K)
                t = load_logits(teacher_rows, cols, live, TEACHER_COL, K)
                q, p, u = probabilities(s, t, max_s, max_t, f_s, f_t, sum_s, sum_t, log_ratio)
                if student_grad_ptr is not None:
                    g = student_gradient(u, p, q, centre_s, beta, KIND) * f_s
                    if STANDARDIZED:
                        g -= standardization_share(dot_s * inverse_temperature, std_s, K) * ((s - mean_s) * a_s)
                    g = tl.where(live[:, None], g * row_weight, 0.0)
                    store_tile(row_pointers(student_grad_ptr, rows, K), cols, inside, g, K)
                if teacher_grad_ptr is not None:
                    g = teacher_gradient(u, p, q, centre_t, beta, KIND) * f_t
                    if STANDARDIZED:
                        g -= standardization_share(dot_t * inverse_temperature, std_t, K) * ((t - mean_t) * a_t)
                    g = tl.where(live[:, None], g * row_weight, 0.0)
                    store_tile(row_pointers(teacher_grad_ptr, rows, K), cols, inside, g, K)

        if loss_ptr is not None:
            divergence = d1
            if KIND == 2:
                divergence = beta * d1 + (1 - beta) * d2
            divergence = without_shift(divergence, shift, beta, KIND)
            losses = tl.where(live[:, None], divergence * per_row_weight, 0.0)
            if PER_ROW:
                tl.store(row_pointers(loss_ptr, rows, 1), losses, mask=inside[:, None])
            else:
                accumulated += block_sum(losses)
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
    s, t = rows_of(student), rows_of(teacher)
    rows, classes = s.shape
    launch = row_launch_for(s, t, heavy=divergence != "forward" or standardized or gradients[1] is not None)
    _softmax_kl_kernel[(programs_for(launch, rows, s.device),)](
        s,
        t,
        flat(scale),
        flat(mask),
        normalizer_or_rows(normalizer_value, normalizer, rows),
        upstream[0],
        outputs[0],
        partial_sums(outputs[0]),
        *gradients[:2],
        rows,
        1.0 / temperature,
        weight,
        beta,
        *strides(s),
        *strides(t),
        classes,
        KIND=DIVERGENCES.index(divergence),
        STANDARDIZED=standardized,
        PER_ROW=per_row,
        NORMALIZER_IS_POINTER=normalizer is not None,
        SINGLE=launch.single,
        ROWS=launch.rows,
        BLOCK_K=launch.block_k,
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

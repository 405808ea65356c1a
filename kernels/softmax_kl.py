"""Divergence of two softmax distributions and its gradient in one pass over the logits (Eq. 1 and 2).

    L = τ² D( softmax(z_t / τ), softmax(z_s / τ) ),    ∂L/∂z_s = τ ( p_s - p_t )  for the forward KL

D is one of `reference_divergences`, the logits standardised first on request. Bytes moved: z_s and z_t read, the
gradient written: 3 N K size while a row fits on chip; beyond, the rows are read once more, backwards, so that the tail
of the first reading is still in the L2. Reverse KL, JSD, standardisation and the teacher's gradient read a longer row
more often, since each needs a sum over the whole row before the next.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from unikd_fast.kernels._autograd import FusedLoss, Tensors
from unikd_fast.kernels._device import (
    block_sum,
    difference,
    divergence_terms,
    load_logits,
    log_sum,
    mean_std,
    online_max_sum,
    row_pointers,
    row_sum,
    scalar,
    standardization_share,
    store_tile,
    store_total,
    student_gradient,
    teacher_gradient,
    times_upstream,
)
from unikd_fast.kernels._launch import (
    MAX_PROGRAMS,
    flat,
    new_gradient,
    new_loss,
    normalizer_of,
    on_device,
    partial_sums,
    programs_for,
    row_launch_for,
    rows_of,
    strides,
)
from unikd_fast.kernels.reference_divergences import DIVERGENCES


@triton.jit(do_not_specialize=["N"])
def _softmax_kl_kernel(
    student_ptr,  # (N, K)
    teacher_ptr,  # (N, K)
    scale_ptr,  # (N,) of stored teacher rows, or None
    mask_ptr,  # (N,) bool, or None
    normalizer,  # number, or 0-d
    upstream_ptr,  # 0-d, (N,), or None
    loss_ptr,  # (N,) if PER_ROW, else 0-d; None to leave it out
    partial_ptr,  # (MAX_PROGRAMS,)
    ticket_ptr,
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
    # Then the gradient does not need the row's loss, and both come from one pass.
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
        scale_t = a_t
        if STANDARDIZED:
            mean_s, std_s = mean_std(student_rows, live, a_s, STUDENT_COL, K, BLOCK_K, ROWS)
            mean_t, std_t = mean_std(teacher_rows, live, a_t, TEACHER_COL, K, BLOCK_K, ROWS)
            a_s = 1.0 / (std_s + 1e-7)
            a_t = scale_t / (std_t + 1e-7)
        f_s = a_s * inverse_temperature  # (ROWS, 1): softmax of f z
        f_t = a_t * inverse_temperature

        if SINGLE:
            cols0 = tl.arange(0, BLOCK_K)
            s0 = load_logits(student_rows, cols0, live, STUDENT_COL, K)
            t0 = load_logits(teacher_rows, cols0, live, TEACHER_COL, K)
            max_s = tl.max(s0, axis=1)[:, None]
            max_t = tl.max(t0, axis=1)[:, None]
            d_s0 = (s0 - max_s) * f_s
            d_t0 = (t0 - max_t) * f_t
            e_s0 = tl.exp(d_s0)
            e_t0 = tl.exp(d_t0)
            n_s = row_sum((s0 == max_s).to(tl.float32))
            n_t = row_sum((t0 == max_t).to(tl.float32))
            rest_s = row_sum(tl.where(s0 == max_s, 0.0, e_s0))
            rest_t = row_sum(tl.where(t0 == max_t, 0.0, e_t0))
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
        log_ratio = log_sum(n_s, rest_s) - log_sum(n_t, rest_t)

        row_weight = times_upstream(per_row_weight, upstream_ptr, rows, inside, PER_ROW, ROWS)
        grad_rows_s = student_rows  # replaced where there is a gradient
        grad_rows_t = teacher_rows
        if student_grad_ptr is not None:
            grad_rows_s = row_pointers(student_grad_ptr, rows, K)
        if teacher_grad_ptr is not None:
            grad_rows_t = row_pointers(teacher_grad_ptr, rows, K)

        d1 = tl.zeros([ROWS, 1], tl.float32)
        d2 = tl.zeros([ROWS, 1], tl.float32)
        for i in range(BLOCKS):
            cols = (BLOCKS - 1 - i) * BLOCK_K + tl.arange(0, BLOCK_K)
            if SINGLE:
                d_s = d_s0
                d_t = d_t0
                q = e_s0 / sum_s
                p = e_t0 / sum_t
            else:
                d_s = (load_logits(student_rows, cols, live, STUDENT_COL, K) - max_s) * f_s
                d_t = (load_logits(teacher_rows, cols, live, TEACHER_COL, K) - max_t) * f_t
                q = tl.exp(d_s) / sum_s
                p = tl.exp(d_t) / sum_t
            u = (d_s - d_t) - log_ratio
            terms1, terms2 = divergence_terms(u, p, q, beta, KIND)
            d1 += row_sum(terms1)
            d2 += row_sum(terms2)
            if FUSED_PASS and WANT_GRAD:
                g = difference(p, q, u) * (row_weight * f_s)
                store_tile(grad_rows_s, cols, inside, tl.where(live[:, None], g, 0.0), K)

        if WANT_GRAD and not FUSED_PASS:
            dot_s = tl.zeros([ROWS, 1], tl.float32)  # Σ gradient z', of the standardised logits z'
            dot_t = tl.zeros([ROWS, 1], tl.float32)
            if STANDARDIZED:
                for i in range(BLOCKS):
                    cols = i * BLOCK_K + tl.arange(0, BLOCK_K)
                    s = load_logits(student_rows, cols, live, STUDENT_COL, K)
                    t = load_logits(teacher_rows, cols, live, TEACHER_COL, K)
                    d_s = (s - max_s) * f_s
                    d_t = (t - max_t) * f_t
                    q = tl.exp(d_s) / sum_s
                    p = tl.exp(d_t) / sum_t
                    u = (d_s - d_t) - log_ratio
                    if student_grad_ptr is not None:
                        g = student_gradient(u, p, q, d1, d2, beta, KIND)
                        dot_s += row_sum(tl.where((cols < K)[None, :], g * ((s - mean_s) * a_s), 0.0))
                    if teacher_grad_ptr is not None:
                        g = teacher_gradient(u, p, q, d1, d2, beta, KIND)
                        dot_t += row_sum(tl.where((cols < K)[None, :], g * ((t - mean_t) * a_t), 0.0))
            for i in range(BLOCKS):
                cols = (BLOCKS - 1 - i) * BLOCK_K + tl.arange(0, BLOCK_K)
                s = load_logits(student_rows, cols, live, STUDENT_COL, K)
                t = load_logits(teacher_rows, cols, live, TEACHER_COL, K)
                d_s = (s - max_s) * f_s
                d_t = (t - max_t) * f_t
                q = tl.exp(d_s) / sum_s
                p = tl.exp(d_t) / sum_t
                u = (d_s - d_t) - log_ratio
                if student_grad_ptr is not None:
                    g = student_gradient(u, p, q, d1, d2, beta, KIND) * f_s
                    if STANDARDIZED:
                        g -= standardization_share(dot_s * inverse_temperature, std_s, K) * ((s - mean_s) * a_s)
                    store_tile(grad_rows_s, cols, inside, tl.where(live[:, None], g * row_weight, 0.0), K)
                if teacher_grad_ptr is not None:
                    g = teacher_gradient(u, p, q, d1, d2, beta, KIND) * f_t
                    if STANDARDIZED:
                        g -= standardization_share(dot_t * inverse_temperature, std_t, K) * ((t - mean_t) * a_t)
                    store_tile(grad_rows_t, cols, inside, tl.where(live[:, None], g * row_weight, 0.0), K)

        if loss_ptr is not None:
            divergence = d1
            if KIND == 2:
                divergence = beta * d1 + (1 - beta) * d2
            losses = tl.where(live[:, None], divergence * per_row_weight, 0.0)
            if PER_ROW:
                tl.store(row_pointers(loss_ptr, rows, 1), losses, mask=inside[:, None])
            else:
                accumulated += block_sum(losses)
    if loss_ptr is not None and not PER_ROW:
        store_total(loss_ptr, partial_ptr, ticket_ptr, accumulated, PROGRAMS)


def _launch(
    tensors: Tensors,  # student (..., K), teacher (..., K), scale (...,), mask (...,), normalizer 0-d
    wanted: Sequence[bool],
    upstream: Tensors | None,
    *,
    temperature: float,
    weight: float,
    divergence: str,
    beta: float,
    standardized: bool,
    per_row: bool,
    normalizer_value: float,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    student, teacher, scale, mask, normalizer = tensors
    assert student is not None
    assert teacher is not None
    classes = student.shape[-1]
    gradients = [new_gradient(x, w) for x, w in zip(tensors, wanted, strict=True)]
    loss = new_loss(student, per_row) if upstream is None else None
    rows = student.numel() // classes
    if rows == 0:
        return [None if loss is None else loss.zero_()], gradients
    s, t = rows_of(student), rows_of(teacher)
    launch = row_launch_for(s, t, heavy=divergence != "forward" or standardized or wanted[1])
    with on_device(student):
        _softmax_kl_kernel[(programs_for(launch, rows, student.device),)](
            s,
            t,
            flat(scale),
            flat(mask),
            (normalizer_value or float(rows)) if normalizer is None else normalizer,
            None if upstream is None else flat(upstream[0]),
            loss,
            *partial_sums(loss),
            gradients[0],
            gradients[1],
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
    return [loss], gradients


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
    output_shapes=lambda student, per_row, **_: [student.shape[:-1] if per_row else ()],
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
    """Give `reference.softmax_kl` from one launch; `scale` (...,) multiplies the teacher's stored rows."""
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
    """Give the least there is to move: both logits read, the gradient written."""
    return 3 * rows * classes * element_bytes

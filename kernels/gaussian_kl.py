"""Divergence of diagonal Gaussians and its gradients in one pass (Eq. 6).

    L = 1/2 Σ_k [ v_s/v_t - 1 - ln( v_s/v_t ) + (m_t - m_s)² / v_t ] = 1/2 Σ_k [ φ(d) + (m_t - m_s)² e^(-l_t) ]

m the means, l = ln v the log-variances, d = l_s - l_t, φ(d) = eᵈ - 1 - d. Bytes moved: four parameters read and the
wanted gradients written, two or four.
"""

import triton
import triton.language as tl
from torch import Tensor

from unikd_fast.kernels._autograd import FusedLoss, Tensors
from unikd_fast.kernels._divergence_device import (
    exp,
    expm1,
    phi,
)
from unikd_fast.kernels._launch import (
    MAX_PROGRAMS,
    elementwise_launch_for,
    normalizer_of,
    normalizer_or_rows,
    partial_sums,
    programs_for,
    rows_of,
)
from unikd_fast.kernels._rows_device import (
    added_losses,
    row_pointers,
    row_sum,
    scalar,
    store_tile,
    store_total,
    tile_pointers,
    times_upstream,
)


@triton.jit
def load_dense(ptr, rows, cols, inside, K: tl.constexpr):
    """A tile of a dense (N, K) in fp32, 0 outside."""
    return tl.load(tile_pointers(row_pointers(ptr, rows, K), cols, 1), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def gaussian_rows(
    student_mean_ptr,
    student_log_var_ptr,
    teacher_mean_ptr,
    teacher_log_var_ptr,
    student_mean_grad_ptr,
    student_log_var_grad_ptr,
    teacher_mean_grad_ptr,
    teacher_log_var_grad_ptr,
    rows,
    live,
    weight,  # (ROWS, 1) of a term's gradient
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sum over k of each row (ROWS, 1); writes the gradients that have a buffer."""
    total = tl.zeros([ROWS, 1], tl.float32)
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        inside = live[:, None] & (cols < K)[None, :]
        m_s = load_dense(student_mean_ptr, rows, cols, inside, K)
        l_s = load_dense(student_log_var_ptr, rows, cols, inside, K)
        m_t = load_dense(teacher_mean_ptr, rows, cols, inside, K)
        l_t = load_dense(teacher_log_var_ptr, rows, cols, inside, K)
        d = l_s - l_t
        precision = exp(-l_t)
        distance = m_t - m_s
        total += row_sum(tl.where(inside, 0.5 * (phi(d) + distance * distance * precision), 0.0))
        pull = distance * precision * weight
        if student_mean_grad_ptr is not None:
            store_tile(row_pointers(student_mean_grad_ptr, rows, K), cols, live, -pull, K)
        if student_log_var_grad_ptr is not None:
            store_tile(row_pointers(student_log_var_grad_ptr, rows, K), cols, live, 0.5 * expm1(d) * weight, K)
        if teacher_mean_grad_ptr is not None:
            store_tile(row_pointers(teacher_mean_grad_ptr, rows, K), cols, live, pull, K)
        if teacher_log_var_grad_ptr is not None:
            g = -0.5 * (expm1(d) * weight + distance * pull)
            store_tile(row_pointers(teacher_log_var_grad_ptr, rows, K), cols, live, g, K)
    return total


@triton.jit(do_not_specialize=["N"])
def _gaussian_kl_kernel(
    student_mean_ptr,  # (N, K) dense, as all that follow
    student_log_var_ptr,
    teacher_mean_ptr,
    teacher_log_var_ptr,
    normalizer,  # number, or 0-d
    upstream_ptr,  # 0-d, (N,), or None
    loss_ptr,  # (N,) if PER_ROW, else 0-d; None to leave it out
    partial_ptr,  # (PROGRAMS + 1,)
    student_mean_grad_ptr,  # (N, K), or None
    student_log_var_grad_ptr,
    teacher_mean_grad_ptr,
    teacher_log_var_grad_ptr,
    N,
    weight,  # of a row's sum
    K: tl.constexpr,
    PER_ROW: tl.constexpr,
    NORMALIZER_IS_POINTER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    per_row_weight = weight / scalar(normalizer, NORMALIZER_IS_POINTER)
    accumulated = 0.0
    for tile in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        live = rows < N
        row_weight = times_upstream(per_row_weight, upstream_ptr, rows, live, PER_ROW, ROWS)
        sums = gaussian_rows(
            student_mean_ptr, student_log_var_ptr, teacher_mean_ptr, teacher_log_var_ptr,
            student_mean_grad_ptr, student_log_var_grad_ptr, teacher_mean_grad_ptr, teacher_log_var_grad_ptr,
            rows, live, row_weight, K, ROWS, BLOCK_K,
        )  # fmt: skip
        if loss_ptr is not None:
            losses = sums * per_row_weight
            accumulated = added_losses(accumulated, loss_ptr, losses, rows, live, PER_ROW)
    if loss_ptr is not None and not PER_ROW:
        store_total(loss_ptr, partial_ptr, accumulated, PROGRAMS)


def _launch(
    tensors: Tensors,  # student mean, log_var, teacher mean, log_var (..., K), normalizer 0-d
    outputs: Tensors,
    gradients: Tensors,
    upstream: Tensors,
    *,
    weight: float,
    per_row: bool,
    normalizer_value: float,
) -> None:
    parameters = [rows_of(x).contiguous() for x in tensors[:4] if x is not None]
    normalizer = tensors[4]
    rows, classes = parameters[0].shape
    launch = elementwise_launch_for(parameters[0])
    _gaussian_kl_kernel[(programs_for(launch, rows, parameters[0].device),)](
        *parameters,
        normalizer_or_rows(normalizer_value, normalizer, rows),
        upstream[0],
        outputs[0],
        partial_sums(outputs[0]),
        *gradients[:4],
        rows,
        weight,
        classes,
        PER_ROW=per_row,
        NORMALIZER_IS_POINTER=normalizer is not None,
        ROWS=launch.rows,
        BLOCK_K=launch.block_k,
        PROGRAMS=MAX_PROGRAMS,
        **launch.options,
    )


_loss = FusedLoss(
    "gaussian_kl",
    inputs=("student_mean", "student_log_var", "teacher_mean", "teacher_log_var", "normalizer"),
    gradient_of=(0, 0, 0, 0, -1),
    settings={"weight": "float", "per_row": "bool", "normalizer_value": "float"},
    outputs=1,
    launch=_launch,
)


def fused_gaussian_kl(
    student_mean: Tensor,
    student_log_var: Tensor,
    teacher_mean: Tensor,
    teacher_log_var: Tensor,
    *,
    reduction: str = "batchmean",
    feature_reduction: str = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Return `reference.gaussian_kl` from one launch."""
    # The class axis is reduced by feature_reduction, so "mean" over rows is "batchmean".
    value, tensor = normalizer_of(student_mean, reduction, None, normalizer)
    (loss,) = _loss(
        (student_mean, student_log_var, teacher_mean, teacher_log_var, tensor),
        weight=1.0 / student_mean.shape[-1] if feature_reduction == "mean" else 1.0,
        per_row=reduction == "none",
        normalizer_value=value,
    )
    return loss


def bytes_moved(rows: int, classes: int, element_bytes: int, *, teacher_gradient: bool = False) -> int:
    """Return the least there is to move: four parameters read, two gradients written, or four."""
    return (8 if teacher_gradient else 6) * rows * classes * element_bytes

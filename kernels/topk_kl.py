"""Divergence from a teacher of whom the largest logits are stored, and its gradient (`reference_compressed.topk_kl`).

    L = Σ_{j in top k} p_j ln( p_j / q_j ) + r_t ln( r_t / r_s ),    r = 1 - Σ_{j in top k} p_j

    ∂L/∂z_j = q_j - p_j in the top k,    q_j - r_t q_j / r_s elsewhere

Bytes moved: the student's row and its gradient, one byte a class that marks the top k, and the stored teacher, which is
small.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from unikd_fast.kernels._autograd import FusedLoss, Tensors
from unikd_fast.kernels._device import (
    block_sum,
    difference,
    expm1,
    kl_terms,
    load_logits,
    log_sum,
    online_max_sum,
    row_pointers,
    row_sum,
    scalar,
    store_tile,
    store_total,
    tile_pointers,
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


@triton.jit(do_not_specialize=["N"])
def _topk_kl_kernel(
    student_ptr,  # (N, K)
    marks_ptr,  # (N, K) uint8 dense, 1 in the top k
    values_ptr,  # (N, TOP) dense
    indices_ptr,  # (N, TOP) dense
    log_sum_exp_ptr,  # (N,)
    mask_ptr,  # (N,) bool, or None
    normalizer,
    upstream_ptr,
    loss_ptr,
    partial_ptr,
    grad_ptr,  # (N, K) dense, or None
    N,
    weight,
    STUDENT_ROW: tl.constexpr,
    STUDENT_COL: tl.constexpr,
    K: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK_TOP: tl.constexpr,
    PER_ROW: tl.constexpr,
    NORMALIZER_IS_POINTER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    per_row_weight = weight / scalar(normalizer, NORMALIZER_IS_POINTER)
    accumulated = 0.0
    top = tl.arange(0, BLOCK_TOP)
    for tile in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        inside = rows < N
        live = inside
        if mask_ptr is not None:
            live = inside & (tl.load(mask_ptr + rows, mask=inside, other=1) == 0)
        student_rows = row_pointers(student_ptr, rows, STUDENT_ROW)
        mark_rows = row_pointers(marks_ptr, rows, K)
        # The rest of the classes by their own maximum, so that it is exact however little there is of it.
        max_all = tl.full([ROWS, 1], -float("inf"), tl.float32)
        max_rest = max_all
        n_all = tl.zeros([ROWS, 1], tl.float32)
        n_rest = n_all
        rest_all = n_all
        rest_rest = n_all
        one = tl.full([ROWS, 1], 1.0, tl.float32)
        for start in range(0, K, BLOCK_K):
            cols = start + tl.arange(0, BLOCK_K)
            x = load_logits(student_rows, cols, live, STUDENT_COL, K)
            marks = tl.load(tile_pointers(mark_rows, cols, 1), mask=live[:, None] & (cols < K)[None, :], other=0)
            max_all, n_all, rest_all = online_max_sum(max_all, n_all, rest_all, x, one)
            unmarked = tl.where(marks == 0, x, -float("inf"))
            max_rest, n_rest, rest_rest = online_max_sum(max_rest, n_rest, rest_rest, unmarked, one)
        sum_all = n_all + rest_all
        sum_rest = n_rest + rest_rest
        log_all = log_sum(n_all, rest_all)
        stored = live[:, None] & (top < TOP)[None, :]
        top_ptrs = row_pointers(indices_ptr, rows, TOP) + top[None, :]
        index = tl.load(top_ptrs, mask=stored, other=0).to(tl.int64)
        z_t = tl.load(row_pointers(values_ptr, rows, TOP) + top[None, :], mask=stored, other=0.0).to(tl.float32)
        z_s = tl.load(student_rows + index * STUDENT_COL, mask=stored, other=0.0).to(tl.float32)
        lse = tl.load(log_sum_exp_ptr + rows, mask=live, other=0.0).to(tl.float32)[:, None]
        log_p = z_t - lse
        log_q = (z_s - max_all) - log_all
        p = tl.where(stored, tl.exp(log_p), 0.0)
        q = tl.where(stored, tl.exp(log_q), 0.0)
        sums = row_sum(kl_terms(p, q, log_q - log_p))
        excess = row_sum(difference(p, q, log_q - log_p))  # Σ q - p: 0, but for the rounding of what was stored
        rest_p = tl.zeros([ROWS, 1], tl.float32)
        if TOP < K:
            # 1 - Σ p, without losing it in the largest p.
            log_top = tl.max(tl.where(stored, log_p, -float("inf")), axis=1)[:, None]
            is_top = stored & (log_p == log_top)
            n_top = row_sum(is_top.to(tl.float32))
            outside_top = tl.where(n_top == 1.0, -expm1(log_top), 1.0 - n_top * tl.exp(log_top))
            rest_p = tl.maximum(outside_top - row_sum(tl.where(is_top, 0.0, p)), 0.0)
            log_rest_q = (max_rest - max_all) + (log_sum(n_rest, rest_rest) - log_all)
            log_ratio = log_rest_q - tl.log(rest_p)
            sums += kl_terms(rest_p, tl.exp(log_rest_q), log_ratio)
            excess += difference(rest_p, tl.exp(log_rest_q), log_ratio)
        if grad_ptr is not None:
            row_weight = times_upstream(per_row_weight, upstream_ptr, rows, inside, PER_ROW, ROWS)
            grad_rows = row_pointers(grad_ptr, rows, K)
            for start in range(0, K, BLOCK_K):
                cols = start + tl.arange(0, BLOCK_K)
                x = load_logits(student_rows, cols, live, STUDENT_COL, K)
                q_all = tl.exp(x - max_all) / sum_all * (1.0 - excess)
                g = (q_all - rest_p * tl.exp(x - max_rest) / sum_rest) * row_weight
                store_tile(grad_rows, cols, inside, tl.where(live[:, None], g, 0.0), K)
            tl.debug_barrier()  # whoever wrote the classes of the top k as part of the rest has done so
            g = (difference(p, q, log_q - log_p) - q * excess) * row_weight
            tl.store(grad_rows + index, g.to(grad_ptr.dtype.element_ty), mask=stored)
        if loss_ptr is not None:
            losses = tl.where(live[:, None], sums * per_row_weight, 0.0)
            if PER_ROW:
                tl.store(row_pointers(loss_ptr, rows, 1), losses, mask=inside[:, None])
            else:
                accumulated += block_sum(losses)
    if loss_ptr is not None and not PER_ROW:
        store_total(loss_ptr, partial_ptr, accumulated, PROGRAMS)


def _launch(
    tensors: Tensors,  # student (..., K), values, indices (..., k), log_sum_exp, mask (...,), normalizer 0-d
    outputs: Tensors,
    gradients: Tensors,
    upstream: Tensors,
    *,
    weight: float,
    per_row: bool,
    normalizer_value: float,
) -> None:
    student, values, indices, log_sum_exp, mask, normalizer = tensors
    assert student is not None
    assert values is not None
    assert indices is not None
    s, index = rows_of(student), rows_of(indices).contiguous()
    rows, classes = s.shape
    k = values.shape[-1]
    launch = row_launch_for(s, s, heavy=True)
    marks = torch.zeros(s.shape, dtype=torch.uint8, device=s.device).scatter_(1, index.long(), 1)
    _topk_kl_kernel[(programs_for(launch, rows, s.device),)](
        s,
        marks,
        rows_of(values).contiguous(),
        index,
        flat(log_sum_exp),
        flat(mask),
        normalizer_or_rows(normalizer_value, normalizer, rows),
        upstream[0],
        outputs[0],
        partial_sums(outputs[0]),
        gradients[0],
        rows,
        weight,
        *strides(s),
        classes,
        TOP=k,
        BLOCK_TOP=triton.next_power_of_2(k),
        PER_ROW=per_row,
        NORMALIZER_IS_POINTER=normalizer is not None,
        ROWS=launch.rows,
        BLOCK_K=launch.block_k,
        PROGRAMS=MAX_PROGRAMS,
        **launch.options,
    )


_loss = FusedLoss(
    "topk_kl",
    inputs=("student_logits", "values", "indices", "log_sum_exp", "ignore_mask", "normalizer"),
    gradient_of=(0, -1, -1, -1, -1, -1),
    settings={"weight": "float", "per_row": "bool", "normalizer_value": "float"},
    outputs=1,
    launch=_launch,
)


def fused_topk_kl(
    student_logits: Tensor,
    values: Tensor,
    indices: Tensor,
    log_sum_exp: Tensor,
    *,
    reduction: str = "batchmean",
    ignore_mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Give `reference_compressed.topk_kl`."""
    value, tensor = normalizer_of(student_logits, reduction, ignore_mask, normalizer)
    (loss,) = _loss(
        (student_logits, values, indices, log_sum_exp, ignore_mask, tensor),
        weight=1.0 / student_logits.shape[-1] if reduction == "mean" else 1.0,
        per_row=reduction == "none",
        normalizer_value=value,
    )
    return loss

"""Teachers stored in less than their logits: quantised rows, and the largest logits with their log-sum-exp."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from unikd_fast.kernels.reference import at_least_fp32, reduce_rows
from unikd_fast.kernels.reference_divergences import kl_rows


def quantize_rows(logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Give (values, scale, offset) with z ≈ scale values + offset, one scale and offset per row.

    uint8: the row's range in 255 steps, an error of at most scale / 2. fp16: the row as it is, divided by a power of
    two where it would overflow; -inf stays -inf.

    Args:
        logits: (..., K); finite for uint8.
        dtype: torch.uint8 or torch.float16.

    Returns:
        values (..., K), scale (...,) fp32, offset (...,) fp32.
    """
    rows = logits.detach().float()
    if dtype == torch.uint8:
        low, high = rows.amin(dim=-1), rows.amax(dim=-1)
        scale = (high - low) / 255
        steps = (rows - low[..., None]) / torch.where(scale == 0, 1.0, scale)[..., None]
        return steps.round().clamp(0, 255).to(torch.uint8), scale, low
    largest = rows.abs().masked_fill(rows.isinf(), 0.0).amax(dim=-1)
    scale = torch.exp2(torch.ceil(torch.log2(largest / 32768.0)).clamp(min=0.0))
    return (rows / scale[..., None]).to(torch.float16), scale, torch.zeros_like(scale)


def dequantize_rows(values: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Give scale values + offset (..., K) in fp32 (fp64 for fp64 scales)."""
    return values.to(scale.dtype) * scale[..., None] + offset[..., None]


def topk_kl(
    student_logits: Tensor,
    values: Tensor,
    indices: Tensor,
    log_sum_exp: Tensor,
    *,
    reduction: str = "batchmean",
    ignore_mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Give the divergence from a teacher of whom the k largest logits and the log-sum-exp of all are known, τ = 1.

        Σ_{j in top k} p_j ln( p_j / q_j ) + r_t ln( r_t / r_s ),    r = 1 - Σ_{j in top k} p_j,    p_j = e^{z_j - lse}

    The KL divergence with all other classes taken as one: never above the full one (data-processing inequality),
    equal to it where the student spreads r as the teacher does, and it says nothing about classes nobody stored.

    Args:
        student_logits: (..., K).
        values: (..., k) the teacher's largest logits, k <= K.
        indices: (..., k) their classes, distinct.
        log_sum_exp: (...,) of all K of the teacher's logits, so that the stored probabilities sum to at most one.
        reduction, ignore_mask, normalizer: as in `softmax_kl`.
    """
    student, top, lse = at_least_fp32(student_logits), at_least_fp32(values), at_least_fp32(log_sum_exp)
    if ignore_mask is not None:
        student, top = (x.masked_fill(ignore_mask[..., None], 0.0) for x in (student, top))
        lse = lse.masked_fill(ignore_mask, math.log(top.shape[-1]))
    index = indices.long()
    log_p, log_q_all = top - lse[..., None], F.log_softmax(student, dim=-1)
    log_q = log_q_all.gather(-1, index)
    if index.shape[-1] < student.shape[-1]:
        rest_p = (1 - log_p.exp().sum(dim=-1, keepdim=True)).clamp(min=0).log()
        rest_q = log_q_all.scatter(-1, index, -math.inf).logsumexp(dim=-1, keepdim=True)
        log_p, log_q = torch.cat([log_p, rest_p], dim=-1), torch.cat([log_q, rest_q], dim=-1)
    rows = kl_rows(log_p, log_q)
    return reduce_rows(rows, reduction, classes=student.shape[-1], ignore_mask=ignore_mask, normalizer=normalizer)

"""Decoupled knowledge distillation (Zhao et al., CVPR 2022) in plain PyTorch."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from unikd_fast.kernels.reference import at_least_fp32, is_ignored, reduce_rows
from unikd_fast.kernels.reference_divergences import kl_rows, standardize


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
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
    """Give α TCKD + β NCKD, Eq. 7 of the paper, times τ².

        TCKD = KL( (p_y, 1 - p_y) || (q_y, 1 - q_y) ),    NCKD = KL( p without y || q without y, both renormalised )

    for the teacher's p, the student's q = softmax(z / τ) and the label y. 1 - q_y is the sum of the other classes, so
    a student that is nearly certain loses no digits.

    Args:
        student_logits: (..., K), K >= 2.
        teacher_logits: (..., K).
        labels: (...,) integer.
        alpha, beta: weights, numbers or 0-d tensors.
        temperature: τ > 0.
        reduction: over rows: as in `softmax_kl`.
        ignore_index: label of the rows to leave out.
        standardized: whether each row of logits is standardised first.
        normalizer: what "batchmean" and "mean" divide by in place of the number of rows kept.
    """
    student, teacher = at_least_fp32(student_logits), at_least_fp32(teacher_logits)
    ignored = is_ignored(labels, ignore_index)
    student = student.masked_fill(ignored[..., None], 0.0)
    teacher = teacher.masked_fill(ignored[..., None], 0.0)
    if standardized:
        student, teacher = standardize(student), standardize(teacher)
    target = labels.long().masked_fill(ignored, 0)[..., None]
    classes = torch.arange(student.shape[-1], device=student.device)
    is_target = classes == target
    binary, others = [], []
    for logits in (teacher, student):
        log_p = F.log_softmax(logits / temperature, dim=-1)
        without_target = log_p.masked_fill(is_target, -math.inf)
        binary.append(torch.cat([log_p.gather(-1, target), without_target.logsumexp(-1, keepdim=True)], dim=-1))
        others.append(F.log_softmax(without_target, dim=-1))
    rows = (alpha * kl_rows(*binary) + beta * kl_rows(*others)) * temperature**2
    return reduce_rows(rows, reduction, classes=student.shape[-1], ignore_mask=ignored, normalizer=normalizer)

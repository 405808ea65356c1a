"""What the adapters share: the class axis, and the reductions of `torch.nn.functional.kl_div` on `softmax_kl`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from unikd_fast.kernels.reference import at_least_fp32
from unikd_fast.losses import softmax_kl


def kl_div(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    reduction: str = "batchmean",
    dim: int = -1,
    scale_by_t2: bool = True,
) -> Tensor:
    """Return KL( softmax(z_t / τ) || softmax(z_s / τ) ), reduced like `torch.nn.functional.kl_div`.

    "batchmean" divides by the first axis only, "mean" by the number of elements. Without rows it is 0, where PyTorch
    returns NaN.

    Args:
        student_logits: (N, ..., K), or with the classes along `dim`.
        teacher_logits: the same shape.
        temperature: τ > 0.
        reduction: "batchmean", "mean", "sum", or "none": the terms of the sum, of the logits' shape. These are computed
            in plain PyTorch, since the kernel never holds them.
        dim: the class axis.
        scale_by_t2: whether to multiply by τ².

    Raises:
        ValueError: If the reduction is unknown, or `softmax_kl` raises it.
    """
    if reduction == "none":
        log_q = F.log_softmax(at_least_fp32(student_logits) / temperature, dim=dim)
        p = F.softmax(at_least_fp32(teacher_logits) / temperature, dim=dim)
        terms = F.kl_div(log_q, p, reduction="none")
        return terms * temperature**2 if scale_by_t2 else terms
    rows = student_logits.movedim(dim, -1), teacher_logits.movedim(dim, -1)
    if reduction != "batchmean":
        return softmax_kl(*rows, temperature=temperature, reduction=reduction, scale_by_t2=scale_by_t2)
    total = softmax_kl(*rows, temperature=temperature, reduction="sum", scale_by_t2=scale_by_t2)
    return total / max(student_logits.shape[0], 1)


def jsd_terms(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """Return the terms of the generalised Jensen-Shannon divergence, of the inputs' shape, in plain PyTorch.

        β p (ln p - ln m) + (1 - β) q (ln q - ln m),  m = β p + (1 - β) q
        β = 0: p (ln p - ln q),   β = 1: q (ln q - ln p)

    Unlike `reference.kl_rows` it does not rest on p and q summing to one: `log_q` is a free variable, and the
    gradient of each term is that of the term as it stands here.

    Args:
        log_q: (..., K), the student's log-probabilities.
        log_p: (..., K), the teacher's.
        beta: in [0, 1].
    """
    absent = (log_p == -math.inf) & (log_q == -math.inf)  # logaddexp(-inf, -inf) has no gradient
    log_p, log_q = log_p.masked_fill(absent, 0.0), log_q.masked_fill(absent, 0.0)
    if beta == 0:
        terms = _weighted_log_ratio(log_p, log_q)
    elif beta == 1:
        terms = _weighted_log_ratio(log_q, log_p)
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        terms = beta * _weighted_log_ratio(log_p, log_m) + (1 - beta) * _weighted_log_ratio(log_q, log_m)
    return terms.masked_fill(absent, 0.0)


def _weighted_log_ratio(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return a (ln a - ln b), with 0 ln 0 = 0."""
    a = log_a.exp()
    return a * (log_a - log_b).masked_fill(a == 0, 0.0)

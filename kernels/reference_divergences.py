"""Divergences of two categorical distributions given by their log-probabilities, row by row, in plain PyTorch.

Letters: p the teacher's and q the student's probabilities of K classes, both summing to one; φ(u) = eᵘ - 1 - u.
Every divergence is written as sums of p φ(u): because p and q both sum to one that is the textbook form, and as every
term is positive nothing cancels when the student is close to its teacher.
"""

import math

import torch
from torch import Tensor

DIVERGENCES = ("forward", "reverse", "jsd")


def divergence_rows(log_p: Tensor, log_q: Tensor, divergence: str, beta: float) -> Tensor:
    """Give the divergence of each row.

        forward    KL(p || q)
        reverse    KL(q || p)
        jsd        β KL(p || m) + (1 - β) KL(q || m),    m = β p + (1 - β) q

    The last one, the generalised Jensen-Shannon divergence (Agarwal et al. 2024, Eq. 1), lies in [0, ln 2] for β = 1/2.
    At β = 0 and 1 its own value is 0; the forward and the reverse KL are its limits divided by β and 1 - β.

    Args:
        log_p: (..., K), the teacher's.
        log_q: (..., K), the student's.
        divergence: one of the three.
        beta: β in (0, 1), used by "jsd" alone.
    """
    if divergence == "forward":
        return kl_rows(log_p, log_q)
    if divergence == "reverse":
        return kl_rows(log_q, log_p)
    absent = (log_p == -math.inf) & (log_q == -math.inf)  # logaddexp(-inf, -inf) has no gradient
    log_p, log_q = log_p.masked_fill(absent, 0.0), log_q.masked_fill(absent, 0.0)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    log_p, log_q, log_m = (x.masked_fill(absent, -math.inf) for x in (log_p, log_q, log_m))
    return beta * kl_rows(log_p, log_m) + (1 - beta) * kl_rows(log_q, log_m)


def kl_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Give KL(p || q) = Σ_k p_k φ(u_k), u = ln q - ln p, of each row (..., K)."""
    q, p = log_q.exp(), log_p.exp()
    absent = p == 0  # 0 ln 0 = 0
    u = (log_q - log_p).masked_fill(absent, 0.0)
    far = absent | (u.abs() >= 1)
    # eᵘ may overflow where p is tiny, so away from u = 0 write p eᵘ as q; there nothing cancels.
    small_u = u.masked_fill(far, 0.0)
    terms = torch.where(far, q - p - p * u, p * (torch.expm1(small_u) - small_u))
    return terms.sum(dim=-1)


def standardize(logits: Tensor) -> Tensor:
    """Give (z - mean_k z) / (std_k z + 1e-7), std unbiased, with its gradient (Sun et al. 2024, Eq. 13).

    A row of equal logits becomes 0, and its gradient that of the mean alone.
    """
    unit = unit_of(logits)
    rows = logits / unit
    centred = rows - rows.mean(dim=-1, keepdim=True)
    return centred / (rows.std(dim=-1, keepdim=True) + 1e-7 / unit)


def unit_of(logits: Tensor) -> Tensor:
    """Give the power of two (..., 1) below each row's largest logit, 1 at least; in such units no square overflows."""
    return torch.exp2(torch.log2(logits.detach().abs().amax(dim=-1, keepdim=True).clamp(min=1)).floor())

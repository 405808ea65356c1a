"""The losses as they are written without this package: plain PyTorch, and Liger-Kernel.

Plain PyTorch keeps the dtype of the logits throughout. Under autocast it would compute in fp32, which is more exact
and moves about twice the bytes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 4.0
DKD_ALPHA, DKD_BETA = 1.0, 8.0
UNIKD_ALPHA, UNIKD_BETA = 4.0, 1.0


def softmax_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q = F.log_softmax(student / TEMPERATURE, dim=-1)
    log_p = F.log_softmax(teacher / TEMPERATURE, dim=-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * TEMPERATURE * TEMPERATURE


def mdistiller_kd(student: Tensor, teacher: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """The same as mdistiller writes it, against probabilities."""
    log_q = F.log_softmax(student / temperature, dim=1)
    p = F.softmax(teacher / temperature, dim=1)
    return F.kl_div(log_q, p, reduction="none").sum(1).mean() * temperature**2


def jsd(student: Tensor, teacher: Tensor) -> Tensor:
    """The generalised Jensen-Shannon divergence at β = 1/2 and τ = 1, as TRL writes it."""
    log_q, log_p = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    log_m = torch.logsumexp(torch.stack([log_q + math.log(0.5), log_p + math.log(0.5)]), dim=0)
    kl_teacher = F.kl_div(log_m, log_p, log_target=True, reduction="batchmean")
    return 0.5 * kl_teacher + 0.5 * F.kl_div(log_m, log_q, log_target=True, reduction="batchmean")


def gaussian_kl(mean_s: Tensor, log_var_s: Tensor, mean_t: Tensor, log_var_t: Tensor) -> Tensor:
    d = log_var_s - log_var_t
    return 0.5 * (d.exp() + (mean_t - mean_s).square() * (-log_var_t).exp() - 1 - d).mean(dim=-1).mean()


def dkd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Decoupled distillation as mdistiller writes it; the label's class is pushed down by 1000 in place of removed."""
    is_label = F.one_hot(labels, student.shape[1]).bool()
    q, p = F.softmax(student / TEMPERATURE, dim=1), F.softmax(teacher / TEMPERATURE, dim=1)
    q_two = torch.stack([(q * is_label).sum(1), (q * ~is_label).sum(1)], dim=1)
    p_two = torch.stack([(p * is_label).sum(1), (p * ~is_label).sum(1)], dim=1)
    rows = student.shape[0]
    tckd = F.kl_div(torch.log(q_two), p_two, reduction="sum") * TEMPERATURE**2 / rows
    p_others = F.softmax(teacher / TEMPERATURE - 1000.0 * is_label, dim=1)
    log_q_others = F.log_softmax(student / TEMPERATURE - 1000.0 * is_label, dim=1)
    nckd = F.kl_div(log_q_others, p_others, reduction="sum") * TEMPERATURE**2 / rows
    return DKD_ALPHA * tckd + DKD_BETA * nckd


def unikd(
    student: Tensor,
    teacher: Tensor,
    mean_s: Tensor,
    log_var_s: Tensor,
    mean_t: Tensor,
    log_var_t: Tensor,
    labels: Tensor,
) -> Tensor:
    feature_kl = gaussian_kl(mean_s, log_var_s, mean_t, log_var_t)
    return F.cross_entropy(student, labels) + UNIKD_ALPHA * feature_kl + UNIKD_BETA * softmax_kl(student, teacher)


def liger_softmax_kl(student: Tensor, teacher: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerKLDIVLoss

    log_q = F.log_softmax(student / TEMPERATURE, dim=-1)
    log_p = F.log_softmax(teacher / TEMPERATURE, dim=-1)
    return LigerKLDIVLoss(reduction="batchmean", log_target=True)(log_q, log_p) * TEMPERATURE * TEMPERATURE


def liger_jsd(student: Tensor, teacher: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerJSD

    return LigerJSD(beta=0.5)(F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1))

"""What codebases that are in no package index compute, restated from their papers and published behaviour.

The conformance table compares with these if it cannot compare with the package itself. Plain PyTorch in the dtype of
the inputs, using `torch.nn.functional.kl_div` as these codebases do. Contains only what a case of `presets` uses.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def kd_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float) -> Tensor:
    """Return mdistiller's loss: the mean over everything but the classes."""
    return _terms(logits_student, logits_teacher, temperature).sum(1).mean() * temperature**2


def dkd_loss(
    logits_student: Tensor, logits_teacher: Tensor, target: Tensor, alpha: float, beta: float, temperature: float
) -> Tensor:
    """Return mdistiller's loss: the target is removed from NCKD by a logit lower by 1000."""
    is_target = F.one_hot(target.reshape(-1), logits_student.shape[1]).to(logits_student)
    scale = temperature**2 / target.shape[0]
    p, q = (_two_classes(F.softmax(x / temperature, dim=1), is_target) for x in (logits_teacher, logits_student))
    tckd = F.kl_div(q.log(), p, reduction="sum") * scale
    others_p = F.softmax(logits_teacher / temperature - 1000.0 * is_target, dim=1)
    others_log_q = F.log_softmax(logits_student / temperature - 1000.0 * is_target, dim=1)
    nckd = F.kl_div(others_log_q, others_p, reduction="sum") * scale
    return alpha * tckd + beta * nckd


def standardized_kd_loss(
    logits_student_in: Tensor, logits_teacher_in: Tensor, temperature: float, logit_stand: bool
) -> Tensor:
    """Return the fork's loss: standardised along the last axis, softmax along the first after the batch."""
    student, teacher = _standardized(logit_stand, logits_student_in, logits_teacher_in)
    return kd_loss(student, teacher, temperature)


def standardized_dkd_loss(
    logits_student_in: Tensor,
    logits_teacher_in: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    logit_stand: bool,
) -> Tensor:
    """Return the fork's loss."""
    student, teacher = _standardized(logit_stand, logits_student_in, logits_teacher_in)
    return dkd_loss(student, teacher, target, alpha, beta, temperature)


class DistillKL(nn.Module):
    """RepDistiller: the sum over N."""

    def __init__(self, T: float) -> None:
        super().__init__()
        self.T = T

    def forward(self, y_s: Tensor, y_t: Tensor) -> Tensor:
        return _terms(y_s, y_t, self.T).sum() * self.T**2 / y_s.shape[0]


class KLDivergence(nn.Module):
    """mmrazor: the reductions of `torch.nn.functional.kl_div`, τ² and a weight."""

    def __init__(
        self, tau: float = 1.0, reduction: str = "batchmean", loss_weight: float = 1.0, teacher_detach: bool = True
    ) -> None:
        super().__init__()
        self.tau, self.reduction, self.loss_weight, self.teacher_detach = tau, reduction, loss_weight, teacher_detach

    def forward(self, preds_S: Tensor, preds_T: Tensor) -> Tensor:
        teacher = preds_T.detach() if self.teacher_detach else preds_T
        log_q, p = F.log_softmax(preds_S / self.tau, dim=1), F.softmax(teacher / self.tau, dim=1)
        return self.loss_weight * self.tau**2 * F.kl_div(log_q, p, reduction=self.reduction)


class ChannelWiseDivergence(nn.Module):
    """mmrazor: the softmax over the positions of each channel, the sum over N·C, τ² and a weight."""

    def __init__(self, tau: float = 1.0, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.tau, self.loss_weight = tau, loss_weight

    def forward(self, preds_S: Tensor, preds_T: Tensor) -> Tensor:
        N, C, H, W = preds_S.shape
        terms = _terms(preds_S.reshape(-1, H * W), preds_T.reshape(-1, H * W), self.tau)
        return self.loss_weight * self.tau**2 * terms.sum() / (N * C)


class DistillationLoss(nn.Module):
    """DeiT: the soft term over N·K, the hard term on the teacher's argmax."""

    def __init__(
        self,
        base_criterion: nn.Module,
        teacher_model: Callable[[Tensor], Tensor],
        distillation_type: str,
        alpha: float,
        tau: float,
    ) -> None:
        super().__init__()
        self.base_criterion, self.teacher_model = base_criterion, teacher_model
        self.distillation_type, self.alpha, self.tau = distillation_type, alpha, tau

    def forward(self, inputs: Tensor, outputs: Any, labels: Tensor) -> Tensor:
        logits, logits_kd = outputs
        base = self.base_criterion(logits, labels)
        with torch.no_grad():
            teacher = self.teacher_model(inputs)
        if self.distillation_type == "hard":
            distillation = F.cross_entropy(logits_kd, teacher.argmax(dim=1))
        else:
            log_q, log_p = (F.log_softmax(x / self.tau, dim=1) for x in (logits_kd, teacher))
            total = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
            distillation = total * self.tau**2 / logits_kd.numel()
        return (1 - self.alpha) * base + self.alpha * distillation


class FlattenedLogitsDistillationLoss(nn.Module):
    """Model Optimizer 0.33: the rows flattened."""

    def __init__(self, temperature: float = 1.0, reduction: str = "batchmean") -> None:
        super().__init__()
        self._temperature, self._reduction = temperature, reduction

    def forward(self, logits_s: Tensor, logits_t: Tensor) -> Tensor:
        log_q = F.log_softmax(logits_s / self._temperature, dim=-1).flatten(0, -2)
        p = F.softmax(logits_t / self._temperature, dim=-1).flatten(0, -2)
        return F.kl_div(log_q, p.detach(), reduction=self._reduction) * self._temperature**2


def _terms(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return F.kl_div(
        F.log_softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1), reduction="none"
    )


def _two_classes(p: Tensor, is_target: Tensor) -> Tensor:
    return torch.stack([(p * is_target).sum(1), (p * (1 - is_target)).sum(1)], dim=1)


def _standardized(logit_stand: bool, *logits: Tensor) -> list[Tensor]:
    if not logit_stand:
        return list(logits)
    return [(x - x.mean(dim=-1, keepdim=True)) / (1e-7 + x.std(dim=-1, keepdim=True)) for x in logits]

"""NKD, knowledge distillation with a normalised loss of the non-target classes (Yang et al., ICCV 2023)."""

from functools import partial

import torch
from torch.nn import functional as F

from unikd_fast.kernels import reference
from unikd_fast.kernels.reference import at_least_fp32
from unikd_fast.losses import dkd_loss
from unikd_fast.losses.stored import dense_logits
from unikd_fast.methods.method import Method, Needs
from unikd_fast.settings import NonNegative, Positive, settings
from unikd_fast.values import Batch, Loss, StudentOutput, Target, TopKLogits


@settings
class NKDSettings:
    """Normalised distillation (Yang et al. 2023): the teacher's target probability, and the others renormalised."""

    ce_weight: NonNegative = 1.0
    """w, weight of the cross-entropy. In a hybrid it is counted once."""
    gamma: NonNegative = 1.5
    """Weight of the non-target classes."""
    temperature: Positive = 1.0
    """Softmax temperature τ of the non-target classes."""


class NKD(Method[NKDSettings]):
    """L = w L_CE - p_y ln q_y - gamma τ² Σ_{k != y} p'_k ln q'_k, averaged over the labelled samples.

    p and q are the teacher's and the student's probabilities at τ = 1; p' and q' those at τ over the classes other than
    the label y, renormalised. As in the published code (cls_KD), p_y and q_y stay at τ = 1 whatever τ is, and the label
    of a mixed sample is its heaviest class. The published gamma and τ are 1.5 and 1 on ImageNet, 3.5 and 3 on CIFAR-100
    (ResNet-34 to ResNet-18). Tables that call logit standardisation "NKD" mean another method, see `KD`.
    """

    settings_class = NKDSettings
    needs = Needs(labels=True, two_classes=True)

    @property
    def term_names(self) -> tuple[str, ...]:
        return ("ce", "nkd_target", "nkd_non_target")

    def loss(self, student: StudentOutput, target: Target | None, batch: Batch) -> Loss:
        assert target is not None
        assert not isinstance(target.logits, TopKLogits), "all logits are needed"
        labels = batch.labels.argmax(dim=-1) if batch.labels.is_floating_point() else batch.labels
        ce = reference.cross_entropy(student.logits, batch.labels, label_smoothing=self.label_smoothing)
        # The cross-entropy of p' and q' is the divergence, which is fused, plus the entropy of p', a constant.
        divergence = dkd_loss(
            student.logits,
            target.logits,
            labels,
            alpha=0.0,
            beta=1.0,
            temperature=self.settings.temperature,
            impl=self.impl,
        )
        ignored = reference.is_ignored(labels, -100)
        label = labels.long().masked_fill(ignored, 0)[:, None]
        mean = partial(
            reference.reduce_rows, reduction="batchmean", classes=student.logits.shape[-1], ignore_mask=ignored
        )
        with torch.no_grad():
            teacher = at_least_fp32(dense_logits(target.logits))
            p_y = teacher.softmax(dim=-1).gather(-1, label)
            others = teacher.scatter(-1, label, -torch.inf) / self.settings.temperature
            entropy = self.settings.temperature**2 * mean(torch.special.entr(others.softmax(dim=-1)).sum(dim=-1))
        log_q_y = F.log_softmax(at_least_fp32(student.logits), dim=-1).gather(-1, label)
        of_target, of_others = mean(-(p_y * log_q_y).squeeze(-1)), divergence + entropy
        total = self.ce_weight * ce + of_target + self.settings.gamma * of_others
        terms = {"ce": ce.detach(), "nkd_target": of_target.detach(), "nkd_non_target": of_others.detach()}
        return Loss(total, terms)

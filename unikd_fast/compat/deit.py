"""Drop-in for the loss of DeiT: `DistillationLoss` of losses.py."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unikd_fast.compat._kl_div import kl_div

_TYPES = ("none", "soft", "hard")


class DistillationLoss(nn.Module):
    """DeiT's `DistillationLoss`: (1 - α) base + α distillation.

        soft: τ² / (N K) Σ p ( ln p - ln q ),    p = softmax_1(z_t / τ),  q = softmax_1(z_s / τ)
        hard: CE(z_s, argmax_1 z_t)

    The soft term is divided by the number of elements, classes included, as in DeiT: K times less than "batchmean".
    It is computed in fp32 and returned so, where DeiT keeps the dtype of the logits. The teacher runs under no_grad.

    Args:
        base_criterion: (outputs, labels) -> loss.
        teacher_model: inputs -> logits (N, K).
        distillation_type: "none", "soft" or "hard".
        alpha: α.
        tau: τ > 0, of the soft term.

    Raises:
        ValueError: an unknown distillation_type, where DeiT asserts.
    """

    def __init__(
        self,
        base_criterion: nn.Module,
        teacher_model: nn.Module | Callable[[Tensor], Tensor],
        distillation_type: str,
        alpha: float,
        tau: float,
    ) -> None:
        super().__init__()
        if distillation_type not in _TYPES:
            raise ValueError(
                f"DistillationLoss: distillation_type must be one of {', '.join(_TYPES)}, got {distillation_type!r}"
            )
        self.base_criterion = base_criterion
        self.teacher_model = teacher_model
        self.distillation_type = distillation_type
        self.alpha = alpha
        self.tau = tau

    def forward(self, inputs: Tensor, outputs: Tensor | tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        """Return the loss.

        Args:
            inputs: what the teacher sees.
            outputs: the student's logits (N, K), or a pair: those of the class token and of the distillation token.
            labels: for the base criterion.

        Raises:
            ValueError: no pair of logits where the teacher has a say.
        """
        logits, logits_kd = (outputs, None) if isinstance(outputs, Tensor) else outputs
        base_loss = self.base_criterion(logits, labels)
        if self.distillation_type == "none":
            return base_loss
        if logits_kd is None:
            raise ValueError(
                f"DistillationLoss: distillation_type {self.distillation_type!r} needs outputs to be a pair of logits, "
                f"got one tensor; return those of the class token and of the distillation token from the student"
            )
        with torch.no_grad():
            teacher_logits = self.teacher_model(inputs)
        if self.distillation_type == "soft":
            loss = kl_div(logits_kd, teacher_logits, temperature=self.tau, reduction="mean", dim=1)
        else:
            loss = F.cross_entropy(logits_kd, teacher_logits.argmax(dim=1))
        return base_loss * (1 - self.alpha) + loss * self.alpha

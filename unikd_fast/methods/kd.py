"""Knowledge distillation of the logits (Hinton et al. 2015; Eq. 1-2 of the UniKD paper)."""

from torch import Tensor

from unikd_fast.losses import LossTerms, unikd_loss
from unikd_fast.methods.method import Method
from unikd_fast.values import StudentOutput, Target


class KD(Method):
    """L = w L_CE + beta τ² KL(p_t(τ) || p_s(τ)).

    Args:
        ce_weight: w; 0.1 in the CIFAR literature, 0.5 on ImageNet.
        beta: 0.9 in the CIFAR literature, 0.5 on ImageNet.
        temperature: τ.
        scale_by_t2: with the factor τ².
        label_smoothing: of the cross-entropy.
        impl: implementation of the losses, see unikd_loss.
    """

    needs_levels = False

    def __init__(
        self,
        *,
        ce_weight: float = 0.1,
        beta: float = 0.9,
        temperature: float = 4.0,
        scale_by_t2: bool = True,
        label_smoothing: float = 0.0,
        impl: str = "auto",
    ) -> None:
        self.ce_weight, self.beta = ce_weight, beta
        self.temperature, self.scale_by_t2 = temperature, scale_by_t2
        self.label_smoothing, self.impl = label_smoothing, impl

    def loss(self, student: StudentOutput, target: Target | None, labels: Tensor) -> LossTerms:
        assert target is not None
        return unikd_loss(
            student.logits,
            target.logits,
            labels,
            ce_weight=self.ce_weight,
            beta=self.beta,
            temperature=self.temperature,
            scale_by_t2=self.scale_by_t2,
            label_smoothing=self.label_smoothing,
            impl=self.impl,
        )

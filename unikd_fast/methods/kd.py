"""Knowledge distillation of the logits (Hinton et al. 2015; Eq. 1-2 of the UniKD paper)."""

from unikd_fast.kernels import reference
from unikd_fast.losses import softmax_kl, unikd_loss
from unikd_fast.methods.method import Method, Needs
from unikd_fast.values import Batch, Loss, StudentOutput, Target


class KD(Method):
    """L = w L_CE + beta τ² KL(p_t(τ) || p_s(τ)).

    With logit standardisation (Sun et al., CVPR 2024) the KL is that of (z - mean z) / (std z + 1e-7) in place of the
    logits z, on both sides, each row by itself, std unbiased, with the gradient through mean and std; the cross-entropy
    sees z. Published weights on CIFAR: w = 1, beta = 9, τ = 2 or 3.

    Args:
        ce_weight: w; 0.1 in the CIFAR literature, 0.5 on ImageNet.
        beta: 0.9 in the CIFAR literature, 0.5 on ImageNet.
        temperature: τ.
        scale_by_t2: with the factor τ².
        standardized: with logit standardisation.
        label_smoothing: of the cross-entropy.
        impl: implementation of the losses, see unikd_loss.
    """

    def __init__(
        self,
        *,
        ce_weight: float = 0.1,
        beta: float = 0.9,
        temperature: float = 4.0,
        scale_by_t2: bool = True,
        standardized: bool = False,
        label_smoothing: float = 0.0,
        impl: str = "auto",
    ) -> None:
        self.ce_weight, self.beta = ce_weight, beta
        self.temperature, self.scale_by_t2 = temperature, scale_by_t2
        self.standardized, self.label_smoothing, self.impl = standardized, label_smoothing, impl
        self.needs = self.needs_with(standardized=standardized)

    @classmethod
    def needs_with(cls, *, standardized: bool) -> Needs:
        """What it needs: a row of one class has no standard deviation."""
        return cls.needs._replace(two_classes=standardized)

    @property
    def term_names(self) -> tuple[str, ...]:
        return ("ce", "logit_kl")

    def loss(self, student: StudentOutput, target: Target | None, batch: Batch) -> Loss:
        assert target is not None
        if self.standardized:
            return self._standardized_loss(student, target, batch)
        found = unikd_loss(
            student.logits,
            target.logits,
            batch.labels,
            ce_weight=self.ce_weight,
            beta=self.beta,
            temperature=self.temperature,
            scale_by_t2=self.scale_by_t2,
            label_smoothing=self.label_smoothing,
            impl=self.impl,
        )
        return Loss(found.total, {"ce": found.ce, "logit_kl": found.logit_kl})

    def _standardized_loss(self, student: StudentOutput, target: Target, batch: Batch) -> Loss:
        ce = reference.cross_entropy(student.logits, batch.labels, label_smoothing=self.label_smoothing)
        logit_kl = softmax_kl(
            student.logits,
            target.logits,
            temperature=self.temperature,
            scale_by_t2=self.scale_by_t2,
            standardized=True,
            impl=self.impl,
        )
        total = self.ce_weight * ce + self.beta * logit_kl
        return Loss(total, {"ce": ce.detach(), "logit_kl": logit_kl.detach()})


class StudentAlone(Method):
    """L = L_CE.

    Args:
        label_smoothing: of the cross-entropy.
    """

    needs = Needs(teacher=False)

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def loss(self, student: StudentOutput, target: Target | None, batch: Batch) -> Loss:
        ce = reference.cross_entropy(student.logits, batch.labels, label_smoothing=self.label_smoothing)
        return Loss(self.ce_weight * ce, {"ce": ce.detach()})

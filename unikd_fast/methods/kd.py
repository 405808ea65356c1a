"""Knowledge distillation of the logits (Hinton et al. 2015; Eq. 1-2 of the UniKD paper)."""

from unikd_fast.kernels import reference
from unikd_fast.losses import softmax_kl, unikd_loss
from unikd_fast.methods.method import Method, Needs, NoSettings
from unikd_fast.settings import NonNegative, Positive, settings
from unikd_fast.values import Batch, Loss, StudentOutput, Target


@settings
class KDSettings:
    """Knowledge distillation of the logits (Hinton et al. 2015)."""

    ce_weight: NonNegative = 0.1
    """w, weight of the cross-entropy: 0.1 in the CIFAR literature, 0.5 on ImageNet. In a hybrid it is counted once."""
    beta: NonNegative = 0.9
    """Weight of the KL: 0.9 in the CIFAR literature, 0.5 on ImageNet."""
    temperature: Positive = 4.0
    """Softmax temperature τ: 4 on CIFAR, 1 on ImageNet."""
    scale_by_t2: bool = True
    """Multiply the KL by τ². Eq. 1 of the UniKD paper has no τ²; without it the gradient shrinks as 1/τ²."""
    standardized: bool = False
    """Logit standardisation (Sun et al. 2024): each sample's logits to mean 0 and standard deviation 1 before the KL.
    Published with ce_weight 1, beta 9 and temperature 2."""


class KD(Method[KDSettings]):
    """L = w L_CE + beta τ² KL(p_t(τ) || p_s(τ)).

    With logit standardisation (Sun et al., CVPR 2024) the logits z in the KL are replaced by (z - mean z) / (std z +
    1e-7), for student and teacher, row by row, with the unbiased std and with gradients through mean and std; the
    cross-entropy uses z. Published weights on CIFAR: w = 1, beta = 9, τ = 2 or 3.
    """

    settings_class = KDSettings
    accepts_top_k = True

    @classmethod
    def needs_of(cls, settings: KDSettings) -> Needs:
        """Return what the method needs: a row of one class has no standard deviation."""
        return cls.needs._replace(two_classes=settings.standardized)

    @property
    def term_names(self) -> tuple[str, ...]:
        return ("ce", "logit_kl")

    def loss(self, student: StudentOutput, target: Target | None, batch: Batch) -> Loss:
        assert target is not None
        if self.settings.standardized:
            return self._standardized_loss(student, target, batch)
        found = unikd_loss(
            student.logits,
            target.logits,
            batch.labels,
            ce_weight=self.ce_weight,
            beta=self.settings.beta,
            temperature=self.settings.temperature,
            scale_by_t2=self.settings.scale_by_t2,
            label_smoothing=self.label_smoothing,
            impl=self.impl,
        )
        return Loss(found.total, {"ce": found.ce, "logit_kl": found.logit_kl})

    def _standardized_loss(self, student: StudentOutput, target: Target, batch: Batch) -> Loss:
        ce = reference.cross_entropy(student.logits, batch.labels, label_smoothing=self.label_smoothing)
        logit_kl = softmax_kl(
            student.logits,
            target.logits,
            temperature=self.settings.temperature,
            scale_by_t2=self.settings.scale_by_t2,
            standardized=True,
            impl=self.impl,
        )
        total = self.ce_weight * ce + self.settings.beta * logit_kl
        return Loss(total, {"ce": ce.detach(), "logit_kl": logit_kl.detach()})


class StudentAlone(Method[NoSettings]):
    """L = L_CE: the baseline of every comparison, and how teachers are trained."""

    needs = Needs(teacher=False, labels=True)

    def loss(self, student: StudentOutput, target: Target | None, batch: Batch) -> Loss:
        ce = reference.cross_entropy(student.logits, batch.labels, label_smoothing=self.label_smoothing)
        return Loss(self.ce_weight * ce, {"ce": ce.detach()})

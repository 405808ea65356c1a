"""Decoupled knowledge distillation (Zhao et al., CVPR 2022)."""

from unikd_fast.kernels import reference
from unikd_fast.losses import dkd_loss
from unikd_fast.methods.context import RunContext
from unikd_fast.methods.method import Method, Needs, Ramp
from unikd_fast.settings import NonNegative, Positive, settings
from unikd_fast.values import Batch, Loss, StudentOutput, Target, TopKLogits


@settings
class DKDSettings:
    """Decoupled distillation (Zhao et al. 2022): separate terms for the target class and the other classes."""

    ce_weight: NonNegative = 1.0
    """w, weight of the cross-entropy. In a hybrid it is counted once."""
    alpha: NonNegative = 1.0
    """Weight of TCKD, the target class against the others."""
    beta: NonNegative = 8.0
    """Weight of NCKD, the other classes among themselves: 2 to 8 in the CIFAR literature, depending on the networks."""
    temperature: Positive = 4.0
    """Softmax temperature τ: 4 on CIFAR, 1 on ImageNet."""
    ramp_epochs: NonNegative | None = None
    """Warm-up: epochs over which r rises linearly from 0. If null, 20, but at most 8 % of the run."""
    standardized: bool = False
    """Logit standardisation, as in kd. Published with temperature 2, and alpha and beta 9 times their usual values."""


class DKD(Method[DKDSettings]):
    """L = w L_CE + r(t) τ² (alpha TCKD + beta NCKD), Eq. 7 of the paper; r rises linearly from 0 to 1.

        TCKD = KL( (p_y, 1 - p_y) || (q_y, 1 - q_y) ),    NCKD = KL( p without y || q without y, both renormalised )

    for the teacher's p, the student's q and the label y, at temperature τ. Differences to the published code
    (mdistiller): its r is that of the epoch, 1/20 in the first, ours that of the step, from 0; it removes y from NCKD
    by a logit lower by 1000, here y is left out; its ln(1 - q_y) is -inf where 1 - q_y underflows, here it is finite.
    """

    settings_class = DKDSettings
    needs = Needs(labels=True, hard_labels=True, two_classes=True)

    def __init__(self, settings: DKDSettings, context: RunContext) -> None:
        super().__init__(settings, context)
        self.ramp = Ramp(1.0, epochs=context.ramp(settings.ramp_epochs), device=context.device)

    @property
    def term_names(self) -> tuple[str, ...]:
        return ("ce", "dkd_target", "dkd_non_target")

    def set_progress(self, epochs: float) -> None:
        self.ramp.set_progress(epochs)

    def loss(self, student: StudentOutput, target: Target | None, batch: Batch) -> Loss:
        assert target is not None
        assert not isinstance(target.logits, TopKLogits), "all logits are needed"
        ce = reference.cross_entropy(student.logits, batch.labels, label_smoothing=self.label_smoothing)
        # Computed separately for the log.
        of_target, of_others = (
            dkd_loss(
                student.logits,
                target.logits,
                batch.labels,
                alpha=alpha,
                beta=beta,
                temperature=self.settings.temperature,
                standardized=self.settings.standardized,
                impl=self.impl,
            )
            for alpha, beta in ((1.0, 0.0), (0.0, 1.0))
        )
        total = self.ce_weight * ce + self.ramp.value * (
            self.settings.alpha * of_target + self.settings.beta * of_others
        )
        terms = {"ce": ce.detach(), "dkd_target": of_target.detach(), "dkd_non_target": of_others.detach()}
        return Loss(total, terms)

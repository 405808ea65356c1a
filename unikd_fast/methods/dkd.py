"""Decoupled knowledge distillation (Zhao et al., CVPR 2022)."""

import torch

from unikd_fast.kernels import reference
from unikd_fast.losses import dkd_loss
from unikd_fast.methods.method import Method, Needs, Ramp
from unikd_fast.values import Batch, Loss, StudentOutput, Target, TopKLogits


class DKD(Method):
    """L = w L_CE + r(t) τ² (alpha TCKD + beta NCKD), Eq. 7 of the paper; r rises linearly from 0 to 1.

        TCKD = KL( (p_y, 1 - p_y) || (q_y, 1 - q_y) ),    NCKD = KL( p without y || q without y, both renormalised )

    for the teacher's p, the student's q and the label y, at temperature τ. Where the published code (mdistiller)
    differs: its r is that of the epoch, 1/20 in the first, ours that of the step, from 0; it takes y out of NCKD by
    a logit 1000 lower, here it is left out; its ln(1 - q_y) is -inf where 1 - q_y underflows, here it is finite.

    Args:
        ce_weight: w.
        alpha: of the target class against the others.
        beta: of the others among themselves; 2 to 8 in the CIFAR literature, by pair of networks.
        temperature: τ.
        ramp_epochs: epochs over which r rises; 0: r = 1 from the start.
        standardized: logit standardisation of both sides, see `KD`.
        label_smoothing: of the cross-entropy.
        impl: implementation of the losses, see `dkd_loss`.
        device: of the ramp.
    """

    needs = Needs(hard_labels=True, two_classes=True)

    def __init__(
        self,
        *,
        ce_weight: float = 1.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        ramp_epochs: float = 20.0,
        standardized: bool = False,
        label_smoothing: float = 0.0,
        impl: str = "auto",
        device: torch.device | str = "cpu",
    ) -> None:
        self.ce_weight, self.alpha, self.beta = ce_weight, alpha, beta
        self.temperature, self.standardized = temperature, standardized
        self.ramp = Ramp(1.0, epochs=ramp_epochs, device=device)
        self.label_smoothing, self.impl = label_smoothing, impl

    @property
    def term_names(self) -> tuple[str, ...]:
        return ("ce", "dkd_target", "dkd_non_target")

    def set_progress(self, epochs: float) -> None:
        self.ramp.set_progress(epochs)

    def loss(self, student: StudentOutput, target: Target | None, batch: Batch) -> Loss:
        assert target is not None
        assert not isinstance(target.logits, TopKLogits), "all logits are needed"
        ce = reference.cross_entropy(student.logits, batch.labels, label_smoothing=self.label_smoothing)
        # Each part by itself, so that the log can tell them apart.
        of_target, of_others = (
            dkd_loss(
                student.logits,
                target.logits,
                batch.labels,
                alpha=alpha,
                beta=beta,
                temperature=self.temperature,
                standardized=self.standardized,
                impl=self.impl,
            )
            for alpha, beta in ((1.0, 0.0), (0.0, 1.0))
        )
        total = self.ce_weight * ce + self.ramp.value * (self.alpha * of_target + self.beta * of_others)
        terms = {"ce": ce.detach(), "dkd_target": of_target.detach(), "dkd_non_target": of_others.detach()}
        return Loss(total, terms)

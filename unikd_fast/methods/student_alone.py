"""The student alone: cross-entropy, no teacher. The baseline of every comparison, and how teachers are trained."""

from unikd_fast.kernels import reference
from unikd_fast.methods.method import Method, Needs
from unikd_fast.values import Batch, Loss, StudentOutput, Target


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

"""The student alone: cross-entropy, no teacher. The baseline of every comparison, and how teachers are trained."""

from torch import Tensor

from unikd_fast.kernels import reference
from unikd_fast.losses import LossTerms
from unikd_fast.methods.method import Method
from unikd_fast.values import StudentOutput, Target


class StudentAlone(Method):
    """L = L_CE.

    Args:
        label_smoothing: of the cross-entropy.
    """

    needs_teacher = False
    needs_levels = False

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def loss(self, student: StudentOutput, target: Target | None, labels: Tensor) -> LossTerms:
        ce = reference.cross_entropy(student.logits, labels, label_smoothing=self.label_smoothing)
        zero = ce.new_zeros(())
        return LossTerms(ce, ce.detach(), zero, zero)

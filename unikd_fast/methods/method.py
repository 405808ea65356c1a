"""The shape of a distillation method."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from unikd_fast.losses import LossTerms
from unikd_fast.values import Features, StudentOutput, Target


class Method:
    """What a method adds to a student and a teacher. The engine calls, in this order:

    once: ``prepare`` with the teacher's features of many batches;
    every micro-batch: ``target`` (teacher's side), ``loss``, then ``train_head`` after the student's backward pass;
    every optimiser step: ``set_progress``.
    """

    needs_teacher: ClassVar[bool] = True
    needs_levels: ClassVar[bool] = True
    adapter: nn.Module | None = None
    """The student's side with parameters of its own, levels -> (N, D); trained with the student."""
    companion: nn.Module | None = None
    """Further parameters that are trained with the student, but used by ``loss`` only."""

    def prepare(self, batches: Iterable[Features]) -> None:
        """Fits what must be ready before the student's first step; draws from ``batches`` only what it needs."""

    def set_progress(self, epochs: float) -> None:
        """Tells the method how many epochs the student has trained, for ramps."""

    def target(self, teacher: Features) -> Target:
        """The teacher's side of a step. ``teacher`` carries no gradient."""
        return Target(teacher.logits)

    def loss(self, student: StudentOutput, target: Target | None, labels: Tensor) -> LossTerms:
        """The loss of one micro-batch and its terms."""
        raise NotImplementedError

    def train_head(self, terms: LossTerms, *, accumulation_steps: int, update: bool) -> None:
        """Trains what has an optimiser of its own; ``update`` on the last micro-batch of an optimiser step."""

    def indicators(self, teacher: Features, labels: Tensor) -> dict[str, Tensor]:
        """0-d figures about the method's own parts on one batch, averaged and logged at every evaluation."""
        return {}

    @property
    def uncacheable(self) -> str | None:
        """Why the teacher's side of a step is no constant of the view, and cannot be cached; None if it is one."""
        return None

    @property
    def fitted_head(self) -> nn.Module | None:
        """What ``prepare`` fits and ``target`` runs, fixed from then on."""
        return None

    @property
    def head_settings(self) -> dict[str, Any]:
        """What decides how a ``fitted_head`` is built and fitted, besides its first weights and the batches."""
        return {}

    def adopt_head(self, state: Mapping[str, Tensor]) -> None:
        """Takes the state of a ``fitted_head`` that was fitted before; ``prepare`` is then not called."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the student's side."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what ``state_dict`` gave; ``prepare`` is then not called."""

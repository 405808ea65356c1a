"""The shape of a distillation method."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from unikd_fast.methods.context import RunContext
from unikd_fast.settings import settings
from unikd_fast.values import Batch, Features, Loss, StudentOutput, Target


class Needs(NamedTuple):
    """What a method needs besides the student's and the teacher's logits; the engine provides this and no more.

    What stands here of a network's features holds for student and teacher alike, unless it names one of them.
    """

    teacher: bool = True
    levels: bool = False  # Features.levels
    before_activation: bool = False  # Features.before_activation
    teacher_before_activation: bool = False  # the same, of the teacher alone
    embedding: bool = False  # Features.embedding
    second_view: bool = False  # Batch.second, and the logits of both networks for it
    teacher_batch_statistics: bool = False  # the teacher's BatchNorms normalise by each batch, as in training
    teacher_network: bool = False  # the teacher's own blocks, as functions that a gradient can pass through
    hard_labels: bool = False  # one class a sample, so no mixup or CutMix
    two_classes: bool = False  # at least two classes in the data
    whole_head: bool = False  # the companion's weights whole in the loss, which ZeRO stage 3 shards

    def union(self, other: "Needs") -> "Needs":
        """What two methods need together."""
        return Needs(*(ours or theirs for ours, theirs in zip(self, other, strict=True)))

    def before_activation_of(self, role: str) -> bool:
        """Whether Features.before_activation of a network, "student" or "teacher", is needed."""
        return self.before_activation or (self.teacher_before_activation and role == "teacher")

    @property
    def beyond_outputs(self) -> str | None:
        """What of this is not among the outputs that a cache stores for a view, in words; None: nothing."""
        named = {
            "the teacher's feature levels": self.levels,
            "its features before activation": self.before_activation_of("teacher"),
            "its embeddings": self.embedding,
            "its logits for a second view": self.second_view,
            "a teacher that normalises by each batch": self.teacher_batch_statistics,
            "the teacher's own blocks": self.teacher_network,
        }
        return " and ".join(name for name, needed in named.items() if needed) or None


@settings
class NoSettings:
    """A method without settings."""


Settings = TypeVar("Settings")


class Method(Generic[Settings]):
    """What a method adds to a student and a teacher. The engine calls, in this order:

    once: ``prepare`` with the teacher's features of many batches;
    every micro-batch: ``target`` (teacher's side), ``loss``, then ``train_head`` after the student's backward pass;
    every optimiser step: ``set_progress``.

    Args:
        settings: the method's own, of its ``settings_class``.
        context: what the run knows.
    """

    settings_class: ClassVar[type] = NoSettings

    needs: Needs = Needs()
    """What the engine must provide. Of the class: it is asked for before the method is built, with networks that
    return it. A hybrid's own is the union of its parts'."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy, the term called "ce", in the total. A hybrid sets it to 0 and counts its own."""
    adapter: nn.Module | None = None
    """The student's side of the method: the student's Features -> any pytree of tensors (`StudentOutput.adapted`). Its
    parameters are trained with the student; it runs where they are whole, under the student's autocast."""
    companion: nn.Module | None = None
    """Further parameters that are trained with the student, but used by ``loss`` only, by calling modules of it."""

    accepts_top_k: ClassVar[bool] = False
    """Whether its loss of the logits can do with the largest of them, at temperature 1."""

    def __init__(self, settings: Settings, context: RunContext) -> None:
        self.settings = settings
        self.needs = self.needs_of(settings)
        self.ce_weight = getattr(settings, "ce_weight", 1.0)
        self.label_smoothing, self.impl = context.label_smoothing, context.impl

    @classmethod
    def needs_of(cls, settings: Settings) -> Needs:
        """Return what the method needs with these settings, before it is built."""
        return cls.needs

    @property
    def term_names(self) -> tuple[str, ...]:
        """Keys of `Loss.terms`, in the order of the log; fixed when the method is built. The total is none of them."""
        return ("ce",)

    def prepare(self, batches: Iterable[Features]) -> None:
        """Fits what must be ready before the student's first step; draws from ``batches`` only what it needs."""

    def set_progress(self, epochs: float) -> None:
        """Tells the method how many epochs the student has trained, for ramps."""

    def target(self, teacher: Features, second: Features | None = None) -> Target:
        """The teacher's side of a step. ``teacher``, and ``second`` of the second view, carry no gradient."""
        return Target(teacher.logits, second_logits=None if second is None else second.logits)

    def loss(self, student: StudentOutput, target: Target | None, batch: Batch) -> Loss:
        """The loss of one micro-batch and its terms."""
        raise NotImplementedError

    def inside(self, student: StudentOutput) -> Any:
        """What ``loss`` makes of the student's output by running further networks, with what autograd keeps of it.

        For an estimate of memory: most methods run none, and what a loss itself keeps is small.
        """
        return None

    def device_bytes(self, batch: int) -> int:
        """Bytes on the device beside the parameters of its modules and what autograd keeps: those that stay for the
        whole run, and those that a step needs for a moment.

        Args:
            batch: samples of a micro-batch.
        """
        return 0

    def train_head(self, loss: Loss, *, accumulation_steps: int, update: bool, leave_out: bool = False) -> None:
        """Trains what has an optimiser of its own; ``update`` on the last micro-batch of an optimiser step.

        With ``leave_out`` that step changes nothing: it was not finite.
        """

    def indicators(self, teacher: Features, labels: Tensor) -> dict[str, Tensor]:
        """0-d figures about the method's own parts on one batch, averaged and logged at every evaluation."""
        return {}

    @property
    def uncacheable(self) -> str | None:
        """Why a cache of the teacher's outputs cannot stand in for the teacher; None: it can."""
        beyond = self.needs.beyond_outputs
        return None if beyond is None else f"{type(self).__name__} needs {beyond}, not only its logits"

    @property
    def uncapturable(self) -> str | None:
        """Why a step cannot be captured in a CUDA graph and replayed; None: it can.

        A step that can reads nothing on the host, and whatever changes between two steps, ramps and counters, is in
        tensors that stay where they are. What the first step alone does (`CRD`) is done before the capture.
        """
        return None

    @property
    def heads(self) -> tuple[nn.Module, ...]:
        """Networks of the method that take the teacher's Features and are trained at some time."""
        return ()

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

    def head_of(self, state: Mapping[str, Any]) -> Mapping[str, Tensor] | None:
        """The ``fitted_head``'s part of what ``state_dict`` gave."""
        return state.get("head")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the student's side."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what ``state_dict`` gave; ``prepare`` is then not called."""


class Ramp:
    """peak min(1, t / T), after t epochs.

    Args:
        peak: the weight from epoch T on.
        epochs: T; 0: the peak from the start.
        device: of the value.

    Attributes:
        value: 0-d fp32, always the same tensor, so that a step needs neither a host read nor a new capture.

    Example:
        >>> ramp = Ramp(4.0, epochs=20)
        >>> ramp.set_progress(5.0)
        >>> ramp.value
        tensor(1.)
    """

    def __init__(self, peak: float, *, epochs: float, device: torch.device | str = "cpu") -> None:
        self.peak, self.epochs = peak, epochs
        self.value: Tensor = torch.full((), peak, dtype=torch.float32, device=device)

    def set_progress(self, epochs: float) -> None:
        """Sets the value for the time after so many epochs."""
        self.value.fill_(self.peak * (min(1.0, epochs / self.epochs) if self.epochs else 1.0))

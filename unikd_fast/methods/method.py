"""The interface of a distillation method."""

from collections.abc import Iterable
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from unikd_fast.methods.context import RunContext
from unikd_fast.methods.head import TeacherHead
from unikd_fast.settings import settings
from unikd_fast.values import Batch, Features, Loss, StudentOutput, Target


class Needs(NamedTuple):
    """What a method needs besides the logits of student and teacher; the engine provides this and no more.

    Features of a network are needed for both student and teacher, unless the name says which.
    """

    teacher: bool = True
    levels: bool = False  # Features.levels
    pooled: bool = False  # their averages alone: a detector gives the levels of its regions in place of its maps
    before_activation: bool = False  # Features.before_activation
    teacher_before_activation: bool = False  # the same, for the teacher alone
    near_objects: bool = False  # RegionBatch.near_objects, of a detector
    embedding: bool = False  # Features.embedding
    second_view: bool = False  # Batch.second, and both networks' logits for it
    teacher_batch_statistics: bool = False  # the teacher's BatchNorms use batch statistics, as in training
    teacher_network: bool = False  # the teacher's own blocks, as functions that gradients can pass through
    labels: bool = False  # the class of every sample, so none without a label
    hard_labels: bool = False  # one class per sample, so no mixup or CutMix
    two_classes: bool = False  # at least two classes in the data
    whole_head: bool = False  # unsharded companion weights in the loss; ZeRO stage 3 shards them

    def union(self, other: "Needs") -> "Needs":
        """Return what two methods need together."""
        return Needs(*(ours or theirs for ours, theirs in zip(self, other, strict=True)))

    def before_activation_of(self, role: str) -> bool:
        """Return whether Features.before_activation of a network, "student" or "teacher", is needed."""
        return self.before_activation or (self.teacher_before_activation and role == "teacher")

    @property
    def beyond_outputs(self) -> str | None:
        """Describe needs that the outputs cached for a view do not cover; None if there are none."""
        named = {
            "the teacher's feature levels": self.levels,
            "its features before activation": self.before_activation_of("teacher"),
            "its embeddings": self.embedding,
            "where objects are": self.near_objects,
            "its logits for a second view": self.second_view,
            "a teacher with batch statistics": self.teacher_batch_statistics,
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
    every micro-batch: ``target`` for the teacher, ``loss``, then ``head.train`` after the student's backward pass;
    every optimiser step: ``set_progress``.

    Args:
        settings: settings of the method, of its ``settings_class``.
        context: what the run knows.
    """

    settings_class: ClassVar[type] = NoSettings

    needs: Needs = Needs()
    """What the engine must provide. An attribute of the class, because it is read before the method is built; a
    hybrid's own is the union of its parts'."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy, the term "ce", in the total. A hybrid sets it to 0 and adds its own."""
    adapter: nn.Module | None = None
    """The part applied to the student: maps its Features to any pytree of tensors (`StudentOutput.adapted`). Its
    parameters are trained with the student; it runs where they are unsharded, under the student's autocast. If it has a
    method ``second``, that is applied to the Features of a second view."""
    companion: nn.Module | None = None
    """Further parameters that are trained with the student, but used only by ``loss``, which calls modules of it."""
    head: TeacherHead | None = None
    """Network on the teacher's Features with an optimiser of its own."""

    accepts_top_k: ClassVar[bool] = False
    """Whether its logit loss can use the top-k logits alone, at temperature 1."""

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
        """Keys of `Loss.terms`, in the order of the log, fixed when the method is built; without the total."""
        return ("ce",)

    def prepare(self, batches: Iterable[Features]) -> None:
        """Fit what must be ready before the student's first step; takes from ``batches`` only what it needs."""

    def set_progress(self, epochs: float) -> None:
        """Set how many epochs the student has trained, for ramps."""

    def target(self, teacher: Features, second: Features | None = None) -> Target:
        """Return the target of a step. ``teacher``, and ``second`` for the second view, have no gradient."""
        return Target(teacher.logits, second_logits=None if second is None else second.logits)

    def loss(self, student: StudentOutput, target: Target | None, batch: Batch) -> Loss:
        """Return the loss of one micro-batch and its terms."""
        raise NotImplementedError

    def inside(self, student: StudentOutput) -> Any:
        """Return what ``loss`` computes from the student's output by running further networks, for a memory estimate.

        Most methods run none, and what a loss itself saves for its backward pass is small.
        """
        return None

    def device_bytes(self, batch: int) -> int:
        """Return the bytes on the device besides module parameters and saved activations: those kept for the whole run,
        and those a step needs temporarily.

        Args:
            batch: number of samples in a micro-batch.
        """
        return 0

    @property
    def uncacheable(self) -> str | None:
        """Say why a cache of the teacher's outputs cannot replace the teacher; None if it can."""
        beyond = self.needs.beyond_outputs
        return None if beyond is None else f"{type(self).__name__} needs {beyond}, not only its logits"

    @property
    def uncapturable(self) -> str | None:
        """Say why a step cannot be captured in a CUDA graph and replayed; None if it can.

        A step that can be captured reads nothing on the host, and keeps whatever changes between steps, such as ramps
        and counters, in the same tensors. Work of the first step alone (`CRD`) is done before the capture.
        """
        return None

    @property
    def fixed_head(self) -> TeacherHead | None:
        """The head, if ``prepare`` fits it and it is fixed from then on: its outputs can be cached."""
        return self.head if self.head is not None and self.head.fixed else None

    def to(self, device: torch.device) -> None:
        """Move the tensors that the method keeps outside of its adapter, companion and head."""
        for name, value in vars(self).items():
            if isinstance(value, Ramp):
                value.value = value.value.to(device)
            elif isinstance(value, Tensor):
                setattr(self, name, value.to(device))
            elif isinstance(value, list) and all(isinstance(each, Tensor) for each in value):
                setattr(self, name, [each.to(device) for each in value])

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold besides the StudentModule and the head."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; ``prepare`` is then not called."""


def check_map_sizes(method: str, student: Tensor, teacher: Tensor) -> None:
    """Refuse maps of a method (N, C, H, W) that cannot be compared place by place.

    Raises:
        ValueError: they differ in H or W.
    """
    if student.shape[2:] != teacher.shape[2:]:
        own, other = (f"{shape[2]} x {shape[3]}" for shape in (student.shape, teacher.shape))
        raise ValueError(
            f"{method}: maps of {own} and of {other} cannot be compared; give images of the size that the method was "
            "built for (image_size)"
        )


class Ramp:
    """peak min(1, t / T), after t epochs.

    Args:
        peak: weight from epoch T on.
        epochs: length T of the ramp. 0 gives the peak from the start.
        device: device of the value.

    Attributes:
        value: current weight, 0-d fp32; always the same tensor, so that a step needs no host read and no new capture.

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
        """Set the value for this number of epochs."""
        self.value.fill_(self.peak * (min(1.0, epochs / self.epochs) if self.epochs else 1.0))

"""What a method can know about its run: networks, data, length."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

Shape = tuple[int, int, int]
Block = Callable[[Tensor], Tensor]
T = TypeVar("T")


class FeatureNetwork(Protocol):
    """The interface of a network that returns its features; `unikd_fast.models.FeatureExtractor` has it."""

    @property
    def level_names(self) -> tuple[str, ...]:
        """Names of the modules whose outputs are the levels, from fine to coarse."""
        ...

    @property
    def level_shapes(self) -> tuple[Shape, ...]:
        """Shape (C_l, H_l, W_l) of each level."""
        ...

    @property
    def embedding_width(self) -> int | None:
        """Width D of the classifier's input, None if it is not returned."""
        ...

    @property
    def classifier_weight(self) -> Tensor:
        """Weight (K, D) of the last linear layer."""
        ...

    @property
    def norms_before_activation(self) -> tuple[str | None, ...]:
        """Path of the BatchNorm that computes each level's pre-activation, None if there is none."""
        ...

    @property
    def plain(self) -> nn.Module:
        """The network itself."""
        ...


@dataclass(frozen=True)
class RunContext:
    """What a run knows before its method is built.

    Attributes:
        student, teacher: networks as built, with the features that the method needs; None if it needs none. The
            teacher's weights are in fp32 and its BatchNorms not folded.
        teacher_blocks: function that returns the teacher split at its levels: the i-th block maps level i to level
            i + 1, the last one to the logits.
        num_classes: number of classes.
        sample_ids, sample_labels: training samples, (M,) int64 on the CPU; a subset keeps its ids in the full set.
        device: device of the method's own tensors.
        total_steps, steps_per_epoch: number of optimiser steps.
        label_smoothing: label smoothing of the cross-entropy.
        impl: implementation of the losses, see `unikd_loss`.
    """

    student: FeatureNetwork | None = None
    teacher: FeatureNetwork | None = None
    teacher_blocks: Callable[[], Sequence[Block]] | None = None
    num_classes: int = 0
    sample_ids: Tensor | None = None
    sample_labels: Tensor | None = None
    device: torch.device | str = "cpu"
    total_steps: int = 1000
    steps_per_epoch: int = 1
    label_smoothing: float = 0.0
    impl: str = "auto"

    @property
    def student_shapes(self) -> tuple[Shape, ...]:
        """Shapes (C_l, H_l, W_l) of the student's levels, from fine to coarse.

        H_l and W_l are 0 for a detector's maps, which are as large as the images, and equal for both networks.
        """
        return _asked(self.student).level_shapes

    @property
    def teacher_shapes(self) -> tuple[Shape, ...]:
        """Shapes (C_l, H_l, W_l) of the teacher's levels, from fine to coarse."""
        return _asked(self.teacher).level_shapes

    @property
    def student_width(self) -> int:
        """Width D of the student's embedding."""
        return _asked(_asked(self.student).embedding_width)

    @property
    def teacher_width(self) -> int:
        """Width D of the teacher's embedding."""
        return _asked(_asked(self.teacher).embedding_width)

    @property
    def has_embeddings(self) -> bool:
        """Whether the networks return their classifiers' inputs, if the method needs them; detectors do not."""
        return _asked(self.student).embedding_width is not None

    @property
    def teacher_norms(self) -> list[nn.BatchNorm2d]:
        """Return the BatchNorms that compute the teacher's levels before their activation, not folded.

        Raises:
            ValueError: a level has none.
        """
        network = _asked(self.teacher)
        for level, norm in zip(network.level_names, network.norms_before_activation, strict=True):
            if norm is None:
                raise ValueError(
                    f"teacher level {level!r} of {type(network.plain).__name__} is not computed by a BatchNorm before "
                    "its activation; use another method, such as unikd, reviewkd, at or kd, or other levels "
                    "(teacher.feature_nodes)"
                )
        found = [network.plain.get_submodule(str(norm)) for norm in network.norms_before_activation]
        norms = [norm for norm in found if isinstance(norm, nn.BatchNorm2d)]
        assert len(norms) == len(found), "the BatchNorms are folded: read them when the method is built"
        return norms

    @property
    def classifier_weight(self) -> Tensor:
        """Return a copy of the teacher's last weight, (K, D)."""
        return _asked(self.teacher).classifier_weight.detach().to(self.device, copy=True)

    def ramp(self, epochs: float | None, *, usual: float = 20.0) -> float:
        """Return the warm-up in epochs: as set, otherwise the literature's, limited to 8 % of the run."""
        return min(usual, 0.08 * self.total_steps / self.steps_per_epoch) if epochs is None else epochs


def _asked(found: T | None) -> T:
    assert found is not None, "a method can only use what it declares in `needs`"
    return found

"""What a method may know of the run that it is built for: networks, data, length."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unikd_fast.data.splits import DataSplits
from unikd_fast.models import FeatureExtractor, LogitsOnly
from unikd_fast.models.blocks import Block, split_at_levels


@dataclass(frozen=True)
class Surroundings:
    """What a run knows before its method is built.

    Attributes:
        student, teacher: the networks as built, with what the method needs; no teacher where it needs none. Feature
            shapes are `level_shapes` and `embedding_width`; the teacher's weights are whole, in fp32 and not folded.
        splits: the data; `num_classes`, and the samples that are trained on with their ids and labels.
        device: where the method's own tensors belong.
        total_steps, steps_per_epoch: optimiser steps of the run.
        label_smoothing: of the cross-entropy.
        impl: implementation of the losses.
    """

    student: FeatureExtractor | LogitsOnly
    teacher: FeatureExtractor | LogitsOnly | None
    splits: DataSplits
    device: torch.device
    total_steps: int
    steps_per_epoch: int
    label_smoothing: float
    impl: str

    @property
    def num_classes(self) -> int:
        return self.splits.num_classes

    @property
    def student_channels(self) -> list[int]:
        """C_l of the student's levels, fine to coarse."""
        return [shape[0] for shape in self.student_shapes]

    @property
    def teacher_channels(self) -> list[int]:
        """C_l of the teacher's levels, fine to coarse."""
        return [shape[0] for shape in self.teacher_shapes]

    @property
    def student_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(C_l, H_l, W_l) of the student's levels."""
        return _extractor(self.student).level_shapes

    @property
    def teacher_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(C_l, H_l, W_l) of the teacher's levels."""
        return _extractor(self.teacher).level_shapes

    @property
    def student_width(self) -> int:
        """D of the student's embedding."""
        return _width(self.student)

    @property
    def teacher_width(self) -> int:
        """D of the teacher's embedding."""
        return _width(self.teacher)

    @property
    def sample_ids(self) -> Tensor:
        """(M,) int64 on the CPU: ids of the training samples; a subset keeps those of the whole split."""
        return torch.as_tensor(self.splits.train.sample_ids)

    @property
    def sample_labels(self) -> Tensor:
        """(M,) int64 on the CPU: their classes."""
        return torch.as_tensor(self.splits.train.labels)

    @property
    def teacher_norms(self) -> list[nn.BatchNorm2d]:
        """The BatchNorm that gives each level of the teacher before its activation, not folded yet.

        Raises:
            ValueError: a level has none.
        """
        network = _extractor(self.teacher)
        for level, norm in zip(network.level_names, network.norms_before_activation, strict=True):
            if norm is None:
                raise ValueError(
                    f"teacher level {level!r} of {type(network.plain).__name__} is not given by a BatchNorm before its "
                    "activation; take another teacher, or other levels (teacher.feature_nodes)"
                )
        found = [network.plain.get_submodule(str(norm)) for norm in network.norms_before_activation]
        norms = [norm for norm in found if isinstance(norm, nn.BatchNorm2d)]
        assert len(norms) == len(found), "they are folded: read them when the method is built"
        return norms

    @property
    def classifier_weights(self) -> tuple[Tensor, Tensor]:
        """(K, D) each: copies of the student's and the teacher's last weights, where embeddings are needed."""
        weights = (_extractor(network).classifier_weight for network in (self.student, self.teacher))
        student, teacher = (weight.detach().to(self.device, torch.float32, copy=True) for weight in weights)
        return student, teacher

    def teacher_blocks(self) -> list[Block]:
        """The teacher cut at its levels, for a method that needs the teacher's network; see `split_at_levels`."""
        return split_at_levels(_extractor(self.teacher))

    def ramp(self, epochs: float) -> float:
        """The epochs of a published warm-up, but at most 8 % of this run."""
        return min(epochs, 0.08 * self.total_steps / self.steps_per_epoch)


def _extractor(network: FeatureExtractor | LogitsOnly | None) -> FeatureExtractor:
    assert isinstance(network, FeatureExtractor), "what a method does not need it cannot ask for"
    return network


def _width(network: FeatureExtractor | LogitsOnly | None) -> int:
    width = _extractor(network).embedding_width
    assert width is not None, "what a method does not need it cannot ask for"
    return width

"""FGFI: a detector's maps are imitated near objects alone (Wang et al., CVPR 2019)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unikd_fast.kernels.reference import at_least_fp32, cross_entropy
from unikd_fast.methods.context import RunContext
from unikd_fast.methods.method import Method, Needs
from unikd_fast.settings import NonNegative, settings
from unikd_fast.values import Batch, Features, Loss, RegionBatch, StudentOutput, Target


@settings
class FGFISettings:
    """The student's maps are regressed onto the teacher's where anchors overlap objects; for detection."""

    weight: NonNegative = 0.01
    """w, weight of the squared difference of the maps at a place, averaged over the places near objects."""


class FGFI(Method[FGFISettings]):
    """L = L_CE + w Σ_l Σ_i M_l |r_l(F_l,s) - F_l,t|² / (2 Σ_l Σ_i M_l), over places i of all levels.

    M_l is 1 at a place of an anchor whose overlap (IoU) with some object is more than half of the largest that an
    anchor of that image has with it; r_l is a 3x3 convolution with ReLU. The authors publish it for networks of one
    level; on a pyramid we join the places of all levels.

    Raises:
        ValueError: the networks have different levels.
    """

    settings_class = FGFISettings
    needs = Needs(levels=True, near_objects=True)

    def __init__(self, settings: FGFISettings, context: RunContext) -> None:
        super().__init__(settings, context)
        student, teacher = (
            [shape[0] for shape in shapes] for shapes in (context.student_shapes, context.teacher_shapes)
        )
        if len(student) != len(teacher):
            raise ValueError(
                f"FGFI: both networks must have the same levels, got {len(student)} of the student and {len(teacher)} "
                "of the teacher; take pyramids of equally many"
            )
        self.adapter: MapAdapters = MapAdapters(student, teacher)

    @property
    def term_names(self) -> tuple[str, ...]:
        return ("ce", "imitation")

    def target(self, teacher: Features, second: Features | None = None) -> Target:
        return Target(teacher.logits, extra=teacher.levels)

    def loss(self, student: StudentOutput, target: Target | None, batch: Batch | RegionBatch) -> Loss:
        assert target is not None
        assert isinstance(batch, RegionBatch)
        assert batch.near_objects is not None
        ce = cross_entropy(student.logits, batch.labels, label_smoothing=self.label_smoothing)
        total = student.logits.new_zeros((), dtype=torch.float32)
        places = student.logits.new_zeros((), dtype=torch.float32)
        for own, other, near in zip(student.adapted, target.extra, batch.near_objects, strict=True):
            squares = (at_least_fp32(own) - at_least_fp32(other)).square().sum(dim=1, keepdim=True)
            total = total + torch.where(near, squares, 0).sum()
            places = places + near.sum()
        imitation = total / (2 * places.clamp(min=1))
        terms = {"ce": ce.detach(), "imitation": imitation.detach()}
        return Loss(self.ce_weight * ce + self.settings.weight * imitation, terms)


class MapAdapters(nn.Module):
    """Maps the student's Features to r_l(F_l), in the teacher's channels.

    Args:
        channels, teacher_channels: channels of each level, from fine to coarse.
    """

    def __init__(self, channels: list[int], teacher_channels: list[int]) -> None:
        super().__init__()
        pairs = zip(channels, teacher_channels, strict=True)
        self.convolutions = nn.ModuleList(nn.Conv2d(own, other, 3, padding=1) for own, other in pairs)
        for convolution in self.convolutions:
            assert isinstance(convolution, nn.Conv2d)
            assert convolution.bias is not None
            nn.init.normal_(convolution.weight, std=1e-4)
            nn.init.zeros_(convolution.bias)

    def forward(self, features: Features) -> tuple[Tensor, ...]:
        return tuple(F.relu(r(level)) for r, level in zip(self.convolutions, features.levels, strict=True))

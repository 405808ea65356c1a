"""Attention transfer: the student's attention maps are matched to the teacher's (Zagoruyko and Komodakis 2017)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unikd_fast.kernels.reference import at_least_fp32, cross_entropy
from unikd_fast.methods.context import RunContext
from unikd_fast.methods.method import Method, Needs
from unikd_fast.settings import NonNegative, settings
from unikd_fast.values import Batch, Features, Loss, StudentOutput, Target


@settings
class ATSettings:
    """Attention maps of the student's levels are matched to the teacher's."""

    weight: NonNegative = 1000.0
    """w, weight of the mean squared differences, summed over levels."""


class AT(Method[ATSettings]):
    """L = L_CE + w Σ_l mean( (a_s - a_t)² ), a = m / |m|, m = mean_c F²: a map (H, W) for each level and sample.

    The larger of two paired levels is first averaged to the size of the smaller.

    The paper uses half the norm of a_s - a_t. RepDistiller and mdistiller use the mean of its squares over samples and
    pixels, which the literature's w = 1000 belongs to; so do we. They pair levels from the fine end, but their networks
    have equally many; we pair the last min(L_s, L_t).
    """

    settings_class = ATSettings
    needs = Needs(levels=True)

    def __init__(self, settings: ATSettings, context: RunContext) -> None:
        super().__init__(settings, context)
        student_shapes, teacher_shapes = context.student_shapes, context.teacher_shapes
        count = min(len(student_shapes), len(teacher_shapes))
        pairs = zip(student_shapes[-count:], teacher_shapes[-count:], strict=True)
        self.adapter: AttentionMaps = AttentionMaps([min(own[1], other[1]) for own, other in pairs])

    @property
    def term_names(self) -> tuple[str, ...]:
        return ("ce", "attention")

    def target(self, teacher: Features, second: Features | None = None) -> Target:
        return Target(teacher.logits, extra=self.adapter(teacher))

    def loss(self, student: StudentOutput, target: Target | None, batch: Batch) -> Loss:
        assert target is not None
        ce = cross_entropy(student.logits, batch.labels, label_smoothing=self.label_smoothing)
        pairs = zip(student.adapted, target.extra, strict=True)
        attention = torch.stack([F.mse_loss(own, other) for own, other in pairs]).sum()
        terms = {"ce": ce.detach(), "attention": attention.detach()}
        return Loss(self.ce_weight * ce + self.settings.weight * attention, terms)


class AttentionMaps(nn.Module):
    """Maps a network's Features to a of its last levels, (N, size²) each, in fp32; has no parameters.

    Args:
        sizes: height and width of each map, from fine to coarse; 0 for a level as it is.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)

    def forward(self, features: Features) -> tuple[Tensor, ...]:
        levels = features.levels[-len(self.sizes) :]
        return tuple(_attention(level, size) for level, size in zip(levels, self.sizes, strict=True))


def _attention(level: Tensor, size: int) -> Tensor:
    level = at_least_fp32(level)  # squares of half-precision features overflow
    if size and level.shape[-1] != size:
        level = F.adaptive_avg_pool2d(level, size)
    return F.normalize(level.square().mean(1).flatten(1))

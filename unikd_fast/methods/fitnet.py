"""FitNet: one level of the student regressed onto the teacher's (Romero et al. 2015)."""

from typing import Annotated

from annotated_types import Ge
from torch import Tensor, nn
from torch.nn import functional as F

from unikd_fast.kernels.reference import at_least_fp32, cross_entropy
from unikd_fast.methods.context import RunContext, Shape
from unikd_fast.methods.method import Method, Needs
from unikd_fast.settings import NonNegative, settings
from unikd_fast.values import Batch, Features, Loss, StudentOutput, Target


@settings
class FitNetSettings:
    """One level of the student is regressed onto the teacher's."""

    weight: NonNegative = 100.0
    """w, weight of the mean squared difference."""
    level: Annotated[int, Ge(0)] = 1
    """Index of the level in each network, 0 for the finest."""


class FitNet(Method[FitNetSettings]):
    """L = L_CE + w mean( (r(F_s) - F_t)² ), where r is a convolution with BatchNorm and ReLU.

    The convolution maps the student's level to the teacher's size: 3x3 with stride 2 from twice the size, a transposed
    4x4 with stride 2 from half of it, otherwise without padding and 1 + H_s - H_t wide.

    The paper first trains the student up to the level by this term alone, and then by KD alone. mdistiller, which the
    figures of the literature come from, trains by the sum from the start, at the second stage after the stem, after its
    ReLU; so do we. As there, levels are counted from the fine end of each network, however many it has.

    Raises:
        ValueError: a network has no such level, or the student's is smaller than the teacher's by a factor other than
            2.
    """

    settings_class = FitNetSettings
    needs = Needs(levels=True)

    def __init__(self, settings: FitNetSettings, context: RunContext) -> None:
        super().__init__(settings, context)
        student_shapes, teacher_shapes = context.student_shapes, context.teacher_shapes
        level = settings.level
        fewest = min(len(student_shapes), len(teacher_shapes))
        if not 0 <= level < fewest:
            raise ValueError(
                f"FitNet: level must be from 0 to {fewest - 1}, got {level}: the student has {len(student_shapes)} "
                f"levels and the teacher {len(teacher_shapes)}; set a smaller distill.fitnet.level"
            )
        self.adapter: Regressor = Regressor(student_shapes[level], teacher_shapes[level], level=level)

    @property
    def term_names(self) -> tuple[str, ...]:
        return ("ce", "hint")

    def target(self, teacher: Features, second: Features | None = None) -> Target:
        return Target(teacher.logits, extra=teacher.levels[self.settings.level])

    def loss(self, student: StudentOutput, target: Target | None, batch: Batch) -> Loss:
        assert target is not None
        ce = cross_entropy(student.logits, batch.labels, label_smoothing=self.label_smoothing)
        # Squares of half-precision features overflow.
        hint = F.mse_loss(at_least_fp32(student.adapted), at_least_fp32(target.extra))
        return Loss(self.ce_weight * ce + self.settings.weight * hint, {"ce": ce.detach(), "hint": hint.detach()})


class Regressor(nn.Module):
    """Maps the student's Features to its level in the teacher's shape, (N, C_t, H_t, W_t).

    Args:
        student_shape, teacher_shape: shapes (C, H, W) of the level in both networks.
        level: its index.
        method: name of the method in errors.
    """

    def __init__(self, student_shape: Shape, teacher_shape: Shape, *, level: int, method: str = "FitNet") -> None:
        super().__init__()
        (own, size, _), (channels, wanted, _) = student_shape, teacher_shape
        self.level = level
        self.convolution: nn.Conv2d | nn.ConvTranspose2d
        if size and size == 2 * wanted:
            self.convolution = nn.Conv2d(own, channels, 3, stride=2, padding=1)
        elif wanted and 2 * size == wanted:
            self.convolution = nn.ConvTranspose2d(own, channels, 4, stride=2, padding=1)
        elif size >= wanted:
            self.convolution = nn.Conv2d(own, channels, 1 + size - wanted)
        else:
            raise ValueError(
                f"{method}: a level of the student must be half as large as the teacher's, or not smaller, got {size} "
                f"x {size} and {wanted} x {wanted} at level {level}; use another level, or name levels that fit "
                "(feature_nodes)"
            )
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, features: Features) -> Tensor:
        return F.relu(self.norm(self.convolution(features.levels[self.level])))

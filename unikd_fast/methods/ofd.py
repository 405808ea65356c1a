"""OFD, the overhaul of feature distillation: levels compared before their activation (Heo et al. 2019)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unikd_fast.kernels.reference import at_least_fp32, cross_entropy
from unikd_fast.methods.context import RunContext
from unikd_fast.methods.method import Method, Needs, check_map_sizes
from unikd_fast.settings import NonNegative, settings
from unikd_fast.values import Batch, Features, Loss, StudentOutput, Target

_RARELY_NEGATIVE = 0.001  # share of negative values below which the normal's conditional mean is not used


@settings
class OFDSettings:
    """Levels before activation are matched to the teacher's, where a ReLU would pass the difference on."""

    weight: NonNegative = 1e-3
    """w, weight of the partial squared differences, summed over channels and pixels; 1e-4 on ImageNet."""
    teacher_batch_statistics: bool = False
    """Let the teacher's BatchNorms use batch statistics, like the authors' code, which keeps the teacher in training
    mode; needs teacher.fold_batch_norm = false."""


class OFD(Method[OFDSettings]):
    """L = L_CE + w Σ_l 2^-(n-l-1) (1/N) Σ d_p( max(F_t, m), r(F_s) ), l = 0 .. n-1, n levels before activation.

    d_p(t, s) is the partial (t - s)²: zero if s <= t <= 0, because the ReLU after it hides the difference. m is the
    mean of a channel's negative values, for a normal with the shift and scale of the teacher's BatchNorm. r is a 1x1
    convolution with BatchNorm.

    The sum is over channels and pixels, the mean over samples, as in the authors' code, whose masked form of d_p is
    used; mdistiller's is the same if m < 0. Two rules come from mdistiller, as the authors' networks always match in
    size and number of levels: the teacher's level is averaged to the student's size (or repeated, if that is larger),
    and the
    last min(L_s, L_t) levels are compared.

    The authors' code keeps the teacher in training mode, so that F_t is normalised by batch statistics, and a sample's
    features depend on the rest of its batch: the distillation term differs by 5 % and its gradient by 6 %. Ours, like
    mdistiller's, is in eval mode unless ``teacher_batch_statistics`` is set, which a teacher with folded BatchNorms
    does not support. The margins m are the same in both.

    Raises:
        ValueError: a level of the teacher is not computed by a BatchNorm, or by one of another width.
    """

    settings_class = OFDSettings
    needs = Needs(before_activation=True)

    def __init__(self, settings: OFDSettings, context: RunContext) -> None:
        super().__init__(settings, context)
        student_shapes, teacher_shapes = context.student_shapes, context.teacher_shapes
        teacher_norms = context.teacher_norms
        widths, channels = [norm.num_features for norm in teacher_norms], [shape[0] for shape in teacher_shapes]
        if widths != channels:
            raise ValueError(
                f"OFD: each level of the teacher needs a BatchNorm, got widths {widths} for levels of "
                f"{channels} channels; pass those that compute the levels before their activation"
            )
        count = min(len(student_shapes), len(teacher_shapes))
        self.sizes = [size for _, size, _ in student_shapes[-count:]]
        self.margins = [negative_mean(norm).to(context.device)[:, None, None] for norm in teacher_norms[-count:]]
        self.adapter: Connectors = Connectors([shape[0] for shape in student_shapes[-count:]], channels[-count:])

    @classmethod
    def needs_of(cls, settings: OFDSettings) -> Needs:
        """Return what the method needs, which is more if the teacher is to use batch statistics."""
        return cls.needs._replace(teacher_batch_statistics=settings.teacher_batch_statistics)

    @property
    def term_names(self) -> tuple[str, ...]:
        return ("ce", "partial_l2")

    def target(self, teacher: Features, second: Features | None = None) -> Target:
        levels = zip(teacher.before_activation[-len(self.sizes) :], self.sizes, strict=True)
        return Target(teacher.logits, extra=tuple(_at_size(at_least_fp32(level), size) for level, size in levels))

    def loss(self, student: StudentOutput, target: Target | None, batch: Batch) -> Loss:
        assert target is not None
        ce = cross_entropy(student.logits, batch.labels, label_smoothing=self.label_smoothing)
        levels = list(zip(student.adapted, target.extra, self.margins, strict=True))
        for own, other, _ in levels:
            check_map_sizes("OFD", own, other)
        finest_first = [partial_l2(own, other, margin) for own, other, margin in levels]
        partial = torch.stack([term / 2**above for above, term in enumerate(reversed(finest_first))]).sum()
        terms = {"ce": ce.detach(), "partial_l2": partial.detach()}
        return Loss(self.ce_weight * ce + self.settings.weight * partial, terms)


class Connectors(nn.Module):
    """Maps the student's Features to r of its last levels before activation, with the teacher's channels.

    Args:
        student_channels, teacher_channels: channels of each level, from fine to coarse.
    """

    def __init__(self, student_channels: Sequence[int], teacher_channels: Sequence[int]) -> None:
        super().__init__()
        pairs = zip(student_channels, teacher_channels, strict=True)
        self.connectors = nn.ModuleList(_connector(own, other) for own, other in pairs)

    def forward(self, features: Features) -> tuple[Tensor, ...]:
        levels = features.before_activation[-len(self.connectors) :]
        return tuple(connector(level) for connector, level in zip(self.connectors, levels, strict=True))


def partial_l2(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """Return (1/N) Σ d_p( max(t, m), s ) in fp32.

    Args:
        student, teacher: levels (N, C, H, W) before activation.
        margin: margin m < 0, (C, 1, 1).

    Example:
        >>> one = torch.ones(1, 1, 1, 1)
        >>> partial_l2(-2 * one, -one, torch.full((1, 1, 1), -0.5)), partial_l2(one, -one, torch.full((1, 1, 1), -0.5))
        (tensor(0.), tensor(2.2500))
    """
    own, other = at_least_fp32(student), at_least_fp32(teacher)
    wanted = torch.maximum(other, margin)
    counts = (own > wanted) | (other > 0)
    return torch.where(counts, (own - wanted).square(), 0.0).sum() / len(own)


def negative_mean(norm: nn.BatchNorm2d) -> Tensor:
    """Return m of each channel, (C,) fp32: E[x | x < 0], x normal with mean b and standard deviation s = |scale|.

        m = b - s φ(b/s) / Φ(-b/s),    but -3 s where Φ(-b/s) <= 0.001

    A channel with s = 0 is constant: m = min(b, 0).
    """
    weight, bias = norm.weight, norm.bias
    std = torch.ones(norm.num_features) if weight is None else weight.detach().cpu().abs()
    mean = torch.zeros(norm.num_features) if bias is None else bias.detach().cpu()
    std, mean = std.double(), mean.double()
    ratio = mean / std.clamp(min=torch.finfo(torch.float32).tiny)
    negative = torch.special.ndtr(-ratio)
    density = (-ratio.square() / 2).exp() / math.sqrt(2 * math.pi)
    usual = mean - std * density / negative.clamp(min=_RARELY_NEGATIVE)
    return torch.where(negative > _RARELY_NEGATIVE, usual, -3 * std).float()


def _connector(own: int, other: int) -> nn.Sequential:
    convolution = nn.Conv2d(own, other, 1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out")
    return nn.Sequential(convolution, nn.BatchNorm2d(other))


def _at_size(level: Tensor, size: int) -> Tensor:
    return level if level.shape[-1] == size else F.adaptive_avg_pool2d(level, size)

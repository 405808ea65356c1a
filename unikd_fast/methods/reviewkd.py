"""ReviewKD (KR): each level of the student, fused with the coarser ones, against the teacher's (Chen et al. 2021)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unikd_fast.kernels.reference import at_least_fp32, cross_entropy
from unikd_fast.methods.context import RunContext
from unikd_fast.methods.method import Method, Needs, Ramp, check_map_sizes
from unikd_fast.settings import NonNegative, PositiveInt, settings
from unikd_fast.values import Batch, Features, Loss, StudentOutput, Target

_CONTEXTS = (4, 2, 1)  # sizes that HCL averages to


@settings
class ReviewKDSettings:
    """The student's levels, each fused with the coarser ones, are matched to the teacher's."""

    weight: NonNegative = 1.0
    """w, weight of the hierarchical context loss: 0.6 to 8 in the literature, depending on the networks."""
    ramp_epochs: NonNegative | None = None
    """T, epochs over which the weight rises linearly from 0. If null, 20, but at most 8 % of the run."""
    width: PositiveInt | None = None
    """Channels inside the fusion modules. If null, the width of the student's embedding, but at most 512."""
    student_before_activation: bool = False
    """Use the student's levels before their activation, like the teacher's: false in the literature on CIFAR, true on
    ImageNet."""


class ReviewKD(Method[ReviewKDSettings]):
    """L = L_CE + w min(1, t / T) Σ_l HCL( G_l, F_l ), after t epochs.

    F_l are the teacher's levels before activation and its embedding; G_l is computed by the student's ABF (`Review`)
    from its own levels and embedding, starting from the coarsest. The last min(L_s, L_t) levels and the embedding are
    compared.

    The student's levels are those after activation, as in the authors' code for CIFAR and in mdistiller, which uses
    those before it on ImageNet. As there, HCL halves the weight for each size it averages to: 1/2, 1/4, 1/8 for 4, 2, 1
    on levels above 4 x 4, and 1/2, 1/4 for 2, 1 on a level of 4 x 4. There t counts whole epochs; ours is fractional.

    The authors' code never calls ``teacher.eval()``, so its teacher uses batch statistics; ours is in eval mode, like
    mdistiller's.

    A detector's levels, those of its pyramid, are before activation already, are not resized, and have no embedding
    besides, as in mdistiller.
    """

    settings_class = ReviewKDSettings
    needs = Needs(levels=True, teacher_before_activation=True, embedding=True)

    def __init__(self, settings: ReviewKDSettings, context: RunContext) -> None:
        super().__init__(settings, context)
        student_shapes, teacher_shapes = context.student_shapes, context.teacher_shapes
        self.count = min(len(student_shapes), len(teacher_shapes))
        self.weight = Ramp(settings.weight, epochs=context.ramp(settings.ramp_epochs), device=context.device)
        student = [shape[0] for shape in student_shapes[-self.count :]]
        teacher = [(channels, size) for channels, size, _ in teacher_shapes[-self.count :]]
        width = settings.width or student[-1]
        if context.has_embeddings:
            student, teacher = [*student, context.student_width], [*teacher, (context.teacher_width, 1)]
            width = settings.width or min(512, context.student_width)
        self.adapter: Review = Review(
            student,
            teacher,
            width=width,
            with_embedding=context.has_embeddings,
            before_activation=settings.student_before_activation,
        )

    @classmethod
    def needs_of(cls, settings: ReviewKDSettings) -> Needs:
        """Return what the method needs, which is more if the student's levels are used before their activation."""
        return cls.needs._replace(before_activation=settings.student_before_activation)

    @property
    def term_names(self) -> tuple[str, ...]:
        return ("ce", "hcl")

    def set_progress(self, epochs: float) -> None:
        self.weight.set_progress(epochs)

    def target(self, teacher: Features, second: Features | None = None) -> Target:
        return Target(teacher.logits, extra=_with_embedding(teacher.before_activation[-self.count :], teacher))

    def loss(self, student: StudentOutput, target: Target | None, batch: Batch) -> Loss:
        assert target is not None
        ce = cross_entropy(student.logits, batch.labels, label_smoothing=self.label_smoothing)
        pairs = list(zip(student.adapted, target.extra, strict=True))
        for own, other in pairs:
            check_map_sizes("ReviewKD", own, other)
        hcl = torch.stack([hierarchical_context_loss(own, other) for own, other in pairs]).sum()
        terms = {"ce": ce.detach(), "hcl": hcl.detach()}
        return Loss(self.ce_weight * ce + self.weight.value * hcl, terms)


class Review(nn.Module):
    """Maps the student's Features to G_l of its last levels and of its embedding, in the shapes of the teacher's.

    Args:
        student_channels: channels of each level, from fine to coarse, then of the embedding.
        teacher_shapes: (C_l, H_l) of each, in the same order.
        width: channels inside the fusion modules.
        with_embedding: whether the last of them is the embedding.
        before_activation: whether the levels are used before their activation.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_shapes: Sequence[tuple[int, int]],
        *,
        width: int,
        with_embedding: bool,
        before_activation: bool,
    ) -> None:
        super().__init__()
        self.before_activation, self._levels = before_activation, len(student_channels) - with_embedding
        last = len(student_channels) - 1
        pairs = zip(student_channels, teacher_shapes, strict=True)
        self.fusions = nn.ModuleList(
            AttentionFusion(own, width, other, size, has_above=index < last)
            for index, (own, (other, size)) in enumerate(pairs)
        )

    def forward(self, features: Features) -> tuple[Tensor, ...]:
        levels = features.before_activation if self.before_activation else features.levels
        inputs = _with_embedding(levels[-self._levels :], features)
        results: list[Tensor] = []
        fused: Tensor | None = None
        for fusion, level in zip(reversed(self.fusions), reversed(inputs), strict=True):
            result, fused = fusion(level, fused)
            results.append(result)
        return tuple(reversed(results))


class AttentionFusion(nn.Module):
    """ABF: a level blended with what was fused from the coarser ones, by two attention maps that need not sum to 1.

        x = N(W_1 F),    (g, h) = sigmoid( W_g (x ⊕ Up(y)) ),    z = g x + h Up(y),    G = N(W_3 z)

    W_1 and W_g are 1x1, W_3 is 3x3, N is BatchNorm, Up is nearest-neighbour upsampling. z is resized to the teacher's
    size, also by nearest neighbour, and is the y of the next finer level. The coarsest has no y: z = x.

    Args:
        channels: channels of F.
        width: channels of x, y and z.
        out_channels, size: channels and size of G, the teacher's; with size 0 G is as large as F.
        has_above: whether there is a coarser level y.
    """

    def __init__(self, channels: int, width: int, out_channels: int, size: int, *, has_above: bool) -> None:
        super().__init__()
        self.size = size
        self.project = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.output = nn.Sequential(
            nn.Conv2d(width, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels)
        )
        self.attention = nn.Conv2d(2 * width, 2, 1) if has_above else None
        for layer in (self.project[0], self.output[0]):
            assert isinstance(layer, nn.Conv2d)
            nn.init.kaiming_uniform_(layer.weight, a=1)

    def forward(self, level: Tensor, above: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return (G, z): (N, C_out, size, size) and (N, width, size, size)."""
        x = self.project(level)
        if self.attention is not None:
            assert above is not None
            above = _nearest(above, x.shape[-2:])
            maps = self.attention(torch.cat([x, above], dim=1)).sigmoid()
            x = maps[:, :1] * x + maps[:, 1:] * above
        x = _nearest(x, (self.size, self.size) if self.size else x.shape[-2:])
        return self.output(x), x


def hierarchical_context_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return HCL: the mean squared difference at full size and averaged to 4 x 4, 2 x 2 and 1 x 1, in fp32.

        ( MSE + Σ_i 2^-i MSE_i ) / ( 1 + Σ_i 2^-i ),    i = 1, 2, .. over those sizes that are smaller than H and W

    Args:
        student, teacher: levels (N, C, H, W).

    Example:
        >>> hierarchical_context_loss(torch.ones(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))
        tensor(1.)
    """
    assert student.shape == teacher.shape
    # Averaging is linear: the difference is averaged once instead of both levels.
    difference = at_least_fp32(student) - at_least_fp32(teacher)
    total, weight, weights = difference.square().mean(), 1.0, 1.0
    for size in _CONTEXTS:
        if size < min(difference.shape[-2:]):
            weight /= 2
            weights += weight
            total = total + weight * F.adaptive_avg_pool2d(difference, size).square().mean()
    return total / weights


def _with_embedding(levels: Sequence[Tensor], features: Features) -> tuple[Tensor, ...]:
    """Append the embedding, if there is one, as a coarsest level of one pixel."""
    if features.embedding is None:
        return tuple(levels)
    return (*levels, features.embedding[:, :, None, None])


def _nearest(level: Tensor, size: Sequence[int]) -> Tensor:
    return level if tuple(level.shape[-2:]) == tuple(size) else F.interpolate(level, size=tuple(size), mode="nearest")

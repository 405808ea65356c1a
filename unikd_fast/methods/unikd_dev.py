"""UniKD as the public development code has it: samples of Gaussians on features, beside the loss of another method."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unikd_fast.kernels.reference import at_least_fp32, cross_entropy
from unikd_fast.losses import softmax_kl
from unikd_fast.methods.context import RunContext
from unikd_fast.methods.method import Method, Needs
from unikd_fast.settings import NonNegative, Positive, settings
from unikd_fast.values import Batch, Features, Loss, StudentOutput, Target

_WIDEST = 512  # of the fusion, as in the code


@settings
class UniKDDevSettings:
    """The public development code's reading of UniKD: features alone, for a sum with dkd or mlkd."""

    ce_weight: NonNegative = 1.0
    """w, weight of the cross-entropy. In a hybrid it is counted once."""
    feature_weight: NonNegative = 1.0
    """a, weight of the divergence between the samples of both networks."""
    head_weight: NonNegative = 1.0
    """b, weight of the divergences of the samples from their own networks' logits, which train the heads."""
    temperature: Positive = 1.0
    """Softmax temperature τ of all three divergences: 1 in the code's form with DKD, 4 in that with MLKD."""
    fusion: Literal["chained", "pooled"] = "chained"
    """What a level is fused with. chained: the result of the coarser ones; pooled: the pooled vector alone, so that the
    finest level is the only one used, as in the code's form with MLKD."""


class UniKDDev(Method[UniKDDevSettings]):
    """L = w L_CE + a d(x_s, x_t) + b [ d(x_s, z_s) + d(x_t, z_t) ],   d(x, y) = τ² KL(softmax(y / τ) || softmax(x / τ))

    x_s and x_t are samples of a Gaussian over the classes for student and teacher, z_s and z_t their logits. Nothing is
    detached: d pulls both samples, and the student's logits towards its sample. A head of two linear layers gives mean
    and log-variance from a pooled vector: the student's is fused (`StudentHead`), the teacher's is its first stage
    before activation. Both heads are trained by this loss. In a sum with mlkd the terms of both views are added.

    This is what a public repository (FabienCode/mdistiller, June 2024) computes. That it is the paper's authors' is
    inferred from its configurations and from a folder ``324_84/UniKD_78.18/epoch_480``, which bears a figure of the
    paper; `UniKD` follows the paper's text instead. It has two forms:

    - ``UniLogitsKD``, 240 epochs: here ``["unikd_dev", "dkd"]`` with τ = 1. At the last commit it passes its head an
      argument too many and can't be built.
    - ``UniMLKD``, 480 epochs: here ``["unikd_dev", "mlkd"]`` with τ = 4. It never passes on a fused level, so each is
      fused with the pooled vector alone, and of these only the finest is used (``fusion = pooled``).

    The levels of the student are those after activation, as in the code's configurations for CIFAR-100.

    Raises:
        ValueError: the networks are detectors, which have no pooled vector.
    """

    settings_class = UniKDDevSettings
    needs = Needs(levels=True, teacher_before_activation=True, embedding=True)

    def __init__(self, settings: UniKDDevSettings, context: RunContext) -> None:
        super().__init__(settings, context)
        if not context.has_embeddings:
            raise ValueError(
                "UniKDDev: the networks need one pooled vector an image, and detectors have none; use unikd, which "
                "takes the features of regions"
            )
        student, teacher = context.student_shapes, context.teacher_shapes
        self.count = min(len(student), len(teacher))
        finest = teacher[-self.count]
        levels = [shape[0] for shape in student[-self.count :]]
        self.adapter: StudentHead = StudentHead(
            levels if settings.fusion == "chained" else levels[:1],
            context.student_width,
            out_channels=finest[0],
            size=finest[1:],
            classes=context.num_classes,
            first=-self.count,
        )
        self.companion = self.teacher_head = SampleHead(finest[0], context.num_classes)

    @property
    def term_names(self) -> tuple[str, ...]:
        return ("ce", "sample_kl", "student_head_kl", "teacher_head_kl")

    def target(self, teacher: Features, second: Features | None = None) -> Target:
        views = [teacher] if second is None else [teacher, second]
        pooled = tuple(at_least_fp32(view.before_activation[-self.count]).mean((2, 3)) for view in views)
        return super().target(teacher, second)._replace(extra=pooled)

    def loss(self, student: StudentOutput, target: Target | None, batch: Batch) -> Loss:
        assert target is not None
        assert isinstance(target.logits, Tensor)
        ce = cross_entropy(student.logits, batch.labels, label_smoothing=self.label_smoothing)
        terms = self._terms(student.logits, student.adapted, target.logits, target.extra[0])
        if student.second_adapted is not None:
            assert student.second_logits is not None and target.second_logits is not None
            second = self._terms(student.second_logits, student.second_adapted, target.second_logits, target.extra[1])
            terms = [first + other for first, other in zip(terms, second, strict=True)]
        between, *heads = terms
        total = self.ce_weight * ce + self.settings.feature_weight * between + self.settings.head_weight * sum(heads)
        values = zip(self.term_names, (ce, *terms), strict=True)
        return Loss(total, {name: value.detach() for name, value in values})

    def _terms(self, logits: Tensor, gaussian: Tensor, teacher: Tensor, pooled: Tensor) -> list[Tensor]:
        """Return d(x_s, x_t), d(x_s, z_s) and d(x_t, z_t) of one view."""
        own, other = sample(gaussian), sample(self.teacher_head(pooled))
        pairs = ((own, other), (own, logits), (other, teacher))
        return [softmax_kl(x, y, temperature=self.settings.temperature, impl=self.impl) for x, y in pairs]


def sample(gaussian: Tensor) -> Tensor:
    """Return m + exp(log v / 2) ε for m and log v (N, 2 K), ε from torch's generator, which a checkpoint keeps: (N, K)
    in fp32."""
    mean, log_var = at_least_fp32(gaussian).chunk(2, dim=1)
    return mean + (log_var / 2).exp() * torch.randn_like(mean)


class SampleHead(nn.Linear):
    """Maps a pooled vector (N, C) to means and log-variances over the classes, (N, 2 K): two linear layers as one.

    A subclass of nn.Linear, as CRD's: its weight is whole inside its own forward at ZeRO stage 3, and fp32 there.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__(channels, 2 * classes)

    def forward(self, pooled: Tensor) -> Tensor:
        return super().forward(pooled.to(self.weight.dtype))


class StudentHead(nn.Module):
    """Maps the student's Features to means and log-variances (N, 2 K), from the pooled vector to the finest level.

        R = E(pooled);    R <- z_0 E_l(F_l) + z_1 Up(R), coarse to fine;    head( mean( relu( conv3x3(R) ) ) )

    E is a 1x1 convolution without bias and a ReLU; z_0 and z_1 are sigmoids of one 1x1 convolution of both summands; Up
    is to the size of the level, by nearest neighbours, and R ends in the size and width of the teacher's finest level.

    Args:
        channels: channels of the levels that are fused, from fine to coarse; the first of them is level ``first``.
        width: width of the pooled vector; levels are fused in min(512, width) channels.
        out_channels, size: channels and size (H, W) of the teacher's finest level.
        classes: number of classes.
        first: index of the finest level among the student's.
    """

    def __init__(
        self, channels: Sequence[int], width: int, *, out_channels: int, size: tuple[int, int], classes: int, first: int
    ) -> None:
        super().__init__()
        inside = min(_WIDEST, width)
        self.first, self.size = first, size
        self.pooled = nn.Conv2d(width, inside, 1, bias=False)
        self.expanders = nn.ModuleList(nn.Conv2d(each, inside, 1, bias=False) for each in channels)
        self.gates = nn.ModuleList(nn.Conv2d(2 * inside, 2, 1) for _ in channels)
        self.close = nn.Conv2d(inside, out_channels, 3, padding=1, bias=False)
        for layer in (self.pooled, *self.expanders, self.close):
            assert isinstance(layer, nn.Conv2d)
            nn.init.kaiming_uniform_(layer.weight, a=1)
        self.head = SampleHead(out_channels, classes)

    def forward(self, features: Features) -> Tensor:
        assert features.embedding is not None
        fused = F.relu(self.pooled(features.embedding[:, :, None, None]))
        count = len(self.expanders)
        levels = features.levels[self.first :][:count]
        for level, expander, gate in reversed(list(zip(levels, self.expanders, self.gates, strict=True))):
            own = F.relu(expander(level))
            above = F.interpolate(fused, size=own.shape[-2:], mode="nearest")
            z = gate(torch.cat([own, above], dim=1)).sigmoid()
            fused = z[:, :1] * own + z[:, 1:] * above
        fused = F.interpolate(fused, size=self.size, mode="nearest")
        gaussian: Tensor = self.head(F.relu(self.close(fused)).mean((2, 3)))
        return gaussian

    def second(self, features: Features) -> Tensor:
        """Return the output for the second view; see `Method.adapter`."""
        gaussian: Tensor = self(features)
        return gaussian

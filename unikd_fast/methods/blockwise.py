"""Block-wise logit distillation (Yu et al. 2024, arXiv 2411.01547): the student's blocks inside the teacher."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unikd_fast.losses import softmax_kl, unikd_loss
from unikd_fast.methods.context import RunContext, Shape
from unikd_fast.methods.method import Method, Needs
from unikd_fast.settings import NonNegative, Positive, settings
from unikd_fast.values import Batch, Features, Loss, StudentOutput, Target


class Connector(nn.Module):
    """Maps a student's level (N, C_s, H_s, W_s) to (N, C_t, H_t, W_t): pooling, 1x1 convolution, BatchNorm, upsampling.

    Args:
        student, teacher: shapes (C, H, W) of the levels.
    """

    def __init__(self, student: Shape, teacher: Shape) -> None:
        super().__init__()
        self.pooled = (min(student[1], teacher[1]), min(student[2], teacher[2]))
        self.size = teacher[1:]
        self.pools, self.upsamples = self.pooled != student[1:], self.pooled != teacher[1:]
        self.conv = nn.Conv2d(student[0], teacher[0], 1, bias=False)
        self.norm = nn.BatchNorm2d(teacher[0])

    def forward(self, level: Tensor) -> Tensor:
        if self.pools:
            level = F.adaptive_avg_pool2d(level, self.pooled)
        level = self.norm(self.conv(level))
        return F.interpolate(level, size=self.size, mode="nearest") if self.upsamples else level


class Connectors(nn.Module):
    """Maps the student's Features to its last levels, coarsest last, each in the shape of the teacher's level.

    Args:
        student_shapes, teacher_shapes: shapes (C, H, W) of the levels, from fine to coarse; the last min of both are
            paired.
        light: whether to use only the coarsest level.
    """

    def __init__(self, student_shapes: Sequence[Shape], teacher_shapes: Sequence[Shape], *, light: bool) -> None:
        super().__init__()
        self.count = 1 if light else min(len(student_shapes), len(teacher_shapes))
        pairs = zip(student_shapes[-self.count :], teacher_shapes[-self.count :], strict=True)
        self.connectors = nn.ModuleList(Connector(student, teacher) for student, teacher in pairs)

    def forward(self, features: Features) -> tuple[Tensor, ...]:
        levels = zip(self.connectors, features.levels[-self.count :], strict=True)
        return tuple(connector(level) for connector, level in levels)


@settings
class BlockwiseSettings:
    """The student up to a level, continued by the teacher's frozen blocks, as stepping stones between the two."""

    task_weight: NonNegative = 1.0
    """a, weight of the cross-entropies of the student and the stepping stones."""
    distill_weight: NonNegative = 1.0
    """b, weight of their softened KL to the teacher."""
    cross_weight: NonNegative = 1.0
    """c, weight of their softened KL to the mean of the stepping stones."""
    temperature: Positive = 4.0
    """Softmax temperature τ of both KL terms."""
    light: bool = False
    """Use only the last stepping stone, made of the student's last level and the teacher's classifier."""


class Blockwise(Method[BlockwiseSettings]):
    """L = a L_task + b L_distill + c L_cross, of the student S and of stepping stones N_1 .. N_n between it and T.

        N_i = T_head ∘ T_n ∘ .. ∘ T_{i+1} ∘ C_i ∘ S_i ∘ .. ∘ S_1          w_i = 2^{i-n}
        L_task = CE(S) + Σ_i w_i CE(N_i)
        L_distill = d(S, T) + Σ_i w_i d(N_i, T)
        L_cross = d(S, Y) + Σ_i w_i d(N_i, Y),          Y = 1/n Σ_i N_i, no gradient

    d(A, B) = τ² KL( softmax(B / τ) || softmax(A / τ) ). N_i is the student up to its level i, a connector C_i and the
    rest of the frozen teacher in eval mode: gradients pass through its blocks to the student's features, which are thus
    aligned by what the teacher makes of them. The connectors are trained with the student and dropped, with the
    stepping stones, after training.

    The authors published no code that we know of; formula and weights follow descriptions of the paper. What these
    leave open is our choice: C_i (`Connector`: no activation, although the teacher's levels are rectified), τ = 4,
    a = b = c = 1, and Y over the stepping stones alone. If the numbers of levels differ, the last n = min are paired.

    The teacher's blocks may run in fp16, in which gradients of a batch mean underflow: inside them the gradient is
    multiplied by a power of two, and divided by it where it leaves.

    Raises:
        ValueError: there are no levels, or not as many blocks as the teacher has levels.
    """

    settings_class = BlockwiseSettings
    needs = Needs(levels=True, teacher_network=True)

    def __init__(self, settings: BlockwiseSettings, context: RunContext) -> None:
        super().__init__(settings, context)
        assert context.teacher_blocks is not None
        student_shapes, teacher_shapes = context.student_shapes, context.teacher_shapes
        blocks = context.teacher_blocks()
        if not student_shapes or not teacher_shapes or len(blocks) != len(teacher_shapes):
            raise ValueError(
                f"Blockwise: student and teacher need levels, and the teacher a block after each, got "
                f"{len(student_shapes)} levels of the student, {len(teacher_shapes)} of the teacher and {len(blocks)} "
                "blocks; split the teacher at its levels (split_at_levels)"
            )
        self.adapter: Connectors = Connectors(student_shapes, teacher_shapes, light=settings.light).to(context.device)
        self.blocks = list(blocks[-self.adapter.count :])
        self.ce_weight = settings.task_weight

    @property
    def term_names(self) -> tuple[str, ...]:
        """Return ce and logit_kl of the student, their sums over its stepping stones, and L_cross."""
        return ("ce", "logit_kl", "stone_ce", "stone_kl", "cross_kl")

    @property
    def stone_weights(self) -> list[float]:
        """Return w_i, from fine to coarse."""
        count = self.adapter.count
        return [2.0 ** (i - count) for i in range(1, count + 1)]

    def loss(self, student: StudentOutput, target: Target | None, batch: Batch) -> Loss:
        assert target is not None
        stones = self.inside(student)
        ensemble = torch.stack([stone.detach() for stone in stones]).mean(0)
        options: dict[str, Any] = {"temperature": self.settings.temperature, "impl": self.impl}
        own = unikd_loss(
            student.logits,
            target.logits,
            batch.labels,
            ce_weight=self.ce_weight,
            beta=self.settings.distill_weight,
            label_smoothing=self.label_smoothing,
            **options,
        )
        cross = softmax_kl(student.logits, ensemble, **options)
        total, stone_ce, stone_kl = own.total, torch.zeros_like(own.ce), torch.zeros_like(own.ce)
        for stone, weight in zip(stones, self.stone_weights, strict=True):
            found = unikd_loss(
                stone,
                target.logits,
                batch.labels,
                ce_weight=self.settings.task_weight,
                beta=self.settings.distill_weight,
                label_smoothing=self.label_smoothing,
                **options,
            )
            total = total + weight * found.total
            stone_ce, stone_kl = stone_ce + weight * found.ce, stone_kl + weight * found.logit_kl
            cross = cross + weight * softmax_kl(stone, ensemble, **options)
        terms = (own.ce, own.logit_kl, stone_ce, stone_kl, cross.detach())
        return Loss(total + self.settings.cross_weight * cross, dict(zip(self.term_names, terms, strict=True)))

    def inside(self, student: StudentOutput) -> tuple[Tensor, ...]:
        """Return the logits (N, K) of N_1 .. N_n; see ``stones``."""
        return self.stones(student.adapted)

    def stones(self, connected: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the logits (N, K) of N_1 .. N_n, given the connectors' outputs.

        Each block runs once for all stepping stones that have reached it: in eval mode samples are independent.
        """
        # A student in fp16 already has a loss scale, which adjusts itself.
        half = connected[0].dtype == torch.float16
        scale = 1.0 if half else 64.0 * 2 ** math.ceil(math.log2(len(connected[0])))
        levels: list[Tensor] = [_ScaledGradient.apply(level, 1 / scale) for level in connected]
        inside = self.blocks[0](levels[0])
        for level, block in zip(levels[1:], self.blocks[1:], strict=True):
            inside = block(torch.cat([inside, level.to(inside.dtype)]))
        logits: Tensor = _ScaledGradient.apply(inside, scale)
        return logits.chunk(len(levels))


class _ScaledGradient(torch.autograd.Function):
    """The identity, with its gradient multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0] * ctx.scale, None

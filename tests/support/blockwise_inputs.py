"""Block-wise logit distillation on small levels, and a step of it."""

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.build_method import build as build_method
from unikd_fast.methods import Blockwise
from unikd_fast.values import Batch, Features, StudentOutput, Target

N, CLASSES = 6, 7
Shape = tuple[int, int, int]
# The teacher's level is larger, smaller, of another shape in one axis only, and the same.
STUDENT: tuple[Shape, ...] = ((3, 12, 12), (4, 2, 2), (5, 4, 2), (6, 2, 2))
TEACHER: tuple[Shape, ...] = ((5, 8, 8), (6, 6, 6), (7, 3, 3), (8, 2, 2))


class Head(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, CLASSES)

    def forward(self, level: Tensor) -> Tensor:
        logits: Tensor = self.linear(level.relu().mean((2, 3)))
        return logits


class Step(nn.Module):
    """From one level of the teacher to the next."""

    def __init__(self, start: Shape, end: Shape) -> None:
        super().__init__()
        self.conv, self.size = nn.Conv2d(start[0], end[0], 3, padding=1), end[1:]

    def forward(self, level: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.conv(level).tanh(), self.size)


def blocks_of(shapes: tuple[Shape, ...]) -> nn.ModuleList:
    torch.manual_seed(1)
    inner = [Step(start, end) for start, end in itertools.pairwise(shapes)]
    return nn.ModuleList([*inner, Head(shapes[-1][0])]).requires_grad_(False)


def build(student: tuple[Shape, ...] = STUDENT, teacher: tuple[Shape, ...] = TEACHER, **options: Any) -> Blockwise:
    blocks = blocks_of(teacher)
    torch.manual_seed(2)
    return build_method(Blockwise, student, teacher, list(blocks), **options)


def given(shapes: tuple[Shape, ...], dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """The student's levels, its logits, the teacher's, and labels."""
    generator = torch.Generator().manual_seed(3)
    levels = [torch.randn(N, *shape, generator=generator).to(dtype) for shape in shapes]
    own, teacher = (3 * torch.randn(N, CLASSES, generator=generator).to(dtype) for _ in range(2))
    return levels, own, teacher, torch.randint(0, CLASSES, (N,), generator=generator)


def batch_of(labels: Tensor) -> Batch:
    return Batch(torch.zeros(N, 3, 1, 1), labels, torch.arange(N))


def ours(method: Blockwise, student: tuple[Shape, ...]) -> dict[str, Tensor]:
    levels, z, target, labels = given(student)
    levels, z = [level.requires_grad_() for level in levels], z.requires_grad_()
    adapted = method.adapter(Features(tuple(levels), z))
    loss = method.loss(StudentOutput(z, adapted), Target(target), batch_of(labels))
    assert tuple(loss.terms) == method.term_names
    assert not any(term.requires_grad for term in loss.terms.values())
    loss.total.backward()
    gradients = {f"level {i}": level.grad for i, level in enumerate(levels)}
    gradients |= {name: parameter.grad for name, parameter in method.adapter.named_parameters()}
    return {"total": loss.total, **loss.terms, "logits": z.grad, **gradients}  # type: ignore[dict-item]

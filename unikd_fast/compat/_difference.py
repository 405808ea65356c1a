"""How far a drop-in is from its original: value and gradients, on the same random inputs."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unikd_fast.compat._cases import Case

Measured = list[
    Tensor | None
]  # the value, the gradient by the student's inputs, and by the teacher's if that is no constant


class Difference(NamedTuple):
    """The largest difference over all entries of value and gradients, absolute and relative to the largest entry."""

    value: float = 0.0
    relative_value: float = 0.0
    gradient: float = 0.0
    relative_gradient: float = 0.0


def measure(
    loss: Any, case: Case, *, rounded_to: torch.dtype, computed_in: torch.dtype, device: str = "cpu", seed: int = 0
) -> Measured:
    """Return a loss and its gradients with respect to the student's and the teacher's inputs, None where it has none.

    The inputs are normal with a standard deviation of 3, drawn in fp64 and rounded; the gradient is that of a random
    weighting of the outputs. Every loss, dtype and device sees the same numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for prepare in (case.prepare_student, case.prepare_teacher):
        x = 3 * torch.randn(case.shape, generator=generator, dtype=torch.float64)
        x = prepare(x) if prepare is not None else x
        inputs.append(x.to(rounded_to).to(computed_in).to(device).requires_grad_())
    if case.constant_teacher:
        inputs[1] = inputs[1].detach()
    leaves = [x for x in inputs if x.requires_grad]
    value = case.call(loss, *inputs)
    upstream = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream, allow_unused=True)]


def difference(ours: Measured, theirs: Measured) -> Difference:
    """Return how far `ours` is from `theirs`; infinite where the shapes differ or only one has a gradient."""
    value, *gradients = (_distance(a, b) for a, b in zip(ours, theirs, strict=True))
    return Difference(*value, *(max(x) for x in zip(*gradients, strict=True)))


def largest(differences: Iterable[Difference]) -> Difference:
    return Difference(*(max(x) for x in zip(Difference(), *differences, strict=True)))


def _distance(ours: Tensor | None, theirs: Tensor | None) -> tuple[float, float]:
    if ours is None and theirs is None:
        return 0.0, 0.0
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return math.inf, math.inf
    ours, theirs = ours.double(), theirs.double()
    absolute, size = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    if math.isnan(absolute):
        return math.inf, math.inf
    return absolute, absolute / size if size > 0 else absolute

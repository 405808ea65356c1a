"""Derivatives that the kernels do not have are refused, not silently 0: second ones, and those of forward mode."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unikd_fast.kernels.reference import transform_of


def refuse_transforms(function: str, tensors: Sequence[Tensor | None]) -> None:
    """Raise RuntimeError for a tensor under forward-mode differentiation, `torch.vmap` or `torch.func`.

    A launch sees the numbers alone: a tangent would be lost, and a batched tensor has no numbers to see.
    """
    transform = transform_of(*tensors)
    if transform is not None:
        raise RuntimeError(
            f"{function}: the kernel can be differentiated in reverse mode by autograd, got a tensor under "
            f"{transform}; use impl='reference'"
        )


def once(gradient: Tensor | None, x: Tensor | None) -> Tensor | None:
    """Let a second derivative fail where one is prepared (create_graph=True): as a constant it would be silently 0."""
    if gradient is None or x is None or not torch.is_grad_enabled():
        return gradient
    result: Tensor = _Once.apply(gradient.detach(), x)
    return result


class _Once(torch.autograd.Function):
    """A gradient as a function of the input, whose own derivative is refused."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, None]:
        raise RuntimeError(
            "the kernels can be differentiated once, got a second derivative; use impl='reference' for it, and for AFF "
            "path='stagewise'"
        )

"""Second derivatives of what the kernels compute are refused, not silently 0."""

from typing import Any

import torch
from torch import Tensor


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

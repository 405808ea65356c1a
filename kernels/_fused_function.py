"""Operations whose backward pass is a computation of its own, in eager mode and under torch.compile.

In eager mode an autograd.Function; under torch.compile, where graphs and fake tensors are wanted, two functional custom
operators, which in eager mode would cost several times the time per call. Differentiable once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unikd_fast.kernels._once import once, refuse_transforms

Tensors = Sequence[Tensor]
Allocate = Callable[..., tuple[Tensor, list[Tensor]]]


class FusedFunction:
    """One operation on a list of tensors.

    Args:
        name: of the operators, `unikd_fast::name` and `unikd_fast::name_backward`.
        settings: schema of what else the operation takes, by name, such as {"upsample": "str"}.
        allocate: `allocate(tensors, **settings)` gives empty buffers: the output, and what backward needs besides the
            tensors. It launches nothing, and runs on fake tensors too.
        forward: `forward(tensors, output, saved, **settings)` fills them.
        backward: `backward(tensors, saved, upstream, grads, **settings)` fills the gradients; None for one that is
            not wanted.
    """

    def __init__(
        self,
        name: str,
        *,
        settings: dict[str, str],
        allocate: Allocate,
        forward: Callable[..., None],
        backward: Callable[..., None],
    ) -> None:
        self.name, self.settings, self.allocate = name, tuple(settings), allocate
        self._launch_forward, self._launch_backward = forward, backward
        extra = "".join(f", {kind} {x}" for x, kind in settings.items())
        self.operator = torch.library.custom_op(
            f"unikd_fast::{name}",
            self._forward,
            mutates_args=(),
            schema=f"(Tensor[] tensors{extra}) -> (Tensor, Tensor[])",
        )
        self.operator.register_fake(self._fake)
        self.operator.register_autograd(self._operator_backward, setup_context=self._setup_context)
        self.backward_operator = torch.library.custom_op(
            f"unikd_fast::{name}_backward",
            self._backward,
            mutates_args=(),
            schema=f"(Tensor[] tensors, Tensor[] saved, Tensor upstream, bool[] wanted{extra}) -> Tensor[]",
        )
        self.backward_operator.register_fake(self._backward_fake)

    def __call__(self, tensors: Tensors, **settings: Any) -> Tensor:
        refuse_transforms(self.name, tensors)
        ordered = [settings[name] for name in self.settings]
        if torch.compiler.is_compiling():
            output: Tensor = self.operator(list(tensors), *ordered)[0]
        else:
            output = _Eager.apply(self, ordered, *tensors)
        return output

    def _named(self, settings: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(self.settings, settings, strict=True))

    def _forward(self, tensors: list[Tensor], *settings: Any) -> tuple[Tensor, list[Tensor]]:
        output, saved = self.allocate(tensors, **self._named(settings))
        self._launch_forward(tensors, output, saved, **self._named(settings))
        return output, saved

    def _fake(self, tensors: list[Tensor], *settings: Any) -> tuple[Tensor, list[Tensor]]:
        return self.allocate(tensors, **self._named(settings))

    def gradients(
        self, tensors: Tensors, saved: Tensors, upstream: Tensor, wanted: Sequence[bool], settings: Sequence[Any]
    ) -> list[Tensor | None]:
        with torch.no_grad():
            grads = [torch.empty_like(x) if w else None for x, w in zip(tensors, wanted, strict=True)]
            self._launch_backward(tensors, saved, upstream, grads, **self._named(settings))
        return grads

    def _backward(
        self, tensors: list[Tensor], saved: list[Tensor], upstream: Tensor, wanted: list[bool], *settings: Any
    ) -> list[Tensor]:
        grads = self.gradients(tensors, saved, upstream, wanted, settings)
        return [upstream.new_empty(0) if g is None else g for g in grads]

    def _backward_fake(
        self, tensors: list[Tensor], saved: list[Tensor], upstream: Tensor, wanted: list[bool], *settings: Any
    ) -> list[Tensor]:
        return [torch.empty_like(x) if w else upstream.new_empty(0) for x, w in zip(tensors, wanted, strict=True)]

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
        tensors, *ctx.settings = inputs
        ctx.count = len(tensors)
        ctx.wanted = [x.requires_grad for x in tensors]
        ctx.save_for_backward(*tensors, *output[1])

    def _operator_backward(self, ctx: Any, upstream: Tensor, _: Any) -> tuple[Any, ...]:
        tensors, saved = list(ctx.saved_tensors[: ctx.count]), list(ctx.saved_tensors[ctx.count :])
        grads = self.backward_operator(tensors, saved, upstream, ctx.wanted, *ctx.settings)
        wanted = [once(g, x) if w else None for g, x, w in zip(grads, tensors, ctx.wanted, strict=True)]
        return (wanted, *[None] * len(ctx.settings))


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: FusedFunction, settings: list[Any], *tensors: Tensor) -> Tensor:
        output, saved = function._forward(list(tensors), *settings)
        ctx.save_for_backward(*tensors, *saved)
        ctx.function, ctx.settings, ctx.count = function, settings, len(tensors)
        return output

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        tensors, saved = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        grads = ctx.function.gradients(tensors, saved, upstream, ctx.needs_input_grad[2:], ctx.settings)
        return (None, None, *(once(g, x) for g, x in zip(grads, tensors, strict=True)))

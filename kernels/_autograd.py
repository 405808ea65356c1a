"""Losses whose gradient is computed together with their value.

A kernel that has both rows of logits on chip can write the gradient for the price of its bytes; a backward pass of its
own would read both rows again. What is left for backward is the upstream gradient:

- It is 1 for a loss that is backpropagated as it is. Looking would cost a synchronisation, so a kernel looks, and
  touches the gradient only if it has to. It writes in place, since the buffer is used once.
- A second backward pass through the same graph finds the buffer gone and computes the gradient anew.
- fp16 gradients before the multiplication by a loss scale would underflow: for fp16 inputs nothing is computed in
  forward, and backward computes the gradient with the upstream factor inside.

Under torch.compile the same launch is a functional custom operator, for which graphs and fake tensors work; in eager
mode that would cost several times the time per call, so there it is an autograd.Function.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unikd_fast.kernels._launch import flat, on_device
from unikd_fast.kernels._multiply import multiplied, multiply_in_place
from unikd_fast.kernels._once import once, refuse_transforms

Tensors = Sequence[Tensor | None]


class FusedLoss:
    """One loss: how it is launched, and what its inputs and outputs are.

    Args:
        name: of the operator, `unikd_fast::name`.
        inputs: names of the tensors; all but the first may be None.
        gradient_of: for each input, the output whose gradient it gets; -1 for an input that never has one.
        settings: schema of what else `launch` takes, by name, such as {"temperature": "float"}.
        outputs: how many; the first `differentiable` of them carry gradients. They are 0-d, or one number per row of
            the first input if there is a setting `per_row` and it is true.
        launch: `launch(inputs, outputs, gradients, upstream, **settings)` fills the outputs, and of each input the
            dense gradient, wherever there is one to fill. It is called on the inputs' device if they have any rows.
            `upstream` holds a dense factor, or None, for each differentiable output, by which its gradients are
            multiplied.
    """

    def __init__(
        self,
        name: str,
        *,
        inputs: Sequence[str],
        gradient_of: Sequence[int],
        settings: dict[str, str],
        outputs: int,
        launch: Callable[..., None],
        differentiable: int = 1,
    ) -> None:
        self.name, self.inputs, self.gradient_of, self.settings = name, tuple(inputs), tuple(gradient_of), settings
        self.outputs, self.differentiable, self.launch = outputs, differentiable, launch
        arguments = [f"Tensor{'' if i == 0 else '?'} {x}" for i, x in enumerate(inputs)]
        arguments += ["bool[] wanted", *(f"Tensor? upstream{i}" for i in range(differentiable))]
        arguments += [f"{kind} {x}" for x, kind in settings.items()]
        returns = ", ".join(["Tensor"] * (outputs + len(inputs)))
        operator = torch.library.custom_op(
            f"unikd_fast::{name}", self._operator, mutates_args=(), schema=f"({', '.join(arguments)}) -> ({returns})"
        )
        operator.register_fake(self._fake)
        operator.register_autograd(self._operator_backward, setup_context=self._setup_context)
        self.operator = getattr(torch.ops.unikd_fast, name)

    def __call__(self, tensors: Tensors, **settings: Any) -> tuple[Tensor, ...]:
        """Give the outputs, differentiable by the inputs that require a gradient.

        Raises:
            RuntimeError: tensors under a transform that autograd would not see, see `refuse_transforms`.
        """
        refuse_transforms(self.name, tensors)
        wanted = [
            torch.is_grad_enabled() and output >= 0 and x is not None and x.requires_grad
            for x, output in zip(tensors, self.gradient_of, strict=True)
        ]
        if torch.compiler.is_compiling():
            ordered = [settings[name] for name in self.settings]
            results = self.operator(*tensors, _now(tensors, wanted), *[None] * self.differentiable, *ordered)
            return tuple(results[: self.outputs])
        with torch.no_grad():
            outputs, gradients = self.compute(tensors, _now(tensors, wanted), None, settings)
        for output in range(self.differentiable):
            members = [i for i, of in enumerate(self.gradient_of) if of == output and wanted[i]]
            if members:
                call = _Call(self, settings, tensors, gradients, outputs[output], output, members)
                outputs[output] = _GradientInForward.apply(call, *(tensors[i] for i in members))
        return tuple(x for x in outputs if x is not None)

    def compute(
        self, tensors: Tensors, wanted: Sequence[bool], upstream: Tensors | None, settings: dict[str, Any]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Give the outputs, None if there are upstream factors, and the gradients that are wanted."""
        outputs, gradients = self._buffers(tensors, wanted, upstream, settings)
        first = tensors[0]
        assert first is not None
        if first.numel() or any(x.numel() for x in self._main_inputs(tensors)):
            factors = [None] * self.differentiable if upstream is None else [flat(x) for x in upstream]
            with on_device(first):
                self.launch(tensors, outputs, gradients, factors, **settings)
        else:
            outputs = [None if x is None else x.zero_() for x in outputs]
        return outputs, gradients

    def _main_inputs(self, tensors: Tensors) -> list[Tensor]:
        """Give those that may have a gradient: if all of them are empty, there is nothing to launch."""
        return [x for x, output in zip(tensors, self.gradient_of, strict=True) if output >= 0 and x is not None]

    def _buffers(
        self, tensors: Tensors, wanted: Sequence[bool], upstream: Tensors | None, settings: dict[str, Any]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        first = tensors[0]
        assert first is not None
        outputs: list[Tensor | None] = [None] * self.outputs
        if upstream is None:
            shape = first.shape[:-1] if settings.get("per_row") else ()
            outputs = [torch.empty(shape, dtype=torch.float32, device=first.device) for _ in outputs]
        gradients = [
            torch.empty(x.shape, dtype=x.dtype, device=x.device) if w and x is not None else None
            for x, w in zip(tensors, wanted, strict=True)
        ]
        return outputs, gradients

    def _split(self, arguments: Sequence[Any]) -> tuple[Tensors, Any, Tensors | None, dict[str, Any]]:
        n = len(self.inputs)
        upstream = arguments[n + 1 : n + 1 + self.differentiable]
        settings = dict(zip(self.settings, arguments[n + 1 + self.differentiable :], strict=True))
        return arguments[:n], arguments[n], None if all(x is None for x in upstream) else upstream, settings

    def _operator(self, *arguments: Any) -> tuple[Tensor, ...]:
        tensors, wanted, upstream, settings = self._split(arguments)
        outputs, gradients = self.compute(tensors, wanted, upstream, settings)
        return tuple(_nothing(arguments[0]) if x is None else x for x in (*outputs, *gradients))

    def _fake(self, *arguments: Any) -> tuple[Tensor, ...]:
        tensors, wanted, upstream, settings = self._split(arguments)
        outputs, gradients = self._buffers(tensors, wanted, upstream, settings)
        return tuple(_nothing(arguments[0]) if x is None else x for x in (*outputs, *gradients))

    def _setup_context(self, ctx: Any, inputs: Any, output: Any) -> None:
        tensors, ctx.computed, _, ctx.settings = self._split(inputs)
        ctx.save_for_backward(*tensors, *output[self.outputs :])
        ctx.set_materialize_grads(False)  # an output that nobody used has no gradient, not one of 0 times what it is

    def _operator_backward(self, ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        n = len(self.inputs)
        tensors, gradients = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        factors = upstream[: self.differentiable]
        result: list[Tensor | None] = [None] * n
        missing = [False] * n
        for i, output in enumerate(self.gradient_of):
            factor = factors[output] if output >= 0 and ctx.needs_input_grad[i] else None
            if factor is None:
                continue
            if ctx.computed[i]:
                result[i] = multiplied(gradients[i], factor)
            else:
                missing[i] = True
        if any(missing):
            again = self.operator(*tensors, missing, *factors, *ctx.settings.values())[self.outputs :]
            result = [g if m else r for g, m, r in zip(again, missing, result, strict=True)]
        result = [once(g, x) for g, x in zip(result, tensors, strict=True)]
        return (*result, None, *[None] * self.differentiable, *[None] * len(self.settings))


class _Call(NamedTuple):
    """What backward of one output needs to know of the launch."""

    loss: FusedLoss
    settings: dict[str, Any]
    tensors: Tensors
    gradients: list[Tensor | None]
    value: Tensor | None
    output: int
    members: list[int]  # the inputs that get the gradient of this output


class _GradientInForward(torch.autograd.Function):
    """One differentiable output of a launch: each has a node, and so a backward pass, of its own."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Tensor) -> Tensor | None:
        # What is not an input here must not keep the graph alive that it came from.
        others = [None if x is None else x.detach() for x in call.tensors]
        for i, x in zip(call.members, inputs, strict=True):
            others[i] = x
        ctx.save_for_backward(*others)
        ctx.gradients = [call.gradients[i] for i in call.members]
        ctx.call = call._replace(tensors=(), gradients=[], value=None)
        return call.value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        loss, settings, *_, output, members = ctx.call
        tensors = ctx.saved_tensors  # raises if an input was changed in place since
        gradients, ctx.gradients = ctx.gradients, [None] * len(members)
        missing = [i for i, g in zip(members, gradients, strict=True) if g is None]
        multiply_in_place([(g, upstream) for g in gradients if g is not None])
        if missing:
            wanted = [i in missing for i in range(len(tensors))]
            factors = [upstream if o == output else None for o in range(loss.differentiable)]
            computed = loss.compute(tensors, wanted, factors, settings)[1]
            gradients = [computed[i] if g is None else g for i, g in zip(members, gradients, strict=True)]
        inputs = [tensors[i] for i in members]
        return (None, *(once(g, x) for g, x in zip(gradients, inputs, strict=True)))


def _now(tensors: Tensors, wanted: Sequence[bool]) -> list[bool]:
    """Which gradients forward computes: not those in fp16."""
    return [bool(w and x is not None and x.dtype != torch.float16) for x, w in zip(tensors, wanted, strict=True)]


def _nothing(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.float32)

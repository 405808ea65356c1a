"""Kernels under autograd and under torch.compile.

In eager mode a kernel is an autograd.Function; under torch.compile, where graphs and fake tensors are needed, it is a
functional custom operator, which in eager mode would cost several times the time per call. `FusedFunction` has a
backward pass of its own, `FusedLoss` computes its gradient together with its value. Both are differentiable once, in
reverse mode: other derivatives are refused, since they would silently be 0.

A loss kernel that has both rows of logits on chip can write the gradient for the price of its bytes; a backward pass
of its own would read both rows again. What is left for backward is the upstream gradient:

- It is 1 for a loss that is backpropagated as it is. Looking would cost a synchronisation, so a kernel looks, and
  touches the gradient only if it has to. It writes in place, since the buffer is used once.
- Under torch.compile the product belongs to the graph. Inductor writes it into the buffer, which is donated, and fuses
  it with elementwise neighbours, but it reads and writes the gradient whatever the factor is, 5 N K size in place of 3:
  of an operator that mutates what forward saved it would make a copy first, which costs as much.
- A second backward pass through the same graph finds the buffer gone and computes the gradient anew.
- fp16 gradients before the multiplication by a loss scale would underflow: for fp16 inputs nothing is computed in
  forward, and backward computes the gradient with the upstream factor inside.
- So it is for a loss a row (`per_row`) whose gradient sums over rows, as that of a weight does, or is not dense in
  rows: there a factor a row would have to be looked up for each element.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unikd_fast.kernels._launch import Rows, flat, gradient_like, on_device, rows_in_place
from unikd_fast.kernels.reference import at_least_fp32, transform_of

Tensors = Sequence[Tensor | None]
Allocate = Callable[..., tuple[Tensor, list[Tensor]]]


class FusedLoss:
    """A loss whose kernel computes the gradient together with the value.

    Args:
        name: name of the operator, `unikd_fast::name`.
        inputs: names of the tensors; all but the first may be None.
        gradient_of: for each input the output that it receives a gradient from, or -1 if it never receives one.
        settings: schema of the other arguments of `launch` by name, such as {"temperature": "float"}.
        outputs: number of outputs, of which the first `differentiable` carry gradients. They are 0-d, or one number
            per row of the first input if there is a setting `per_row` and it is true.
        launch: `launch(inputs, outputs, gradients, upstream, **settings)` fills the outputs and the gradients of the
            inputs, those that are not None. They are dense in rows, those of logits as `gradient_like` says. It is
            called on the inputs' device if they have any rows. `upstream` holds for each differentiable output None or
            a dense factor to multiply its gradients by. If there is a setting `fused` and it is false, it is plain
            PyTorch, and Triton is not needed.
        sums_rows: whether an input that receives a gradient has no axis of rows.
        logits: whether the first two inputs are logits (..., K), read by their strides.
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
        sums_rows: bool = False,
        logits: bool = False,
    ) -> None:
        self.name, self.inputs, self.gradient_of, self.settings = name, tuple(inputs), tuple(gradient_of), settings
        self.sums_rows, self.logits = sums_rows, logits
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
        """Return the outputs, differentiable with respect to the inputs that require a gradient.

        Raises:
            RuntimeError: If a tensor is under a transform that a kernel cannot see (`refuse_transforms`).
        """
        refuse_transforms(self.name, tensors)
        wanted = [
            torch.is_grad_enabled() and output >= 0 and x is not None and x.requires_grad
            for x, output in zip(tensors, self.gradient_of, strict=True)
        ]
        now = self.computed_in_forward(tensors, wanted, settings)
        if torch.compiler.is_compiling():
            ordered = [settings[name] for name in self.settings]
            results = self.operator(*tensors, now, *[None] * self.differentiable, *ordered)
            return tuple(results[: self.outputs])
        with torch.no_grad():
            outputs, gradients = self.compute(tensors, now, None, settings)
        for output in range(self.differentiable):
            members = [i for i, of in enumerate(self.gradient_of) if of == output and wanted[i]]
            if members:
                call = _Call(self, settings, tensors, gradients, outputs[output], output, members)
                outputs[output] = _GradientInForward.apply(call, *(tensors[i] for i in members))
        return tuple(x for x in outputs if x is not None)

    def computed_in_forward(self, tensors: Tensors, wanted: Sequence[bool], settings: dict[str, Any]) -> list[bool]:
        """Tell which of the wanted gradients are computed with the loss: not in fp16, nor always for a loss a row."""
        if settings.get("per_row") and (self.sums_rows or self._strided(tensors, wanted)):
            return [False] * len(wanted)
        return [bool(w and x is not None and x.dtype != torch.float16) for x, w in zip(tensors, wanted, strict=True)]

    def _strided(self, tensors: Tensors, wanted: Sequence[bool]) -> bool:
        """Tell whether a wanted gradient may be one that is not dense in rows."""
        pairs = zip(tensors, wanted, strict=True)
        return self.logits and any(w and x is not None and not x.is_contiguous() for x, w in pairs)

    def compute(
        self, tensors: Tensors, wanted: Sequence[bool], upstream: Tensors | None, settings: dict[str, Any]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Return the outputs, or None if there are upstream factors, and the wanted gradients."""
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
        """Return the inputs that may receive a gradient: if all are empty, there is nothing to launch."""
        return [x for x, output in zip(tensors, self.gradient_of, strict=True) if output >= 0 and x is not None]

    def _buffers(
        self, tensors: Tensors, wanted: Sequence[bool], upstream: Tensors | None, settings: dict[str, Any]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        first = tensors[0]
        assert first is not None
        outputs: list[Tensor | None] = [None] * self.outputs
        if upstream is None:
            shape = first.shape[:-1] if settings.get("per_row") else ()
            dtype = torch.promote_types(first.dtype, torch.float32)
            outputs = [torch.empty(shape, dtype=dtype, device=first.device) for _ in outputs]
        rows: list[Rows | None] = [None] * len(tensors)
        if self._strided(tensors, wanted) and tensors[1] is not None:
            rows[:2] = rows_in_place(first, tensors[1])
        gradients = [
            gradient_like(x, r) if w and x is not None else None for x, w, r in zip(tensors, wanted, rows, strict=True)
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
        ctx.set_materialize_grads(False)  # an unused output has no gradient, rather than one of 0

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
    """What the backward pass of one output needs from the launch."""

    loss: FusedLoss
    settings: dict[str, Any]
    tensors: Tensors
    gradients: list[Tensor | None]
    value: Tensor | None
    output: int
    members: list[int]  # the inputs that receive a gradient from this output


class _GradientInForward(torch.autograd.Function):
    """One differentiable output of a launch: each has its own node, and so its own backward pass."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Tensor) -> Tensor | None:
        # Tensors that are not inputs here must not keep their graph alive.
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
        _scale([g for g in gradients if g is not None], upstream, fused=settings.get("fused", True))
        if missing:
            wanted = [i in missing for i in range(len(tensors))]
            factors = [upstream if o == output else None for o in range(loss.differentiable)]
            computed = loss.compute(tensors, wanted, factors, settings)[1]
            gradients = [computed[i] if g is None else g for i, g in zip(members, gradients, strict=True)]
        inputs = [tensors[i] for i in members]
        return (None, *(once(g, x) for g, x in zip(gradients, inputs, strict=True)))


def multiplied(gradient: Tensor, factor: Tensor) -> Tensor:
    """Return a gradient (..., K) times a factor, 0-d or (...,), in plain PyTorch: compiled, it may be in place."""
    x = at_least_fp32(gradient)  # a 0-d factor would be rounded to the gradient's dtype before the product
    product = x * (factor[..., None] if factor.ndim else factor)
    return torch.where(x == 0, 0.0, product).to(gradient.dtype)


def _scale(gradients: Sequence[Tensor], factor: Tensor, *, fused: bool) -> None:
    """Multiply gradients in place."""
    if fused and gradients:
        from unikd_fast.kernels._multiply import multiply_in_place

        multiply_in_place([(g, factor) for g in gradients])
        return
    for gradient in gradients:
        if factor.device.type != "cpu":
            gradient.copy_(multiplied(gradient, factor))
        elif factor != 1:
            gradient.mul_(factor.item())


def _nothing(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.float32)


class FusedFunction:
    """An operation on a list of tensors with a backward pass of its own.

    Args:
        name: name of the operators, `unikd_fast::name` and `unikd_fast::name_backward`.
        settings: schema of the other arguments by name, such as {"upsample": "str"}.
        allocate: `allocate(tensors, **settings)` returns empty buffers: the output, and those that backward needs
            besides the tensors. It launches nothing and works on fake tensors.
        forward: `forward(tensors, output, saved, **settings)` fills them.
        backward: `backward(tensors, saved, upstream, grads, **settings)` fills the gradients that are not None.
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

    def __call__(self, tensors: Sequence[Tensor], **settings: Any) -> Tensor:
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
        self,
        tensors: Sequence[Tensor],
        saved: Sequence[Tensor],
        upstream: Tensor,
        wanted: Sequence[bool],
        settings: Sequence[Any],
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


def refuse_transforms(function: str, tensors: Sequence[Tensor | None]) -> None:
    """Raise RuntimeError for a tensor under forward-mode differentiation, `torch.vmap` or `torch.func`.

    A launch sees plain numbers only: a tangent would be lost, and a batched tensor has none.
    """
    transform = transform_of(*tensors)
    if transform is not None:
        raise RuntimeError(
            f"{function}: the kernel can be differentiated in reverse mode by autograd, got a tensor under "
            f"{transform}; use impl='reference'"
        )


def once(gradient: Tensor | None, x: Tensor | None) -> Tensor | None:
    """Make a second derivative raise if one is prepared (create_graph=True): of a constant it would silently be 0."""
    if gradient is None or x is None or not torch.is_grad_enabled():
        return gradient
    result: Tensor = _Once.apply(gradient.detach(), x)
    return result


class _Once(torch.autograd.Function):
    """A gradient as a function of the input that cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, None]:
        raise RuntimeError(
            "the kernels can be differentiated once, got a second derivative; use impl='reference' for it, for AFF "
            "path='stagewise', and softmax_kl of the logits for linear_softmax_kl"
        )

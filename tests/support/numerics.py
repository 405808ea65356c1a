"""How exact a computation has to be: no worse than eager PyTorch in the same dtype, both held against float64.

A fixed tolerance is either too wide for fp32 or too narrow for bf16, and hides a kernel that is ten times worse than
what it replaces. So the yardstick is the error that the plain implementation makes itself.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Computation = Callable[..., Any]


def relative_error(x: Tensor, truth: Tensor) -> float:
    """‖x - truth‖ / ‖truth‖ in float64; the norm of x where the truth is zero."""
    x, truth = x.detach().double(), truth.detach().double()
    norm = truth.norm().item()
    return (x - truth).norm().item() / (norm if norm > 0 else 1.0)


def outputs_and_gradients(
    compute: Computation, inputs: Sequence[Any], *, upstream_seed: int = 0
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Run `compute` and give its outputs and the gradients of the inputs that require one.

    The inputs are used in place, as leaves of their own, with whatever strides they have.

    The gradient comes from a random upstream vector, drawn in float64 and rounded to the outputs' dtype: the same one
    for every implementation, and unlike a sum it sees every output with a weight of its own.
    """
    leaves = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs]
    result = compute(*leaves)
    outputs = [result] if isinstance(result, Tensor) else [x for x in result if isinstance(x, Tensor)]
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    if not wanted:
        return outputs, []
    generator = torch.Generator().manual_seed(upstream_seed)
    upstream = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs]
    live = [(y, g) for y, g in zip(outputs, upstream, strict=True) if y.requires_grad]
    gradients = torch.autograd.grad([y for y, _ in live], wanted, [g for _, g in live], allow_unused=True)
    return outputs, list(gradients)


def assert_no_worse_than_eager(
    fused: Computation,
    reference: Computation,
    inputs: Sequence[Any],
    *,
    units: float = 1.0,
    output_units: float | None = None,
    factor: float = 1.0,
    truth: Computation | None = None,
) -> None:
    """Hold the outputs and gradients of `fused` against float64, with the errors of `reference` as the allowance.

        ‖fused - truth‖ <= factor ‖reference - truth‖ + units ε ‖truth‖         for each output and each gradient

    truth = `reference` in float64 on the very same numbers; ε is that of the tensor's dtype. The last term allows one
    rounding of the result: the reference may by luck be exact, and a different order of summation is not an error.
    Besides, the two have to agree with the truth on which entries are not finite, and on which inputs have a gradient.

    Args:
        fused: computation under test, a tensor or a tuple of tensors.
        reference: the plain one, with the same arguments.
        inputs: arguments; the floating-point tensors are in the dtype under test, and those that require a gradient
            are compared. All must come out unchanged.
        units: how many ε.
        output_units: how many of an output, whose dtype may be another than the gradients'. If None, as many.
        factor: multiple of the reference's error; above 1 needs a written reason.
        truth: what to run in float64 if that is not `reference`.

    Raises:
        AssertionError: naming the output or gradient, and both errors.
    """
    before = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]
    exact = [_double(x) if isinstance(x, Tensor) else x for x in inputs]
    results = [
        outputs_and_gradients(compute, arguments)
        for compute, arguments in ((truth or reference, exact), (reference, inputs), (fused, inputs))
    ]
    for x, kept in zip(inputs, before, strict=True):
        if isinstance(x, Tensor):
            assert torch.allclose(x, kept, rtol=0, atol=0, equal_nan=True), "an input was changed in place"
    for kind, position, allowed in (
        ("output", 0, units if output_units is None else output_units),
        ("gradient", 1, units),
    ):
        expected, plain, tested = (result[position] for result in results)
        assert len(expected) == len(plain) == len(tested), f"number of {kind}s: {len(plain)} and {len(tested)}"
        for i, (e, p, t) in enumerate(zip(expected, plain, tested, strict=True)):
            _assert_no_worse(f"{kind} {i}", e, p, t, units=allowed, factor=factor)


def _double(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x


def _assert_no_worse(
    name: str, expected: Tensor | None, plain: Tensor | None, tested: Tensor | None, *, units: float, factor: float
) -> None:
    assert (plain is None) == (tested is None), f"{name}: one of the two is None"
    if expected is None or plain is None or tested is None:
        return
    assert tested.shape == plain.shape, f"{name}: shapes {tuple(plain.shape)} and {tuple(tested.shape)}"
    assert tested.dtype == plain.dtype, f"{name}: dtypes {plain.dtype} and {tested.dtype}"
    finite = expected.isfinite()
    # What overflows in half precision does so in the reference as well; there the entries need not be finite.
    must_be_finite = finite & plain.isfinite()
    assert tested[must_be_finite].isfinite().all(), f"{name}: not finite where float64 and the reference are"
    assert torch.equal(tested[~finite].double().nan_to_num(), expected[~finite].nan_to_num()), (
        f"{name}: differs from float64 where that is not finite"
    )
    plain_error = relative_error(plain[must_be_finite], expected[must_be_finite])
    tested_error = relative_error(tested[must_be_finite], expected[must_be_finite])
    allowed = factor * plain_error + units * torch.finfo(tested.dtype).eps
    assert tested_error <= allowed, f"{name}: error {tested_error:.2e}, allowed {allowed:.2e} (eager {plain_error:.2e})"

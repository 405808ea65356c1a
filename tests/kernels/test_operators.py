"""The four losses at every size, where they refuse, as custom operators, and under torch.compile (case 15)."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

from support.kernel_inputs import (
    BACKEND,
    DEVICE,
    DTYPES,
    LOSSES,
    Graphs,
    compare,
    every_dtype,
    every_loss,
    labels_for,
    leaves_of,
    long,
    objective,
    quantized_kl,
    quiet,
    randn,
    rows_for,
    some_losses,
)
from unikd_fast import dkd_loss, gaussian_kl, quantize_logits, softmax_kl, unikd_loss
from unikd_fast.kernels import _autograd, dkd
from unikd_fast.kernels import gaussian_kl as gaussian_kernel
from unikd_fast.kernels import softmax_kl as softmax_kernel
from unikd_fast.kernels import unikd_loss as unikd_kernel

pytestmark = quiet
# The launch sizes depend on K: many rows a tile, one row, odd rows, and more blocks than one. 1000 is not a multiple of
# 16; from 4097 on (16385 for the plain forward divergence) a row takes several blocks.
SIZES = (2, 100, 1003, 5000, 21841)
MORE_SIZES = (10, 1000, 50257, 128256, 262144)
MODULES = {
    "softmax_kl": softmax_kernel,
    "gaussian_kl": gaussian_kernel,
    "dkd_loss": dkd,
    "unikd_loss": unikd_kernel,
}


def operator_arguments(name: str, inputs: Sequence[Tensor], **settings: Any) -> tuple[Any, ...]:
    """Return what the public loss passes to its operator where it compiles."""
    loss, calls = MODULES[name]._loss, []

    def record(_: _autograd.FusedLoss, tensors: _autograd.Tensors, **chosen: Any) -> list[Tensor]:
        wanted = [x is not None and x.requires_grad for x in tensors]
        ordered = [chosen[setting] for setting in loss.settings]
        now = loss.computed_in_forward(tensors, wanted, chosen)
        calls.append((*tensors, now, *[None] * loss.differentiable, *ordered))
        return [torch.zeros(())] * loss.outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_autograd.FusedLoss, "__call__", record)
        LOSSES[name].compute(*inputs, impl="fused", **settings)
    return calls[0]


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, long(torch.float16)])
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    """Schema, fake tensors, autograd and tracing with dynamic shapes, of the calls that the public losses make."""
    reductions = ("none", "batchmean") if LOSSES[name].reduces else (None,)
    for reduction in reductions:
        chosen = {} if reduction is None else {"reduction": reduction}
        for grad in (True, False):
            inputs = LOSSES[name].make(5, 11, dtype)
            if not grad:
                inputs = [x.detach() for x in inputs]
            arguments = operator_arguments(name, inputs, **chosen)
            torch.library.opcheck(MODULES[name]._loss.operator, arguments)


@pytest.mark.long
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_opcheck_of_maps(reduction: str) -> None:
    """Gradients with the strides of the logits: fake tensors have them too."""
    inputs = [randn(2, 5, 4, 8, seed=seed).movedim(1, -1).requires_grad_() for seed in (1, 2)]
    arguments = operator_arguments("softmax_kl", inputs, reduction=reduction)
    torch.library.opcheck(softmax_kernel._loss.operator, arguments)
    if reduction != "none":
        results = softmax_kernel._loss.operator(*(x.detach() if isinstance(x, Tensor) else x for x in arguments))
        assert [x.stride() for x in results[1:3]] == [x.stride() for x in inputs]


@some_losses
def test_opcheck_with_an_upstream_gradient(name: str) -> None:
    """The call that backward makes for fp16."""
    loss = MODULES[name]._loss
    inputs = LOSSES[name].make(5, 11, torch.float16)
    arguments = operator_arguments(name, inputs)
    n = len(loss.inputs)
    tensors = [x.detach() if isinstance(x, Tensor) else x for x in arguments[:n]]
    wanted = [bool(isinstance(x, Tensor) and x.requires_grad) for x in arguments[:n]]
    upstream = [torch.tensor(3.0, device=DEVICE)] + [None] * (loss.differentiable - 1)
    rest = arguments[n + 1 + loss.differentiable :]
    torch.library.opcheck(loss.operator, (*tensors, wanted, *upstream, *rest))


@pytest.mark.long
@pytest.mark.parametrize("classes", [*SIZES, *map(long, MORE_SIZES)])
@every_loss
def test_number_of_classes(name: str, classes: int) -> None:
    """Case 3, for every loss."""
    loss = LOSSES[name]
    for dtype in DTYPES if classes <= 1003 else (torch.bfloat16,) if classes % 2 else (torch.float32,):
        compare(loss.compute, loss.make(rows_for(classes), classes, dtype))


class TestRefusals:
    """impl="fused" never falls back."""

    CALLS: tuple[tuple[str, Callable[..., Any]], ...] = (
        ("softmax_kl", lambda x, y: softmax_kl(x, x, impl="fused")),
        ("gaussian_kl", lambda x, y: gaussian_kl(x, x, x, x, impl="fused")),
        ("dkd_loss", lambda x, y: dkd_loss(x, x, y, impl="fused")),
        ("unikd_loss", lambda x, y: unikd_loss(x, x, y, impl="fused")),
    )

    @pytest.mark.parametrize(("name", "call"), CALLS)
    def test_float64(self, name: str, call: Callable[..., Any]) -> None:
        x, y = torch.zeros(2, 3, dtype=torch.float64, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
        with pytest.raises(RuntimeError, match=f"{name}: impl='fused' computes in fp32, got torch.float64; use impl="):
            call(x, y)

    @pytest.mark.parametrize(("name", "call"), CALLS)
    def test_no_gpu(self, name: str, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(RuntimeError, match=f"{name}: impl='fused' needs a GPU, got tensors on cpu; move them"):
            call(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))

    def test_auto_is_plain_on_the_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(_autograd.FusedLoss, "__call__")
        assert softmax_kl(torch.zeros(2, 3), torch.zeros(2, 3)).item() == 0


@every_loss
@every_dtype
def test_compiled_is_eager(name: str, dtype: torch.dtype) -> None:
    """Loss and gradients, with an upstream gradient other than 1; to the bit, but for a product that may be rounded."""
    torch._dynamo.reset()
    loss = LOSSES[name]

    def scaled(*inputs: Tensor) -> Tensor:
        return loss.compute(*inputs, impl="fused") * 3

    compiled = torch.compile(scaled, fullgraph=True, backend=BACKEND)
    inputs = loss.make(7, 11, dtype)
    results = [[y, *torch.autograd.grad(y, leaves_of(inputs))] for y in (compiled(*inputs), scaled(*inputs))]
    torch.testing.assert_close(*results, rtol=torch.finfo(dtype).eps, atol=0)


@some_losses
@pytest.mark.parametrize("reduction", ["batchmean", long("none")])
def test_one_graph_for_all_batch_sizes(name: str, reduction: str) -> None:
    torch._dynamo.reset()
    loss, graphs = LOSSES[name], Graphs()
    chosen = {"reduction": reduction} if loss.reduces else {}

    def compute(*inputs: Tensor) -> Tensor:
        return loss.compute(*inputs, impl="fused", **chosen)

    compiled = torch.compile(compute, fullgraph=True, backend=graphs, dynamic=True)
    counts = []
    for rows in (4, 7, 9, 33):
        inputs = loss.make(rows, 11, torch.float32)
        results = []
        for f in (compiled, compute):
            y = f(*inputs)
            results.append([y, *torch.autograd.grad(y.sum(), leaves_of(inputs))])
        torch.testing.assert_close(*results, rtol=1e-6, atol=0)
        counts.append(graphs.count)
    assert counts == [counts[0]] * 4


@some_losses
def test_a_changing_batch_size_recompiles_once(name: str) -> None:
    """Without a word about it: dynamo takes the first size for a constant and the second for a variable."""
    torch._dynamo.reset()
    loss, graphs = LOSSES[name], Graphs()
    compiled = torch.compile(lambda *x: loss.compute(*x, impl="fused"), fullgraph=True, backend=graphs)
    counts = []
    for rows in (4, 7, 9, 33, 12):
        compiled(*loss.make(rows, 11, torch.float32))
        counts.append(graphs.count)
    assert counts[1:] == [counts[1]] * 4


def test_a_ramp_of_the_weights_does_not_recompile() -> None:
    torch._dynamo.reset()
    graphs, inputs = Graphs(), LOSSES["unikd_loss"].make(6, 11, torch.float32)
    compiled = torch.compile(objective, fullgraph=True, backend=graphs)
    for weight in (0.0, 0.5, 4.0):
        weights = {"alpha": torch.tensor(weight, device=DEVICE), "normalizer": torch.tensor(weight + 1, device=DEVICE)}
        terms = compiled(*inputs, impl="fused", **weights)
        assert torch.equal(torch.stack(terms), torch.stack(objective(*inputs, impl="fused", **weights)))
    assert graphs.count == 1


@pytest.mark.parametrize("case", ["anchor", long("mask"), long("quantized"), long("total"), long("soft labels")])
def test_compiled_with_options(case: str) -> None:
    """Masks, anchors, stored teachers, no Gaussians, no gradient."""
    student, teacher = randn(6, 11, seed=1, grad=True), randn(6, 11, seed=2)
    mask, labels = torch.arange(6, device=DEVICE) % 2 == 0, labels_for(6, 11)
    stored = quantize_logits(teacher)
    anchor = (randn(6, 11, seed=3, grad=True), randn(6, 11, seed=4, grad=True))
    calls: dict[str, Callable[[], Any]] = {
        "mask": lambda: softmax_kl(
            student, teacher, ignore_mask=mask, divergence="jsd", standardized=True, impl="fused"
        ),
        "quantized": lambda: quantized_kl(stored.values)(student, stored.scale, stored.offset, impl="fused"),
        "total": lambda: unikd_loss(student, stored, labels, anchor=anchor, label_smoothing=0.1, impl="fused").total,
        "anchor": lambda: unikd_loss(student, stored, labels, anchor=anchor, impl="fused").anchor,
        "soft labels": lambda: unikd_loss(student, teacher, teacher.softmax(-1), impl="fused").total,
    }
    torch._dynamo.reset()
    results = []
    for f in (torch.compile(calls[case], fullgraph=True, backend=BACKEND), calls[case]):
        y = f()
        gradients = torch.autograd.grad(y, [student, *anchor], allow_unused=True)
        results.append([y, *(torch.zeros(6, 11, device=DEVICE) if g is None else g for g in gradients)])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)
    with torch.no_grad():
        assert not torch.compile(calls[case], fullgraph=True, backend=BACKEND)().requires_grad


@some_losses
def test_backward_of_a_compiled_loss_twice(name: str) -> None:
    """Case 11 in a graph."""
    torch._dynamo.reset()
    loss = LOSSES[name]
    inputs = loss.make(5, 11, torch.float32)
    leaves = leaves_of(inputs)
    y = torch.compile(lambda *x: loss.compute(*x, impl="fused"), fullgraph=True, backend=BACKEND)(*inputs)
    first = torch.autograd.grad(y, leaves, torch.tensor(2.0, device=DEVICE), retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(y, leaves, torch.tensor(1.0, device=DEVICE))
    for a, before, b in zip(first, kept, second, strict=True):
        assert torch.equal(a, before)
        assert torch.equal(b * 2, a)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:dynamo_pgo")
@pytest.mark.parametrize("donated", [True, False])
def test_inductor_multiplies_the_gradient_in_place(donated: bool) -> None:
    """Where backward owns what forward saved; where it does not, a second pass finds the gradient as it was."""
    torch._dynamo.reset()
    hidden, teacher = randn(16, 8, seed=3), randn(16, 100, seed=2)
    weight = randn(8, 100, seed=1, grad=True)
    compiled = torch.compile(lambda x, w: softmax_kl(x @ w, teacher, impl="fused") * 3, fullgraph=True)
    expected = torch.autograd.grad(softmax_kl(hidden @ weight, teacher) * 3, weight)[0]
    with functorch_config.patch(donated_buffer=donated), inductor_config.patch(force_disable_caches=True):
        losses: list[Tensor] = []

        def step() -> Tensor:
            losses.append(compiled(hidden, weight))
            return torch.autograd.grad(losses[0], weight, retain_graph=not donated)[0]

        first, (_, backward) = run_and_get_code(step)
        assert len(re.findall(r"void +kernel\(|^def triton_", backward, re.M)) == 1
        assert ("in_out_ptr" in backward) == donated
        for gradient in [first] if donated else [first, torch.autograd.grad(losses[0], weight)[0]]:
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


@some_losses
def test_second_derivatives_of_operators_are_rejected(name: str) -> None:
    """As in eager mode: the operator's gradient is an output of its own, and its derivative is not known."""
    torch._dynamo.reset()
    loss = LOSSES[name]
    inputs = loss.make(5, 11, torch.float32)
    y = torch.compile(lambda *x: loss.compute(*x, impl="fused"), fullgraph=True, backend="eager")(*inputs)
    with pytest.raises(RuntimeError):
        (gradient, *_) = torch.autograd.grad(y, leaves_of(inputs), create_graph=True)
        (y + gradient.square().sum()).backward()

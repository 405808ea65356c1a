"""The last linear layer and the divergence in one, against the same loss of all logits and against float64."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from support.kernel_inputs import BACKEND, DEVICE, DTYPES, UNITS, Graphs, labels_for, quiet, randn
from support.long_rounds import long, quick
from support.numerics import assert_no_worse_than_eager
from unikd_fast import LinearSoftmaxKL, linear_softmax_kl, quantize_logits, softmax_kl
from unikd_fast.kernels import _launch
from unikd_fast.kernels import linear_softmax_kl as kernel
from unikd_fast.kernels import softmax_kl as softmax_kernel
from unikd_fast.values import QuantizedLogits, TopKLogits

pytestmark = quiet
DIVERGENCES = ("forward", "reverse", "jsd")
IMPLS = ("fused", "reference")
CHUNK, TILE = 64, 32  # rows at a time in these tests


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "LEAST_ROWS", CHUNK)
    assert kernel.rows_at_once(1, 4, 4) == (CHUNK, TILE)


def inputs_for(
    rows: int | tuple[int, ...],
    classes: int = 11,
    dtype: torch.dtype = torch.float32,
    *,
    widths: tuple[int, int] = (6, 9),
    bias: bool = True,
    labels: bool = False,
) -> list[Tensor | None]:
    """Return hidden states, weight and bias of student and teacher, and labels, of which a third is ignored."""
    shape = (rows,) if isinstance(rows, int) else rows
    student, teacher = widths
    count = math.prod(shape)
    return [
        randn(*shape, student, seed=1, scale=1, dtype=dtype, grad=True),
        randn(classes, student, seed=2, scale=1, dtype=dtype, grad=True),
        randn(classes, seed=3, dtype=dtype, grad=True) if bias else None,
        randn(*shape, teacher, seed=4, scale=1, dtype=dtype),
        randn(classes, teacher, seed=5, scale=1, dtype=dtype),
        randn(classes, seed=6, dtype=dtype) if bias else None,
        labels_for(count, classes, ignored=range(1, count, 3)).reshape(shape) if labels else None,
    ]


def chunked(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    **settings: Any,
) -> Tensor:
    return linear_softmax_kl(
        hidden, weight, teacher, teacher_weight, labels, student_bias=bias, teacher_bias=teacher_bias, **settings
    )


def unfused(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    *,
    ce_weight: float = 1.0,
    ignore_index: int = -100,
    **settings: Any,
) -> Tensor:
    """The same loss of logits that all exist, written with torch's cross-entropy."""
    logits = F.linear(hidden, weight, bias)
    teacher_logits = teacher if teacher_weight is None else F.linear(teacher, teacher_weight, teacher_bias)
    loss = softmax_kl(logits, teacher_logits, impl="reference", **settings)
    if labels is None:
        return loss
    mask, normalizer = settings.get("ignore_mask"), settings.get("normalizer")
    if mask is not None:
        labels = labels.masked_fill(mask, ignore_index)
    rows = logits.reshape(-1, logits.shape[-1])
    ce = F.cross_entropy(
        rows if rows.dtype == torch.float64 else rows.float(),
        labels.reshape(-1),
        ignore_index=ignore_index,
        reduction="sum",
    )
    if settings.get("reduction") != "sum":
        ce = ce / ((labels != ignore_index).sum() if normalizer is None else normalizer)
    return loss + ce_weight * ce


def check(inputs: list[Tensor | None], *, impls: tuple[str, ...] = IMPLS, scale: float = 1, **settings: Any) -> None:
    """Hold value and gradients against float64, with the errors of the unfused loss as the allowance.

    What is fp32 may err besides by the rounding of sums in another order; gradients in half precision by one rounding.
    """
    for impl in impls:
        assert_no_worse_than_eager(
            lambda *x, impl=impl: chunked(*x, impl=impl, **settings) * scale,
            lambda *x: unfused(*x, **settings) * scale,
            inputs,
            units=UNITS if inputs[0] is not None and inputs[0].dtype == torch.float32 else 1,
            output_units=UNITS,
        )


def gradients_of(loss: Tensor, inputs: list[Tensor | None], **settings: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [x for x in inputs if x is not None and x.requires_grad], **settings))


@pytest.mark.parametrize("labels", [long(False), True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", quick(DTYPES, torch.bfloat16))
def test_values_and_gradients(dtype: torch.dtype, divergence: str, labels: bool) -> None:
    """Two chunks and a part of one; widths of student and teacher differ."""
    inputs = inputs_for(2 * CHUNK + 21, dtype=dtype, labels=labels)
    check(inputs, divergence=divergence, beta=0.3, temperature=2.0, ce_weight=0.7)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), ()], ids=str)
def test_only_wanted_gradients_are_computed(wanted: tuple[int, ...]) -> None:
    inputs = [
        None if x is None else x.detach().requires_grad_(i in wanted) for i, x in enumerate(inputs_for(CHUNK + 3))
    ]
    check(inputs)


@pytest.mark.parametrize("rows", [0, 1, 15, TILE, TILE + 1, CHUNK, CHUNK + TILE, 2 * CHUNK, (3, 5, 7), ()], ids=str)
def test_numbers_of_rows(rows: int | tuple[int, ...]) -> None:
    """Chunks and tiles that do not divide the rows, none of them, and rows along several axes."""
    for labels in (False, True):
        inputs = inputs_for(rows, labels=labels and rows != 0)
        check(inputs)
        if rows == 0:
            loss = chunked(*inputs)
            assert loss.item() == 0
            assert all((g == 0).all() for g in gradients_of(loss, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_gradient_over_many_chunks(dtype: torch.dtype) -> None:
    """It is rounded once a chunk: here 20 times, and a mean direction makes the sum grow with every one."""
    rows = 64 * kernel.CHUNKS * 5 - 1
    assert rows // kernel.rows_at_once(rows, 2, 2)[0] == 19
    inputs = inputs_for(rows, 7, dtype, bias=False)
    for shift in (0.0, 1.0):
        hidden = (inputs[0] + shift).detach().requires_grad_()
        check([hidden, *inputs[1:]], impls=("reference",))


@pytest.mark.parametrize("classes", [1, 100, 128256])
def test_numbers_of_classes(classes: int) -> None:
    """The kernels themselves are tested at all sizes; interpreted they are slow."""
    for dtype in DTYPES[:2] if classes <= 100 else DTYPES[1:2]:
        check(inputs_for(3, classes, dtype, labels=True), impls=IMPLS if classes <= 100 else ("reference",))


class TestTeachers:
    """Hidden states, logits, and logits as a cache stores them."""

    @pytest.mark.parametrize("labels", [False, True])
    def test_logits(self, labels: bool) -> None:
        inputs = inputs_for(CHUNK + 9, labels=labels)
        for dtype in DTYPES:
            check([*inputs[:3], randn(CHUNK + 9, 11, seed=7, dtype=dtype), None, None, inputs[6]], divergence="jsd")

    def test_of_another_dtype(self) -> None:
        student = inputs_for(CHUNK + 9, dtype=torch.bfloat16)
        check([*student[:3], *inputs_for(CHUNK + 9)[3:]])

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
    def test_quantized_logits(self, dtype: torch.dtype) -> None:
        inputs, stored = inputs_for(CHUNK + 9), quantize_logits(randn(CHUNK + 9, 11, seed=7), dtype)

        def compute(loss: Any, *x: Tensor, **settings: Any) -> Tensor:
            return loss(*x[:3], QuantizedLogits(stored.values, x[3], x[4]), None, None, None, **settings)

        for impl in IMPLS:
            assert_no_worse_than_eager(
                lambda *x, impl=impl: compute(chunked, *x, impl=impl),
                lambda *x: compute(unfused, *x),
                [*inputs[:3], stored.scale, stored.offset],
            )

    def test_strides(self) -> None:
        hidden = randn(6, 300, seed=1).T.requires_grad_()  # a view that is not dense
        weight = randn(6, 11, seed=2).T.requires_grad_()
        teacher = randn(1, 11, seed=3).expand(300, 11)
        check([hidden, weight, None, teacher, None, None, None])
        shifted = randn(7, 50, 6, seed=1)[:, :-1].requires_grad_()
        check([shifted, weight, None, randn(7, 50, 11, seed=3)[:, 1:], None, None, None])


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
def test_reductions(reduction: str, labels: bool) -> None:
    rows = CHUNK + 9
    mask = torch.arange(rows, device=DEVICE) % 4 == 1
    for ignore_mask, normalizer in ((None, None), (mask, None), (mask, 13.0), (None, torch.tensor(13, device=DEVICE))):
        inputs = inputs_for(rows, labels=labels)
        check(inputs, reduction=reduction, ignore_mask=ignore_mask, normalizer=normalizer, ce_weight=0.3)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_loss_per_row(dtype: torch.dtype, masked: bool) -> None:
    """With a random upstream gradient a row, which the gradient of the weight sums over."""
    mask = (torch.arange(CHUNK + 8, device=DEVICE) % 4 == 1).reshape(2, -1) if masked else None
    check(inputs_for((2, CHUNK // 2 + 4), dtype=dtype), reduction="none", ignore_mask=mask, temperature=3.0)


@pytest.mark.parametrize("scale_by_t2", [False, True])
def test_temperature(scale_by_t2: bool) -> None:
    for temperature in (0.5, 20.0):
        check(inputs_for(33, labels=True), temperature=temperature, scale_by_t2=scale_by_t2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
class TestIgnoredRows:
    def test_may_hold_anything(self, impl: str, divergence: str) -> None:
        """The loss and its gradients are those of the other rows."""
        mask = torch.arange(CHUNK + 9, device=DEVICE) % 3 == 1
        inputs = inputs_for(CHUNK + 9, labels=True)
        kept = [x[~mask] if i in (0, 3, 6) and x is not None else x for i, x in enumerate(inputs)]
        loss = chunked(*kept, impl=impl, divergence=divergence)
        hidden, *rest = gradients_of(loss, inputs)
        expected = [loss, hidden[~mask], *rest]
        with torch.no_grad():
            inputs[0][mask], inputs[3][mask] = math.nan, math.inf
        loss = chunked(*inputs, ignore_mask=mask, impl=impl, divergence=divergence)
        hidden, *rest = gradients_of(loss, inputs)
        assert (hidden[mask] == 0).all()
        torch.testing.assert_close([loss, hidden[~mask], *rest], expected, rtol=2e-5, atol=1e-7)

    @pytest.mark.parametrize("labels", [False, True])
    def test_none_kept(self, impl: str, divergence: str, labels: bool) -> None:
        mask = torch.ones(CHUNK + 9, dtype=torch.bool, device=DEVICE)
        inputs = inputs_for(CHUNK + 9, labels=labels)
        loss = chunked(*inputs, ignore_mask=mask, impl=impl, divergence=divergence)
        assert loss.item() == 0
        assert all((g == 0).all() for g in gradients_of(loss, inputs))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", quick(DTYPES, torch.float16))
class TestUpstream:
    def test_two_backward_passes(self, dtype: torch.dtype, impl: str) -> None:
        inputs = inputs_for(CHUNK + 9, dtype=dtype, labels=True)
        loss = chunked(*inputs, impl=impl)
        first = gradients_of(loss, inputs, grad_outputs=torch.tensor(2.0, device=DEVICE), retain_graph=True)
        kept = [x.clone() for x in first]
        second = gradients_of(loss, inputs, grad_outputs=torch.tensor(-0.5, device=DEVICE))
        for a, a_before, b in zip(first, kept, second, strict=True):
            assert torch.equal(a, a_before)
            torch.testing.assert_close(b * -4, a)

    def test_of_a_product(self, dtype: torch.dtype, impl: str) -> None:
        check(inputs_for(CHUNK + 9, dtype=dtype), impls=(impl,), scale=0.375)


def test_loss_scale_in_fp16() -> None:
    """Gradients of the logits are below the smallest number of fp16 until they are multiplied by the loss scale."""
    inputs = inputs_for(CHUNK + 9, 501, torch.float16, widths=(6, 6), bias=False)
    assert inputs[0] is not None and inputs[1] is not None
    inputs[3], inputs[4] = (inputs[0] + 0.1).detach(), inputs[1].detach()
    check(inputs, scale=2.0**14)


def _double(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_(x.requires_grad)


def _with(rest: list[Any], settings: dict[str, Any], *leaves: Tensor) -> Tensor:
    return chunked(*leaves, *rest, **settings)


def test_gradcheck() -> None:
    inputs = [x if x is None or not x.is_floating_point() else _double(x) for x in inputs_for(5, 4, labels=True)]
    for divergence in DIVERGENCES:
        for reduction in ("batchmean", "none"):
            given = [*inputs[:6], None if reduction == "none" else inputs[6]]

            settings = {"temperature": 2.0, "divergence": divergence, "reduction": reduction}
            assert torch.autograd.gradcheck(partial(_with, given[3:], settings), given[:3])


@pytest.mark.parametrize("impl", IMPLS)
class TestCompiled:
    @pytest.mark.parametrize("dtype", [torch.float32, long(torch.float16)])
    def test_it_is_eager(self, impl: str, dtype: torch.dtype) -> None:
        torch._dynamo.reset()
        inputs = inputs_for(CHUNK + 9, dtype=dtype, labels=True)
        mask = torch.arange(CHUNK + 9, device=DEVICE) % 3 == 1

        def loss(*x: Any) -> Tensor:
            return chunked(*x, impl=impl, ignore_mask=mask, divergence="jsd") * 3

        compiled = torch.compile(loss, fullgraph=True, backend=BACKEND)
        results = [[y, *gradients_of(y, inputs)] for y in (compiled(*inputs), loss(*inputs))]
        torch.testing.assert_close(*results, rtol=torch.finfo(dtype).eps, atol=0)

    def test_a_loss_per_row(self, impl: str) -> None:
        torch._dynamo.reset()
        inputs = inputs_for(9)

        def loss(*x: Any) -> Tensor:
            return chunked(*x, impl=impl, reduction="none").square().sum()

        compiled = torch.compile(loss, fullgraph=True, backend=BACKEND)
        results = [[y, *gradients_of(y, inputs)] for y in (compiled(*inputs), loss(*inputs))]
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)

    def test_one_graph_for_all_batch_sizes(self, impl: str) -> None:
        torch._dynamo.reset()
        graphs = Graphs()
        compiled = torch.compile(lambda *x: chunked(*x, impl=impl), fullgraph=True, backend=graphs, dynamic=True)
        counts = []
        for rows in (4, 7, CHUNK + 9):
            inputs = inputs_for(rows)
            torch.testing.assert_close(compiled(*inputs), chunked(*inputs, impl=impl), rtol=1e-6, atol=0)
            counts.append(graphs.count)
        assert counts == [counts[0]] * 3

    @pytest.mark.parametrize("reduction", ["batchmean", "none"])
    def test_opcheck(self, impl: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[Any] = []

        def record(loss: Any, tensors: Any, **chosen: Any) -> list[Tensor]:
            now = [reduction != "none" and x is not None and x.requires_grad for x in tensors]
            calls.append((*tensors, now, None, *chosen.values()))
            return [torch.zeros(())]

        monkeypatch.setattr(type(kernel._loss), "__call__", record)
        chunked(*inputs_for(5, labels=reduction != "none"), impl=impl, reduction=reduction)
        torch.library.opcheck(kernel._loss.operator, calls[0])


class TestRefusals:
    @pytest.mark.parametrize("impl", IMPLS)
    def test_second_derivative(self, impl: str) -> None:
        inputs = inputs_for(5)
        loss = chunked(*inputs, impl=impl)
        gradient = gradients_of(loss, inputs, create_graph=True)[0]
        with pytest.raises(RuntimeError, match=r"twice|softmax_kl of the logits for linear_softmax_kl"):
            (loss + gradient.square().sum()).backward()

    def test_transforms(self) -> None:
        hidden, *rest = (x if x is None else x.detach() for x in inputs_for(5))
        message = (
            "linear_softmax_kl: can be differentiated in reverse mode by autograd, got a tensor under .*softmax_kl"
        )
        for impl in ("auto", *IMPLS):
            with pytest.raises(RuntimeError, match=message):
                torch.func.grad(lambda x, impl=impl: chunked(x, *rest, impl=impl))(hidden)
            with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
                chunked(forward_ad.make_dual(hidden, torch.ones_like(hidden)), *rest, impl=impl)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            (
                {0: (5, 7)},
                ValueError,
                r"student_hidden must be \(\.\.\., D\) and student_weight \(K, D\) .*\(5, 7\) and",
            ),
            ({1: (6,)}, ValueError, r"got \(5, 6\) and \(6,\); pass the weight of a torch\.nn\.Linear"),
            ({1: (0, 6)}, ValueError, r"with at least one class, got \(5, 6\) and \(0, 6\)"),
            (
                {2: (6,)},
                ValueError,
                r"student_bias must have one entry per class, got \(6,\) for student_weight \(11, 6\)",
            ),
            ({4: (11, 8)}, ValueError, r"teacher_hidden must be .* got \(5, 9\) and \(11, 8\)"),
            ({4: (12, 9), 5: (12,)}, ValueError, r"logits must have one shape, got \(5, 11\) and \(5, 12\)"),
            ({3: (6, 9)}, ValueError, r"logits must have one shape, got \(5, 11\) and \(6, 11\)"),
            ({3: (5, 12), 4: None, 5: None}, ValueError, r"logits must have one shape, got \(5, 11\) and \(5, 12\)"),
            ({4: None}, ValueError, r"teacher_bias with a teacher_weight, got a teacher_bias alone; leave it out"),
            (
                {6: (4,)},
                ValueError,
                r"labels must have one entry per row of the logits, got \(4,\) for logits \(5, 11\)",
            ),
        ],
        ids=str,
    )
    def test_shapes(self, changes: dict[int, Any], error: type[Exception], message: str) -> None:
        inputs: list[Any] = inputs_for(5, labels=True)
        for position, shape in changes.items():
            dtype = torch.int64 if position == 6 else torch.float32
            inputs[position] = None if shape is None else torch.zeros(shape, dtype=dtype, device=DEVICE)
        with pytest.raises(error, match=f"linear_softmax_kl: .*{message}"):
            chunked(*inputs)

    def test_dtypes_and_devices(self) -> None:
        inputs: list[Any] = inputs_for(5)
        with pytest.raises(
            TypeError, match=r"student_weight must have one dtype, got torch\.float32 and torch\.bfloat16"
        ):
            chunked(inputs[0], inputs[1].bfloat16(), *inputs[2:])
        with pytest.raises(
            ValueError, match=r"teacher_hidden and teacher_weight must be on one device, got .* and meta"
        ):
            chunked(*inputs[:4], inputs[4].to("meta"), *inputs[5:])
        with pytest.raises(TypeError, match=r"student_hidden must be floating point, got torch\.int64"):
            chunked(inputs[0].long(), *inputs[1:])

    def test_teachers(self) -> None:
        inputs: list[Any] = inputs_for(5)
        logits = randn(5, 11)
        with pytest.raises(
            ValueError, match="teacher_weight is a constant, got a tensor that requires a gradient; detac"
        ):
            chunked(*inputs[:4], inputs[4].clone().requires_grad_(), *inputs[5:])
        with torch.no_grad():
            chunked(*inputs[:4], inputs[4].clone().requires_grad_(), *inputs[5:])
        with pytest.raises(TypeError, match="needs all of the teacher's logits, got TopKLogits"):
            linear_softmax_kl(inputs[0], inputs[1], TopKLogits(logits, logits.long(), logits[:, 0]))
        with pytest.raises(ValueError, match="got a teacher_weight for QuantizedLogits; leave it out"):
            linear_softmax_kl(inputs[0], inputs[1], quantize_logits(logits), inputs[4])

    def test_labels(self) -> None:
        inputs: list[Any] = inputs_for(5, labels=True)
        with pytest.raises(ValueError, match="reduction='none' has no cross-entropy, got labels; leave them out"):
            chunked(*inputs, reduction="none")
        if DEVICE == "cpu":
            with pytest.raises(ValueError, match=r"labels must lie in \[0, 11\) or be ignore_index -100, got 11"):
                chunked(*inputs[:6], torch.full((5,), 11))

    @pytest.mark.parametrize("impl", ["fused"])
    def test_fused_never_falls_back(self, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
        inputs: list[Any] = [x if x is None else _double(x) for x in inputs_for(5)]
        with pytest.raises(RuntimeError, match=r"computes in fp32, got torch\.float64"):
            chunked(*inputs, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast(impl: str) -> None:
    """fp32 parameters in bf16 products, as a linear layer has them; the gradients are fp32."""
    inputs = inputs_for(CHUNK + 9, labels=True)
    results = []
    for loss in (lambda *x: chunked(*x, impl=impl), unfused):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            value = loss(*inputs)
        results.append([value, *gradients_of(value, inputs)])
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-4)  # gradients of the logits are rounded to bf16
    assert all(x.dtype == torch.float32 for x in results[0])


def test_inputs_are_unchanged_and_results_repeat() -> None:
    for impl in IMPLS:
        inputs = inputs_for(CHUNK + 9, labels=True)
        before = [x if x is None else x.detach().clone() for x in inputs]
        results = []
        for _ in range(2):
            loss = chunked(*inputs, impl=impl, ignore_mask=torch.arange(CHUNK + 9, device=DEVICE) % 3 == 1)
            results.append([loss, *gradients_of(loss, inputs)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert all(a is None or torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_module() -> None:
    inputs = inputs_for(9, labels=True)
    settings: dict[str, Any] = {"temperature": 2.0, "divergence": "jsd", "beta": 0.3, "ce_weight": 0.5}
    mask = torch.arange(9, device=DEVICE) % 3 == 1
    hidden, weight, bias, teacher, teacher_weight, teacher_bias, labels = inputs
    loss = LinearSoftmaxKL(**settings)(
        hidden,
        weight,
        teacher,
        teacher_weight,
        labels,
        student_bias=bias,
        teacher_bias=teacher_bias,
        ignore_mask=mask,
    )
    assert torch.equal(loss, chunked(*inputs, ignore_mask=mask, **settings))


class LiveBytes(TorchDispatchMode):
    """The most bytes that are live at once, besides those of the given tensors."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.given = [x.untyped_storage() for x in given]
        self.live = WeakIdKeyDictionary()
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and not any(x.untyped_storage() is y for y in self.given):
                self.live[x.untyped_storage()] = x.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self.live.values()))
        return result


class TestMemory:
    """Beside the inputs and the gradients, in shares of the student's logits."""

    @pytest.fixture
    def absent_gpu(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
        """Fake tensors on a GPU, on which kernels are not launched."""
        of_cpu = _launch.describe(torch.device("cpu"))
        monkeypatch.setattr(_launch, "describe", lambda _: of_cpu)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(type(softmax_kernel._softmax_kl_kernel), "run", lambda *_, **__: None)
        with FakeTensorMode():
            yield torch.device("cuda", 0)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU that is not there has room for anything")
    @pytest.mark.parametrize("teacher", ["hidden", "logits"])
    @pytest.mark.parametrize("labelled", [False, True])
    def test_kernels_at_full_size(self, absent_gpu: torch.device, labelled: bool, teacher: str) -> None:
        """8,192 positions of width 4,096 and 128,256 classes; the gradients are computed in forward."""
        rows, width, classes = 8192, 4096, 128256
        empty = partial(torch.empty, dtype=torch.bfloat16, device=absent_gpu)
        student = [empty(shape).requires_grad_() for shape in ((rows, width), (classes, width), (classes,))]
        others = [empty(rows, classes)] if teacher == "logits" else [empty(rows, width), empty(classes, width)]
        settings: dict[str, Tensor] = {}
        if labelled:
            settings = {"labels": empty(rows, dtype=torch.int64), "ignore_mask": empty(rows, dtype=torch.bool)}
        hidden, weight, bias = student
        with LiveBytes([*student, *others, *settings.values()]) as memory:
            loss = linear_softmax_kl(hidden, weight, *others, student_bias=bias, impl="fused", **settings)
        assert loss.requires_grad
        extra = memory.peak - sum(x.untyped_storage().nbytes() for x in student)
        assert 0.12 < extra / (rows * classes * 2) < 0.13

    @pytest.mark.long
    @pytest.mark.slow
    def test_plain_losses(self) -> None:
        """12.5 %, and some numbers in fp32 for each of 2^17 logits; freed memory goes back to the system at once."""
        code = """
import torch
from support.processes import peak_of_memory
from unikd_fast import linear_softmax_kl
rows, width, classes = 8192, 16, 16384
def make(*shape, grad=False):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).bfloat16().requires_grad_(grad)
hidden, weight = make(rows, width, grad=True), make(classes, width, grad=True)
teacher, teacher_weight, labels = make(rows, width), make(classes, width), torch.zeros(rows, dtype=torch.int64)
for n in (16, rows):
    with peak_of_memory() as peak:
        loss = linear_softmax_kl(hidden[:n], weight, teacher[:n], teacher_weight, labels[:n])
        (loss * 3).backward()
print((peak.bytes - hidden.nbytes - weight.nbytes) / (rows * classes * 2))
"""
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert 0.12 < float(done.stdout) < 0.16, done.stdout


@pytest.mark.slow
def test_the_plain_loss_needs_no_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from unikd_fast import linear_softmax_kl, softmax_kl
hidden, weight = torch.randn(9, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
teacher = torch.randn(9, 5)
losses = linear_softmax_kl(hidden, weight, teacher), softmax_kl(hidden @ weight.T, teacher)
torch.testing.assert_close(*(torch.autograd.grad(loss * 3, (hidden, weight)) for loss in losses))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""The labels of the whole objective, and the anchor of the teacher's head, a term of its own."""

from typing import Any

import pytest
import torch
from torch import Tensor

from support.kernel_inputs import (
    ALL_FOUR,
    DEVICE,
    DTYPES,
    compare,
    gaussians,
    labelled_logits,
    long,
    objective,
    objective_inputs,
    quiet,
    randn,
    without_gaussians,
)
from support.numerics import relative_error
from unikd_fast import dkd_loss, unikd_loss
from unikd_fast.kernels._launch import COUNTED_IN_KERNEL
from unikd_fast.kernels.unikd_loss import fused_unikd_loss

pytestmark = quiet


def with_anchor(*x: Any, **chosen: Any) -> tuple[Tensor, ...]:
    return objective(*x[:7], anchor=(x[7], x[8]), **chosen)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("classes", [10, long(5000)])
def test_labels(classes: int, soft: bool, label_smoothing: float) -> None:
    for dtype in DTYPES:
        inputs = objective_inputs(3, classes, dtype)
        if soft:
            inputs[2] = randn(3, classes, seed=3).softmax(-1).to(dtype)
        compare(objective, inputs, label_smoothing=label_smoothing)


@pytest.mark.parametrize("classes", [10, 5000])
def test_soft_labels_that_do_not_sum_to_one(classes: int) -> None:
    inputs = objective_inputs(3, classes)
    inputs[2] = randn(classes, 3, seed=3).abs().T
    inputs[2][0] = 0
    compare(objective, inputs)


@pytest.mark.parametrize("rows", [long(COUNTED_IN_KERNEL), long(COUNTED_IN_KERNEL + 1)])
def test_count_of_labelled_rows(rows: int) -> None:
    student, teacher, labels = labelled_logits(rows, 3)
    labels[::7] = -100
    compare(without_gaussians, [student, teacher, labels])


def test_ignored_labels() -> None:
    """Case 9: rows without a label are distilled; no labelled row at all gives 0."""
    student, teacher, labels, *pairs = objective_inputs(6, 7)
    compare(objective, [student, teacher, torch.where(labels == 3, -100, labels), *pairs])
    compare(objective, [student, teacher, labels.clamp(min=0), *pairs], ignore_index=0)
    compare(objective, [student, teacher, torch.full_like(labels, -100), *pairs])
    student.grad = None
    terms = unikd_loss(student, teacher, torch.full_like(labels, -100), beta=0, impl="fused")
    terms.total.backward()
    assert terms.total.item() == terms.ce.item() == 0
    assert student.grad is not None
    assert (student.grad == 0).all()


# Where -100 and 255 wrap round in the labels' dtype to a class, or to what is no class.
SMALL_LABELS = [(torch.uint8, -100), (torch.uint8, 255), (torch.int8, 255), (torch.int8, -100), (torch.uint16, -100)]


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize(("dtype", "ignore_index"), SMALL_LABELS, ids=str)
@pytest.mark.parametrize("loss", ["unikd_loss", "dkd_loss"])
def test_small_integer_labels(loss: str, dtype: torch.dtype, ignore_index: int, impl: str) -> None:
    """They mean what they mean in int64; classes 156 and 155 are what -100 and -101 wrap round to."""

    def compute(labels: Tensor) -> list[Tensor]:
        student, teacher = randn(5, 200, seed=1, grad=True), randn(5, 200, seed=2)
        chosen: dict[str, Any] = {"ignore_index": ignore_index, "impl": impl}
        if loss == "dkd_loss":
            y = dkd_loss(student, teacher, labels, **chosen)
        else:
            y = unikd_loss(student, teacher, labels, beta=0, **chosen).total
        return [y.detach(), *torch.autograd.grad(y, student)]

    labels = torch.tensor([3, 7, 100, 0, 9] if dtype == torch.int8 else [3, 156, 155, 0, 9], device=DEVICE)
    if ignore_index == 255 and dtype == torch.uint8:
        labels[3] = 255
    for a, b in zip(compute(labels.to(dtype)), compute(labels), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [5, long(COUNTED_IN_KERNEL + 1)])
def test_cross_entropy_of_small_integer_labels(rows: int) -> None:
    """Against PyTorch's own: rows past the last one once counted as labelled."""
    student, labels = randn(rows, 10, seed=1), torch.arange(rows, device=DEVICE) % 10
    expected = torch.nn.functional.cross_entropy(student, labels)
    for dtype, ignore_index in ((torch.uint8, -100), (torch.int8, 255), (torch.int16, 65535)):
        ce = unikd_loss(student, student, labels.to(dtype), ignore_index=ignore_index, impl="fused").ce
        torch.testing.assert_close(ce, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_label_out_of_range_makes_its_row_nan(dtype: torch.dtype) -> None:
    """Where looking at the labels would cost a synchronisation."""
    for wrong in (-1, 5, 2**40):
        student, teacher, labels, *pairs = objective_inputs(4, 5, dtype)
        labels[1] = wrong
        chosen: dict[str, Any] = {"alpha": 4.0, "beta": 1.0, "ce_weight": 1.0, "temperature": 4.0, "scale_by_t2": True}
        chosen |= {"feature_reduction": "mean", "label_smoothing": 0.0, "ignore_index": -100, "normalizer": None}
        terms = fused_unikd_loss(student, teacher, None, labels, (*pairs[:2],), (*pairs[2:],), None, **chosen)
        terms[0].backward()
        assert [x.isnan().item() for x in terms] == [True, True, False, False, False]
        assert student.grad is not None
        assert student.grad.isnan().all(-1).tolist() == [False, True, False, False]
        assert student.grad.isnan().any(-1).tolist() == [False, True, False, False]
        assert pairs[0].grad is not None
        assert pairs[0].grad.isfinite().all()


@pytest.mark.parametrize("classes", [2, long(100), long(5000)])
def test_anchor(classes: int) -> None:
    """A term of its own, with gradients of its own."""
    for dtype in DTYPES:
        pair = [randn(3, classes, seed=30 + i, scale=0.5, dtype=dtype, grad=True) for i in range(2)]
        compare(with_anchor, [*objective_inputs(3, classes, dtype), *pair])
        compare(with_anchor, [*objective_inputs(3, classes, dtype), *pair], normalizer=13.0)


@pytest.mark.parametrize("size", [1e-30, 1e19, 1e30, 1e37])
def test_anchor_at_logits_of_any_size(size: float) -> None:
    """Their squares leave the range of fp32; standardised they are those of size 1."""
    pair = [randn(3, 10, seed=30 + i, scale=0.5, grad=True) for i in range(2)]
    inputs = objective_inputs(3, 10)
    inputs[1] = randn(3, 10, seed=2, scale=size)
    compare(with_anchor, [*inputs, *pair], beta=0)
    if size > 1:
        terms = [
            unikd_loss(inputs[0], randn(3, 10, seed=2, scale=s), inputs[2], anchor=(*pair,), impl=impl).anchor
            for s, impl in ((1e6, "reference"), (size, "fused"), (size, "reference"))
        ]
        assert terms[1].item() == pytest.approx(terms[0].item(), rel=1e-5)
        assert terms[2].item() == pytest.approx(terms[0].item(), rel=1e-5)


def test_gradient_of_the_anchor_alone() -> None:
    inputs = objective_inputs(3, 7)
    pair = [randn(3, 7, seed=30 + i, scale=0.5, grad=True) for i in range(2)]
    for dtype in DTYPES:
        leaves = [x.to(dtype).detach().requires_grad_() for x in pair]
        anchored = unikd_loss(*inputs[:3], anchor=tuple(leaves), impl="fused").anchor
        assert anchored is not None
        anchored.backward()
        assert inputs[0].grad is None
        expected = unikd_loss(*inputs[:3], anchor=tuple(x.double() for x in leaves), impl="reference").anchor
        for a, b in zip(leaves, torch.autograd.grad(expected, leaves), strict=True):
            assert a.grad is not None
            assert relative_error(a.grad, b) < 2 * torch.finfo(dtype).eps


def test_anchor_with_more_rows_than_gaussians() -> None:
    labels = torch.zeros(3, 4, dtype=torch.int64, device=DEVICE)

    def compute(student: Tensor, teacher: Tensor, *pairs: Tensor, **chosen: Any) -> tuple[Any, ...]:
        terms = unikd_loss(student, teacher, labels, pairs[:2], pairs[2:4], anchor=pairs[4:], **chosen)
        return terms.total, terms.anchor

    pair = [randn(3, 4, 9, seed=30 + i, scale=0.5, grad=True) for i in range(2)]
    logits = [randn(3, 4, 9, seed=1, grad=True), randn(3, 4, 9, seed=2)]
    compare(compute, [*logits, *gaussians(3, 9, grad=ALL_FOUR), *pair])

"""The kernel of the whole objective against plain PyTorch and float64: every term and every gradient at once."""

import math
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from support.kernel_inputs import (
    ALL_FOUR,
    DEVICE,
    DTYPES,
    OF_STUDENT,
    close_logits,
    compare,
    drawn,
    gaussians,
    labelled_logits,
    labels_for,
    long,
    objective,
    objective_inputs,
    quiet,
    randn,
    without_gaussians,
)
from support.numerics import relative_error
from unikd_fast import QuantizedLogits, quantize_logits, unikd_loss

pytestmark = quiet
INF = math.inf


@pytest.mark.parametrize("weights", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 4, 1), (0.3, 2.5, 0.7)])
@pytest.mark.parametrize("classes", [10, long(2), long(100), long(1003), long(5000)])
def test_each_term(classes: int, weights: tuple[float, float, float]) -> None:
    """Case 19: each term alone, none, and all."""
    ce_weight, alpha, beta = weights
    for dtype in DTYPES:
        compare(objective, objective_inputs(5, classes, dtype), ce_weight=ce_weight, alpha=alpha, beta=beta)


@pytest.mark.parametrize(
    ("temperature", "scale_by_t2"),
    [
        (0.5, True),
        (4.0, False),
        *(long(*x) for x in ((0.5, False), (1.0, True), (1.0, False), (4.0, True), (20.0, True), (20.0, False))),
    ],
)
def test_temperature(temperature: float, scale_by_t2: bool) -> None:
    """Case 6."""
    for dtype in DTYPES:
        compare(objective, objective_inputs(67, 11, dtype), temperature=temperature, scale_by_t2=scale_by_t2)


def test_gradients_of_the_teachers_gaussian() -> None:
    """Case 17: none by default, right when asked for."""
    for dtype in DTYPES:
        compare(objective, objective_inputs(5, 100, dtype, wanted=ALL_FOUR), feature_reduction="sum")
        compare(objective, objective_inputs(5, 100, dtype, wanted=(False, False, True, False)))
    inputs = objective_inputs(5, 7)
    objective(*inputs, impl="fused")[0].backward()
    assert [x.grad is not None for x in inputs] == [True, False, False, True, True, False, False]


@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_and_one(rows: int) -> None:
    """Case 9."""
    inputs = objective_inputs(max(rows, 1), 7, wanted=ALL_FOUR)
    inputs[2].fill_(3)
    if rows:
        compare(objective, inputs)
        return
    inputs = [x.detach()[:0].requires_grad_(x.requires_grad) for x in inputs]
    terms = objective(*inputs, impl="fused")
    terms[0].backward()
    assert [x.item() for x in terms] == [0, 0, 0, 0]
    assert all(x.grad is not None and x.grad.shape == (0, 7) for x in inputs if x.requires_grad)
    terms = without_gaussians(*inputs[:3], impl="fused")
    assert [x.item() for x in terms] == [0, 0, 0, 0]


def test_weights_and_normalizer_as_tensors() -> None:
    numbers = {"alpha": 2.5, "beta": 0.75, "normalizer": 13.0}
    tensors = {name: torch.tensor(x, device=DEVICE) for name, x in numbers.items()}
    inputs = objective_inputs(5, 11, wanted=ALL_FOUR)
    compare(objective, inputs, **numbers)
    compare(objective, inputs, **tensors)
    assert torch.equal(
        torch.stack(objective(*inputs, impl="fused", **tensors)),
        torch.stack(objective(*inputs, impl="fused", **numbers)),
    )


@pytest.mark.parametrize("classes", [6, 5000])
class TestExtremes:
    """Case 1. The label of row i is class i."""

    def inputs(self, classes: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        logits = [randn(3, classes, seed=seed, dtype=dtype) for seed in (1, 2)]
        return [*logits, torch.arange(3, device=DEVICE), *gaussians(3, classes, dtype=dtype, grad=OF_STUDENT)]

    def test_absent_from_both(self, classes: int) -> None:
        student, teacher, *others = self.inputs(classes)
        student[:, 4], teacher[:, 4] = -INF, -INF
        compare(objective, [student.requires_grad_(), teacher, *others])

    def test_absent_from_the_teacher(self, classes: int) -> None:
        student, teacher, *others = self.inputs(classes)
        teacher[:, 1] = -INF
        compare(objective, [student.requires_grad_(), teacher, *others])

    def test_absent_from_the_student(self, classes: int) -> None:
        student, *others = self.inputs(classes)
        student[0, 4] = -INF
        terms = objective(student.requires_grad_(), *others, impl="fused")
        terms[0].backward()
        assert [x.item() == INF for x in terms] == [True, False, False, True]
        assert student.grad is not None
        assert student.grad.isfinite().all()

    def test_huge_logits(self, classes: int) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            student, teacher, *others = self.inputs(classes, dtype)
            student[:, 0], student[:, 1], teacher[:, 1], teacher[:, 2] = 1e4, -1e4, 1e4, -1e4
            compare(objective, [student.requires_grad_(), teacher, *others])


class TestShapes:
    """Case 4."""

    def test_strides(self) -> None:
        student, teacher, labels = randn(7, 40, seed=1)[:, ::2], randn(20, 7, seed=2).T, labels_for(14, 20)[::2]
        pairs = [randn(20, 7, seed=i, scale=0.5).T.requires_grad_() for i in range(3)]
        pairs.append(randn(1, 20, seed=4).expand(7, 20))
        compare(objective, [student.requires_grad_(), teacher, labels, *pairs])
        compare(objective, [teacher.detach().requires_grad_(), student.detach(), labels, *pairs])

    def test_positions_of_samples(self) -> None:
        """Logits (N, T, K) or class maps, with one Gaussian for each sample: other rows than the logits have."""
        pairs = gaussians(3, 20, grad=ALL_FOUR)
        for student, teacher in (
            (randn(4, 3, 20, seed=1).transpose(0, 1), randn(3, 4, 20, seed=2)),
            (randn(3, 20, 5, 2, seed=1).movedim(1, -1), randn(3, 5, 2, 20, seed=2)),
        ):
            labels = torch.arange(teacher.numel() // 20, device=DEVICE).reshape(teacher.shape[:-1]) % 20
            for normalizer in (None, 7.0):
                inputs = [student.detach().requires_grad_(), teacher, labels, *pairs]
                compare(objective, inputs, ignore_index=3, normalizer=normalizer)

    @pytest.mark.parametrize("size", [(3, 7), (4, 8)])
    def test_class_maps(self, size: tuple[int, int]) -> None:
        """Tiles along pixels, with labels, weights of classes and smoothing; and close to a certain teacher."""
        student, teacher = (randn(2, 7, *size, seed=seed).movedim(1, -1) for seed in (1, 2))
        labels = torch.arange(2 * size[0] * size[1], device=DEVICE).reshape(2, *size) % 7
        compare(without_gaussians, [student.requires_grad_(), teacher, labels], ignore_index=3, label_smoothing=0.1)
        compare(without_gaussians, [student, teacher, labels], ignore_index=3)
        compare(without_gaussians, [student, teacher, teacher.softmax(-1)])

    def test_class_maps_close_and_certain(self) -> None:
        """Of a sum over classes near 1 the logarithm is known to ε, which is 1e-4 of such a cross-entropy."""
        student, teacher = (x.float().T.contiguous().reshape(1, 19, 4, 8).movedim(1, -1) for x in close_logits(19, 32))
        labels = torch.zeros(1, 4, 8, dtype=torch.int64, device=DEVICE)
        ce, _, kl = without_gaussians(student, teacher, labels, impl="fused")[1:]
        exact_ce, _, exact_kl = without_gaussians(student.double(), teacher.double(), labels)[1:]
        assert abs(ce - exact_ce) <= torch.finfo(torch.float32).eps
        assert abs(kl - exact_kl) <= 2e-5 * exact_kl

    def test_gaussians_of_another_width(self) -> None:
        for width in (3, 300):
            compare(objective, [*labelled_logits(5, 11), *gaussians(5, width, grad=ALL_FOUR)])

    def test_unequal_classes(self) -> None:
        """Case 5."""
        with pytest.raises(ValueError, match="unikd_loss: student and teacher logits must have one shape"):
            unikd_loss(randn(2, 3), randn(2, 4), labels_for(2, 3), impl="fused")

    def test_more_than_2_to_the_31_elements(self) -> None:
        """Case 2."""
        stride, classes = 2**30, 16
        try:
            storage = torch.empty(2 * stride + classes, dtype=torch.bfloat16, device=DEVICE)
        except RuntimeError:
            pytest.skip("no room for 4 GiB of addresses")
        student = storage.as_strided((3, classes), (stride, 1)).copy_(randn(3, classes, seed=1))
        compare(objective, [student.requires_grad_(), *objective_inputs(3, classes)[1:]])


@pytest.mark.parametrize("classes", [10, long(5000)])
def test_no_gaussians(classes: int) -> None:
    for dtype in DTYPES:
        compare(without_gaussians, labelled_logits(3, classes, dtype))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
@pytest.mark.parametrize("classes", [10, long(5000)])
def test_quantized_teachers(classes: int, dtype: torch.dtype) -> None:
    stored = quantize_logits(randn(3, classes, seed=2, scale=5), dtype)

    def compute(
        student: Tensor, scale: Tensor, offset: Tensor, labels: Tensor, *pairs: Tensor, **x: Any
    ) -> tuple[Tensor, ...]:
        teacher = QuantizedLogits(stored.values, scale, offset)
        terms = unikd_loss(student, teacher, labels, pairs[:2], pairs[2:4], anchor=pairs[4:], **x)
        return tuple(term for term in terms if term is not None)

    student, _, labels, *pairs = objective_inputs(3, classes, torch.bfloat16)
    pairs += [randn(3, classes, seed=30 + i, scale=0.5, grad=True) for i in range(2)]
    compare(compute, [student, stored.scale, stored.offset, labels, *pairs])


def test_a_student_close_to_its_teacher() -> None:
    """Case 12: bf16 logits, p_y = 0.999; loss, and gradient in fp32, within half a percent of float64."""
    student, teacher = close_logits(100)
    labels = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    for weights in ({"ce_weight": 0.0}, {"beta": 0.0}, {}):
        leaf, exact = student.float().requires_grad_(), student.double().requires_grad_()
        chosen: dict[str, Any] = {"temperature": 1.0, **weights}
        terms = unikd_loss(leaf, teacher, labels, impl="fused", **chosen)
        truth = unikd_loss(exact, teacher.double(), labels, impl="reference", **chosen)
        terms.total.backward()
        truth.total.backward()
        assert relative_error(terms.logit_kl, truth.logit_kl) < 0.005
        assert relative_error(terms.total, truth.total) < 0.005
        assert leaf.grad is not None
        assert exact.grad is not None
        assert relative_error(leaf.grad, exact.grad) < 0.005, weights


@pytest.mark.parametrize("examples", [3, long(30)])
def test_any_inputs(examples: int) -> None:
    drawn(compare_any, examples)


def compare_any(data: st.DataObject) -> None:
    """Shapes, strides, dtypes, settings and sizes of logits nobody thought of."""
    rows, classes = data.draw(st.integers(1, 40)), data.draw(st.integers(2, 70))
    inputs: list[Tensor] = []
    for seed in (1, 2):
        scale = data.draw(st.sampled_from([1.0, 30.0, 300.0] + [0.0, 1e-3] * (seed == 1)))
        step = data.draw(st.integers(1, 3))
        x = randn(rows, classes * step, seed=seed, scale=scale, dtype=data.draw(st.sampled_from(DTYPES)))[:, ::step]
        inputs.append((x.T.contiguous().T if data.draw(st.booleans()) else x).requires_grad_(seed == 1))
    if data.draw(st.booleans()):
        inputs.append(randn(rows, classes, seed=3).softmax(-1))
    else:
        inputs.append(labels_for(rows, classes, ignored=(rows // 2,)))
    wanted = data.draw(st.tuples(*[st.booleans()] * 4))
    shape = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 70))
    compare(
        objective,
        [*inputs, *gaussians(*shape, dtype=data.draw(st.sampled_from(DTYPES)), grad=wanted)],
        temperature=data.draw(st.sampled_from([0.5, 1.0, 4.0])),
        label_smoothing=data.draw(st.sampled_from([0.0, 0.1])),
        normalizer=data.draw(st.sampled_from([None, 7.0])),
    )

"""The kernel of the top-k divergence against plain PyTorch and float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import DEVICE, DTYPES, close_logits, compare, quiet, randn, topk_kl
from numerics import relative_error
from torch import Tensor

from unikd_fast import TopKLogits, softmax_kl, top_k_logits

pytestmark = quiet
INF = math.inf


def inputs_for(rows: int, classes: int, k: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    student = randn(rows, classes, seed=1, dtype=dtype, grad=True)
    return [student, *top_k_logits(randn(rows, classes, seed=2, dtype=dtype), k)]


@pytest.mark.parametrize(
    ("classes", "k"), [(2, 1), (2, 2), (10, 5), (10, 10), (1003, 1), (1003, 5), (1003, 1003), (50257, 5), (50257, 300)]
)
def test_number_stored(classes: int, k: int) -> None:
    """Case 3; 50257 takes several blocks."""
    for dtype in DTYPES if classes <= 1003 else (torch.bfloat16,):
        compare(topk_kl, inputs_for(5 if classes <= 1003 else 2, classes, k, dtype))


def test_all_stored_is_the_whole_divergence() -> None:
    student, teacher = randn(5, 20, seed=1), randn(5, 20, seed=2)
    loss = softmax_kl(student, top_k_logits(teacher, 20), impl="fused")
    assert relative_error(loss, softmax_kl(student.double(), teacher.double(), impl="reference")) < 1e-6


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_reductions(reduction: str, masked: bool) -> None:
    """Case 8."""
    mask = torch.arange(67, device=DEVICE) % 3 == 1 if masked else None
    for dtype in DTYPES:
        compare(topk_kl, inputs_for(67, 11, 3, dtype), reduction=reduction, ignore_mask=mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_hold_what_they_like(dtype: torch.dtype) -> None:
    """Case 9."""
    student, values, indices, lse = (x.detach().clone() for x in inputs_for(6, 11, 3, dtype))
    mask = torch.arange(6, device=DEVICE) % 2 == 0
    student[mask], values[mask], lse[mask] = math.nan, math.nan, math.nan
    student.requires_grad_()
    loss = softmax_kl(student, TopKLogits(values, indices, lse), ignore_mask=mask, reduction="none", impl="fused")
    loss.sum().backward()
    assert student.grad is not None
    assert (loss[mask] == 0).all()
    assert (student.grad[mask] == 0).all()
    assert (loss[~mask] > 0).all()
    assert (student.grad[~mask] != 0).any()


@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_no_rows(reduction: str) -> None:
    """Case 9."""
    for rows in (0, 1, 4):
        inputs = inputs_for(rows, 7, 3)
        loss = topk_kl(
            *inputs, reduction=reduction, ignore_mask=torch.ones(rows, dtype=torch.bool, device=DEVICE), impl="fused"
        )
        loss.sum().backward()
        assert inputs[0].grad is not None
        assert inputs[0].grad.shape == (rows, 7)
        assert loss.sum().item() == inputs[0].grad.abs().sum().item() == 0
    compare(topk_kl, inputs_for(1, 7, 3), reduction=reduction)


def test_normalizer() -> None:
    for normalizer in (13.0, torch.tensor(13.0, device=DEVICE)):
        compare(topk_kl, inputs_for(5, 11, 3), normalizer=normalizer, reduction="mean")


@pytest.mark.parametrize("classes", [6, 5000])
class TestExtremes:
    """Case 1."""

    def test_absent_classes(self, classes: int) -> None:
        student, teacher = randn(3, classes, seed=1), randn(3, classes, seed=2)
        teacher[:, ::3] = -INF
        compare(topk_kl, [student.clone().requires_grad_(), *top_k_logits(teacher, 2)])
        compare(topk_kl, [student.clone().requires_grad_(), *top_k_logits(teacher, classes)])
        student[:, ::3] = -INF
        compare(topk_kl, [student.clone().requires_grad_(), *top_k_logits(teacher, 2)])
        compare(topk_kl, [student.requires_grad_(), *top_k_logits(teacher, classes)])

    def test_the_student_lacks_a_stored_class(self, classes: int) -> None:
        student, teacher = randn(3, classes, seed=1), randn(3, classes, seed=2)
        stored = top_k_logits(teacher, 2)
        student[0, stored.indices[0, 0].item()] = -INF
        student.requires_grad_()
        loss = softmax_kl(student, stored, reduction="none", impl="fused")
        loss.sum().backward()
        assert loss[0].item() == INF
        assert loss[1:].isfinite().all()
        assert student.grad is not None
        assert student.grad.isfinite().all()

    def test_huge_logits(self, classes: int) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            student, teacher = (randn(3, classes, seed=seed, dtype=dtype) for seed in (1, 2))
            student[:, 0], student[:, 1], teacher[:, 1], teacher[:, 2] = 1e4, -1e4, 1e4, -1e4
            compare(topk_kl, [student.requires_grad_(), *top_k_logits(teacher, 2)])

    def test_a_certain_teacher_leaves_nothing_to_the_rest(self, classes: int) -> None:
        teacher = randn(3, classes, seed=2)
        teacher[:, 1] = 100.0
        compare(topk_kl, [randn(3, classes, seed=1, grad=True), *top_k_logits(teacher, 1)])


class TestShapes:
    """Case 4."""

    def test_strides(self) -> None:
        _, values, indices, lse = inputs_for(7, 20, 3)
        student = randn(7, 40, seed=1)[:, ::2].requires_grad_()
        apart = [x.repeat_interleave(2, dim=-1)[..., ::2] for x in (values, indices)]
        compare(topk_kl, [student, *apart, lse.repeat_interleave(2)[::2]])
        compare(topk_kl, [randn(20, 7, seed=1).T.requires_grad_(), values.T.contiguous().T, indices, lse])
        compare(topk_kl, [randn(1, 20, seed=1).expand(7, 20).requires_grad_(), values, indices, lse])

    def test_sequences(self) -> None:
        student = randn(4, 3, 20, seed=1).transpose(0, 1).requires_grad_()
        mask = torch.arange(12, device=DEVICE).reshape(3, 4) % 5 == 0
        stored = top_k_logits(randn(3, 4, 20, seed=2), 5)
        for reduction in ("none", "batchmean"):
            compare(topk_kl, [student, *stored], reduction=reduction, ignore_mask=mask)

    def test_maps(self) -> None:
        student = randn(2, 6, 3, 5, seed=1).movedim(1, -1).requires_grad_()
        compare(topk_kl, [student, *top_k_logits(randn(2, 6, 3, 5, seed=2).movedim(1, -1), 2)])

    def test_int64_indices(self) -> None:
        student, values, indices, lse = inputs_for(7, 20, 3)
        compare(topk_kl, [student, values, indices.long(), lse])

    def test_unequal_classes(self) -> None:
        """Case 5: seen by the indices where looking is free."""
        _, *stored = inputs_for(7, 20, 20)
        with pytest.raises(ValueError, match=r"must both be \(..., k\), 0 < k <= 10"):
            topk_kl(randn(7, 10), *stored, impl="fused")
        if DEVICE == "cpu":
            with pytest.raises(ValueError, match=r"indices must lie in \[0, 10\)"):
                topk_kl(randn(7, 10), *(x[:, :5] if x.ndim == 2 else x for x in stored), impl="fused")

    def test_more_than_2_to_the_31_elements(self) -> None:
        """Case 2."""
        stride, classes = 2**30, 16
        try:
            storage = torch.empty(2 * stride + classes, dtype=torch.bfloat16, device=DEVICE)
        except RuntimeError:
            pytest.skip("no room for 4 GiB of addresses")
        student = storage.as_strided((3, classes), (stride, 1)).copy_(randn(3, classes, seed=1))
        compare(topk_kl, [student.requires_grad_(), *inputs_for(3, classes, 4)[1:]], reduction="none")


@pytest.mark.skipif(DEVICE != "cpu", reason="looking at the values would synchronise")
def test_probabilities_that_sum_to_more_than_one_are_refused() -> None:
    """Case 13."""
    student, values, indices, lse = inputs_for(7, 20, 5)
    with pytest.raises(ValueError, match="stored probabilities must sum to at most 1, got"):
        topk_kl(student, values, indices, lse - 1, impl="fused")


def test_settings_that_need_all_logits_are_refused() -> None:
    for chosen in ({"temperature": 2.0}, {"divergence": "reverse"}, {"standardized": True}):
        with pytest.raises(ValueError, match="TopKLogits hold the teacher at temperature 1"):
            topk_kl(*inputs_for(3, 5, 2), impl="fused", **chosen)


@pytest.mark.parametrize("k", [1, 5, 100])
def test_a_student_close_to_its_teacher(k: int) -> None:
    """Case 12: bf16 logits, p_y = 0.999; loss, and gradient in fp32, within half a percent of float64."""
    student, teacher = close_logits(100)
    stored = top_k_logits(teacher.float(), k)
    leaf, exact = student.float().requires_grad_(), student.double().requires_grad_()
    loss, truth = softmax_kl(leaf, stored, impl="fused"), softmax_kl(exact, stored, impl="reference")
    loss.backward()
    truth.backward()
    assert leaf.grad is not None
    assert exact.grad is not None
    assert relative_error(loss, truth) < 0.005
    assert relative_error(leaf.grad, exact.grad) < 0.005


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_anything(data: st.DataObject) -> None:
    """Shapes, strides, dtypes, settings and sizes of logits nobody thought of."""
    rows, classes = data.draw(st.integers(1, 40)), data.draw(st.integers(2, 70))
    scale = data.draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0, 300.0]))
    student = randn(rows, classes, seed=1, scale=scale, dtype=data.draw(st.sampled_from(DTYPES)))
    if data.draw(st.booleans()):
        student = student.T.contiguous().T
    scale = data.draw(st.sampled_from([1.0, 3.0]))
    teacher = randn(rows, classes, seed=2, scale=scale, dtype=data.draw(st.sampled_from(DTYPES)))
    stored = top_k_logits(teacher, data.draw(st.integers(1, classes)))
    reduction = data.draw(st.sampled_from(["none", "sum", "batchmean", "mean"]))
    compare(topk_kl, [student.requires_grad_(), *stored], reduction=reduction)

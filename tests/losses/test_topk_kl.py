"""The divergence from a teacher whose k largest logits are stored, against a textbook form in float64."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from support.loss_inputs import EXACT, randn
from support.numerics import assert_no_worse_than_eager, outputs_and_gradients, relative_error
from unikd_fast import TopKLogits, dkd_loss, softmax_kl, top_k_logits, unikd_loss

INF = math.inf
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Sums over k and K in another order than the textbook form's.
UNITS = 8


def plain(student: Tensor, values: Tensor, indices: Tensor, log_sum_exp: Tensor, **settings: Any) -> Tensor:
    return softmax_kl(student, TopKLogits(values, indices, log_sum_exp), **settings)


def textbook(student: Tensor, values: Tensor, indices: Tensor, log_sum_exp: Tensor) -> Tensor:
    """Return Σ p ln(p / q) of each row, over the stored classes and the rest as one class."""
    wide = [x if x.dtype == torch.float64 else x.float() for x in (student, values, log_sum_exp)]
    q_all, p = wide[0].softmax(-1), (wide[1] - wide[2][..., None]).exp()
    q = q_all.gather(-1, indices.long())
    if indices.shape[-1] < student.shape[-1]:
        outside = torch.ones_like(q_all).scatter(-1, indices.long(), 0.0)
        p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)
        q = torch.cat([q, (q_all * outside).sum(-1, keepdim=True)], -1)
    present = p > 0
    return torch.where(present, p * (torch.where(present, p, 1).log() - torch.where(present, q, 1).log()), 0).sum(-1)


def inputs_for(rows: int, classes: int, k: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    student, teacher = ((2 * randn(rows, classes, seed=seed)).float().to(dtype) for seed in (1, 2))
    stored = top_k_logits(teacher, k)
    if dtype == torch.float64:  # `top_k_logits` sums in fp32
        stored = stored._replace(log_sum_exp=teacher.logsumexp(-1))
    return [student.requires_grad_(), *stored]


def compare(inputs: list[Tensor]) -> None:
    assert_no_worse_than_eager(lambda *x: plain(*x, reduction="none"), textbook, inputs, units=UNITS)


@pytest.mark.parametrize(("classes", "k"), [(2, 1), (2, 2), (10, 5), (10, 10), (1003, 1), (1003, 5), (1003, 1003)])
def test_equals_the_textbook_form(classes: int, k: int) -> None:
    rows = plain(*inputs_for(5, classes, k, torch.float64), reduction="none")
    torch.testing.assert_close(rows, textbook(*inputs_for(5, classes, k, torch.float64)), **EXACT)
    for dtype in DTYPES:
        compare(inputs_for(5, classes, k, dtype))


def test_all_stored_is_the_whole_divergence() -> None:
    student, teacher = randn(5, 20, seed=1).float(), randn(5, 20, seed=2).float()
    loss = softmax_kl(student, top_k_logits(teacher, 20))
    assert relative_error(loss, softmax_kl(student.double(), teacher.double())) < 1e-6  # fp32


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("reduction", "divisor"), [("sum", 1), ("batchmean", 67), ("mean", 67 * 11)])
def test_reductions(reduction: str, divisor: int, masked: bool) -> None:
    mask = torch.arange(67) % 3 == 1 if masked else None
    inputs = inputs_for(67, 11, 3, torch.float64)
    rows = textbook(*inputs)
    if mask is not None:
        rows, divisor = rows[~mask], divisor if reduction == "sum" else divisor * 45 // 67
    loss = plain(*inputs, reduction=reduction, ignore_mask=mask)
    torch.testing.assert_close(loss, rows.sum() / divisor, **EXACT)
    if reduction != "sum":
        loss = plain(*inputs, reduction=reduction, ignore_mask=mask, normalizer=torch.tensor(13.0))
        torch.testing.assert_close(loss, rows.sum() / 13 / (11 if reduction == "mean" else 1), **EXACT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_may_hold_anything(dtype: torch.dtype) -> None:
    student, values, indices, lse = (x.detach().clone() for x in inputs_for(6, 11, 3, dtype))
    mask = torch.arange(6) % 2 == 0
    student[mask], values[mask], lse[mask] = math.nan, math.nan, math.nan
    student.requires_grad_()
    loss = plain(student, values, indices, lse, ignore_mask=mask, reduction="none")
    loss.sum().backward()
    assert student.grad is not None
    assert (loss[mask] == 0).all()
    assert (student.grad[mask] == 0).all()
    assert (loss[~mask] > 0).all()
    assert (student.grad[~mask] != 0).any()


@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_no_rows_kept(rows: int, reduction: str) -> None:
    inputs = inputs_for(rows, 7, 3)
    loss = plain(*inputs, reduction=reduction, ignore_mask=torch.ones(rows, dtype=torch.bool))
    loss.sum().backward()
    assert inputs[0].grad is not None
    assert inputs[0].grad.shape == (rows, 7)
    assert loss.sum().item() == inputs[0].grad.abs().sum().item() == 0


class TestExtremes:
    @pytest.mark.parametrize("stored", [2, 6])
    @pytest.mark.parametrize("absent_from_student", [False, True])
    def test_absent_classes(self, stored: int, absent_from_student: bool) -> None:
        student, teacher = randn(3, 6, seed=1).float(), randn(3, 6, seed=2).float()
        teacher[:, ::3] = -INF
        if absent_from_student:
            student[:, ::3] = -INF
        compare([student.requires_grad_(), *top_k_logits(teacher, stored)])

    def test_the_student_lacks_a_stored_class(self) -> None:
        student, teacher = randn(3, 6, seed=1), randn(3, 6, seed=2)
        stored = top_k_logits(teacher, 2)
        student[0, stored.indices[0, 0].item()] = -INF
        loss = softmax_kl(student.requires_grad_(), stored, reduction="none")
        loss.sum().backward()
        assert loss[0].item() == INF
        assert loss[1:].isfinite().all()
        assert student.grad is not None
        assert not student.grad[1:].isnan().any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_huge_logits(self, dtype: torch.dtype) -> None:
        student, teacher = randn(3, 6, seed=1).to(dtype), randn(3, 6, seed=2).to(dtype)
        student[:, 0], student[:, 1], teacher[:, 1], teacher[:, 2] = 1e4, -1e4, 1e4, -1e4
        loss = softmax_kl(student.requires_grad_(), top_k_logits(teacher, 2), reduction="none")
        loss.sum().backward()
        # The student's gap at the one class that has any probability.
        torch.testing.assert_close(loss, (student[:, 0] - student[:, 1]).detach().float(), rtol=1e-6, atol=0)
        assert student.grad is not None
        assert student.grad.isfinite().all()

    def test_a_certain_teacher_leaves_no_rest(self) -> None:
        teacher = randn(3, 6, seed=2).float()
        teacher[:, 1] = 100.0
        compare([randn(3, 6, seed=1, dtype=torch.float32, grad=True), *top_k_logits(teacher, 1)])

    @pytest.mark.parametrize("k", [1, 5, 100])
    def test_a_student_close_to_its_teacher(self, k: int) -> None:
        """bf16 logits, p_y = 0.999; loss, and gradient in fp32, within half a percent of float64."""
        teacher = 0.5 * randn(4, 100, seed=2)
        teacher[:, 0] = teacher[:, 1:].logsumexp(-1) + math.log(999)
        student, stored = (teacher + 0.02 * randn(4, 100, seed=1)).bfloat16(), top_k_logits(teacher.float(), k)
        leaf, exact = student.float().requires_grad_(), student.double().requires_grad_()
        (loss,), (gradient,) = outputs_and_gradients(lambda x: softmax_kl(x, stored), [leaf])
        truth, truth_gradient = outputs_and_gradients(lambda x: softmax_kl(x, stored), [exact])
        assert gradient is not None and truth_gradient[0] is not None
        assert relative_error(loss, truth[0]) < 0.005
        assert relative_error(gradient, truth_gradient[0]) < 0.005


class TestShapes:
    def test_strides(self) -> None:
        _, values, indices, lse = inputs_for(7, 20, 3)
        student = randn(7, 40, seed=1, dtype=torch.float32)[:, ::2].requires_grad_()
        apart = [x.repeat_interleave(2, dim=-1)[..., ::2] for x in (values, indices)]
        compare([student, *apart, lse.repeat_interleave(2)[::2]])
        compare([student.detach().T.contiguous().T.requires_grad_(), values, indices.long(), lse])
        compare([student.detach()[:1].expand(7, 20).requires_grad_(), values, indices, lse])

    def test_sequences_and_maps(self) -> None:
        for student in (randn(4, 3, 20, seed=1).transpose(0, 1), randn(3, 20, 4, seed=1).movedim(1, -1)):
            teacher = randn(3, 4, 20, seed=2)
            rows = softmax_kl(student, top_k_logits(teacher, 5), reduction="none")
            expected = softmax_kl(student.reshape(12, 20), top_k_logits(teacher.view(12, 20), 5), reduction="none")
            assert torch.equal(rows, expected.view(3, 4))


@pytest.mark.parametrize("k", [1, 5, 11])
@pytest.mark.parametrize("dtype", DTYPES)
def test_objective_with_top_k_logits(dtype: torch.dtype, k: int) -> None:
    """The total of Eq. 7, and the gradients of the logits and the Gaussians, in float64 and rounded."""
    student, *stored = inputs_for(5, 11, k, dtype)
    labels = torch.arange(5)
    pairs = [(randn(5, 11, seed=20 + i) / 2).to(dtype).requires_grad_(i < 2) for i in range(4)]

    def compute(student: Tensor, values: Tensor, indices: Tensor, lse: Tensor, *pairs: Tensor) -> tuple[Tensor, ...]:
        stored = TopKLogits(values, indices, lse)
        return unikd_loss(student, stored, labels, pairs[:2], pairs[2:], temperature=1.0, beta=0.7)[:4]

    def parts(student: Tensor, values: Tensor, indices: Tensor, lse: Tensor, *pairs: Tensor) -> tuple[Tensor, ...]:
        whole = unikd_loss(student, torch.zeros_like(student), labels, pairs[:2], pairs[2:], beta=0.0)
        logit_kl = textbook(student, values, indices, lse).mean()
        return whole.total + 0.7 * logit_kl, whole.ce, whole.feature_kl, logit_kl.detach()

    assert_no_worse_than_eager(compute, parts, [student, *stored, *pairs], units=UNITS)


def test_transforms() -> None:
    """Forward mode, torch.func and torch.vmap over every input."""
    inputs = [x.detach() for x in inputs_for(5, 11, 3, torch.float64)]
    student, *stored = inputs

    def loss(x: Tensor) -> Tensor:
        return plain(x, *stored)

    (gradient,) = torch.autograd.grad(loss(student.requires_grad_()), student)
    student, direction = student.detach(), randn(5, 11, seed=9)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(student, direction))).tangent
    assert tangent is not None
    torch.testing.assert_close(tangent, (gradient * direction).sum(), **EXACT)
    torch.testing.assert_close(torch.func.grad(loss)(student), gradient, **EXACT)
    batched = torch.vmap(lambda *x: plain(*x))(*(torch.stack([x, x.flip(0)]) for x in inputs))
    torch.testing.assert_close(batched, plain(*inputs).detach().expand(2), **EXACT)


def test_compiled_is_eager() -> None:
    torch._dynamo.reset()
    student, *stored = inputs_for(6, 11, 3)
    mask, labels = torch.arange(6) % 2 == 0, torch.arange(6)

    def compute(x: Tensor) -> tuple[Tensor, Tensor]:
        top = TopKLogits(*stored)
        return softmax_kl(x, top, ignore_mask=mask), unikd_loss(x, top, labels, temperature=1.0).total

    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager")
    results = [outputs_and_gradients(f, [student]) for f in (compiled, compute)]
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)  # a decomposition may sum in another order


class TestRefusals:
    def test_fused_is_rejected_by_name(self) -> None:
        student, *stored = inputs_for(3, 5, 2)
        with pytest.raises(ValueError, match="softmax_kl: impl='fused' has no kernel for TopKLogits; use impl='auto'"):
            plain(student, *stored, impl="fused")
        with pytest.raises(ValueError, match="unikd_loss: impl='fused' has no kernel for TopKLogits"):
            unikd_loss(student, TopKLogits(*stored), torch.arange(3), temperature=1.0, impl="fused")
        with pytest.raises(ValueError, match="softmax_kl: impl must be one of auto, reference, fused, got 'triton'"):
            plain(student, *stored, impl="triton")

    def test_auto_and_reference_are_plain(self) -> None:
        inputs = inputs_for(3, 5, 2)
        assert torch.equal(plain(*inputs, impl="auto"), plain(*inputs, impl="reference"))

    @pytest.mark.parametrize("chosen", [{"temperature": 2.0}, {"divergence": "reverse"}, {"standardized": True}])
    def test_settings_that_need_all_logits(self, chosen: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="TopKLogits hold the teacher at temperature 1"):
            plain(*inputs_for(3, 5, 2), **chosen)

    def test_dkd_needs_all_logits(self) -> None:
        student, *stored = inputs_for(3, 5, 2)
        with pytest.raises(TypeError, match="dkd_loss: needs all of the teacher's logits, got TopKLogits"):
            dkd_loss(student, TopKLogits(*stored), torch.arange(3))  # type: ignore[arg-type]

    def test_unequal_classes(self) -> None:
        _, *stored = inputs_for(7, 20, 20)
        student = randn(7, 10).float()
        with pytest.raises(ValueError, match=r"must both be \(..., k\), 0 < k <= 10"):
            plain(student, *stored)
        with pytest.raises(ValueError, match=r"indices must lie in \[0, 10\)"):
            plain(student, *(x[:, :5] if x.ndim == 2 else x for x in stored))

    def test_probabilities_summing_to_more_than_one(self) -> None:
        student, values, indices, lse = inputs_for(7, 20, 5)
        with pytest.raises(ValueError, match="stored probabilities must sum to at most 1, got"):
            plain(student, values, indices, lse - 1)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_inputs(data: st.DataObject) -> None:
    rows, classes = data.draw(st.integers(1, 40)), data.draw(st.integers(2, 70))
    scale = data.draw(st.sampled_from([1e-3, 1.0, 30.0]))
    student = (scale * randn(rows, classes, seed=1)).to(data.draw(st.sampled_from(DTYPES)))
    if data.draw(st.booleans()):
        student = student.T.contiguous().T
    teacher = (data.draw(st.sampled_from([1.0, 3.0])) * randn(rows, classes, seed=2)).to(
        data.draw(st.sampled_from(DTYPES))
    )
    compare([student.requires_grad_(), *top_k_logits(teacher, data.draw(st.integers(1, classes)))])

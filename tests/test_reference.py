"""The softmax KL of the reference: formula, reductions, extremes."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from support.loss_inputs import EXACT, randn
from support.numerics import assert_no_worse_than_eager
from unikd_fast.kernels import reference

INF = float("inf")


def softmax_kl_loop(student: Tensor, teacher: Tensor, temperature: float) -> list[float]:
    """Eq. 1 and 2 in Python floats, a row at a time, τ² included."""
    rows = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        sum_s = sum(math.exp(x / temperature) for x in s)
        sum_t = sum(math.exp(x / temperature) for x in t)
        p = [math.exp(x / temperature) / sum_t for x in t]
        q = [math.exp(x / temperature) / sum_s for x in s]
        rows.append(temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return rows


class TestSoftmaxKL:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
    def test_equals_a_loop(self, temperature: float) -> None:
        student, teacher = 3 * randn(5, 7, seed=1), 3 * randn(5, 7, seed=2)
        rows = reference.softmax_kl(student, teacher, temperature=temperature, reduction="none")
        expected = torch.tensor(softmax_kl_loop(student, teacher, temperature), dtype=torch.float64)
        torch.testing.assert_close(rows, expected, **EXACT)

    def test_equals_torch_distributions(self) -> None:
        student, teacher = randn(6, 11, seed=1), randn(6, 11, seed=2)
        expected = kl_divergence(Categorical(logits=teacher), Categorical(logits=student))
        torch.testing.assert_close(reference.softmax_kl(student, teacher, reduction="none"), expected, **EXACT)

    # "mean" divides by every element, as in F.kl_div; here 2 * 3 rows of 5 classes.
    @pytest.mark.parametrize(("reduction", "divisor"), [("batchmean", 6), ("mean", 30), ("sum", 1)])
    def test_reduces_like_kl_div(self, reduction: str, divisor: int) -> None:
        student, teacher = randn(2, 3, 5, seed=1), randn(2, 3, 5, seed=2)
        total = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True)
        loss = reference.softmax_kl(student, teacher, reduction=reduction)
        torch.testing.assert_close(loss, total / divisor, **EXACT)

    def test_t2_is_a_factor(self) -> None:
        student, teacher = randn(3, 4, seed=1), randn(3, 4, seed=2)
        plain = reference.softmax_kl(student, teacher, temperature=3.0, scale_by_t2=False)
        torch.testing.assert_close(reference.softmax_kl(student, teacher, temperature=3.0), 9 * plain, **EXACT)

    @pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
    def test_gradients_of_both_sides(self, reduction: str) -> None:
        student, teacher = 2 * randn(3, 5, seed=1), 2 * randn(3, 5, seed=2)
        mask = torch.tensor([False, True, False])

        def loss(s: Tensor, t: Tensor) -> Tensor:
            return reference.softmax_kl(s, t, temperature=2.0, reduction=reduction, ignore_mask=mask)

        assert torch.autograd.gradcheck(loss, (student.requires_grad_(), teacher.requires_grad_()))

    def test_gradient_is_the_closed_form(self) -> None:
        """∂L/∂z_s = τ (p_s - p_t) / N, which no test by differences can tell from a slightly wrong one."""
        student, teacher = randn(4, 9, seed=1, grad=True), randn(4, 9, seed=2)
        reference.softmax_kl(student, teacher, temperature=4.0).backward()
        expected = 4.0 * ((student / 4).softmax(-1) - (teacher / 4).softmax(-1)) / 4
        torch.testing.assert_close(student.grad, expected.detach(), **EXACT)

    def test_teacher_gets_no_gradient_by_default(self) -> None:
        student, teacher = randn(2, 3, seed=1, grad=True), randn(2, 3, seed=2)
        reference.softmax_kl(student, teacher).backward()
        assert teacher.grad is None
        assert student.grad is not None

    def test_minus_infinity_in_both_drops_the_class(self) -> None:
        columns = [0, 1, 3]
        student, teacher = randn(2, 4, seed=1), randn(2, 4, seed=2)
        student[:, 2] = teacher[:, 2] = -INF
        student.requires_grad_()
        teacher.requires_grad_()
        loss = reference.softmax_kl(student, teacher)
        loss.backward()
        expected = reference.softmax_kl(student[:, columns], teacher[:, columns])
        torch.testing.assert_close(loss, expected, **EXACT)
        for logits in (student, teacher):
            assert logits.grad is not None
            assert torch.equal(logits.grad[:, 2], torch.zeros(2, dtype=torch.float64))
            assert logits.grad.isfinite().all()

    def test_minus_infinity_in_the_teacher_alone(self) -> None:
        """p = 0 adds nothing, and still pushes the student's probability down: the gradient is p_s."""
        student, teacher = randn(1, 3, seed=1, grad=True), randn(1, 3, seed=2)
        teacher[0, 1] = -INF
        loss = reference.softmax_kl(student, teacher)
        loss.backward()
        p, q = teacher.softmax(-1)[0], student.detach().softmax(-1)[0]
        expected = sum(p[k] * (p[k] / q[k]).log() for k in (0, 2))
        torch.testing.assert_close(loss.detach(), expected, **EXACT)
        torch.testing.assert_close(student.grad, (q - p)[None], **EXACT)

    def test_minus_infinity_in_the_student_alone(self) -> None:
        student, teacher = randn(1, 3, seed=1), randn(1, 3, seed=2)
        student[0, 1] = -INF
        student.requires_grad_()
        loss = reference.softmax_kl(student, teacher)
        loss.backward()
        assert loss.item() == INF
        assert student.grad is not None
        assert not student.grad.isnan().any()

    # ±1e4 makes every probability but one underflow; the row is its own check: KL = the student's gap at the argmax.
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_extreme_logits(self, dtype: torch.dtype) -> None:
        student = torch.tensor([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0]], dtype=dtype, requires_grad=True)
        teacher = torch.tensor([[-1e4, 1e4, 0.0], [1e4, -1e4, 0.0]], dtype=dtype)
        rows = reference.softmax_kl(student, teacher, reduction="none")
        rows.sum().backward()
        gap = (student[0, 0] - student[0, 1]).detach().float()
        torch.testing.assert_close(rows.detach(), torch.tensor([gap, 0.0]), rtol=1e-6, atol=0)
        assert student.grad is not None
        assert torch.equal(student.grad[0], torch.tensor([1.0, -1.0, 0.0], dtype=dtype))

    def test_class_almost_excluded_by_the_teacher(self) -> None:
        """p = 6e-42 and p_s / p = 1e41: the ratio overflows fp32, and yet the class adds p_s alone."""
        student, teacher = torch.tensor([[0.0, 0.0]], requires_grad=True), torch.tensor([[-95.0, 0.0]])
        loss = reference.softmax_kl(student, teacher)
        loss.backward()
        torch.testing.assert_close(loss.item(), math.log(2), rtol=1e-6, atol=0)  # fp32
        assert torch.equal(student.grad, torch.tensor([[0.5, -0.5]]))

    def test_student_close_to_its_teacher(self) -> None:
        """p_y = 0.999 and logits apart by a rounding of bf16: the plain formula in fp32 is wrong by its own size."""
        teacher = 0.1 * randn(16, 1000, seed=1)
        teacher[:, 0] += 14
        student = teacher + 0.02 * randn(16, 1000, seed=2)
        student, teacher = student.bfloat16(), teacher.bfloat16()
        expected = reference.softmax_kl(student.double(), teacher.double(), reduction="none")
        rows = reference.softmax_kl(student, teacher, reduction="none")
        log_q, log_p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
        plain = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        assert ((rows - expected) / expected).abs().max() < 0.005  # the accuracy that every implementation owes
        assert ((plain - expected) / expected).abs().max() > 0.1  # or this test shows nothing

    @pytest.mark.parametrize("reduction", ["batchmean", "mean"])
    def test_ignored_rows_do_not_count(self, reduction: str) -> None:
        student, teacher = randn(4, 3, seed=1), randn(4, 3, seed=2)
        mask = torch.tensor([True, False, False, True])
        expected = reference.softmax_kl(student[~mask], teacher[~mask], reduction=reduction)
        student[0], teacher[3] = float("nan"), INF  # whatever an ignored row holds
        student.requires_grad_()
        loss = reference.softmax_kl(student, teacher, reduction=reduction, ignore_mask=mask)
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected, **EXACT)
        assert student.grad is not None
        assert torch.equal(student.grad[mask], torch.zeros(2, 3, dtype=torch.float64))
        assert student.grad[~mask].abs().min() > 0

    @pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
    @pytest.mark.parametrize("rows", [0, 3])
    def test_nothing_kept_is_zero(self, reduction: str, rows: int) -> None:
        student = randn(rows, 4, seed=1, grad=True)
        mask = torch.ones(rows, dtype=torch.bool)
        for ignore in (mask, None) if rows == 0 else (mask,):
            loss = reference.softmax_kl(student, randn(rows, 4, seed=2), reduction=reduction, ignore_mask=ignore)
            (gradient,) = torch.autograd.grad(loss, student)
            assert loss.item() == 0
            assert torch.equal(gradient, torch.zeros(rows, 4, dtype=torch.float64))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_more_accurate_than_the_plain_formula(self, dtype: torch.dtype) -> None:
        def plain(s: Tensor, t: Tensor) -> Tensor:
            s, t = (x if x.dtype == torch.float64 else x.float() for x in (s, t))
            return 16 * F.kl_div((s / 4).log_softmax(-1), (t / 4).log_softmax(-1), log_target=True, reduction="sum")

        inputs = (4 * randn(8, 100, seed=1, dtype=dtype)).requires_grad_(), 4 * randn(8, 100, seed=2, dtype=dtype)
        assert_no_worse_than_eager(
            lambda s, t: reference.softmax_kl(s, t, temperature=4.0, reduction="sum"), plain, inputs
        )

    @given(
        st.lists(st.tuples(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4)), min_size=1, max_size=6),
        st.sampled_from([0.5, 1.0, 4.0]),
    )
    @settings(max_examples=60, deadline=None)
    def test_nonnegative_with_gradients_summing_to_zero(
        self, pairs: list[tuple[float, float]], temperature: float
    ) -> None:
        student = torch.tensor([[s for s, _ in pairs]], requires_grad=True)
        teacher = torch.tensor([[t for _, t in pairs]])
        loss = reference.softmax_kl(student, teacher, temperature=temperature)
        loss.backward()
        assert loss.item() >= 0
        assert student.grad is not None
        assert student.grad.isfinite().all()
        # p_s and p_t each sum to one within K roundings of fp32, times τ.
        assert abs(student.grad.sum().item()) < 6 * 1.2e-7 * temperature * 2

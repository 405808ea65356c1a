"""The losses of the reference: formula, reductions, gradients, extremes."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, Normal, kl_divergence

from support.loss_inputs import EXACT, randn
from support.numerics import assert_no_worse_than_eager, outputs_and_gradients
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


class TestGaussianKL:
    def parameters(self, *shape: int) -> list[Tensor]:
        return [randn(*shape, seed=seed) for seed in range(4)]

    def test_equals_torch_distributions_in_direction_of_eq_6(self) -> None:
        mean_s, log_var_s, mean_t, log_var_t = parameters = self.parameters(5, 7)
        student, teacher = Normal(mean_s, (log_var_s / 2).exp()), Normal(mean_t, (log_var_t / 2).exp())
        expected = kl_divergence(student, teacher).sum(-1)
        rows = reference.gaussian_kl(*parameters, reduction="none", feature_reduction="sum")
        torch.testing.assert_close(rows, expected, **EXACT)
        assert (
            rows - kl_divergence(teacher, student).sum(-1)
        ).abs().min() > 1e-3  # the other direction is another loss

    # Division by rows and by k as documented: (sum over elements) times this, for 6 rows of 7.
    @pytest.mark.parametrize(
        ("reduction", "feature_reduction", "scale"),
        [
            ("sum", "sum", 1),
            ("sum", "mean", 1 / 7),
            ("batchmean", "sum", 1 / 6),
            ("batchmean", "mean", 1 / 42),
            ("mean", "sum", 1 / 6),
            ("mean", "mean", 1 / 42),
        ],
    )
    def test_reductions(self, reduction: str, feature_reduction: str, scale: float) -> None:
        parameters = self.parameters(2, 3, 7)
        student, teacher = (Normal(m, (v / 2).exp()) for m, v in (parameters[:2], parameters[2:]))
        expected = kl_divergence(student, teacher).sum() * scale
        loss = reference.gaussian_kl(*parameters, reduction=reduction, feature_reduction=feature_reduction)
        torch.testing.assert_close(loss, expected, **EXACT)

    @pytest.mark.parametrize("reduction", ["batchmean", "none"])
    def test_gradients_of_all_four(self, reduction: str) -> None:
        parameters = tuple(x.requires_grad_() for x in self.parameters(3, 4))
        assert torch.autograd.gradcheck(lambda *x: reference.gaussian_kl(*x, reduction=reduction), parameters)

    def test_no_rows_is_zero(self) -> None:
        parameters = [torch.empty(0, 4, requires_grad=True) for _ in range(4)]
        loss = reference.gaussian_kl(*parameters)
        loss.backward()
        assert loss.item() == 0

    def test_close_variances_do_not_cancel(self) -> None:
        """v_s/v_t - 1 - ln(v_s/v_t) = d²/2 + d³/6 for small d; in fp32 the parts are 1e6 times the whole."""
        zero, d = torch.zeros(1, 1), torch.full((1, 1), 1e-3)
        loss = reference.gaussian_kl(zero, d, zero, zero)
        assert abs(loss.item() - (1e-6 / 4 + 1e-9 / 12)) < 1e-4 * 2.5e-7

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_inputs_are_computed_in_fp32(self, dtype: torch.dtype) -> None:
        parameters = [x.to(dtype).requires_grad_() for x in self.parameters(8, 100)]

        def plain(ms: Tensor, vs: Tensor, mt: Tensor, vt: Tensor) -> Tensor:
            ms, vs, mt, vt = (x if x.dtype == torch.float64 else x.float() for x in (ms, vs, mt, vt))
            return 0.5 * ((vs - vt).exp() + (mt - ms) ** 2 / vt.exp() - 1 + vt - vs).mean(-1).sum() / len(ms)

        assert_no_worse_than_eager(reference.gaussian_kl, plain, parameters)


class TestCrossEntropy:
    @pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
    def test_equals_a_loop(self, label_smoothing: float) -> None:
        logits, labels = randn(2, 3, 5), torch.tensor([[0, -100, 4], [2, 2, -100]])
        total, rows = 0.0, 0
        for z, y in zip(logits.flatten(0, 1), labels.flatten().tolist(), strict=True):
            if y == -100:
                continue
            log_p = z.log_softmax(-1)
            target = torch.full((5,), label_smoothing / 5, dtype=torch.float64)
            target[y] += 1 - label_smoothing
            total, rows = total - (target * log_p).sum().item(), rows + 1
        loss = reference.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        assert rows == 4
        assert loss.item() == pytest.approx(total / rows, rel=1e-12)

    @pytest.mark.parametrize("rows", [0, 2])
    def test_no_labels_is_zero_and_not_nan(self, rows: int) -> None:
        logits = randn(rows, 3, grad=True)
        loss = reference.cross_entropy(logits, torch.full((rows,), 7), ignore_index=7)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.item() == 0
        assert torch.equal(gradient, torch.zeros(rows, 3, dtype=torch.float64))

    def test_half_logits_are_computed_in_fp32(self) -> None:
        logits = 8 * randn(4, 1000, dtype=torch.bfloat16)
        loss = reference.cross_entropy(logits, torch.arange(4))
        assert loss.dtype == torch.float32
        expected = F.cross_entropy(logits.double(), torch.arange(4))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # some roundings of fp32, none of bf16 (4e-3)


class TestGaussianAnchor:
    def test_equals_the_negative_log_likelihood(self) -> None:
        logits, mean, log_var = 3 + 5 * randn(4, 6), randn(4, 6, seed=1), randn(4, 6, seed=2)
        target = torch.stack([(z - z.mean()) / (z.var(unbiased=False) + 1e-5).sqrt() for z in logits])
        expected = -Normal(mean, (log_var / 2).exp()).log_prob(target).mean() - 0.5 * math.log(2 * math.pi)
        torch.testing.assert_close(reference.gaussian_anchor(logits, mean, log_var), expected, **EXACT)

    def test_best_mean_is_the_standardised_logits(self) -> None:
        logits, log_var = randn(3, 5), torch.zeros(3, 5, dtype=torch.float64)
        mean = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
        _, (gradient,) = outputs_and_gradients(lambda m: reference.gaussian_anchor(logits, m, log_var), [mean])
        assert gradient is not None
        standardised = F.layer_norm(logits, (5,))
        assert F.cosine_similarity(gradient.flatten(), standardised.flatten(), dim=0).abs() > 1 - 1e-12

    def test_invariant_to_scale_and_shift(self) -> None:
        logits, mean, log_var = randn(3, 5), randn(3, 5, seed=1), randn(3, 5, seed=2)
        loss = reference.gaussian_anchor(logits, mean, log_var)
        other = reference.gaussian_anchor(10 * logits - 7, mean, log_var)
        assert other.item() == pytest.approx(loss.item(), rel=1e-4)  # 1e-5 is added to a variance of about one

    @pytest.mark.parametrize("classes", [1, 4])
    def test_equal_logits_stand_for_zero(self, classes: int) -> None:
        mean = torch.ones(2, classes, requires_grad=True)
        loss = reference.gaussian_anchor(torch.full((2, classes), 3.0), mean, torch.zeros(2, classes))
        loss.backward()
        assert loss.item() == 0.5
        assert mean.grad is not None
        assert mean.grad.isfinite().all()

    def test_gradients(self) -> None:
        inputs = tuple(randn(2, 4, seed=seed, grad=True) for seed in range(3))
        assert torch.autograd.gradcheck(reference.gaussian_anchor, inputs)

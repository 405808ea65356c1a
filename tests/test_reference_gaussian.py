"""The Gaussian KL, the cross-entropy and the anchor of the reference."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from support.loss_inputs import EXACT, randn
from support.numerics import assert_no_worse_than_eager, outputs_and_gradients
from unikd_fast.kernels import reference


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

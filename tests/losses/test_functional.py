"""The public losses: Eq. 7, autocast, compiled graphs, modules."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from support.loss_inputs import K, arguments, randn
from unikd_fast import (
    ChannelWiseKL,
    Gaussian,
    GaussianKL,
    LossTerms,
    SoftmaxKL,
    UniKDLoss,
    channel_wise_kl,
    gaussian_kl,
    softmax_kl,
    unikd_loss,
)
from unikd_fast.kernels import reference


class TestUniKDLoss:
    def test_is_eq_7(self) -> None:
        student, teacher, labels, gaussian_s, gaussian_t = arguments()
        terms = unikd_loss(student, teacher, labels, gaussian_s, gaussian_t, alpha=3.0, beta=0.5, temperature=2.0)
        ce = torch.nn.functional.cross_entropy(student, labels)
        feature_kl = reference.gaussian_kl(*gaussian_s, *gaussian_t)
        logit_kl = reference.softmax_kl(student, teacher, temperature=2.0)
        expected = (ce + 3 * feature_kl + 0.5 * logit_kl, ce, feature_kl, logit_kl)
        # The same operations in the same order, but for the mean of the cross-entropy.
        torch.testing.assert_close(terms[:4], expected, rtol=1e-14, atol=0)
        assert terms.anchor is None

    def test_terms_are_scalars_in_fp32(self) -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            terms = unikd_loss(*arguments(dtype))
            assert all(term.shape == () and term.dtype == torch.float32 for term in terms[:4])

    def test_settings_reach_their_terms(self) -> None:
        student, teacher, labels, gaussian_s, gaussian_t = arguments()
        labels[3] = 0
        settings: dict[str, Any] = {
            "temperature": 3.0,
            "scale_by_t2": False,
            "feature_reduction": "sum",
            "label_smoothing": 0.2,
        }
        terms = unikd_loss(student, teacher, labels, gaussian_s, gaussian_t, ignore_index=4, **settings)
        cross_entropy = torch.nn.functional.cross_entropy
        expected = {
            "ce": cross_entropy(student, labels, label_smoothing=0.2, ignore_index=4),
            "feature_kl": reference.gaussian_kl(*gaussian_s, *gaussian_t, feature_reduction="sum"),
            "logit_kl": reference.softmax_kl(student, teacher, temperature=3.0, scale_by_t2=False),
        }
        for name, value in expected.items():
            assert getattr(terms, name).item() == pytest.approx(value.item(), rel=1e-13), name

    # A term alone, the weights of the others 0: what a wrong sign in a sum of three would hide.
    @pytest.mark.parametrize(("alpha", "beta", "labelled"), [(0, 0, True), (1, 0, False), (0, 1, False), (4, 1, True)])
    def test_gradients_of_each_term(self, alpha: float, beta: float, labelled: bool) -> None:
        student, teacher, labels, gaussian_s, gaussian_t = arguments()
        labels = labels if labelled else torch.full_like(labels, -100)

        def total(z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
            return unikd_loss(z, teacher, labels, (mean, log_var), gaussian_t, alpha=alpha, beta=beta).total

        leaves = tuple(x.requires_grad_() for x in (student, *gaussian_s))
        assert torch.autograd.gradcheck(total, leaves)

    def test_rows_without_a_label_are_distilled(self) -> None:
        student, teacher, labels, gaussian_s, gaussian_t = arguments()
        terms = unikd_loss(student.requires_grad_(), teacher, torch.full_like(labels, -100), gaussian_s, gaussian_t)
        terms.total.backward()
        assert terms.ce.item() == 0
        assert student.grad is not None
        assert student.grad.abs().sum(-1).min() > 0

    def test_weights_may_be_tensors(self) -> None:
        inputs = arguments()
        weights = {"alpha": torch.tensor(2.5), "beta": torch.tensor(0.25)}
        total = unikd_loss(*inputs, **weights).total
        assert total.item() == pytest.approx(unikd_loss(*inputs, alpha=2.5, beta=0.25).total.item(), rel=1e-14)

    def test_a_plain_pair_is_a_gaussian(self) -> None:
        student, teacher, labels, gaussian_s, gaussian_t = arguments()
        assert torch.equal(
            unikd_loss(student, teacher, labels, tuple(gaussian_s), [*gaussian_t]).total,
            unikd_loss(student, teacher, labels, gaussian_s, gaussian_t).total,
        )

    def test_no_rows_is_zero(self) -> None:
        pair = (torch.empty(0, K), torch.empty(0, K))
        terms = unikd_loss(torch.empty(0, K), torch.empty(0, K), torch.empty(0, dtype=torch.int64), pair, pair)
        assert [term.item() for term in terms[:4]] == [0, 0, 0, 0]

    def test_other_integer_labels(self) -> None:
        student, teacher, labels, *gaussians = arguments()
        expected = unikd_loss(student, teacher, labels, *gaussians).total
        assert torch.equal(unikd_loss(student, teacher, labels.int(), *gaussians).total, expected)

    def test_same_bits_twice(self) -> None:
        inputs = arguments(torch.bfloat16)
        assert torch.equal(unikd_loss(*inputs).total, unikd_loss(*inputs).total)


class TestChannelWiseKL:
    """The formula in float64, its sums written out, for maps and volumes in every layout."""

    @pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 7), (2, 3, 2, 2, 3)])
    def test_is_the_mean_over_channels(self, shape: tuple[int, ...]) -> None:
        student, teacher = (randn(*shape, seed=seed).requires_grad_() for seed in (1, 2))
        expected = torch.zeros((), dtype=torch.float64)
        for s, t in zip(student.reshape(6, -1), teacher.reshape(6, -1), strict=True):
            q, p = (torch.exp(x / 3) / torch.exp(x / 3).sum() for x in (s, t))
            expected = expected + 9 * (p * (p / q).log()).sum() / 6
        loss = channel_wise_kl(student, teacher, temperature=3.0)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        gradients = (torch.autograd.grad(x, (student, teacher)) for x in (loss, expected))
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)

    def test_layout_and_precision(self) -> None:
        student, teacher = (randn(2, 3, 4, 5, seed=seed).float() for seed in (1, 2))
        expected = channel_wise_kl(student.double(), teacher.double())
        loss = channel_wise_kl(student.to(memory_format=torch.channels_last), teacher)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
        assert channel_wise_kl(student[:0], teacher[:0]).item() == 0


class TestAutocast:
    """Half inputs give what the same numbers give in fp32: autocast must not reach the arithmetic."""

    def test_losses_are_the_fp32_losses(self) -> None:
        inputs = arguments(torch.bfloat16)
        in_fp32 = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs[:3]]
        gaussians = [Gaussian(g.mean.float(), g.log_var.float()) for g in inputs[3:]]
        expected = unikd_loss(*in_fp32, *gaussians)
        with torch.autocast("cpu", torch.bfloat16):
            terms = unikd_loss(*inputs)
            terms_of_fp32 = unikd_loss(*in_fp32, *gaussians)
        for term, other, value in zip(terms[:4], terms_of_fp32[:4], expected[:4], strict=True):
            assert torch.equal(term, value)
            assert torch.equal(other, value)

    def test_double_stays_double(self) -> None:
        inputs = arguments()
        with torch.autocast("cpu", torch.bfloat16):
            terms = unikd_loss(*inputs)
        assert torch.equal(terms.total, unikd_loss(*inputs).total)


class TestCompile:
    """One graph, no break, and the numbers of eager mode."""

    def test_unikd_loss(self) -> None:
        student, teacher, labels, gaussian_s, gaussian_t = arguments()
        compiled = torch.compile(unikd_loss, fullgraph=True, backend="aot_eager")
        alpha = torch.tensor(2.0)
        results = []
        for compute in (compiled, unikd_loss):
            leaf = student.clone().requires_grad_()
            terms = compute(leaf, teacher, labels, gaussian_s, gaussian_t, alpha=alpha, label_smoothing=0.1)
            assert isinstance(terms, LossTerms)
            terms.total.backward()
            assert leaf.grad is not None
            results.append([*terms[:4], leaf.grad])
        torch.testing.assert_close(*results, rtol=1e-13, atol=1e-15)  # a decomposition may sum in another order

    def test_softmax_kl_with_mask_and_changing_batch(self) -> None:
        compiled = torch.compile(softmax_kl, fullgraph=True, backend="eager", dynamic=True)
        for rows in (4, 7, 9):
            student, teacher, mask = randn(rows, K, seed=1), randn(rows, K, seed=2), torch.arange(rows) % 2 == 0
            expected = softmax_kl(student, teacher, temperature=2.0, ignore_mask=mask)
            loss = compiled(student, teacher, temperature=2.0, ignore_mask=mask)
            torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)

    def test_a_ramp_does_not_recompile(self) -> None:
        inputs, graphs = arguments(), []

        def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        compiled = torch.compile(UniKDLoss(), fullgraph=True, backend=count)
        totals = [compiled(*inputs, alpha=torch.tensor(alpha)).total.item() for alpha in (0.0, 0.5, 4.0)]
        assert len(graphs) == 1
        assert totals == sorted(totals)
        assert totals[0] < totals[2]


class TestModules:
    def test_modules_equal_the_functions(self) -> None:
        student, teacher, labels, gaussian_s, gaussian_t = arguments()
        mask = torch.tensor([True, False] * 3)
        logits_loss = SoftmaxKL(temperature=3.0, reduction="sum", scale_by_t2=False)
        expected = softmax_kl(student, teacher, temperature=3.0, reduction="sum", scale_by_t2=False, ignore_mask=mask)
        assert torch.equal(logits_loss(student, teacher, mask), expected)
        features_loss = GaussianKL(reduction="none", feature_reduction="sum")
        expected = gaussian_kl(*gaussian_s, *gaussian_t, reduction="none", feature_reduction="sum")
        assert torch.equal(features_loss(*gaussian_s, *gaussian_t), expected)
        settings: dict[str, Any] = {
            "alpha": 2.0,
            "beta": 3.0,
            "temperature": 5.0,
            "scale_by_t2": False,
            "feature_reduction": "sum",
            "label_smoothing": 0.3,
            "ignore_index": 4,
        }
        labels[3] = 0
        whole = UniKDLoss(**settings)(student, teacher, labels, gaussian_s, gaussian_t)
        assert whole == unikd_loss(student, teacher, labels, gaussian_s, gaussian_t, **settings)

    def test_channel_wise(self) -> None:
        student, teacher = randn(2, 3, 4, 5, seed=1), randn(2, 3, 4, 5, seed=2)
        expected = channel_wise_kl(student, teacher, temperature=3.0)
        assert torch.equal(ChannelWiseKL(temperature=3.0)(student, teacher), expected)

    def test_call_weights_override_the_module(self) -> None:
        inputs = arguments()
        loss = UniKDLoss(alpha=2.0, beta=3.0)
        assert torch.equal(loss(*inputs, alpha=0.0).total, unikd_loss(*inputs, alpha=0.0, beta=3.0).total)
        assert torch.equal(loss(*inputs, beta=0.0).total, unikd_loss(*inputs, alpha=2.0, beta=0.0).total)

    def test_bad_settings_are_rejected(self) -> None:
        with pytest.raises(ValueError, match="SoftmaxKL: temperature must be finite and above 0, got -1"):
            SoftmaxKL(temperature=-1)
        with pytest.raises(ValueError, match="GaussianKL: feature_reduction must be one of mean, sum, got 'max'"):
            GaussianKL(feature_reduction="max")
        with pytest.raises(ValueError, match="UniKDLoss: impl must be one of auto, reference, fused, got 'triton'"):
            UniKDLoss(impl="triton")

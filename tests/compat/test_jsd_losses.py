"""Liger's losses of log-probabilities and TRL's of logits: generalised Jensen-Shannon divergences and their limits."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from support.loss_inputs import randn
from support.oracles import assert_same, jsd, jsd_terms
from unikd_fast import softmax_kl
from unikd_fast.compat.liger import LigerFusedLinearJSD, LigerJSD, LigerKLDIVLoss
from unikd_fast.compat.trl import generalized_jsd_loss

N, K = 6, 5
BETAS = [0.0, 0.1, 0.5, 1.0]


def unnormalised(seed: int) -> Tensor:
    """Log-probabilities that do not sum to one: a free variable is one only if the loss says nothing about its sum."""
    return randn(N, K, seed=seed).log_softmax(-1) + 0.1 * randn(N, K, seed=seed + 10)


class TestLigerKL:
    @pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
    @pytest.mark.parametrize("log_target", [False, True])
    def test_formula(self, reduction: str, log_target: bool) -> None:
        def oracle(log_q: Tensor, target: Tensor) -> Tensor:
            p = target.detach().exp() if log_target else target.detach()
            terms = p * (torch.log(p) - log_q)
            return terms if reduction == "none" else terms.sum() / {"batchmean": N, "mean": N * K, "sum": 1}[reduction]

        target = unnormalised(2)
        assert_same(
            LigerKLDIVLoss(reduction=reduction, log_target=log_target),
            oracle,
            unnormalised(1),
            target if log_target else target.exp(),
        )

    def test_default_divides_by_rows_times_classes(self) -> None:
        log_q, p = unnormalised(1), unnormalised(2).exp()
        assert LigerKLDIVLoss()(log_q, p).item() == pytest.approx((p * (p.log() - log_q)).mean().item(), rel=1e-12)

    def test_eps_bounds_the_teachers_logarithm(self) -> None:
        log_q, p = torch.zeros(1, 2).double(), torch.tensor([[1.0, 1e-3]], dtype=torch.float64)
        loss = LigerKLDIVLoss(eps=1e-2, reduction="sum")(log_q, p)
        assert loss.item() == pytest.approx(1e-3 * math.log(1e-2), rel=1e-12)
        assert LigerKLDIVLoss()(log_q, torch.tensor([[1.0, 0.0]]).double()).item() == 0

    def test_gradient_of_free_log_probabilities(self) -> None:
        """-p / N by ln q, where softmax_kl gives (q - p) / N; by the logits before the log_softmax the two agree."""
        logits, p = randn(N, K, seed=1, grad=True), randn(N, K, seed=2).softmax(-1)
        log_q = logits.log_softmax(-1)
        loss, same = LigerKLDIVLoss(reduction="batchmean")(log_q, p), softmax_kl(log_q, p.log())
        torch.testing.assert_close(loss, same)
        own, other = (torch.autograd.grad(x, log_q, retain_graph=True)[0] for x in (loss, same))
        torch.testing.assert_close(own, -p / N)
        torch.testing.assert_close(other, (log_q.exp() - p) / N)
        torch.testing.assert_close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, same)))


class TestLigerJSD:
    @pytest.mark.parametrize("labels", [None, torch.tensor([0, 7, 2, 7, 7, 3])])
    @pytest.mark.parametrize("beta", BETAS)
    def test_formula(self, beta: float, labels: Tensor | None) -> None:
        kept = torch.ones(N, dtype=torch.bool) if labels is None else labels != 7

        def oracle(log_q: Tensor, log_p: Tensor) -> Tensor:
            rows = torch.stack([jsd(p, q, beta).sum() for p, q in zip(log_p.detach().exp(), log_q.exp(), strict=True)])
            return rows[kept].sum() / kept.sum()

        loss = LigerJSD(beta, ignore_index=7)
        assert_same(lambda log_q, log_p: loss(log_q, log_p, labels), oracle, unnormalised(1), unnormalised(2))

    def test_ignored_tokens_may_be_nan(self) -> None:
        log_q = unnormalised(1)
        log_q[1] = math.nan
        log_q.requires_grad_()
        labels = torch.tensor([0, -100, 1, 1, 1, 1])
        LigerJSD()(log_q, unnormalised(2), labels).backward()
        assert log_q.grad is not None and log_q.grad.isfinite().all() and (log_q.grad[1] == 0).all()

    def test_no_rows_kept_give_0(self) -> None:
        labels = torch.full((N,), -100)
        assert LigerJSD()(unnormalised(1), unnormalised(2), labels).item() == 0

    def test_small_integer_labels(self) -> None:
        """156 is what -100 wraps round to in uint8."""
        labels, log_q, log_p = torch.tensor([156, 0, 1, 156, 2, 3]), unnormalised(1), unnormalised(2)
        assert torch.equal(LigerJSD()(log_q, log_p, labels.to(torch.uint8)), LigerJSD()(log_q, log_p, labels))

    @pytest.mark.parametrize("beta", [0.0, 0.5])
    def test_class_impossible_for_both_adds_0(self, beta: float) -> None:
        log_q = torch.tensor([[0.0, 1.0, -math.inf]]).double().log_softmax(-1).requires_grad_()
        log_p = torch.tensor([[1.0, 0.0, -math.inf]]).double().log_softmax(-1)
        loss = LigerJSD(beta)(log_q, log_p)
        loss.backward()
        assert loss.item() == pytest.approx(jsd(log_p[0, :2].exp(), log_q[0, :2].exp(), beta).sum().item(), rel=1e-12)
        assert log_q.grad is not None and log_q.grad.isfinite().all()

    def test_it_keeps_the_dtype(self) -> None:
        assert LigerJSD()(unnormalised(1).bfloat16(), unnormalised(2).bfloat16()).dtype == torch.bfloat16

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match=r"must both be \(N, K\), got \(2, 3, 5\) and \(2, 3, 5\); flatten"):
            LigerJSD()(torch.zeros(2, 3, 5), torch.zeros(2, 3, 5))
        with pytest.raises(ValueError, match=r"shift_labels must be \(6,\), one per row, got \(5,\)"):
            LigerJSD()(unnormalised(1), unnormalised(2), torch.zeros(5))
        with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\], got 1.5"):
            LigerJSD(1.5)(unnormalised(1), unnormalised(2))
        with pytest.raises(ValueError, match="reduction must be one of mean, batchmean, sum, none, got 'avg'"):
            LigerKLDIVLoss(reduction="avg")(unnormalised(1), unnormalised(2))


class TestLigerFusedLinearJSD:
    STUDENT, TEACHER = (randn(N, 3, seed=1), randn(K, 3, seed=2)), (randn(N, 4, seed=3), randn(K, 4, seed=4))

    @pytest.mark.parametrize("labels", [None, torch.tensor([0, 7, 2, 7, 7, 3])])
    @pytest.mark.parametrize("beta", BETAS)
    def test_formula(self, beta: float, labels: Tensor | None) -> None:
        kept = torch.ones(N, dtype=torch.bool) if labels is None else labels != 7

        def oracle(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
            logits = hidden @ weight.T, (teacher @ teacher_weight.T).detach()
            return jsd_terms(*logits, beta, 2.0)[kept].sum() / kept.sum()

        loss = LigerFusedLinearJSD(beta, ignore_index=7, temperature=2.0)
        assert_same(lambda *x: loss(*x, labels), oracle, *self.STUDENT, *self.TEACHER)

    def test_it_is_liger_jsd_of_the_log_probabilities(self) -> None:
        (hidden, weight), (teacher, teacher_weight) = self.STUDENT, self.TEACHER
        labels = torch.tensor([0, -100, 2, 1, -100, 3])
        log_q, log_p = (hidden @ weight.T).log_softmax(-1), (teacher @ teacher_weight.T).log_softmax(-1)
        for beta in BETAS:
            fused = LigerFusedLinearJSD(beta)(hidden, weight, teacher, teacher_weight, labels)
            torch.testing.assert_close(fused, LigerJSD(beta)(log_q, log_p, labels))

    def test_no_rows_kept_give_0(self) -> None:
        labels = torch.full((N,), -100)
        assert LigerFusedLinearJSD()(*self.STUDENT, *self.TEACHER, labels).item() == 0

    def test_half_precision_gives_fp32(self) -> None:
        inputs = [x.bfloat16() for x in (*self.STUDENT, *self.TEACHER)]
        assert LigerFusedLinearJSD(accum_dtype=torch.bfloat16)(*inputs, None).dtype == torch.float32

    def test_refusals(self) -> None:
        inputs = [*self.STUDENT, *self.TEACHER]
        with pytest.raises(ValueError, match=r"shift_labels must be \(6,\), one per row, got \(5,\)"):
            LigerFusedLinearJSD()(*inputs, torch.zeros(5))
        with pytest.raises(ValueError, match=r"LigerFusedLinearJSD: jsd_beta must lie in \[0, 1\], got -1"):
            LigerFusedLinearJSD(-1)(*inputs, None)
        with pytest.raises(
            ValueError, match=r"accum_dtype must be that of the weight, torch\.float64, got torch\.float32"
        ):
            LigerFusedLinearJSD(accum_dtype=torch.float32)(*inputs, None)


class TestTRL:
    LABELS = torch.tensor([[1, -100, 3], [-100, -100, 0]])

    def check(self, oracle: Any, beta: float, **settings: Any) -> None:
        assert_same(
            lambda s, t: generalized_jsd_loss(s, t, beta=beta, temperature=2.0, **settings),
            lambda s, t: oracle(jsd_terms(s, t, beta, 2.0)),
            randn(2, 3, K, seed=1),
            randn(2, 3, K, seed=2),
        )

    def test_small_integer_labels(self) -> None:
        """156 is what -100 wraps round to in uint8."""
        s, t = randn(2, 3, K, seed=1), randn(2, 3, K, seed=2)
        labels = torch.tensor([[156, 1, 2], [3, 156, 4]])
        small = generalized_jsd_loss(s, t, labels.to(torch.uint8))
        assert torch.equal(small, generalized_jsd_loss(s, t, labels))

    @pytest.mark.parametrize("beta", BETAS)
    def test_without_labels_divides_by_the_batch(self, beta: float) -> None:
        self.check(lambda terms: terms.sum() / 2, beta)

    @pytest.mark.parametrize("beta", BETAS)
    def test_with_labels_the_tokens_kept_divide(self, beta: float) -> None:
        self.check(lambda terms: terms[[0, 2, 5]].sum() / 3, beta, labels=self.LABELS)

    @pytest.mark.parametrize("beta", BETAS)
    def test_num_items_in_batch_overrides_the_reduction(self, beta: float) -> None:
        for items in (7, torch.tensor(7)):
            self.check(
                lambda terms: terms[[0, 2, 5]].sum() / 7,
                beta,
                labels=self.LABELS,
                num_items_in_batch=items,
                reduction="mean",
            )

    @pytest.mark.parametrize("beta", BETAS)
    def test_the_other_reductions(self, beta: float) -> None:
        self.check(lambda terms: terms[[0, 2, 5]].sum(), beta, labels=self.LABELS, reduction="sum")
        self.check(lambda terms: terms[[0, 2, 5]].mean(), beta, labels=self.LABELS, reduction="mean")
        self.check(lambda terms: terms[[0, 2, 5]], beta, labels=self.LABELS, reduction="none")
        self.check(lambda terms: terms.reshape(2, 3, K), beta, reduction="none")
        self.check(lambda terms: terms.mean(), beta, reduction="mean")

    def test_no_tokens_kept_give_0(self) -> None:
        labels = torch.full((2, 3), -100)
        for reduction in ("batchmean", "mean", "sum"):
            s = randn(2, 3, K, grad=True)
            loss = generalized_jsd_loss(s, randn(2, 3, K, seed=1), labels, reduction=reduction)
            loss.backward()
            assert loss.item() == 0 and s.grad is not None and (s.grad == 0).all()

    def test_beta_out_of_range_is_rejected(self) -> None:
        with pytest.raises(ValueError, match="beta must lie in"):
            generalized_jsd_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), beta=1.5)

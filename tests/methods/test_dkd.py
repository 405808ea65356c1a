"""DKD: the loss and its gradient against the paper's formula, its warm-up, and what it refuses."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from support.build_method import build
from support.logit_methods import (
    BATCH,
    HOW,
    LABELS,
    Found,
    K,
    N,
    as_found,
    assert_is_the_formula,
    batch_of,
    cross_entropy,
    falls,
    kl,
    logits,
    softmax,
    standardised,
    trained,
)
from support.real_runs import save_teacher
from unikd_fast.config import ConfigError, load_config
from unikd_fast.losses import quantize_logits
from unikd_fast.methods import DKD, KD, Hybrid
from unikd_fast.values import StudentOutput, Target

DIGITS = Path(__file__).parents[2] / "configs" / "digits.json"


def parts(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """τ² TCKD and τ² NCKD, row by row."""
    binary, others = [], []
    for z_s, z_t, y in zip(student, teacher, LABELS.tolist(), strict=True):
        p, q = softmax(z_t, temperature), softmax(z_s, temperature)
        rest = [k for k in range(K) if k != y]
        two = [torch.stack([x[y], x[rest].sum()]) for x in (p, q)]
        without = [x[rest] / x[rest].sum() for x in (p, q)]
        binary.append(kl(*two))
        others.append(kl(*without))
    return temperature**2 * torch.stack(binary).mean(), temperature**2 * torch.stack(others).mean()


@pytest.mark.parametrize("standardized", [False, True])
@pytest.mark.parametrize(("dtype", "impl", "autocast"), HOW)
def test_loss_and_gradient_match_the_formula(dtype: torch.dtype, impl: str, autocast: bool, standardized: bool) -> None:
    method = build(DKD, ce_weight=0.7, alpha=1.5, beta=6.0, temperature=3.0, standardized=standardized, impl=impl)
    method.set_progress(5.0)

    def loss(student: Tensor, teacher: Tensor) -> Found:
        return as_found(method.loss(StudentOutput(student), Target(teacher), BATCH))

    def formula(student: Tensor, teacher: Tensor) -> Found:
        ce = cross_entropy(student)
        both = [standardised(z) if standardized else z for z in (student, teacher)]
        target, others = parts(*both, 3.0)
        total = 0.7 * ce + 5 / 20 * (1.5 * target + 6.0 * others)
        return total, {"ce": ce, "dkd_target": target, "dkd_non_target": others}

    assert_is_the_formula(loss, formula, [logits(1, dtype, grad=True), logits(2, dtype)], autocast=autocast)


def test_the_warm_up_is_linear_and_in_place() -> None:
    method = build(DKD, ramp_epochs=8.0)
    student, target = StudentOutput(logits(1)), Target(logits(2))
    factor = method.ramp.value
    for epochs, share in ((0.0, 0.0), (2.0, 0.25), (8.0, 1.0), (100.0, 1.0)):
        method.set_progress(epochs)
        loss = method.loss(student, target, BATCH)
        distilled = loss.terms["dkd_target"] + 8.0 * loss.terms["dkd_non_target"]
        torch.testing.assert_close(loss.total, loss.terms["ce"] + share * distilled)
    assert method.ramp.value is factor
    none = build(DKD, ramp_epochs=0.0)
    none.set_progress(0.0)
    torch.testing.assert_close(none.loss(student, target, BATCH).total, loss.total)


@pytest.mark.parametrize("weights", [(0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0)])
def test_a_zero_weight_leaves_the_other_terms(weights: tuple[float, float, float]) -> None:
    ce_weight, alpha, beta = weights
    method = build(DKD, ce_weight=ce_weight, alpha=alpha, beta=beta)
    loss = method.loss(StudentOutput(logits(1)), Target(logits(2)), BATCH)
    (expected,) = (term for term, weight in zip(loss.terms.values(), weights, strict=True) if weight)
    assert torch.equal(loss.total, expected)


def test_with_two_classes_only_the_target_term_remains() -> None:
    student, teacher = logits(1)[:, :2], logits(2)[:, :2]
    batch = batch_of(torch.arange(N) % 2)
    terms = build(DKD).loss(StudentOutput(student), Target(teacher), batch).terms
    assert terms["dkd_non_target"] == 0
    torch.testing.assert_close(terms["dkd_target"], 16 * kl(softmax(teacher, 4.0), softmax(student, 4.0)).mean())
    with pytest.raises(ValueError, match="needs at least 2 classes, got 1"):
        build(DKD).loss(
            StudentOutput(student[:, :1]), Target(teacher[:, :1]), batch_of(torch.zeros(N, dtype=torch.int64))
        )


def test_a_certain_student_leaves_the_loss_finite() -> None:
    """Where the published code takes the logarithm of a probability that underflows."""
    student = (300.0 * torch.nn.functional.one_hot(LABELS, K)).float().requires_grad_()
    total = build(DKD).loss(StudentOutput(student), Target(logits(2).float()), BATCH).total
    total.backward()
    assert total.isfinite()
    assert student.grad is not None and student.grad.isfinite().all()


def test_cached_logits_are_accepted() -> None:
    student, teacher = logits(1).float(), logits(2).float()
    stored = quantize_logits(teacher, torch.uint8)
    dense = stored.values * stored.scale[:, None] + stored.offset[:, None]
    found, expected = (build(DKD).loss(StudentOutput(student), Target(z), BATCH).total for z in (stored, dense))
    torch.testing.assert_close(found, expected)


def test_a_step_does_not_synchronise() -> None:
    """A tensor on "meta" has no value to read."""
    student = torch.randn(N, K, device="meta", requires_grad=True)
    method = build(DKD, device="meta", impl="reference")
    total = method.loss(StudentOutput(student), Target(student.detach()), batch_of(LABELS.to("meta"))).total
    total.backward()
    assert student.grad is not None


def test_a_hybrid_adds_the_cross_entropy_once() -> None:
    hybrid = build(Hybrid, {"kd": build(KD, beta=2.0), "dkd": build(DKD, alpha=0.5, beta=3.0, ramp_epochs=4.0)})
    assert hybrid.term_names == ("ce", "logit_kl", "dkd_target", "dkd_non_target")
    assert hybrid.needs.hard_labels and hybrid.uncacheable is None
    hybrid.set_progress(1.0)
    student, teacher = logits(1), logits(2)
    target, others = parts(student, teacher, 4.0)
    soft = 16 * kl(softmax(teacher, 4.0), softmax(student, 4.0)).mean()
    expected = cross_entropy(student) + 2.0 * soft + 0.25 * (0.5 * target + 3.0 * others)
    torch.testing.assert_close(hybrid.loss(StudentOutput(student), Target(teacher), BATCH).total, expected)


@pytest.mark.slow
@pytest.mark.parametrize("standardized", [False, True])
def test_trains(tmp_path: Path, standardized: bool) -> None:
    weights = save_teacher(tmp_path / "teacher.pt")
    section = {"ramp_epochs": 1.0, "standardized": standardized, "alpha": 4.0}
    records = trained(tmp_path, weights, "dkd", distill={"dkd": section})
    assert records[0]["total"] == pytest.approx(records[0]["ce"], rel=1e-5)
    assert falls(records, "dkd_target") and falls(records, "dkd_non_target")


@pytest.mark.slow
def test_trains_from_a_cache(tmp_path: Path) -> None:
    weights = save_teacher(tmp_path / "teacher.pt")
    section = {"ramp_epochs": 1.0, "beta": 2.0}
    online = trained(tmp_path, weights, "dkd", name="online", distill={"dkd": section})
    cache = {"mode": "read_write", "logits": "uint8"}
    cached = trained(tmp_path, weights, "dkd", name="cached", distill={"dkd": section}, cache=cache)
    for term in ("ce", "dkd_target", "dkd_non_target"):
        # One of 255 levels of a row's range, of which τ leaves a quarter.
        assert cached[0][term] == pytest.approx(online[0][term], rel=2e-2), term
        assert (cached[0][term] == online[0][term]) == (term == "ce")
    assert falls(cached, "dkd_non_target")


def test_top_k_logits_are_refused() -> None:
    cached = ["teacher.cache.mode=read", "teacher.cache.logits=top_k", "teacher.cache.top_k=3"]
    with pytest.raises(ConfigError, match=r"'top_k' with distill\.method = 'dkd', which needs all logits"):
        load_config(DIGITS, ["compare=null", "distill.method=dkd", *cached])

"""NKD: the loss and its gradient against the formula of the published code, and what its terms see."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from support.build_method import build
from support.logit_methods import (
    BATCH,
    HOW,
    LABELS,
    SOFT_LABELS,
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
    trained,
)
from support.real_runs import save_teacher
from unikd_fast.losses import quantize_logits
from unikd_fast.methods import DKD, NKD, Hybrid, Needs
from unikd_fast.values import StudentOutput, Target


def parts(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """-p_y ln q_y at τ = 1, and -τ² Σ p' ln q' over the other classes at τ."""
    targets, others = [], []
    for z_s, z_t, y in zip(student, teacher, LABELS.tolist(), strict=True):
        rest = [k for k in range(K) if k != y]
        targets.append(-softmax(z_t)[y] * softmax(z_s)[y].log())
        others.append(-(softmax(z_t[rest], temperature) * softmax(z_s[rest], temperature).log()).sum())
    return torch.stack(targets).mean(), temperature**2 * torch.stack(others).mean()


@pytest.mark.parametrize("labels", [LABELS, SOFT_LABELS], ids=["labels", "mixed"])
@pytest.mark.parametrize(("dtype", "impl", "autocast"), HOW)
def test_loss_and_gradient_match_the_formula(dtype: torch.dtype, impl: str, autocast: bool, labels: Tensor) -> None:
    method = build(NKD, ce_weight=0.8, gamma=3.5, temperature=3.0, impl=impl)

    def loss(student: Tensor, teacher: Tensor) -> Found:
        return as_found(method.loss(StudentOutput(student), Target(teacher), batch_of(labels)))

    def formula(student: Tensor, teacher: Tensor) -> Found:
        ce = cross_entropy(student, labels.double() if labels.is_floating_point() else labels)
        target, others = parts(student, teacher, 3.0)
        return 0.8 * ce + target + 3.5 * others, {"ce": ce, "nkd_target": target, "nkd_non_target": others}

    assert_is_the_formula(loss, formula, [logits(1, dtype, grad=True), logits(2, dtype)], autocast=autocast)


def test_the_non_target_term_ignores_the_target() -> None:
    student, teacher = logits(1), logits(2)
    moved = student.scatter_add(1, LABELS[:, None], torch.full((N, 1), 5.0, dtype=torch.float64))
    before, after = (build(NKD).loss(StudentOutput(z), Target(teacher), BATCH).terms for z in (student, moved))
    torch.testing.assert_close(after["nkd_non_target"], before["nkd_non_target"])
    assert after["nkd_target"] < before["nkd_target"]


def test_with_two_classes_the_non_target_term_is_zero() -> None:
    student, teacher, labels = logits(1)[:, :2], logits(2)[:, :2], torch.arange(N) % 2
    terms = build(NKD, temperature=2.0).loss(StudentOutput(student), Target(teacher), batch_of(labels)).terms
    assert terms["nkd_non_target"] == 0
    with pytest.raises(ValueError, match="needs at least 2 classes, got 1"):
        build(NKD).loss(StudentOutput(student[:, :1]), Target(teacher[:, :1]), batch_of(torch.zeros_like(labels)))


def test_a_certain_teacher_leaves_the_loss_finite() -> None:
    """Whose other probabilities are 0 in fp32, and 0 ln 0 = 0."""
    teacher = torch.zeros(N, K).scatter(1, ((LABELS + 1) % K)[:, None], 1e4)
    student = logits(1, torch.float32, grad=True)
    loss = build(NKD).loss(StudentOutput(student), Target(teacher), BATCH)
    loss.total.backward()
    assert loss.total.isfinite()
    assert student.grad is not None and student.grad.isfinite().all()
    assert loss.terms["nkd_target"] == 0


def test_cached_logits_are_accepted() -> None:
    student, teacher = logits(1).float(), logits(2).float()
    stored = quantize_logits(teacher, torch.uint8)
    dense = stored.values * stored.scale[:, None] + stored.offset[:, None]
    found, expected = (build(NKD).loss(StudentOutput(student), Target(z), BATCH) for z in (stored, dense))
    torch.testing.assert_close(found.terms, expected.terms)


def test_a_step_does_not_synchronise() -> None:
    student = torch.randn(N, K, device="meta", requires_grad=True)
    batch = batch_of(LABELS.to("meta"))
    build(NKD, impl="reference").loss(StudentOutput(student), Target(student.detach()), batch).total.backward()
    assert student.grad is not None


def test_a_hybrid_adds_the_cross_entropy_once() -> None:
    hybrid = build(
        Hybrid, {"nkd": build(NKD, gamma=2.0), "dkd": build(DKD, alpha=0.0, beta=3.0, temperature=1.0, ramp_epochs=0.0)}
    )
    assert hybrid.needs == Needs(labels=True, hard_labels=True, two_classes=True)
    assert build(NKD).needs == Needs(labels=True, two_classes=True)
    student, teacher = logits(1), logits(2)
    target, others = parts(student, teacher, 1.0)
    (_, entropy), (_, divergence) = parts(teacher, teacher, 1.0), parts(student, teacher, 1.0)
    expected = cross_entropy(student) + target + 2.0 * others + 3.0 * (divergence - entropy)
    torch.testing.assert_close(hybrid.loss(StudentOutput(student), Target(teacher), BATCH).total, expected)


def test_zero_weights_leave_the_target_term() -> None:
    loss = build(NKD, ce_weight=0.0, gamma=0.0).loss(StudentOutput(logits(1)), Target(logits(2)), BATCH)
    torch.testing.assert_close(loss.total, parts(logits(1), logits(2), 1.0)[0])
    assert kl(softmax(logits(2)), softmax(logits(1))).mean() != loss.total


@pytest.mark.slow
def test_trains(tmp_path: Path) -> None:
    records = trained(tmp_path, save_teacher(tmp_path / "teacher.pt"), "nkd", distill={"nkd": {"gamma": 3.0}})
    assert falls(records, "nkd_target") and falls(records, "nkd_non_target")
    for record in records:
        expected = record["ce"] + record["nkd_target"] + 3.0 * record["nkd_non_target"]
        assert record["total"] == pytest.approx(expected, rel=1e-5)

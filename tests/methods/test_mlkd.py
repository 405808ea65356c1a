"""MLKD: against what the published code computes, written out, and against the formula without its accidents."""

from pathlib import Path

import numpy as np
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
    standardised,
    trained,
)
from support.real_runs import save_teacher
from unikd_fast.methods import KD, MLKD, Hybrid, Needs
from unikd_fast.values import Features, StudentOutput

TERMS = ("ce", "second_ce", "logit_kl", "second_logit_kl", "batch_gram", "class_gram")


def run(method: MLKD, views: tuple[Tensor, ...], labels: Tensor = LABELS) -> Found:
    """The method on (student's weak, strong, teacher's weak, strong)."""
    student, second, teacher, second_teacher = views
    target = method.target(Features((), teacher), Features((), second_teacher))
    return as_found(method.loss(StudentOutput(student, None, second), target, batch_of(labels)))


def views_of(dtype: torch.dtype = torch.float64, *, n: int = N) -> list[Tensor]:
    return [logits(seed, dtype)[:n].requires_grad_(seed < 3) for seed in (1, 2, 3, 4)]


def soft(student: Tensor, teacher: Tensor, temperature: float, *, standard: bool = False) -> Tensor:
    if standard:
        student, teacher = standardised(student), standardised(teacher)
    return temperature**2 * kl(softmax(teacher, temperature), softmax(student, temperature)).mean()


def gram(student: Tensor, teacher: Tensor, temperature: float, *, classes: bool) -> Tensor:
    """Entry by entry: inner products of the samples' probabilities, or of the classes'."""
    p, q = (softmax(z, temperature).T if classes else softmax(z, temperature) for z in (teacher, student))
    gaps = [(p[i] * p[j]).sum() - (q[i] * q[j]).sum() for i in range(len(p)) for j in range(len(p))]
    return torch.stack(gaps).square().sum() / len(p)


def published(views: tuple[Tensor, ...], labels: Tensor = LABELS, *, standard: bool = False) -> Found:
    """With its masks applied where it applies them: to sums that are reduced already."""
    student, second, teacher, second_teacher = views
    confidence = softmax(teacher.detach()).max(-1).values.numpy()
    of_classes = softmax(teacher.detach()).sum(0).numpy()
    mask = torch.tensor(confidence <= np.percentile(confidence, 50))
    class_mask = torch.tensor(of_classes <= np.percentile(of_classes, 50))
    ce, second_ce = cross_entropy(student, labels), cross_entropy(second, labels)
    at = (4.0, 3.0, 5.0, 2.0, 6.0)
    weak = [soft(student, teacher, t, standard=standard) for t in at]
    strong = [soft(second, second_teacher, t, standard=standard) for t in at[:3]]
    mistaken = [soft(student, teacher, t, standard=standard) for t in at[3:]]
    batches = [gram(student, teacher, t, classes=False) for t in at]
    classes = [gram(student, teacher, t, classes=True) for t in at]
    total = 0.1 * (ce + second_ce)
    for value in weak:
        total = total + 0.9 * (value * mask).mean()
    for value in (*strong, *mistaken):
        total = total + 0.9 * value
    for value in batches:
        total = total + 0.9 * (value * mask).mean()
    for value in classes:
        total = total + 0.9 * (value * class_mask).mean()
    values = (ce, second_ce, *(torch.stack(terms).sum() for terms in (weak, strong, batches, classes)))
    return total, dict(zip(TERMS, values, strict=True))


@pytest.mark.parametrize("standard", [False, True])
@pytest.mark.parametrize(("dtype", "impl", "autocast"), HOW)
def test_the_default_matches_the_published_code(dtype: torch.dtype, impl: str, autocast: bool, standard: bool) -> None:
    method = build(MLKD, standardized=standard, impl=impl)
    assert_is_the_formula(
        lambda *views: run(method, views),
        lambda *views: published(views, standard=standard),
        views_of(dtype),
        autocast=autocast,
    )


def test_gram_terms_of_the_strong_view_are_the_development_codes() -> None:
    """Of UniKD's public development code, written out: of samples with the mask, of classes without."""
    method = build(MLKD, ce_weight=1.0, second_ce_weight=1.0, weight=1.0, second_grams=True)

    def formula(*views: Tensor) -> Found:
        student, second, teacher, second_teacher = views
        total, terms = published(views)
        total = (total - 0.1 * (terms["ce"] + terms["second_ce"])) / 0.9 + terms["ce"] + terms["second_ce"]
        confidence = softmax(teacher.detach()).max(-1).values.numpy()
        mask = torch.tensor(confidence <= np.percentile(confidence, 50))
        batches = torch.stack([gram(second, second_teacher, t, classes=False) for t in (4.0, 3.0, 5.0, 2.0, 6.0)])
        strong = [gram(second, second_teacher, t, classes=True) for t in (4.0, 3.0, 5.0)]
        mistaken = [gram(student, teacher, t, classes=True) for t in (2.0, 6.0)]
        classes = torch.stack([*strong, *mistaken]).sum()
        total = total + sum((value * mask).mean() for value in batches) + classes
        return total, {**terms, "second_batch_gram": batches.sum(), "second_class_gram": classes}

    assert_is_the_formula(lambda *views: run(method, views), formula, views_of())


@pytest.mark.parametrize("labels", [LABELS, SOFT_LABELS.double()], ids=["labels", "mixed"])
def test_without_masks_it_sums_over_views_and_temperatures(labels: Tensor) -> None:
    at = (1.0, 2.5, 4.0)
    method = build(
        MLKD, ce_weight=0.3, second_ce_weight=0.2, weight=0.7, temperatures=at, first_view_temperatures=(), masks=False
    )

    def formula(*views: Tensor) -> Found:
        student, second, teacher, second_teacher = views
        values = [cross_entropy(student, labels), cross_entropy(second, labels)]
        values += [sum(soft(student, teacher, t) for t in at), sum(soft(second, second_teacher, t) for t in at)]
        values += [sum(gram(student, teacher, t, classes=classes) for t in at) for classes in (False, True)]
        total = 0.3 * values[0] + 0.2 * values[1] + 0.7 * sum(values[2:])
        return total, dict(zip(TERMS, values, strict=True))

    assert_is_the_formula(lambda *views: run(method, views, labels), formula, views_of())


@pytest.mark.parametrize("n", [1, 5, 7])
def test_the_median_of_an_odd_number_is_kept(n: int) -> None:
    views = tuple(views_of(n=n))
    total, _ = run(build(MLKD), views, LABELS[:n])
    torch.testing.assert_close(total, published(views, LABELS[:n])[0])
    method = build(
        MLKD, ce_weight=0.0, second_ce_weight=0.0, weight=1.0, temperatures=(4.0,), first_view_temperatures=()
    )
    found, terms = run(method, views, LABELS[:n])
    expected = (n + 1) / (2 * n) * (terms["logit_kl"] + terms["batch_gram"])
    torch.testing.assert_close(found, expected + 3 / 5 * terms["class_gram"] + terms["second_logit_kl"])


def test_ties_with_the_median_are_kept() -> None:
    views = views_of()
    views[2] = views[2][:1].expand(N, K).clone()  # a teacher that says the same of all
    method = build(
        MLKD, ce_weight=0.0, second_ce_weight=0.0, weight=1.0, temperatures=(4.0,), first_view_temperatures=()
    )
    found, terms = run(method, tuple(views))
    kept = terms["logit_kl"] + terms["batch_gram"] + 3 / 5 * terms["class_gram"] + terms["second_logit_kl"]
    torch.testing.assert_close(found, kept)


def test_a_student_equal_to_its_teacher_has_no_loss() -> None:
    student, second, *_ = views_of()
    total, terms = run(build(MLKD), (student, second, student.detach(), second.detach()))
    assert max(value.abs() for name, value in terms.items() if not name.endswith("ce")) < 1e-25
    torch.testing.assert_close(total, 0.1 * terms["ce"] + 0.1 * terms["second_ce"])


def test_the_gram_terms_grow_with_the_batch_size() -> None:
    """Twice the same micro-batch: the classes' products double, the samples' are there four times and divided by 2N."""
    once = run(build(MLKD), tuple(views_of()))[1]
    twice = run(build(MLKD), tuple(torch.cat([view, view]) for view in views_of()), torch.cat([LABELS, LABELS]))[1]
    torch.testing.assert_close(twice["class_gram"], 4 * once["class_gram"])
    torch.testing.assert_close(twice["batch_gram"], 2 * once["batch_gram"])
    for name in TERMS[:4]:
        torch.testing.assert_close(twice[name], once[name])


def test_a_step_does_not_synchronise() -> None:
    views = [torch.randn(N, K, device="meta", requires_grad=seed < 2) for seed in range(4)]
    total, _ = run(build(MLKD, impl="reference"), tuple(views), LABELS.to("meta"))
    total.backward()
    assert views[0].grad is not None and views[1].grad is not None


def test_a_hybrid_keeps_the_strong_views_cross_entropy() -> None:
    hybrid = build(Hybrid, {"mlkd": build(MLKD), "kd": build(KD, beta=2.0)})
    assert hybrid.needs == Needs(second_view=True)
    assert hybrid.uncacheable == "MLKD needs its logits for a second view, not only its logits"
    student, second, teacher, second_teacher = views_of()
    target = hybrid.target(Features((), teacher), Features((), second_teacher))
    loss = hybrid.loss(StudentOutput(student, None, second), target, BATCH)
    assert tuple(loss.terms) == hybrid.term_names
    total, terms = published((student, second, teacher, second_teacher))
    torch.testing.assert_close(loss.total, total + 0.9 * terms["ce"] + 2.0 * soft(student, teacher, 4.0))


@pytest.mark.slow
def test_trains(tmp_path: Path) -> None:
    weights = save_teacher(tmp_path / "teacher.pt")
    section = {"first_view_temperatures": [], "masks": False}
    records = trained(tmp_path, weights, "mlkd", distill={"mlkd": section}, train={"accumulation_steps": 2})
    assert all(falls(records, term) for term in ("logit_kl", "second_logit_kl", "batch_gram", "class_gram"))
    for record in records:
        learnt = sum(record[term] for term in TERMS[2:])
        assert record["total"] == pytest.approx(0.1 * record["ce"] + 0.1 * record["second_ce"] + 0.9 * learnt, rel=1e-5)
        assert record["logit_kl"] != record["second_logit_kl"]

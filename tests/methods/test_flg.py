"""FLG: the loss and its gradients against the formula, and what the embedding's term stands for."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support.build_method import build
from support.logit_methods import (
    BATCH,
    HOW,
    Found,
    K,
    N,
    assert_is_the_formula,
    cross_entropy,
    falls,
    kl,
    logits,
    softmax,
    trained,
)
from support.loss_inputs import randn
from support.real_runs import newest_checkpoint, save_teacher, train_here, train_records
from unikd_fast.config import load_config
from unikd_fast.engine.checkpoint import FOLDER
from unikd_fast.methods import DKD, FLG, Hybrid, Needs
from unikd_fast.values import Features, Loss, StudentOutput

STUDENT, TEACHER = 4, 6
CLASSIFIER = randn(K, TEACHER, seed=20)


def flg(dtype: torch.dtype = torch.float64, **options: Any) -> FLG:
    torch.manual_seed(0)
    method = build(FLG, STUDENT, TEACHER, CLASSIFIER.to(dtype), **options)
    method.adapter.to(dtype)
    return method


def run(method: FLG, student: Features, teacher: Features) -> Loss:
    return method.loss(StudentOutput(student.logits, method.adapter(student)), method.target(teacher), BATCH)


def gap(delta: Tensor, weight: Tensor, p: Tensor) -> Tensor:
    """1/2 Δhᵀ Wᵀ (diag p - p pᵀ) W Δh, row by row."""
    rows = [0.5 * d @ weight.T @ (x.diag() - torch.outer(x, x)) @ weight @ d for d, x in zip(delta, p, strict=True)]
    return torch.stack(rows).mean()


def embeddings(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return randn(N, STUDENT, seed=11, dtype=dtype, grad=True), randn(N, TEACHER, seed=12, dtype=dtype)


@pytest.mark.parametrize(("dtype", "impl", "autocast"), HOW)
def test_loss_and_gradients_match_the_formula(dtype: torch.dtype, impl: str, autocast: bool) -> None:
    arithmetic = torch.promote_types(dtype, torch.float32)
    method = flg(arithmetic, ce_weight=0.6, beta=2.0, gamma=1.7, temperature=3.0, impl=impl)
    matrix = method.adapter.linear.weight

    def loss(student: Tensor, teacher: Tensor, h_s: Tensor, h_t: Tensor) -> Found:
        own, other = Features((), student, embedding=h_s), Features((), teacher, embedding=h_t)
        found = run(method, own, other)
        return found.total, found.terms

    def formula(student: Tensor, teacher: Tensor, h_s: Tensor, h_t: Tensor) -> Found:
        p, q = softmax(teacher, 3.0), softmax(student, 3.0)
        weight = CLASSIFIER.to(arithmetic).double()
        values = cross_entropy(student), 9 * kl(p, q).mean(), gap(h_t - h_s @ matrix.double().T, weight, p)
        total = 0.6 * values[0] + 2.0 * values[1] + 1.7 * values[2]
        return total, dict(zip(("ce", "logit_kl", "embedding_gap"), values, strict=True))

    h_s, h_t = embeddings(dtype)
    inputs = [logits(1, dtype, grad=True), logits(2, dtype), h_s, h_t]
    assert_is_the_formula(loss, formula, inputs, autocast=autocast, more=[matrix])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gap_is_the_second_order_of_the_divergence(temperature: float) -> None:
    """Of a student with logits z_t - W Δh, for a Δh that goes to 0: what is left falls with its third power."""
    method = flg(temperature=temperature)
    _, h_t = embeddings()
    teacher = h_t @ CLASSIFIER.T
    rest = []
    for size in (1e-2, 5e-3):
        delta = size * randn(N, TEACHER, seed=13)
        moved = softmax(teacher - delta @ CLASSIFIER.T, temperature)
        divergence = temperature**2 * kl(softmax(teacher, temperature), moved).mean()
        found = method._gap(delta, teacher)
        assert abs(found / divergence - 1) < 1e-2
        rest.append(float((found - divergence).abs()))
    assert rest[1] < rest[0] / 6


def test_directions_the_classifier_ignores_cost_nothing() -> None:
    method = flg()
    _, _, directions = torch.linalg.svd(CLASSIFIER)
    teacher = logits(2)
    unseen = directions[K:].expand(N, TEACHER)
    assert method._gap(unseen, teacher) < 1e-25
    same_for_all = torch.linalg.lstsq(CLASSIFIER, torch.ones(K, 1, dtype=torch.float64)).solution.T.expand(N, TEACHER)
    assert method._gap(same_for_all, teacher) < 1e-25
    assert method._gap(directions[:1].expand(N, TEACHER), teacher) > 1e-3


def test_half_precision_embeddings_do_not_overflow() -> None:
    method = flg(torch.float32)
    h_s, h_t = ((100.0 * h.detach()).half() for h in embeddings())
    own = Features((), logits(1).float(), embedding=h_s)
    with torch.autocast("cpu", torch.float16):
        loss = run(method, own, Features((), logits(2).half(), embedding=h_t * 50))
    assert loss.total.dtype == torch.float32 and loss.total.isfinite()
    assert loss.terms["embedding_gap"] > 65504  # which is where fp16 ends


def test_zero_weights_leave_the_other_terms() -> None:
    h_s, h_t = embeddings()
    own, other = Features((), logits(1), embedding=h_s), Features((), logits(2), embedding=h_t)
    for name in ("ce", "logit_kl", "embedding_gap"):
        weights = {"ce_weight": 0.0, "beta": 0.0, "gamma": 0.0}
        weights[{"ce": "ce_weight", "logit_kl": "beta", "embedding_gap": "gamma"}[name]] = 1.0
        loss = run(flg(**weights), own, other)
        torch.testing.assert_close(loss.total, loss.terms[name])
        assert loss.total > 0


def test_a_step_does_not_synchronise() -> None:
    method = build(FLG, STUDENT, TEACHER, CLASSIFIER.float().to("meta"), impl="reference")
    own = Features(
        (), torch.randn(N, K, device="meta", requires_grad=True), embedding=torch.randn(N, STUDENT).to("meta")
    )
    other = Features((), own.logits.detach(), embedding=torch.randn(N, TEACHER).to("meta"))
    output = StudentOutput(own.logits, method.adapter(own))
    method.loss(output, method.target(other), BATCH._replace(labels=BATCH.labels.to("meta"))).total.backward()
    assert method.adapter.linear.weight.grad is not None


def test_the_teachers_weights_are_a_copy_without_gradient() -> None:
    weight = CLASSIFIER.clone().half().requires_grad_()
    method = build(FLG, STUDENT, TEACHER, weight)
    assert not method.classifier_weight.requires_grad
    assert method.classifier_weight.dtype == torch.float32
    assert {name for name, _ in method.adapter.named_parameters()} == {"linear.weight"}
    assert method.adapter.linear.weight.shape == (TEACHER, STUDENT)


def test_a_hybrid_adds_the_cross_entropy_once() -> None:
    method = flg(gamma=2.0)
    hybrid = build(Hybrid, {"flg": method, "dkd": build(DKD, alpha=1.0, beta=1.0, ramp_epochs=0.0)})
    assert hybrid.needs == Needs(embedding=True, labels=True, hard_labels=True, two_classes=True)
    assert hybrid.uncacheable == "FLG needs its embeddings, not only its logits"
    assert hybrid.adapter is not None
    h_s, h_t = embeddings()
    own, other = Features((), logits(1), embedding=h_s), Features((), logits(2), embedding=h_t)
    loss = hybrid.loss(StudentOutput(own.logits, hybrid.adapter(own)), hybrid.target(other), BATCH)
    alone = run(flg(ce_weight=1.0, gamma=2.0), own, other)
    distilled = loss.terms["dkd_target"] + loss.terms["dkd_non_target"]
    torch.testing.assert_close(loss.total, alone.total + distilled)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trains_with_a_teacher_of_another_width(tmp_path: Path, precision: str) -> None:
    weights = save_teacher(tmp_path / "teacher.pt", "cifar/resnet8x4")
    records = trained(tmp_path, weights, "flg", teacher={"model": "cifar/resnet8x4"}, train={"precision": precision})
    assert falls(records, "embedding_gap") and falls(records, "logit_kl")
    for record in records:
        expected = record["ce"] + record["logit_kl"] + record["embedding_gap"]
        assert record["total"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_resumed_hybrid_matches_an_uninterrupted_run(tmp_path: Path) -> None:
    """The projection and its momentum come back, and the warm-up goes on where it was."""
    weights = save_teacher(tmp_path / "teacher.pt")
    settings: dict[str, Any] = {
        "distill": {"dkd": {"ramp_epochs": 2.0}, "flg": {"gamma": 0.5}},
        "run": {"checkpoint_every_steps": 1, "keep_checkpoints": 20},
        "train": {"learning_rate": 0.002},
    }
    whole = trained(tmp_path, weights, ["dkd", "flg"], name="whole", **settings)
    parted = trained(tmp_path, weights, ["dkd", "flg"], name="parted", **settings)
    assert parted == whole
    folder = tmp_path / "parted"
    for later in sorted((folder / FOLDER).glob("step-*"))[5:]:
        shutil.rmtree(later)
    assert newest_checkpoint(folder)["run"]["step"] == 5
    (folder / "result.json").unlink()
    train_here(load_config(tmp_path / "parted.json"), resume=True)
    assert [record for record in train_records(folder) if record["kind"] == "train"] == whole

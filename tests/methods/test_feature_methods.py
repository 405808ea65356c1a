"""What holds for every method on feature levels: precision, layout, checkpoints, sums, and nothing read by the host."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from support.build_method import build
from support.feature_levels import BATCH, CLASSES, LABELS, SAMPLES, cross_entropy_of, features, frozen, step, student_of
from unikd_fast.methods import AT, KD, OFD, FitNet, Hybrid, Method, ReviewKD
from unikd_fast.values import Features

STUDENT = [(3, 8, 8), (4, 8, 8), (5, 4, 4)]
TEACHER = [(2, 16, 16), (6, 16, 16), (7, 8, 8), (8, 2, 2)]

BUILD: dict[str, Callable[..., Method]] = {
    "fitnet": lambda device="cpu": build(FitNet, STUDENT, TEACHER),
    "at": lambda device="cpu": build(AT, STUDENT, TEACHER),
    "ofd": lambda device="cpu": build(OFD, STUDENT, TEACHER, [nn.BatchNorm2d(c) for c, _, _ in TEACHER], device=device),
    "reviewkd": lambda device="cpu": build(ReviewKD, STUDENT, TEACHER, 7, 7, device=device),
}
TERMS = {"fitnet": "hint", "at": "attention", "ofd": "partial_l2", "reviewkd": "hcl"}
each_method = pytest.mark.parametrize("name", BUILD)


def built(name: str, *, seed: int = 0) -> Method:
    torch.manual_seed(seed)
    method = BUILD[name]()
    assert method.adapter is not None
    method.adapter.double()
    return method


@each_method
def test_the_loss_is_fp32_under_autocast(name: str) -> None:
    exact = step(built(name), features(STUDENT, seed=1), features(TEACHER, seed=2))
    method = built(name)
    assert method.adapter is not None
    method.adapter.float()
    own = features(STUDENT, seed=1, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        student = student_of(method, own)
    loss = method.loss(student, method.target(frozen(features(TEACHER, seed=2, dtype=torch.float16))), BATCH)
    assert {loss.total.dtype, *(term.dtype for term in loss.terms.values())} == {torch.float32}
    # bf16 rounds to 2^-9, a few times between the student's level and the loss.
    for term, value in loss.terms.items():
        assert float(value) == pytest.approx(float(exact.terms[term]), rel=0.02), term
    loss.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in method.adapter.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in method.adapter.parameters())


@each_method
def test_channels_last_gives_the_same_loss(name: str) -> None:
    def relaid(given: Features) -> Features:
        levels, before = (
            tuple(level.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for level in some)
            for some in (given.levels, given.before_activation)
        )
        return given._replace(levels=levels, before_activation=before)

    own, other = features(STUDENT, seed=1), features(TEACHER, seed=2)
    expected = step(built(name), own, other)
    again = relaid(own)
    found = step(built(name), again, relaid(other))
    torch.testing.assert_close(found, expected)
    expected.total.backward()
    found.total.backward()
    read = [
        (theirs.grad, ours.grad)
        for theirs, ours in zip(
            (*own.levels, *own.before_activation), (*again.levels, *again.before_activation), strict=True
        )
        if theirs.grad is not None
    ]
    assert read
    for theirs, ours in read:
        torch.testing.assert_close(ours, theirs)


@each_method
def test_a_step_does_not_synchronise(name: str) -> None:
    """Meta tensors have no values, so an .item(), a branch on a value or a shape that depends on one fails."""
    method = BUILD[name](device="meta")
    assert method.adapter is not None
    method.adapter.to("meta")
    own, other = (
        pytree.tree_map(lambda x: x.detach().float().to("meta").requires_grad_(), features(shapes))
        for shapes in (STUDENT, TEACHER)
    )
    batch = BATCH._replace(labels=LABELS.to("meta"))
    method.set_progress(1.0)
    loss = method.loss(student_of(method, own), method.target(frozen(other)), batch)
    loss.total.backward()
    assert own.logits.grad is not None
    assert loss.total.shape == () and loss.total.dtype == torch.float32


@each_method
def test_trained_parts_are_restored_from_a_checkpoint(name: str) -> None:
    own, other = features(STUDENT, seed=1), features(TEACHER, seed=2)
    trained, fresh = built(name), built(name, seed=1)
    assert trained.adapter is not None and fresh.adapter is not None
    if any(True for _ in trained.adapter.parameters()):
        optimizer = torch.optim.SGD(trained.adapter.parameters(), lr=0.01)
        before = step(trained, own, other)
        before.total.backward()
        optimizer.step()
        assert not torch.equal(step(trained, own, other).total, before.total)
        assert not torch.equal(step(fresh, own, other).total, step(trained, own, other).total)
    fresh.adapter.load_state_dict(trained.adapter.state_dict())
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(step(fresh, own, other).total, step(trained, own, other).total)


@each_method
def test_a_hybrid_adds_the_methods_own_term(name: str) -> None:
    own, other = features(STUDENT, seed=1), features(TEACHER, seed=2)
    alone = step(built(name), own, other)
    logits = build(KD).loss(student_of(built(name), own), build(KD).target(frozen(other)), BATCH)
    hybrid = build(Hybrid, {"kd": build(KD), name: built(name)})
    assert hybrid.term_names == ("ce", "logit_kl", TERMS[name])
    loss = step(hybrid, own, other)
    torch.testing.assert_close(loss.terms[TERMS[name]], alone.terms[TERMS[name]])
    torch.testing.assert_close(loss.total, alone.total + 0.9 * logits.terms["logit_kl"])


def test_all_feature_methods_combine_in_a_hybrid() -> None:
    own, other = features(STUDENT, seed=1), features(TEACHER, seed=2)
    hybrid = build(Hybrid, {name: built(name) for name in BUILD})
    assert (hybrid.needs.levels, hybrid.needs.before_activation, hybrid.needs.embedding) == (True, True, True)
    ce = cross_entropy_of(own.logits).detach()
    expected = ce + sum(step(built(name), own, other).total.detach() - ce for name in BUILD)
    torch.testing.assert_close(step(hybrid, own, other).total.detach(), expected)


@each_method
def test_mixed_labels_are_class_weights(name: str) -> None:
    own, other = features(STUDENT, seed=1), features(TEACHER, seed=2)
    labels: Any = torch.rand(SAMPLES, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = labels / labels.sum(1, keepdim=True)
    loss = step(built(name), own, other, BATCH._replace(labels=labels))
    torch.testing.assert_close(loss.terms["ce"], -(labels * own.logits.log_softmax(1)).sum(1).mean().detach())


@each_method
def test_feature_methods_cannot_be_cached(name: str) -> None:
    reason = built(name).uncacheable
    assert reason is not None
    assert ("its features before activation" in reason) == (name in ("ofd", "reviewkd"))
    assert ("its embeddings" in reason) == (name == "reviewkd")

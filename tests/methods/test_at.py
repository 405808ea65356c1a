"""Attention transfer against its formula, for levels that differ in number, width and size."""

import pytest
import torch
from torch import Tensor

from support.build_method import build
from support.feature_levels import averaged, cross_entropy_of, features, frozen, step, student_of
from unikd_fast.methods import AT
from unikd_fast.values import Features

STUDENT = [(3, 16, 16), (4, 8, 8), (5, 4, 4)]
TEACHER = [(2, 16, 16), (6, 8, 8), (7, 8, 8), (8, 2, 2)]
PAIRS = [(0, 1, 8), (1, 2, 8), (2, 3, 2)]  # level of the student, of the teacher, common size


def attention(level: Tensor, size: int) -> Tensor:
    level = averaged(level, size)
    energy = sum(level[:, c] * level[:, c] for c in range(level.shape[1])) / level.shape[1]
    assert isinstance(energy, Tensor)
    return energy / (energy * energy).sum((1, 2), keepdim=True).sqrt()


def test_loss_and_gradients_match_the_formula() -> None:
    method = build(AT, STUDENT, TEACHER, weight=30.0)
    own, other = features(STUDENT, seed=1), features(TEACHER, seed=2)
    inputs = [own.logits, *own.levels]
    loss = step(method, own, other)
    found = torch.autograd.grad(loss.total, inputs)

    by_level = []
    for mine, theirs, size in PAIRS:
        difference = attention(own.levels[mine], size) - attention(other.levels[theirs].detach(), size)
        by_level.append((difference * difference).mean())
    expected, ce = torch.stack(by_level).sum(), cross_entropy_of(own.logits)
    torch.testing.assert_close(loss.terms, {"ce": ce.detach(), "attention": expected.detach()})
    torch.testing.assert_close(loss.total, ce + 30.0 * expected)
    torch.testing.assert_close(found, torch.autograd.grad(ce + 30.0 * expected, inputs))


def test_only_the_direction_of_a_map_counts() -> None:
    """Not how strongly, nor in which channels, nor with which sign."""
    method = build(AT, STUDENT, STUDENT)
    own = features(STUDENT, seed=1)
    other = own._replace(levels=tuple(-3.0 * level.flip(1) for level in own.levels))
    torch.testing.assert_close(step(method, own, other).terms["attention"], torch.zeros((), dtype=torch.float64))
    assert step(method, own, features(STUDENT, seed=2)).terms["attention"] > 1e-3


def test_a_zero_weight_leaves_the_other_term() -> None:
    method = build(AT, STUDENT, TEACHER, weight=0.0, label_smoothing=0.2)
    own, other = features(STUDENT, seed=1), features(TEACHER, seed=2)
    loss = step(method, own, other)
    torch.testing.assert_close(loss.total, 0.8 * cross_entropy_of(own.logits) - 0.2 * own.logits.log_softmax(1).mean())
    weighted = build(AT, STUDENT, TEACHER, weight=2.0)
    weighted.ce_weight = 0.0
    weighted.adapter.load_state_dict(method.adapter.state_dict())
    torch.testing.assert_close(step(weighted, own, other).total, 2.0 * loss.terms["attention"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_levels_do_not_overflow(dtype: torch.dtype) -> None:
    method = build(AT, STUDENT, TEACHER)
    half = features(TEACHER, seed=2, dtype=dtype, scale=400.0)
    as_single = half._replace(levels=tuple(level.float() for level in half.levels))
    assert half.levels[0].square().isinf().any() or dtype == torch.bfloat16
    maps, expected = method.target(frozen(half)).extra, method.target(frozen(as_single)).extra
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(maps, expected, strict=True))


def test_an_all_zero_level_has_no_attention_and_no_gradient() -> None:
    method = build(AT, STUDENT, TEACHER)
    own, other = features(STUDENT, seed=1), features(TEACHER, seed=2)
    dead = Features((torch.zeros_like(own.levels[0]).requires_grad_(), *own.levels[1:]), own.logits)
    step(method, dead, other).total.backward()
    assert dead.levels[0].grad is not None and bool((dead.levels[0].grad == 0).all())
    assert bool((student_of(method, dead).adapted[0] == 0).all())

"""Block-wise logit distillation: its formula, and what its gradients reach."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from support.blockwise_inputs import CLASSES, STUDENT, TEACHER, N, Shape, batch_of, blocks_of, build, given, ours
from support.build_method import build as build_method
from unikd_fast.methods import KD, Blockwise, Hybrid, Needs
from unikd_fast.values import Features, StudentOutput, Target


def kl(z: Tensor, target: Tensor, tau: float) -> Tensor:
    p, q = (target / tau).softmax(1), (z / tau).softmax(1)
    return tau**2 * (p * (p.log() - q.log())).sum(1).mean()


def ce(z: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    log_q = z.log_softmax(1)
    return -((1 - smoothing) * log_q[torch.arange(N), labels] + smoothing * log_q.mean(1)).mean()


def connected(level: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, shape: Shape) -> Tensor:
    """A connector in plain sums: the mean under a smaller pixel, a matrix, the batch's statistics, repetition."""
    for axis, size in ((2, shape[1]), (3, shape[2])):
        if level.shape[axis] > size:
            bounds = [(i * level.shape[axis] // size, -(-(i + 1) * level.shape[axis] // size)) for i in range(size)]
            level = torch.stack([level.narrow(axis, a, b - a).mean(axis) for a, b in bounds], axis)
    level = torch.einsum("nchw,dc->ndhw", level, weight[:, :, 0, 0])
    mean, variance = level.mean((0, 2, 3), keepdim=True), level.var((0, 2, 3), keepdim=True, unbiased=False)
    level = (level - mean) / (variance + 1e-5).sqrt() * scale[:, None, None] + shift[:, None, None]
    for axis, size in ((2, shape[1]), (3, shape[2])):
        if level.shape[axis] < size:
            taken = torch.arange(size) * level.shape[axis] // size
            level = level.index_select(axis, taken)
    return level


def published(
    method: Blockwise, student: tuple[Shape, ...], teacher: tuple[Shape, ...], stones: int, **weights: float
) -> dict[str, Tensor]:
    """Loss and gradients of the formula in float64, each stone by itself."""
    a, b, c = (weights.get(f"{name}_weight", 1.0) for name in ("task", "distill", "cross"))
    tau, smoothing = weights.get("temperature", 4.0), weights.get("label_smoothing", 0.0)
    levels, z, target, labels = given(student, torch.float64)
    levels, z = [level.requires_grad_() for level in levels], z.requires_grad_()
    blocks = copy.deepcopy(blocks_of(teacher)).double()
    parameters = {k: p.detach().double().requires_grad_() for k, p in method.adapter.named_parameters()}
    logits = []
    for i in range(stones):
        ours = [parameters[f"connectors.{i}.{name}"] for name in ("conv.weight", "norm.weight", "norm.bias")]
        inside = connected(levels[len(levels) - stones + i], *ours, teacher[len(teacher) - stones + i])
        for block in blocks[len(teacher) - stones + i :]:
            inside = block(inside)
        logits.append(inside)
    ensemble = sum(logits).detach() / stones  # type: ignore[union-attr]
    w = [1 / 2 ** (stones - i) for i in range(1, stones + 1)]
    terms = {
        "ce": ce(z, labels, smoothing),
        "logit_kl": kl(z, target, tau),
        "stone_ce": sum(x * ce(y, labels, smoothing) for x, y in zip(w, logits, strict=True)),
        "stone_kl": sum(x * kl(y, target, tau) for x, y in zip(w, logits, strict=True)),
        "cross_kl": kl(z, ensemble, tau) + sum(x * kl(y, ensemble, tau) for x, y in zip(w, logits, strict=True)),
    }
    total = a * (terms["ce"] + terms["stone_ce"]) + b * (terms["logit_kl"] + terms["stone_kl"]) + c * terms["cross_kl"]
    total.backward()
    gradients = {f"level {i}": level.grad for i, level in enumerate(levels)}
    gradients |= {name: parameter.grad for name, parameter in parameters.items()}
    return {"total": total, **terms, "logits": z.grad, **gradients}  # type: ignore[dict-item]


WEIGHTS = {"task_weight": 0.5, "distill_weight": 2.0, "cross_weight": 3.0, "temperature": 2.0, "label_smoothing": 0.1}


@pytest.mark.parametrize(
    ("student", "teacher", "stones", "options"),
    [
        (STUDENT, TEACHER, 4, {}),
        (STUDENT, TEACHER, 4, WEIGHTS),
        (STUDENT[2:], TEACHER, 2, {}),
        (STUDENT, TEACHER[1:], 3, WEIGHTS),
        (STUDENT, TEACHER, 1, {"light": True}),
        (STUDENT, TEACHER[-1:], 1, {"cross_weight": 0.0}),
    ],
    ids=["equal", "weights", "shallow student", "shallow teacher", "light", "one level"],
)
def test_loss_and_gradients_match_the_formula(
    student: tuple[Shape, ...], teacher: tuple[Shape, ...], stones: int, options: dict[str, Any]
) -> None:
    method = build(student, teacher, **options)
    expected, found = published(method, student, teacher, stones, **options), ours(method, student)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:  # levels that no stone starts from
            assert name.startswith("level") and found[name] is None
            continue
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert sum(value is None for value in expected.values()) == len(student) - stones


def test_terms_with_zero_weight_are_logged_but_not_trained() -> None:
    found = ours(build(task_weight=0.0, distill_weight=0.0, cross_weight=0.0), STUDENT)
    assert found["total"] == 0
    assert all(found[name] > 0 for name in Blockwise.term_names.fget(build()))  # type: ignore[attr-defined]
    assert not any(value.any() for name, value in found.items() if name.startswith(("level", "connectors", "logits")))


def test_labels_of_mixed_samples_are_soft() -> None:
    method = build()
    levels, z, target, labels = given(STUDENT)
    adapted = method.adapter(Features(tuple(levels), z))
    hard = method.loss(StudentOutput(z, adapted), Target(target), batch_of(labels))
    soft = method.loss(StudentOutput(z, adapted), Target(target), batch_of(F.one_hot(labels, CLASSES).float()))
    torch.testing.assert_close(soft.total, hard.total)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_give_an_fp32_loss(dtype: torch.dtype) -> None:
    method = build()
    levels, z, target, labels = given(STUDENT)
    expected = ours(build(), STUDENT)
    seen: list[torch.dtype] = []
    first, *rest = method.blocks

    def in_fp32(block: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def called(level: Tensor) -> Tensor:
            seen.append(level.dtype)
            return block(level.float())

        return called

    method.blocks = [in_fp32(first), *rest]
    levels = [level.to(memory_format=torch.channels_last) for level in levels]
    with torch.autocast("cpu", dtype):
        adapted = method.adapter(Features(tuple(levels), z.to(dtype)))
    loss = method.loss(StudentOutput(z.to(dtype), adapted), Target(target.to(dtype)), batch_of(labels))
    assert seen == [dtype]
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(loss.total, expected["total"], rtol=0.02, atol=0.0)
    loss.total.backward()
    for name, parameter in method.adapter.named_parameters():
        assert parameter.grad is not None
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert error < 0.1, f"{name}: {error}"


def test_a_hybrid_adds_the_cross_entropy_once() -> None:
    alone, method = build(), build()
    expected = ours(alone, STUDENT)
    hybrid = build_method(Hybrid, {"kd": build_method(KD), "blockwise": method})
    assert hybrid.needs == Needs(levels=True, teacher_network=True)
    assert hybrid.uncacheable is not None and "the teacher's own blocks" in hybrid.uncacheable
    assert hybrid.adapter is not None
    levels, z, target, labels = given(STUDENT)
    student = StudentOutput(z, hybrid.adapter(Features(tuple(levels), z)))
    loss = hybrid.loss(student, hybrid.target(Features((), target)), batch_of(labels))
    torch.testing.assert_close(loss.total, expected["total"] + 0.9 * loss.terms["kd_logit_kl"])


@pytest.mark.parametrize(("student", "teacher", "blocks"), [((), TEACHER, 4), (STUDENT, (), 0), (STUDENT, TEACHER, 3)])
def test_a_teacher_without_blocks_is_refused(student: Any, teacher: Any, blocks: int) -> None:
    numbers = rf"{len(student)} levels of the student, {len(teacher)} of the teacher and {blocks} blocks"
    with pytest.raises(ValueError, match=numbers):
        build_method(Blockwise, student, teacher, [lambda level: level] * blocks)

"""UniKD's development code: the fusion and the divergences of samples written out, and what they train."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.build_method import build
from support.feature_levels import BATCH, CLASSES, SAMPLES, cross_entropy_of, features, frozen, student_of
from unikd_fast.engine.networks import StudentModule
from unikd_fast.methods import MLKD, Hybrid, ReviewKD, UniKDDev
from unikd_fast.values import Features, StudentOutput, Target

STUDENT, TEACHER = [(3, 8, 8), (4, 4, 4), (5, 4, 4)], [(6, 16, 16), (7, 8, 8), (8, 4, 4)]
WIDTH = 7  # of both embeddings


def dev(**options: Any) -> UniKDDev:
    torch.manual_seed(0)
    method: UniKDDev = build(UniKDDev, STUDENT, TEACHER, WIDTH, WIDTH, CLASSES, **options)
    method.adapter.double()
    method.teacher_head.double()
    return method


def pixels(weight: Tensor, x: Tensor) -> Tensor:
    """A 1x1 convolution."""
    return torch.einsum("nchw,dc->ndhw", x, weight[:, :, 0, 0])


def repeated(x: Tensor, size: int) -> Tensor:
    times = size // x.shape[-1]
    return x.repeat_interleave(times, 2).repeat_interleave(times, 3)


def three_by_three(weight: Tensor, x: Tensor) -> Tensor:
    size, padded = x.shape[-1], torch.nn.functional.pad(x, [1, 1, 1, 1])
    windows = [
        torch.einsum("nchw,dc->ndhw", padded[:, :, i : i + size, j : j + size], weight[:, :, i, j])
        for i in range(3)
        for j in range(3)
    ]
    return torch.stack(windows).sum(0)


def fused_by_hand(method: UniKDDev, own: Features, *, chained: bool) -> Tensor:
    module = method.adapter
    assert own.embedding is not None
    result = pixels(module.pooled.weight, own.embedding[:, :, None, None]).clamp(min=0)
    for index in (2, 1, 0) if chained else (0,):
        expander, gate = module.expanders[index], module.gates[index]
        assert isinstance(expander, nn.Conv2d) and isinstance(gate, nn.Conv2d) and gate.bias is not None
        x = pixels(expander.weight, own.levels[index]).clamp(min=0)
        up = repeated(result, x.shape[-1])
        z = 1 / (1 + torch.exp(-pixels(gate.weight, torch.cat([x, up], 1)) - gate.bias[:, None, None]))
        result = z[:, 0:1] * x + z[:, 1:2] * up
    return three_by_three(module.close.weight, repeated(result, TEACHER[0][1])).clamp(min=0).flatten(2).mean(2)


def drawn(pooled: Tensor, head: Any) -> Tensor:
    layers = zip(head.weight.chunk(2), head.bias.chunk(2), strict=True)
    mean, log_var = (pooled @ weight.T + bias for weight, bias in layers)
    return mean + log_var.exp().sqrt() * torch.randn(SAMPLES, CLASSES, dtype=torch.float64)


def divergence(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    p, q = ((z / temperature).softmax(1) for z in (y, x))
    return temperature**2 * (p * (p / q).log()).sum(1).mean()


def terms_by_hand(
    method: UniKDDev, own: Features, other: Features, *, chained: bool, temperature: float
) -> list[Tensor]:
    """In the order in which the method draws: the student's sample, then the teacher's."""
    x = drawn(fused_by_hand(method, own, chained=chained), method.adapter.head)
    y = drawn(other.before_activation[0].flatten(2).mean(2), method.teacher_head)
    pairs = ((x, y), (x, own.logits), (y, other.logits))
    return [divergence(a, b, temperature) for a, b in pairs]


@pytest.mark.parametrize("chained", [True, False])
def test_loss_and_gradients_match_the_formula(chained: bool) -> None:
    fusion = "chained" if chained else "pooled"
    given = {"ce_weight": 0.5, "feature_weight": 2.0, "head_weight": 0.7, "temperature": 3.0, "fusion": fusion}
    method = dev(**given)
    own, other = features(STUDENT, seed=1), frozen(features(TEACHER, seed=2))
    torch.manual_seed(7)
    loss = method.loss(student_of(method, own), method.target(other), BATCH)
    torch.manual_seed(7)
    terms = terms_by_hand(method, own, other, chained=chained, temperature=3.0)
    ce = cross_entropy_of(own.logits)
    expected = dict(zip(method.term_names, (each.detach() for each in (ce, *terms)), strict=True))
    torch.testing.assert_close(loss.terms, expected)
    total = 0.5 * ce + 2.0 * terms[0] + 0.7 * (terms[1] + terms[2])
    torch.testing.assert_close(loss.total, total)
    read = own.levels if chained else own.levels[:1]
    inputs = [own.logits, own.embedding, *read, *method.adapter.parameters(), *method.teacher_head.parameters()]
    found, wanted = (torch.autograd.grad(each, inputs) for each in (loss.total, total))
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-7)
    assert all(gradient.abs().sum() > 0 for gradient in found)


def test_the_teachers_side_is_not_detached() -> None:
    """The feature term alone trains the teacher's head, and the heads' terms the student's logits."""
    own, other = features(STUDENT, seed=1), frozen(features(TEACHER, seed=2))
    method = dev(ce_weight=0.0, head_weight=0.0)
    method.loss(student_of(method, own), method.target(other), BATCH).total.backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in method.teacher_head.parameters())
    assert own.logits.grad is not None and not own.logits.grad.any()
    method = dev(ce_weight=0.0, feature_weight=0.0)
    method.loss(student_of(method, own), method.target(other), BATCH).total.backward()
    assert own.logits.grad.abs().sum() > 0


def test_samples_are_drawn_anew_from_the_runs_generator() -> None:
    method, own, other = dev(), features(STUDENT, seed=1), frozen(features(TEACHER, seed=2))
    student, target = student_of(method, own), method.target(other)

    def total() -> float:
        return float(method.loss(student, target, BATCH).total.detach())

    torch.manual_seed(3)
    first, then = total(), total()
    torch.manual_seed(3)
    assert (total(), total()) == (first, then) and first != then


class Network(nn.Module):
    """Returns Features of either view."""

    def __init__(self, *views: Features) -> None:
        super().__init__()
        self.views = views

    def forward(self, images: Tensor) -> Features:
        return self.views[int(images)]


def test_two_views_add_their_terms() -> None:
    """In a sum with mlkd, beside an adapter that sees the first view alone."""
    review = build(ReviewKD, STUDENT, TEACHER, WIDTH, WIDTH)
    review.adapter.double()
    mlkd = {"second_ce_weight": 1.0, "weight": 1.0, "second_grams": True}
    hybrid = build(Hybrid, {"unikd_dev": dev(), "mlkd": build(MLKD, **mlkd), "reviewkd": review})
    own, others = [features(STUDENT, seed=i) for i in (1, 3)], [frozen(features(TEACHER, seed=i)) for i in (2, 4)]
    module = StudentModule(Network(*own), hybrid.adapter, hybrid.companion)
    student: StudentOutput = module(torch.tensor(0), torch.tensor(1))
    assert list(student.second_adapted) == ["unikd_dev"]
    counts = [each.num_batches_tracked for each in review.adapter.modules() if isinstance(each, nn.BatchNorm2d)]
    assert counts and all(count == 1 for count in counts)
    torch.manual_seed(7)
    loss = hybrid.loss(student, hybrid.target(*others), BATCH)
    torch.manual_seed(7)
    part = hybrid.parts["unikd_dev"]
    views = [terms_by_hand(part, *pair, chained=True, temperature=1.0) for pair in zip(own, others, strict=True)]
    for name, first, second in zip(part.term_names[1:], *views, strict=True):
        torch.testing.assert_close(loss.terms[name], (first + second).detach())
    alone = hybrid.parts["mlkd"].loss(student, Target(others[0].logits, second_logits=others[1].logits), BATCH)
    kr = loss.terms["hcl"]
    rest = loss.total - alone.total - loss.terms["ce"] - torch.stack([sum(view) for view in views]).sum()
    torch.testing.assert_close(rest.detach(), review.weight.value * kr, check_dtype=False)


def test_detectors_are_refused() -> None:
    with pytest.raises(ValueError, match="detectors have none; use unikd"):
        build(UniKDDev, STUDENT, TEACHER, None, None, CLASSES)

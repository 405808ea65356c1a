"""Hybrids: the sum of the parts' own terms with the cross-entropy counted once, and nothing of a part lost."""

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.build_method import build
from unikd_fast.methods import KD, Hybrid, Method, Needs, StudentAlone, UniKD
from unikd_fast.methods.method import NoSettings, Ramp
from unikd_fast.values import Batch, Features, Loss, StudentOutput, Target

CLASSES, STUDENT, TEACHER = 5, (4, 6), (5, 8)


class Hint(Method):
    """w |adapted - t|², of the coarsest level's mean; cross-entropy with a weight of its own."""

    needs = Needs(levels=True, embedding=True)

    def __init__(self, weight: float = 2.0, term: str = "hint") -> None:
        self.weight, self.term, self.ce_weight = Ramp(weight, epochs=4.0), term, 0.3
        self.adapter = Mean(STUDENT[-1], TEACHER[-1])
        self.seen: list[Features] = []

    @property
    def term_names(self) -> tuple[str, ...]:
        return ("ce", self.term)

    def prepare(self, batches: Iterable[Features]) -> None:
        self.seen = [features for features, _ in zip(batches, range(2), strict=False)]

    def set_progress(self, epochs: float) -> None:
        self.weight.set_progress(epochs)

    def target(self, teacher: Features, second: Features | None = None) -> Target:
        return super().target(teacher, second)._replace(extra={"mean": teacher.levels[-1].mean((2, 3))})

    def loss(self, student: StudentOutput, target: Target | None, batch: Batch) -> Loss:
        assert target is not None
        ce = F.cross_entropy(student.logits, batch.labels)
        hint = (student.adapted - target.extra["mean"]).square().mean()
        return Loss(self.ce_weight * ce + self.weight.value * hint, {"ce": ce.detach(), self.term: hint.detach()})

    def state_dict(self) -> dict[str, Any]:
        return {"seen": len(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state


class Mean(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inside, outside)

    def forward(self, features: Features) -> Tensor:
        return self.linear(features.levels[-1].mean((2, 3)))


def features(channels: tuple[int, ...], seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    levels = [torch.randn(6, c, 8 >> i, 8 >> i, generator=generator) for i, c in enumerate(channels)]
    return Features(tuple(levels), torch.randn(6, CLASSES, generator=generator))


def stream() -> Iterator[Features]:
    seed = 10
    while True:
        yield features(TEACHER, seed)
        seed += 1


def unikd(**options: Any) -> UniKD:
    torch.manual_seed(0)
    return build(UniKD, STUDENT, TEACHER, CLASSES, width=8, head_steps=3, **options)


BATCH = Batch(torch.zeros(6, 3, 1, 1), torch.arange(6) % CLASSES, torch.arange(6))


def student_of(method: Method) -> StudentOutput:
    own = features(STUDENT, 1)
    return StudentOutput(own.logits.requires_grad_(), None if method.adapter is None else method.adapter(own))


def test_the_total_has_the_cross_entropy_once() -> None:
    parts = {
        "kd": build(KD, ce_weight=0.1, beta=0.9),
        "hint": Hint(),
        "unikd": unikd(alpha=3.0, teacher_head="anchored"),
    }
    hybrid = build(Hybrid, parts, label_smoothing=0.1)
    teacher = features(TEACHER, 2)
    loss = hybrid.loss(student_of(hybrid), hybrid.target(teacher), BATCH)
    assert tuple(loss.terms) == hybrid.term_names
    assert hybrid.term_names == ("ce", "kd_logit_kl", "hint", "feature_kl", "unikd_logit_kl", "anchor")
    ce = F.cross_entropy(features(STUDENT, 1).logits, BATCH.labels, label_smoothing=0.1)
    torch.testing.assert_close(loss.terms["ce"], ce)
    weights = {"ce": 1.0, "kd_logit_kl": 0.9, "hint": 2.0, "feature_kl": 3.0, "unikd_logit_kl": 1.0, "anchor": 0.0}
    torch.testing.assert_close(loss.total, sum(weights[name] * term for name, term in loss.terms.items()))
    # Each part's term is what the part by itself says.
    alone = build(KD).loss(student_of(build(KD)), build(KD).target(teacher), BATCH)
    torch.testing.assert_close(loss.terms["kd_logit_kl"], alone.terms["logit_kl"])
    part = parts["unikd"]
    own = part.loss(student_of(part), part.target(teacher), BATCH)
    torch.testing.assert_close(loss.terms["feature_kl"], own.terms["feature_kl"])
    assert loss.terms["anchor"].requires_grad


def test_adapters_are_trained_as_in_their_own_methods() -> None:
    hybrid = build(Hybrid, {"hint": Hint(), "unikd": unikd()})
    assert hybrid.adapter is not None
    target = hybrid.target(features(TEACHER, 2))
    hybrid.loss(student_of(hybrid), target, BATCH).total.backward()
    found = [parameter.grad.clone() for parameter in hybrid.adapter.parameters() if parameter.grad is not None]
    assert len(found) == len(list(hybrid.adapter.parameters())) > 2
    hybrid.adapter.zero_grad()
    for part in hybrid.parts.values():
        part.loss(student_of(part), part.target(features(TEACHER, 2)), BATCH).total.backward()
    for gradient, parameter in zip(found, hybrid.adapter.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_needs_and_reasons_are_combined() -> None:
    hybrid = build(Hybrid, {"kd": build(KD), "hint": Hint()})
    assert hybrid.needs == Needs(levels=True, embedding=True)
    assert hybrid.uncacheable == ("Hint needs the teacher's feature levels and its embeddings, not only its logits")
    assert build(Hybrid, {"kd": build(KD), "unikd": unikd()}).uncacheable is None
    both = build(Hybrid, {"unikd": unikd(teacher_head="literal"), "hint": Hint()})
    assert both.uncacheable is not None
    assert "distill.unikd.teacher_head = 'literal'" in both.uncacheable and "; Hint needs" in both.uncacheable
    assert isinstance(both.companion, nn.ModuleDict)
    assert list(both.companion.parameters()) == list(both.parts["unikd"].head.module.parameters())  # type: ignore[attr-defined]
    assert build(Hybrid, {"kd": build(KD), "two": build(KD)}).adapter is None


NOT_OUTPUTS = ("teacher", "pooled", "labels", "hard_labels", "two_classes", "whole_head")


@pytest.mark.parametrize("field", [field for field in Needs._fields if field not in NOT_OUTPUTS])
def test_needs_beyond_outputs_make_a_method_uncacheable(field: str) -> None:
    class Needing(Method[NoSettings]):
        needs = Needs(**{field: True})

    assert build(Needing).uncacheable is not None
    assert build(KD).uncacheable is None


def test_calls_reach_each_part() -> None:
    hint, head = Hint(), unikd(teacher_head="prefit")
    hybrid = build(Hybrid, {"first": hint, "unikd": head})
    hybrid.set_progress(1.0)
    assert hint.weight.value.item() == 0.5
    batches = stream()
    hybrid.prepare(batches)
    assert [seen.logits.sum() for seen in hint.seen] == [features(TEACHER, seed).logits.sum() for seed in (10, 11)]
    assert not any(parameter.requires_grad for parameter in head.head.module.parameters())


def test_terms_of_one_name_are_prefixed_by_their_part() -> None:
    parts = {"a": Hint(term="x"), "b": Hint(weight=5.0, term="x")}
    hybrid = build(Hybrid, parts)
    assert hybrid.term_names == ("ce", "a_x", "b_x")
    loss = hybrid.loss(student_of(hybrid), hybrid.target(features(TEACHER, 2)), BATCH)
    assert float(loss.terms["a_x"]) != float(loss.terms["b_x"])


def test_a_head_is_trained_by_its_term_whatever_it_is_called() -> None:
    alone = unikd(teacher_head="anchored")
    hybrid = build(Hybrid, {"hint": Hint(term="anchor"), "unikd": unikd(teacher_head="anchored")})
    assert hybrid.term_names == ("ce", "hint_anchor", "feature_kl", "logit_kl", "unikd_anchor")
    before = [parameter.clone() for parameter in alone.head.module.parameters()]
    for method in (alone, hybrid):
        loss = method.loss(student_of(method), method.target(features(TEACHER, 2)), BATCH)
        method.head.train(loss.terms, accumulation_steps=1, update=True, leave_out=False)
    found = list(hybrid.head.module.parameters())
    assert all(torch.equal(a, b) for a, b in zip(found, alone.head.module.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(found, before, strict=True))


def test_the_head_belongs_to_its_part() -> None:
    hybrid = build(Hybrid, {"kd": build(KD), "unikd": unikd()})
    assert hybrid.fixed_head is hybrid.parts["unikd"].head is not None
    hybrid.prepare(stream())
    other = build(Hybrid, {"kd": build(KD), "unikd": unikd()})
    other.head.load_state_dict(hybrid.head.state_dict())
    adopted = build(Hybrid, {"kd": build(KD), "unikd": unikd()})
    adopted.head.adopt(hybrid.head.module.state_dict())
    teacher = features(TEACHER, 2)
    expected = hybrid.target(teacher).gaussian
    assert expected is not None
    for one in (other, adopted):
        found = one.target(teacher).gaussian
        assert found is not None
        assert torch.equal(found.mean, expected.mean)
    assert build(Hybrid, {"kd": build(KD), "hint": Hint()}).head is None


def test_the_second_view_reaches_the_parts() -> None:
    class Second(KD):
        needs = Needs(second_view=True)

        def loss(self, student: StudentOutput, target: Target | None, batch: Batch) -> Loss:
            assert target is not None and target.second_logits is not None and student.second_logits is not None
            found = super().loss(student, target, batch)
            both = student.second_logits.sum() + target.second_logits.sum()
            return Loss(found.total + both, found.terms)

    hybrid = build(Hybrid, {"kd": build(KD), "second": build(Second)})
    assert hybrid.needs.second_view
    teacher, second = features(TEACHER, 2), features(TEACHER, 3)
    student = student_of(hybrid)._replace(second_logits=torch.ones(6, CLASSES))
    with_it = hybrid.loss(student, hybrid.target(teacher, second), BATCH).total
    without = build(Hybrid, {"kd": build(KD), "two": build(KD)}).loss(student, build(KD).target(teacher), BATCH).total
    torch.testing.assert_close(with_it, without + 6 * CLASSES + second.logits.sum())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"kd": build(KD)}, r"at least two methods, got \['kd'\]"),
        ({"kd": build(KD), "none": build(StudentAlone)}, "none learns from no teacher"),
        ({"a": unikd(), "b": unikd()}, r"only one part may have a head on the teacher's features, got \['a', 'b'\]"),
    ],
)
def test_invalid_hybrids_are_refused(parts: dict[str, Method], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(Hybrid, parts)

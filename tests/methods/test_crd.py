"""CRD: loss and gradients as its published form gives them, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from support.build_method import build as build_method
from support.crd_inputs import (
    IDS,
    LABELS,
    SAMPLES,
    STUDENT,
    TEACHER,
    WIDTH,
    batch_of,
    build,
    embeddings,
    places_of,
    step,
)
from unikd_fast.methods import CRD, KD, Hybrid, Needs
from unikd_fast.methods import crd as module
from unikd_fast.values import Features, StudentOutput


class Published:
    """The formula in float64 and in the form of the published code: K + 1 embeddings taken out for each row.

    The draws are those of the method under test, which other tests look at.
    """

    def __init__(self, method: CRD) -> None:
        self.method = method
        self.embeds = [nn.Linear(a, WIDTH).double() for a in (STUDENT, TEACHER)]
        for embed, ours in zip(self.embeds, (method.adapter.embed, method.teacher_embed), strict=True):
            embed.load_state_dict(ours.state_dict())
        self.memory = [method.banks.student.double(), method.banks.teacher.double()]
        self.z: list[Tensor] | None = None

    def step(self, seed: int) -> dict[str, Tensor]:
        method, places = self.method, places_of(seed)
        student, teacher, logits = (x.double() for x in embeddings(seed))
        student, logits = student.requires_grad_(), logits.requires_grad_()
        for embed in self.embeds:
            embed.zero_grad()
        v = [embed(x) for embed, x in zip(self.embeds, (student, teacher), strict=True)]
        v = [x / x.pow(2).sum(1, keepdim=True).sqrt() for x in v]
        rows, labels = method.banks.rows(IDS[places]), LABELS[places]
        positive = rows if method.settings.positives == "exact" else method.banks.same_class(rows, labels)
        taken = torch.cat([positive[:, None], method.banks.negatives(rows, labels, method.settings.negatives)], 1)
        scores = [
            torch.exp(torch.einsum("nkd,nd->nk", self.memory[1 - i][taken], v[i]) / method.settings.temperature)
            for i in range(2)
        ]
        if self.z is None:
            self.z = [x.detach().mean() * SAMPLES for x in scores]
        total = torch.zeros((), dtype=torch.float64)
        for x, z in zip(scores, self.z, strict=True):
            e, noise = x / z, method.settings.negatives / SAMPLES
            total = total - (e[:, 0] / (e[:, 0] + noise)).log().sum()
            total = total - (noise / (e[:, 1:] + noise)).log().sum()
        crd = total / len(places)
        ce = -logits.log_softmax(1)[torch.arange(len(places)), labels].mean()
        (ce + method.settings.weight * crd).backward()
        with torch.no_grad():
            for i in range(2):
                for row, new in zip(rows.tolist(), v[i], strict=True):
                    mixed = method.settings.momentum * self.memory[i][row] + (1 - method.settings.momentum) * new
                    self.memory[i][row] = mixed / mixed.norm()
        found = {"total": ce + method.settings.weight * crd, "crd": crd, "ce": ce, "features": student.grad}
        found["logits"] = logits.grad
        for side, embed in zip(("student embed.", "teacher "), self.embeds, strict=True):
            found |= {f"{side}{name}": p.grad for name, p in embed.named_parameters()}
        return found  # type: ignore[return-value]


@pytest.mark.parametrize("options", [{}, {"positives": "relax", "temperature": 0.2, "momentum": 0.9, "weight": 2.0}])
def test_loss_gradients_and_banks_match_the_published_form(options: dict[str, Any]) -> None:
    method = build(**options)
    published = Published(method)
    for seed in range(4):
        expected = published.step(seed)  # before ours: it draws from the banks as they are
        found = step(method, seed)
        assert set(found) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(found[name].double(), value, rtol=2e-5, atol=1e-6, msg=f"{name}, step {seed}")
            assert value.abs().sum() > 0
        for bank, memory in zip((method.banks.student, method.banks.teacher), published.memory, strict=True):
            torch.testing.assert_close(bank.double(), memory, rtol=1e-5, atol=1e-6)
    assert published.z is not None
    torch.testing.assert_close(method.log_z.double().exp(), torch.stack(published.z), rtol=1e-5, atol=0)


def test_a_batch_computed_in_parts_gives_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parted = build(), build()
    row = 16 * SAMPLES + 96 * whole.settings.negatives
    expected = [step(whole, seed) for seed in range(2)]
    monkeypatch.setattr(module, "_WORKING_BYTES", 3 * row)
    assert [len(range(8)[part]) for part in parted._parts(8)] == [3, 3, 2]
    for seed, values in enumerate(expected):
        found = step(parted, seed)
        for name, value in values.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_a_zero_weight_leaves_the_cross_entropy() -> None:
    found = step(build(weight=0.0, label_smoothing=0.1), 1)
    logits = embeddings(1)[2]
    expected = F.cross_entropy(logits, LABELS[places_of(1)], label_smoothing=0.1)
    torch.testing.assert_close(found["total"], expected)
    assert not found["features"].any()
    assert found["crd"] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_give_an_fp32_loss(dtype: torch.dtype) -> None:
    method, whole = build(), build()
    student, teacher, logits = embeddings(1, dtype=dtype)
    with torch.autocast("cpu", dtype):
        adapted = method.adapter(Features((), logits, embedding=student))
        target = method.target(Features((), logits, embedding=teacher))
        loss = method.loss(StudentOutput(logits, adapted), target, batch_of(places_of(1)))
    assert adapted.dtype == loss.total.dtype == torch.float32
    # Two to three digits of the embeddings, of which the temperature takes one.
    torch.testing.assert_close(loss.terms["crd"], step(whole, 1)["crd"], rtol=0.1, atol=0.0)
    assert method.banks.teacher.dtype == torch.float32


class NoHostRead(TorchDispatchMode):
    """Fails where a value would have to come to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}, func
        return func(*args, **(kwargs or {}))


def test_a_step_does_not_synchronise() -> None:
    method = build(positives="relax")
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostRead():
        torch.ones(1).sum().item()
    with NoHostRead():
        for seed in range(2):
            step(method, seed, places=torch.arange(8))


def test_a_hybrid_adds_cross_entropy_once_and_keeps_the_banks() -> None:
    alone, part = build(), build()
    hybrid = build_method(Hybrid, {"kd": build_method(KD), "crd": part})
    assert hybrid.term_names == ("ce", "logit_kl", "crd")
    assert hybrid.needs == Needs(embedding=True, labels=True, hard_labels=True)
    assert hybrid.uncacheable is not None and "CRD needs its embeddings" in hybrid.uncacheable
    assert hybrid.adapter is not None and hybrid.companion is not None
    assert [tuple(p.shape) for p in hybrid.companion.parameters()] == [(WIDTH, TEACHER), (WIDTH,)]
    student, teacher, logits = embeddings(1)
    adapted = hybrid.adapter(Features((), logits, embedding=student))
    target = hybrid.target(Features((), 2 * logits, embedding=teacher))
    loss = hybrid.loss(StudentOutput(logits, adapted), target, batch_of(places_of(1)))
    expected = step(alone, 1)
    torch.testing.assert_close(loss.terms["crd"], expected["crd"])
    torch.testing.assert_close(loss.total, expected["ce"] + 0.8 * expected["crd"] + 0.9 * loss.terms["logit_kl"])
    assert torch.equal(hybrid.state_dict()["crd"]["banks"]["student"], alone.banks.student)

"""torchdistill: the soft loss alone carries neither τ² nor β; with labels both are there."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.loss_inputs import randn
from support.oracles import assert_same, cross_entropy, kl_of_rows
from unikd_fast.compat.torchdistill import KDLoss

T = 3.0
LABELS = torch.tensor([0, 4, 2, 1, 1, 3])


def call(s: Tensor, t: Tensor, targets: Tensor | None, **settings: Any) -> Tensor:
    loss = KDLoss("fc", "output", "head.fc", "input", T, **settings)
    return loss({"fc": {"output": s}}, {"head.fc": {"input": t}}, targets, "not", used=True)


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    return randn(*shape, seed=1), randn(*shape, seed=2)


@pytest.mark.parametrize(("alpha", "beta", "expected_beta"), [(0.3, None, 0.7), (0.3, 2.0, 2.0), (1.5, None, -0.5)])
def test_with_labels(alpha: float, beta: float | None, expected_beta: float) -> None:
    assert_same(
        lambda s, t: call(s, t, LABELS, alpha=alpha, beta=beta),
        lambda s, t: alpha * cross_entropy(s, LABELS) + expected_beta * T**2 * kl_of_rows(s, t, T, dim=1).mean(),
        *pair(6, 5),
    )


@pytest.mark.parametrize(
    ("targets", "settings"),
    [(None, {"alpha": 0.3}), (LABELS, {"alpha": 0}), (LABELS, {"alpha": None, "beta": 5.0}), (LABELS, {})],
)
def test_no_factor_without_alpha_or_labels(targets: Tensor | None, settings: dict[str, Any]) -> None:
    assert_same(
        lambda s, t: call(s, t, targets, **settings), lambda s, t: kl_of_rows(s, t, T, dim=1).mean(), *pair(6, 5)
    )


def test_maps_are_divided_by_the_batch_alone() -> None:
    assert_same(lambda s, t: call(s, t, None), lambda s, t: kl_of_rows(s, t, T, dim=1).sum() / 3, *pair(3, 5, 2, 4))


def test_settings_reach_both_terms() -> None:
    def oracle(s: Tensor, t: Tensor) -> Tensor:
        kept = LABELS != 1
        return 0.3 * cross_entropy(s[kept], LABELS[kept]) * kept.sum() + 0.7 * T**2 * kl_of_rows(s, t, T, dim=1).sum()

    assert_same(lambda s, t: call(s, t, LABELS, alpha=0.3, reduction="sum", ignore_index=1), oracle, *pair(6, 5))


def test_none_gives_terms() -> None:
    s, t = pair(6, 5)
    terms = call(s, t, None, reduction="none")
    assert terms.shape == (6, 5)
    torch.testing.assert_close(terms.sum(1), kl_of_rows(s, t, T, dim=1))


def test_torchdistill_finds_the_drop_in() -> None:
    loss = KDLoss("fc", "output", "fc", "output", T, 0.3)
    assert isinstance(loss, nn.KLDivLoss)
    assert (loss.temperature, loss.alpha, loss.beta, loss.reduction) == (T, 0.3, 0.7, "batchmean")


def test_registering_with_torchdistill(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the registry; tests_compat builds the loss through the real one."""
    registered: dict[str, Any] = {}
    registry = ModuleType("torchdistill.losses.registry")
    registry.register_mid_level_loss = lambda key: lambda cls: registered.setdefault(key, cls)  # type: ignore[attr-defined]
    for name, module in (
        ("torchdistill", ModuleType("torchdistill")),
        ("torchdistill.losses", ModuleType("torchdistill.losses")),
        ("torchdistill.losses.registry", registry),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "unikd_fast.compat.torchdistill_register", raising=False)
    import unikd_fast.compat.torchdistill_register  # noqa: F401

    assert registered == {"UniKDFastKDLoss": KDLoss}

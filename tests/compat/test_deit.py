"""DeiT: the soft term divided by rows times classes, the hard term, the base criterion."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from support.loss_inputs import randn
from support.oracles import assert_same, cross_entropy, kl_of_rows
from unikd_fast.compat.deit import DistillationLoss

N, K, ALPHA, TAU = 6, 5, 0.3, 3.0
LABELS = torch.tensor([0, 4, 2, 1, 1, 3])
CRITERION = nn.CrossEntropyLoss()


@pytest.mark.parametrize("kind", ["soft", "hard", "none"])
def test_distillation_loss(kind: str) -> None:
    teacher_logits = randn(N, K, seed=3)

    def teacher(images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return teacher_logits + images.sum()

    def ours(logits: Tensor, logits_kd: Tensor) -> Tensor:
        loss = DistillationLoss(CRITERION, teacher, kind, ALPHA, TAU)
        return loss(torch.zeros(N, 3), logits if kind == "none" else (logits, logits_kd), LABELS)

    def oracle(logits: Tensor, logits_kd: Tensor) -> Tensor:
        base = cross_entropy(logits, LABELS)
        if kind == "none":
            return base
        soft = kl_of_rows(logits_kd, teacher_logits, TAU, dim=1).sum() * TAU**2 / (N * K)
        hard = cross_entropy(logits_kd, teacher_logits.max(dim=1).indices)
        return (1 - ALPHA) * base + ALPHA * (soft if kind == "soft" else hard)

    assert_same(ours, oracle, randn(N, K, seed=1), randn(N, K, seed=2))


def test_a_student_with_one_output_is_rejected() -> None:
    loss = DistillationLoss(CRITERION, nn.Identity(), "soft", ALPHA, TAU)
    with pytest.raises(ValueError, match="'soft' needs outputs to be a pair of logits, got one tensor"):
        loss(torch.zeros(N, K), torch.zeros(N, K), LABELS)


def test_an_unknown_type_is_rejected() -> None:
    with pytest.raises(ValueError, match="distillation_type must be one of none, soft, hard, got 'both'"):
        partial(DistillationLoss, CRITERION, nn.Identity(), "both")(ALPHA, TAU)

"""mdistiller, its fork, RepDistiller, mmrazor, timm, Model Optimizer: divergences of softened logits, reduced each in
its own way."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from support.loss_inputs import randn
from support.oracles import assert_same, cross_entropy, dkd, kl_of_rows, rows_along, standardized
from unikd_fast.compat import logit_standardization, mdistiller, mmrazor, modelopt, rep_distiller
from unikd_fast.compat.timm_distill import logit_distillation_forward, logit_distillation_loss

ROWS = (6, 5)
MAPS = (3, 5, 2, 4)  # classes on axis 1
TOKENS = (2, 3, 5)  # classes last
T = 3.0


def pair(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return randn(*shape, seed=1), randn(*shape, seed=2)


@pytest.mark.parametrize("shape", [ROWS, MAPS])
def test_mdistiller_averages_all_but_classes(shape: tuple[int, ...]) -> None:
    assert_same(
        lambda s, t: mdistiller.kd_loss(s, t, T), lambda s, t: kl_of_rows(s, t, T, dim=1).mean() * T**2, *pair(shape)
    )


@pytest.mark.parametrize("shape", [ROWS, MAPS])
def test_rep_distiller_divides_by_the_batch(shape: tuple[int, ...]) -> None:
    assert_same(
        rep_distiller.DistillKL(T),
        lambda s, t: kl_of_rows(s, t, T, dim=1).sum() * T**2 / shape[0],
        *pair(shape),
    )


def test_dkd() -> None:
    labels = torch.tensor([0, 4, 2, 1, 1, 3])
    settings = (0.7, 3.0, T)
    assert_same(
        lambda s, t: mdistiller.dkd_loss(s, t, labels, *settings),
        lambda s, t: dkd(s, t, labels, *settings),
        *pair(ROWS),
    )


@pytest.mark.parametrize("stand", [True, False])
def test_the_fork_standardises_the_last_axis(stand: bool) -> None:
    def oracle(s: Tensor, t: Tensor) -> Tensor:
        if stand:
            s, t = (torch.stack([standardized(row) for row in rows_along(x, -1)]).reshape(x.shape) for x in (s, t))
        return kl_of_rows(s, t, T, dim=1).mean() * T**2

    for shape in (ROWS, MAPS):  # of MAPS the last axis is the width, and the softmax stays on axis 1
        assert_same(lambda s, t: logit_standardization.kd_loss(s, t, T, stand), oracle, *pair(shape))


@pytest.mark.parametrize("stand", [True, False])
def test_the_forks_dkd(stand: bool) -> None:
    labels = torch.tensor([0, 4, 2, 1, 1, 3])

    def oracle(s: Tensor, t: Tensor) -> Tensor:
        if stand:
            s, t = (torch.stack([standardized(row) for row in x]) for x in (s, t))
        return dkd(s, t, labels, 0.7, 3.0, T)

    assert_same(lambda s, t: logit_standardization.dkd_loss(s, t, labels, 0.7, 3.0, T, stand), oracle, *pair(ROWS))


def reduced(student: Tensor, teacher: Tensor, reduction: str, dim: int) -> Tensor:
    """KL as torch reduces it: "none" is each class's term, "mean" counts classes, "batchmean" the first axis alone."""
    if reduction == "none":
        s, t = student.movedim(dim, -1), teacher.movedim(dim, -1)
        p, q = (torch.exp(x / T) / torch.exp(x / T).sum(-1, keepdim=True) for x in (t, s))
        return (p * torch.log(p / q)).movedim(-1, dim)
    total = kl_of_rows(student, teacher, T, dim).sum()
    return total / {"batchmean": student.shape[0], "mean": student.numel(), "sum": 1}[reduction]


@pytest.mark.parametrize("shape", [ROWS, MAPS])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
def test_mmrazor(reduction: str, shape: tuple[int, ...]) -> None:
    for detach in (True, False):
        assert_same(
            mmrazor.KLDivergence(T, reduction, 2.5, teacher_detach=detach),
            lambda s, t, d=detach: 2.5 * T**2 * reduced(s, t.detach() if d else t, reduction, dim=1),
            *pair(shape),
        )


def test_mmrazor_channel_by_channel() -> None:
    """Over the positions of each of 3 x 5 channels; the teacher is not detached."""

    def oracle(s: Tensor, t: Tensor) -> Tensor:
        return 2.5 * T**2 * kl_of_rows(s.reshape(15, 8), t.reshape(15, 8), T, dim=1).sum() / 15

    assert_same(mmrazor.ChannelWiseDivergence(T, 2.5), oracle, *pair(MAPS))


def test_mmrazor_rejects_an_unknown_reduction() -> None:
    with pytest.raises(
        ValueError, match="KLDivergence: reduction must be one of none, batchmean, sum, mean, got 'avg'"
    ):
        mmrazor.KLDivergence(reduction="avg")


@pytest.mark.parametrize("shape", [ROWS, TOKENS])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
def test_modelopt(reduction: str, shape: tuple[int, ...]) -> None:
    def current(s: Tensor, t: Tensor) -> Tensor:
        terms = reduced(s, t.detach(), reduction, dim=-1) * T**2
        return terms.sum(-1) if reduction == "none" else terms

    def flattened(s: Tensor, t: Tensor) -> Tensor:
        return T**2 * reduced(s.reshape(-1, 5), t.detach().reshape(-1, 5), reduction, dim=-1)

    assert_same(modelopt.LogitsDistillationLoss(T, reduction), current, *pair(shape))
    assert_same(modelopt.FlattenedLogitsDistillationLoss(T, reduction), flattened, *pair(shape))


def test_the_defaults_of_modelopt() -> None:
    s, t = pair(TOKENS)
    rows = kl_of_rows(s, t, 1.0, dim=-1)
    assert modelopt.LogitsDistillationLoss()(s, t).item() == pytest.approx(rows.sum().item() / s.numel(), rel=1e-11)
    assert modelopt.FlattenedLogitsDistillationLoss()(s, t).item() == pytest.approx(rows.mean().item(), rel=1e-11)


class TeacherOfTimm:
    """Answers with fixed logits, and tells whether it was shown what the task should show it."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def normalize_input(self, images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        assert mean == "the student's mean" and std == "the student's std"
        return images + 1

    def __call__(self, images: Tensor, return_features: bool) -> Tensor:
        assert not torch.is_grad_enabled() and not return_features and (images == 1).all()
        return self.logits.clone()  # a constant: a leaf itself would pass for one that no_grad has not touched


def test_timm() -> None:
    labels = torch.tensor([0, 4, 2, 1, 1, 3])

    def run(s: Tensor, t: Tensor) -> Tensor:
        task = SimpleNamespace(
            trainable_module=lambda images: s,
            teacher=TeacherOfTimm(t),
            criterion=torch.nn.functional.cross_entropy,
            student_mean="the student's mean",
            student_std="the student's std",
            temperature=T,
            task_loss_weight=0.3,
            distill_loss_weight=2.0,
        )
        out = logit_distillation_forward(task, torch.zeros(6, 3, 2, 2), labels)
        assert out["output"] is s
        return torch.stack([out["loss"], out["task_loss"], out["kd_loss"]])

    def oracle(s: Tensor, t: Tensor) -> Tensor:
        ce, kd = cross_entropy(s, labels), kl_of_rows(s, t.detach(), T, dim=-1).mean() * T**2
        return torch.stack([0.3 * ce + 2.0 * kd, ce, kd])

    assert_same(run, oracle, *pair(ROWS))
    assert_same(
        lambda s, t: logit_distillation_loss(s, t, T),
        lambda s, t: kl_of_rows(s, t, T, dim=-1).sum() * T**2 / TOKENS[0],
        *pair(TOKENS),
    )


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mdistiller": lambda s, t: mdistiller.kd_loss(s, t, T),
    "dkd": lambda s, t: mdistiller.dkd_loss(s, t, torch.zeros(len(s), dtype=torch.long), 1.0, 8.0, T),
    "rep_distiller": rep_distiller.DistillKL(T),
    "mmrazor": mmrazor.KLDivergence(T),
    "modelopt": modelopt.LogitsDistillationLoss(T),
    "timm": logit_distillation_loss,
}


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_fp32(name: str) -> None:
    s, t = (x.bfloat16() for x in pair(ROWS))
    loss, exact = LOSSES[name](s, t), LOSSES[name](s.double(), t.double())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)  # bf16 arithmetic would be off by 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_batch_gives_0(name: str) -> None:
    assert LOSSES[name](torch.zeros(0, 5), torch.zeros(0, 5)).item() == 0

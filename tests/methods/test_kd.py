"""KD with logit standardisation: against the formula, and from a configuration."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from support.build_method import build
from support.logit_methods import (
    BATCH,
    HOW,
    SOFT_LABELS,
    Found,
    as_found,
    assert_is_the_formula,
    batch_of,
    built,
    cross_entropy,
    falls,
    kl,
    logits,
    softmax,
    standardised,
    trained,
)
from support.real_runs import save_teacher
from unikd_fast.config import ConfigError, load_config
from unikd_fast.methods import KD
from unikd_fast.values import StudentOutput, Target

DIGITS = Path(__file__).parents[2] / "configs" / "digits.json"


@pytest.mark.parametrize("standardized", [False, True])
@pytest.mark.parametrize("labels", [BATCH.labels, SOFT_LABELS], ids=["labels", "mixed"])
@pytest.mark.parametrize(("dtype", "impl", "autocast"), HOW)
def test_loss_and_gradient_match_the_formula(
    dtype: torch.dtype, impl: str, autocast: bool, labels: Tensor, standardized: bool
) -> None:
    method = build(KD, ce_weight=0.4, beta=9.0, temperature=2.0, standardized=standardized, impl=impl)

    def loss(student: Tensor, teacher: Tensor) -> Found:
        return as_found(method.loss(StudentOutput(student), Target(teacher), batch_of(labels)))

    def formula(student: Tensor, teacher: Tensor) -> Found:
        q, p = (softmax(standardised(z) if standardized else z, 2.0) for z in (student, teacher))
        ce, soft = (
            cross_entropy(student, labels.double() if labels.is_floating_point() else labels),
            4 * kl(p, q).mean(),
        )
        return 0.4 * ce + 9.0 * soft, {"ce": ce, "logit_kl": soft}

    assert_is_the_formula(loss, formula, [logits(1, dtype, grad=True), logits(2, dtype)], autocast=autocast)


def test_standardised_logits_ignore_scale_and_shift() -> None:
    method = build(KD, ce_weight=0.0, standardized=True)
    student = logits(1, grad=True)
    target = Target(2.5 * student.detach() - 7.0)
    loss = method.loss(StudentOutput(student), target, BATCH)
    assert loss.total < 1e-12
    other = method.loss(StudentOutput(student), Target(logits(2)), BATCH).total
    scaled = method.loss(StudentOutput(3.0 * student + 1.0), Target(4.0 * logits(2)), BATCH).total
    torch.testing.assert_close(scaled, other)
    # And so the gradient has no part along either.
    (gradient,) = torch.autograd.grad(other, student)
    assert gradient.sum(-1).abs().max() < 1e-12
    centred = student.detach() - student.detach().mean(-1, keepdim=True)
    assert (gradient * centred).sum(-1).abs().max() < 1e-6  # but for the 1e-7 beside the deviation
    assert gradient.abs().max() > 1e-3


def test_without_the_factor_the_kl_is_not_scaled() -> None:
    student, target = StudentOutput(logits(1)), Target(logits(2))
    with_it, without = (
        build(KD, temperature=3.0, scale_by_t2=scaled, standardized=True).loss(student, target, BATCH).terms["logit_kl"]
        for scaled in (True, False)
    )
    torch.testing.assert_close(with_it, 9 * without)


def test_standardized_does_not_change_the_weights() -> None:
    for section, expected in ((None, False), ({}, False), ({"standardized": True}, True)):
        method = built("kd", section)
        assert isinstance(method, KD)
        assert method.settings.standardized == expected
    config = load_config(
        DIGITS, ["compare=null", "distill.method=kd", "distill.kd.standardized=true", "distill.kd.temperature=2"]
    )
    assert config.distill.kd is not None and config.distill.kd.standardized and config.distill.kd.temperature == 2
    with pytest.raises(ConfigError, match=r"distill\.kd holds settings of .* 'kd', got 'unikd'"):
        load_config(DIGITS, ["compare=null", "distill.method=unikd", "distill.kd.standardized=true"])


def test_standardisation_refuses_top_k_logits() -> None:
    cached = [
        "teacher.cache.mode=read",
        "teacher.cache.logits=top_k",
        "teacher.cache.top_k=3",
        "distill.kd.temperature=1",
    ]
    settings = ["compare=null", "distill.method=kd", *cached]
    load_config(DIGITS, [*settings, "distill.kd.standardized=false"])
    with pytest.raises(ConfigError, match=r"'top_k' with distill\.kd\.standardized = true, .*logits=uint8 or fp16"):
        load_config(DIGITS, [*settings, "distill.kd.standardized=true"])


@pytest.mark.slow
def test_trains(tmp_path: Path) -> None:
    settings = {"kd": {"standardized": True, "temperature": 2.0, "beta": 9.0, "ce_weight": 1.0}}
    records = trained(tmp_path, save_teacher(tmp_path / "teacher.pt"), "kd", distill=settings)
    assert falls(records, "logit_kl")
    for record in records:
        assert record["total"] == pytest.approx(record["ce"] + 9.0 * record["logit_kl"], rel=1e-5)

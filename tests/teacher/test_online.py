"""The online teacher: precision, eval mode, fixed batches, and messages."""

import copy
import logging

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.online_inputs import network, same
from unikd_fast.models import LogitsOnly
from unikd_fast.teacher import OnlineTeacher, resolve_precision
from unikd_fast.teacher import online as formats
from unikd_fast.values import Features

# Precision


@pytest.mark.parametrize(
    ("asked", "device", "units", "expected"),
    [
        ("auto", "cuda", {}, "fp16"),
        ("auto", "cpu", {"avx512_bf16": True}, "bf16"),
        ("auto", "cpu", {"amx_bf16": True}, "bf16"),
        ("auto", "cpu", {"avx512_f": True, "avx512_bf16": False}, "fp32"),
        ("auto", "cpu", {}, "fp32"),
        ("fp16", "cpu", {}, "fp16"),
        ("fp32", "cuda", {}, "fp32"),
    ],
)
def test_auto_resolves_to_the_fast_precision(
    monkeypatch: pytest.MonkeyPatch, asked: str, device: str, units: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    assert resolve_precision(asked, device) == expected


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_levels_are_in_the_precision_and_logits_in_fp32(precision: str, images: Tensor) -> None:
    teacher = OnlineTeacher(network("cifar/wrn_16_1"), precision=precision)
    features = teacher(images)
    assert {level.dtype for level in features.levels} == {formats.PRECISIONS[precision]} == {teacher.dtype}
    assert features.logits.dtype == torch.float32
    assert not any(p.requires_grad for p in teacher.parameters())
    norms = [module for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms  # a pre-activation network keeps some
    assert all(t.dtype == torch.float32 for norm in norms for t in (norm.weight, norm.running_var))


def test_weights_are_folded_before_they_are_cast() -> None:
    plain = network()
    folded = OnlineTeacher(copy.deepcopy(plain), precision="fp32")
    half = OnlineTeacher(copy.deepcopy(plain), precision="bf16")
    for exact, cast in zip(folded.parameters(), half.parameters(), strict=True):
        assert torch.equal(exact.to(torch.bfloat16), cast)


class Loud(nn.Module):
    """Activations of 80,000, beyond fp16's range, and ordinary outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1 / 3))

    def forward(self, images: Tensor) -> Features:
        large = self.scale * (images.abs() + 1) * 240_000
        level = large / 240_000
        return Features((level,), level.mean((2, 3)))


def test_overflowing_fp16_is_recast_to_bf16_from_fp32(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, images: Tensor
) -> None:
    monkeypatch.setattr(formats, "resolve_precision", lambda precision, device: "fp16")  # as on a GPU
    teacher = OnlineTeacher(Loud(), precision="auto")
    assert not teacher.is_finite([images])
    with caplog.at_level(logging.WARNING, logger="unikd_fast"):
        teacher.settle(teacher.is_finite([images]))
    assert "fp16 are not finite" in caplog.text
    assert "bf16" in caplog.text
    assert (teacher.precision, teacher.dtype) == ("bf16", torch.bfloat16)
    assert teacher.is_finite([images])
    assert torch.equal(teacher.network.scale, torch.tensor(1 / 3).to(torch.bfloat16))  # not by way of fp16

    kept = OnlineTeacher(network(), precision="auto")
    kept.settle(kept.is_finite([images]))
    kept.settle(False)  # it was settled
    assert kept.precision == "fp16"


def test_an_explicit_precision_is_never_replaced(images: Tensor) -> None:
    teacher = OnlineTeacher(Loud(), precision="fp16")
    teacher.settle(teacher.is_finite([images]))
    assert teacher.precision == "fp16"


def test_autocast_does_not_affect_the_teacher(images: Tensor) -> None:
    teacher = OnlineTeacher(network(), precision="fp32")
    expected = teacher(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(teacher(images), expected)


# Eval mode


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        out = self.drop(self.norm(self.conv(images)).relu())
        return F.dropout(out, 0.5, self.training).mean((2, 3))


@pytest.mark.parametrize("fold", [True, False])
def test_train_mode_does_not_change_outputs(fold: bool, images: Tensor) -> None:
    teacher = OnlineTeacher(LogitsOnly(Dropping()).train(), precision="fp32", fold=fold)
    assert teacher.folded == fold
    expected = teacher(images)
    before = {name: buffer.clone() for name, buffer in teacher.named_buffers()}
    for switch in (teacher.train, teacher.network.train):  # the second is not ours, and is undone at the next call
        switch()
        assert same(teacher(images), expected)
        assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(before[name], buffer) for name, buffer in teacher.named_buffers())


def test_a_loss_can_backpropagate_with_teacher_outputs(images: Tensor) -> None:
    level = OnlineTeacher(network(), precision="fp32")(images).levels[0]
    assert not level.is_inference()
    weight = torch.ones((), requires_grad=True)
    (weight * level).sum().backward()
    assert weight.grad is not None


# Another normalisation


@pytest.mark.parametrize("compiled", [None, "default"])
@pytest.mark.parametrize(("precision", "batch_size"), [("fp32", None), ("fp32", 3), ("bf16", 3)])
def test_images_are_renormalised_before_they_are_cast(
    images: Tensor, monkeypatch: pytest.MonkeyPatch, precision: str, batch_size: int | None, compiled: str | None
) -> None:
    """In fp32: rounded to bf16 first, an input would err twice."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    scale, shift = (0.458, 0.448, 0.45), (-0.03, -0.088, -0.188)
    plain = network()
    settings = {"precision": precision, "batch_size": batch_size}
    wanted = torch.addcmul(torch.tensor(shift).view(3, 1, 1), images, torch.tensor(scale).view(3, 1, 1))
    teacher = OnlineTeacher(copy.deepcopy(plain), renormalise=(scale, shift), compile_mode=compiled, **settings)
    assert same(teacher(images), OnlineTeacher(copy.deepcopy(plain), **settings)(wanted))
    assert not same(teacher(images), OnlineTeacher(plain, **settings)(images))
    assert torch.equal(teacher.renormalised(images), wanted)


# Fixed batches


@pytest.mark.parametrize("channels_last", [False, True])
def test_batches_are_split_and_padded(channels_last: bool, images: Tensor) -> None:
    plain = network()
    expected = OnlineTeacher(copy.deepcopy(plain), precision="fp32", channels_last=channels_last)(images)
    sizes = []
    teacher = OnlineTeacher(plain, precision="fp32", channels_last=channels_last, batch_size=3)
    teacher.network.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    for count in (0, 1, 3, 7, 8):
        found = teacher(images[:count])
        for a, b in zip((*found.levels, found.logits), (*expected.levels, expected.logits), strict=True):
            torch.testing.assert_close(a, b[:count], rtol=1e-4, atol=1e-5)
    assert set(sizes) == {3}
    assert len(sizes) == 1 + 1 + 1 + 3 + 3


# Messages


def test_invalid_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="auto, fp32, bf16, fp16, got 'int8'"):
        OnlineTeacher(network(), precision="int8")
    with pytest.raises(ValueError, match=r"None or one of default, .*, got 'fast'"):
        OnlineTeacher(network(), compile_mode="fast")
    with pytest.raises(ValueError, match="1 or more, got 0"):
        OnlineTeacher(network(), batch_size=0)

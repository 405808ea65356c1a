"""The online teacher: precision, eval mode, fixed batches, one compilation, and messages."""

import copy
import logging
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from unikd_fast.models import LogitsOnly, build_model, extract_features
from unikd_fast.teacher import OnlineTeacher, measure_fidelity, packing, resolve_precision
from unikd_fast.teacher import precision as formats
from unikd_fast.values import Features

needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler"
)
needs_onednn = pytest.mark.skipif(not packing.has_onednn(), reason="oneDNN does not convolve bf16 on this processor")


def network(name: str = "cifar/resnet8") -> nn.Module:
    torch.manual_seed(0)
    return extract_features(build_model(name, num_classes=10), image_size=32).eval()


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(8, 3, 32, 32)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """torch.compile with a backend that counts the graphs it is given and runs them as they are."""
    graphs: list[int] = []
    compile_ = torch.compile

    def backend(module: Any, inputs: list[Tensor]) -> Any:
        graphs.append(len(inputs))
        return module.forward

    def counting(function: Any, *, mode: str, **options: Any) -> Any:
        return compile_(function, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", counting)
    yield graphs
    torch._dynamo.reset()


def same(a: Features, b: Features) -> bool:
    return all(torch.equal(x, y) for x, y in zip((*a.levels, a.logits), (*b.levels, b.logits), strict=True))


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
def test_auto_takes_what_the_device_is_fast_at(
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


def test_fp16_that_overflows_becomes_bf16_cast_from_fp32(
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


def test_the_precision_asked_for_is_never_exchanged(images: Tensor) -> None:
    teacher = OnlineTeacher(Loud(), precision="fp16")
    teacher.settle(teacher.is_finite([images]))
    assert teacher.precision == "fp16"


def test_autocast_around_the_teacher_changes_nothing(images: Tensor) -> None:
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
def test_dropout_and_train_mode_leave_the_outputs_alone(fold: bool, images: Tensor) -> None:
    teacher = OnlineTeacher(LogitsOnly(Dropping()).train(), precision="fp32", fold=fold)
    assert teacher.folded == fold
    expected = teacher(images)
    before = {name: buffer.clone() for name, buffer in teacher.named_buffers()}
    for switch in (teacher.train, teacher.network.train):  # the second is not ours, and is undone at the next call
        switch()
        assert same(teacher(images), expected)
        assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(before[name], buffer) for name, buffer in teacher.named_buffers())


def test_a_loss_can_go_backward_through_what_the_teacher_gave(images: Tensor) -> None:
    level = OnlineTeacher(network(), precision="fp32")(images).levels[0]
    assert not level.is_inference()
    weight = torch.ones((), requires_grad=True)
    (weight * level).sum().backward()
    assert weight.grad is not None


# Fixed batches and compilation


@pytest.mark.parametrize("channels_last", [False, True])
def test_batches_of_any_size_are_cut_and_padded(channels_last: bool, images: Tensor) -> None:
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


def test_nothing_recompiles_after_the_first_batch(compilations: list[int], images: Tensor) -> None:
    teacher = OnlineTeacher(network(), precision="fp32", compile_mode="default", batch_size=8)
    expected = teacher(images)
    assert len(compilations) == 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        for other in (
            images[:3],
            images[:0],
            torch.cat([images, images[:5]]),
            images.contiguous(memory_format=torch.channels_last),
            images.double(),
            images.clone().requires_grad_(),
            images.flip(3).flip(3),
        ):
            found = teacher(other)
            count = min(len(other), 8)
            assert torch.equal(found.logits[:count], expected.logits[:count])
        teacher.train()
        with torch.no_grad():
            assert same(teacher(images), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert same(teacher(images), expected)
    assert len(compilations) == 1


def test_every_teacher_of_a_comparison_compiles_once(compilations: list[int], images: Tensor) -> None:
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        teacher = OnlineTeacher(network(), precision="fp32", compile_mode="default")
        teacher(images)
        teacher(images[:2])
        assert teacher.batch_size == 8  # the first batch's
    assert len(compilations) == torch._dynamo.config.recompile_limit + 2


@needs_compiler
@pytest.mark.slow
def test_the_compiled_teacher_is_the_eager_one(images: Tensor) -> None:
    plain = network()
    expected = OnlineTeacher(copy.deepcopy(plain), precision="fp32")(images)
    counters.clear()
    teacher = OnlineTeacher(plain, precision="fp32", compile_mode="default", batch_size=8)
    found = teacher(images)
    for a, b in zip((*found.levels, found.logits), (*expected.levels, expected.logits), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(teacher(images[:3]).logits, found.logits[:3])
    assert counters["stats"]["unique_graphs"] == 1


class Windows(nn.Module):
    """Convolutions that oneDNN's operator takes and, at the end, some that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False),
            nn.Conv2d(16, 16, 3, padding=(2, 1), dilation=(2, 1)),
            nn.Conv2d(16, 16, (3, 1), padding="valid"),
            nn.Conv2d(16, 32, 3, groups=16, padding=1),
            nn.Conv2d(32, 32, 1, groups=4),
        )
        self.left = nn.Sequential(
            nn.Conv2d(32, 16, 3, padding=1, padding_mode="reflect"), nn.Conv2d(16, 16, 3, padding="same")
        )
        self.again = nn.Conv2d(16, 16, 3, padding=1)
        self.alias = self.again

    def forward(self, images: Tensor) -> Features:
        level = self.left(self.taken(images))
        level = self.alias(self.again(level)[:, :, ::2])  # one weight, two shapes
        return Features((level,), (level * self.again.weight.mean()).mean((2, 3)))


@needs_onednn
def test_packed_convolutions_compute_the_same_beside_the_untouched_network(
    compilations: list[int], images: Tensor
) -> None:
    torch.manual_seed(2)
    plain = Windows().eval()
    eager = OnlineTeacher(copy.deepcopy(plain), precision="bf16")
    teacher = OnlineTeacher(copy.deepcopy(plain), precision="bf16", compile_mode="default")
    before = {name: (id(tensor), tensor.clone()) for name, tensor in teacher.state_dict(keep_vars=True).items()}
    # What is packed has the same weights and the same rounding of every layer; only the order of sums may differ.
    own, found = (measure_fidelity(t, plain, [images, images[:3]]) for t in (eager, teacher))
    assert found.feature_errors[0] < 1.25 * own.feature_errors[0] < 0.02
    assert found.relative_logit_error < 1.25 * own.relative_logit_error + 1e-3
    assert len(compilations) == 1
    after = teacher.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(id(after[name]) == kept and torch.equal(after[name], was) for name, (kept, was) in before.items())
    packed = packing.pack_convolutions(teacher.network, images.bfloat16())
    assert {id(p) for p in teacher.network.parameters()} < {id(p) for p in packed.parameters()}
    kinds = [type(conv) is packing.PackedConv2d for conv in (*packed.taken, *packed.left, packed.again)]
    assert kinds == [True, True, False, True, True, False, False, True]
    assert not any(isinstance(module, packing.PackedConv2d) for module in teacher.modules())


@needs_compiler
@needs_onednn
@pytest.mark.slow
def test_compiled_bf16_reorders_no_weights_and_keeps_every_level(
    images: Tensor, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = build_model("cifar/resnet20", num_classes=10)
    # Every block is a level and the next block's shortcut: a sum written in place would overwrite it.
    nodes = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)]
    plain = extract_features(model, image_size=32, nodes=nodes).eval()
    eager = OnlineTeacher(copy.deepcopy(plain), precision="bf16")
    counters.clear()
    teacher = OnlineTeacher(copy.deepcopy(plain), precision="bf16", compile_mode="default", batch_size=8)
    own, found = (measure_fidelity(t, plain, [images]) for t in (eager, teacher))
    # Fused, an activation is rounded once and not three times: it errs less than eager, and here a little is allowed.
    assert all(f < 1.05 * o for f, o in zip(found.feature_errors, own.feature_errors, strict=True)), (found, own)
    assert found.relative_logit_error < 1.25 * own.relative_logit_error
    assert counters["inductor"]["mkldnn_conv_binary_unary_fusion_matcher_count"] == 9
    for a, b in zip(teacher(images).levels, eager(images).levels, strict=True):
        assert (a.layout, a.dtype, a.shape, a.stride()) == (torch.strided, torch.bfloat16, b.shape, b.stride())
    capfd.readouterr()
    with (
        torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON),
        torch._dynamo.config.patch(error_on_recompile=True),
    ):
        teacher(images[:5])
    executed = [line for line in capfd.readouterr().out.splitlines() if ",primitive,exec," in line]
    assert sum(",convolution," in line for line in executed) == 21
    assert not [line for line in executed if ",reorder," in line]


def test_a_missing_compiler_names_the_remedy(images: Tensor) -> None:
    teacher = OnlineTeacher(network(), precision="fp32", compile_mode="default")
    options = {"cpp.cxx": ("/no/such/compiler",), "force_disable_caches": True}
    with (
        torch._inductor.config.patch(options),
        pytest.raises(ValueError, match=r"cannot compile the teacher .*teacher.compile=null.*C\+\+ compiler"),
    ):
        teacher(images)
    torch._dynamo.reset()


# Messages


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="auto, fp32, bf16, fp16, got 'int8'"):
        OnlineTeacher(network(), precision="int8")
    with pytest.raises(ValueError, match=r"None or one of default, .*, got 'fast'"):
        OnlineTeacher(network(), compile_mode="fast")
    with pytest.raises(ValueError, match="1 or more, got 0"):
        OnlineTeacher(network(), batch_size=0)

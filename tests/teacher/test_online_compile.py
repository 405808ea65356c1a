"""The online teacher under torch.compile: one compilation, and the outputs of the eager one."""

import copy
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from support.online_inputs import network, same
from unikd_fast.models import build_model, extract_features
from unikd_fast.teacher import OnlineTeacher, measure_fidelity
from unikd_fast.teacher import online as packing
from unikd_fast.values import Features

needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler"
)
needs_onednn = pytest.mark.skipif(not packing.has_onednn(), reason="oneDNN does not convolve bf16 on this processor")


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


def test_each_teacher_of_a_comparison_compiles_once(compilations: list[int], images: Tensor) -> None:
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        teacher = OnlineTeacher(network(), precision="fp32", compile_mode="default")
        teacher(images)
        teacher(images[:2])
        assert teacher.batch_size == 8  # the first batch's
    assert len(compilations) == torch._dynamo.config.recompile_limit + 2


@needs_compiler
@pytest.mark.slow
@pytest.mark.long
def test_the_compiled_teacher_matches_the_eager_one(images: Tensor) -> None:
    plain = network()
    affine = ((0.458, 0.448, 0.45), (-0.03, -0.088, -0.188))  # in the graph too
    expected = OnlineTeacher(copy.deepcopy(plain), precision="fp32", renormalise=affine)(images)
    counters.clear()
    teacher = OnlineTeacher(plain, precision="fp32", renormalise=affine, compile_mode="default", batch_size=8)
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
def test_packed_convolutions_match_the_original_network(compilations: list[int], images: Tensor) -> None:
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
def test_compiled_bf16_does_not_reorder_weights(images: Tensor, capfd: pytest.CaptureFixture[str]) -> None:
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

"""The fusion's kernels as custom operators, and under torch.compile."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from support.kernel_inputs import BACKEND, DEVICE, Graphs, long
from unikd_fast import AdaptiveFeatureFusion
from unikd_fast.kernels import _autograd

CHANNELS, SIZES, WIDTH = [3, 5], ((4, 5), (2, 3)), 3
Compute = Callable[..., Tensor]


def features(images: int = 2, *, dtype: torch.dtype = torch.float32, grad: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(images)
    return [
        torch.randn(images, c, *s, generator=generator).to(DEVICE, dtype).requires_grad_(grad)
        for c, s in zip(CHANNELS, SIZES, strict=True)
    ]


def fusion(**options: str) -> AdaptiveFeatureFusion:
    torch.manual_seed(0)
    module = AdaptiveFeatureFusion(CHANNELS, WIDTH, impl="fused", **options).to(DEVICE)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


# What runs which operators: the collapsed average, and that of normalised features; two blends.
FORMS: dict[str, tuple[dict[str, str], str]] = {
    "collapsed": ({}, "pooled"),
    "normalised": ({"norm": "input"}, "pooled"),
    "stagewise": ({"upsample": "bilinear"}, "forward"),
}
every_form = pytest.mark.parametrize("name", FORMS)
# Interpreted, tracing and repeated backward passes take seconds: in the quick round those of one operator.
traced_forms = pytest.mark.parametrize("name", ["collapsed", long("normalised"), long("stagewise")])


def form(name: str) -> tuple[AdaptiveFeatureFusion, Compute]:
    options, method = FORMS[name]
    module = fusion(**options)

    def compute(*levels: Tensor) -> Tensor:
        result: Tensor = getattr(module, method)(list(levels))
        return result

    return module, compute


def calls_of(compute: Callable[[], Any]) -> list[tuple[Any, list[Tensor], list[Any]]]:
    """Return the calls of fused functions, each with its tensors and settings."""
    calls = []
    original = _autograd.FusedFunction.__call__

    def record(self: Any, tensors: Sequence[Tensor], **settings: Any) -> Tensor:
        calls.append((self, list(tensors), [settings[x] for x in self.settings]))
        return original(self, tensors, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_autograd.FusedFunction, "__call__", record)
        compute()
    return calls


@pytest.mark.long
@traced_forms
def test_opcheck(name: str) -> None:
    """Schema, fake tensors, autograd and tracing with dynamic shapes; forward and backward operators."""
    _, compute = form(name)
    calls = calls_of(lambda: compute(*features()))
    assert calls
    for function, tensors, settings in calls:
        leaves = [x.detach().requires_grad_() for x in tensors]
        torch.library.opcheck(function.operator, (leaves, *settings))
        fixed = [x.detach() for x in tensors]
        torch.library.opcheck(function.operator, (fixed, *settings))
        output, saved = function.operator(fixed, *settings)
        wanted = [i % 2 == 0 for i in range(len(fixed))]
        torch.library.opcheck(function.backward_operator, (fixed, saved, torch.ones_like(output), wanted, *settings))


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, long(torch.bfloat16)])
def test_compiled_is_eager(name: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    module, compute = form(name)
    levels = features(dtype=dtype)
    leaves = [*levels, *module.parameters()]
    results = []
    for f in (torch.compile(compute, fullgraph=True, backend=BACKEND), compute):
        y = f(*levels)
        upstream = torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y).to(y.dtype)
        results.append([y, *torch.autograd.grad(y, leaves, upstream)])
    # The same kernels; what PyTorch does around them may be rounded otherwise.
    torch.testing.assert_close(*results, rtol=4 * torch.finfo(dtype).eps, atol=1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.long
@traced_forms
def test_one_graph_for_all_batch_sizes(name: str) -> None:
    torch._dynamo.reset()
    _, compute = form(name)
    graphs = Graphs()
    compiled = torch.compile(compute, fullgraph=True, backend=graphs, dynamic=True)
    counts = []
    for images in (6, 7):  # neither the size of another axis, which would count as the same
        levels = features(images)
        results = []
        for f in (compiled, compute):
            y = f(*levels)
            results.append([y, *torch.autograd.grad(y.sum(), levels)])
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
        counts.append(graphs.count)
    assert counts[1] == counts[0]


@traced_forms
def test_backward_of_a_compiled_graph_twice(name: str) -> None:
    torch._dynamo.reset()
    _, compute = form(name)
    levels = features()
    y = torch.compile(compute, fullgraph=True, backend=BACKEND)(*levels)
    first = torch.autograd.grad(y, levels, torch.ones_like(y), retain_graph=True)
    second = torch.autograd.grad(y, levels, 2 * torch.ones_like(y))
    assert all(torch.equal(2 * a, b) for a, b in zip(first, second, strict=True))


def test_second_derivatives_are_rejected() -> None:
    torch._dynamo.reset()
    _, compute = form("collapsed")
    levels = features()
    y = torch.compile(compute, fullgraph=True, backend="eager")(*levels)
    with pytest.raises(RuntimeError):
        (gradient, *_) = torch.autograd.grad(y.square().sum(), levels, create_graph=True)
        gradient.square().sum().backward()

"""Nothing on a device that a launch reads outlives the call that launches it.

A captured graph reads it at every replay, and if it was made while the graph's memory pool was current, CUDA graph
trees (`mode="reduce-overhead"`) reject it. Without a GPU every tensor that is passed to a launch is watched, on the
CPU and, with fake tensors, on a GPU that is not there; the kernels themselves do not run.
"""

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from support.kernel_inputs import DEVICE, LOSSES, leaves_of, quiet
from unikd_fast import AdaptiveFeatureFusion
from unikd_fast.kernels import _launch, _pooled_plan, pixel_weights, softmax_kl

pytestmark = quiet
FUSIONS: dict[str, tuple[dict[str, str], str]] = {
    "collapsed": ({}, "pooled"),
    "collapsed bilinear": ({"upsample": "bilinear"}, "pooled"),
    "normalised": ({"norm": "input"}, "pooled"),
    "stagewise": ({}, "forward"),
    "stagewise bilinear": ({"upsample": "bilinear"}, "forward"),
}


def tensors_in(arguments: Any) -> Iterator[Tensor]:
    if isinstance(arguments, Tensor):
        yield arguments
    elif isinstance(arguments, (tuple, list)):
        for x in arguments:
            yield from tensors_in(x)


class Watched:
    """The tensors that are passed to launches, which run on a GPU only."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, launch: bool = torch.cuda.is_available()) -> None:
        self.seen: list[tuple[str, weakref.ref[Tensor]]] = []
        kernel = type(softmax_kl._softmax_kl_kernel)
        run = kernel.run

        def watch(launched: Any, *arguments: Any, **chosen: Any) -> Any:
            given = [*tensors_in(arguments), *tensors_in(tuple(chosen.values()))]
            self.seen += [(launched.fn.__name__, weakref.ref(x)) for x in given]
            return run(launched, *arguments, **chosen) if launch else None

        monkeypatch.setattr(kernel, "run", watch)

    def survivors(self, kept: Sequence[Tensor]) -> set[str]:
        """Name the kernels that were given what still lives, but for `kept`."""
        gc.collect()
        own = {id(x) for x in kept}
        return {name for name, x in self.seen if x() is not None and id(x()) not in own}


def step(name: str, inputs: list[Tensor]) -> None:
    """Forward and backward, with an upstream gradient other than 1."""
    loss = LOSSES[name].compute(*inputs, impl="fused")
    torch.autograd.grad(loss * 3, leaves_of(inputs))


def fuse(name: str, make: Callable[..., Tensor], sizes: Sequence[int]) -> tuple[Callable[[], None], list[Tensor]]:
    options, form = FUSIONS[name]
    fusion = AdaptiveFeatureFusion((4, 3, 5), 4, impl="fused", **options).to(make(1).device)
    features = [make(2, c, s, s + 1).requires_grad_() for c, s in zip((4, 3, 5), sizes, strict=True)]

    def run() -> None:
        y = getattr(fusion, form)(features)
        torch.autograd.grad(y.sum(), [*features, *fusion.parameters()])

    return run, [*features, *fusion.parameters(), *fusion.buffers()]


@pytest.mark.parametrize("name", LOSSES)
def test_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watched, inputs = Watched(monkeypatch), LOSSES[name].make(5, 11, torch.float32)
    step(name, inputs)
    assert len(watched.seen) > 3
    assert watched.survivors(inputs) == set()


@pytest.mark.parametrize("name", FUSIONS)
def test_fusion(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sizes that no other test has, so that nothing is there from before."""
    watched = Watched(monkeypatch)
    run, kept = fuse(name, lambda *shape: torch.zeros(shape, device=DEVICE), (11, 6, 2))
    run()
    assert len(watched.seen) > 3
    assert watched.survivors(kept) == set()


@pytest.fixture
def absent_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Fake tensors on a GPU, on which kernels are not launched but watched."""
    device = torch.device("cuda", 0)
    of_cpu = _launch.describe(torch.device("cpu"))
    for module in (_launch, _pooled_plan, pixel_weights):
        monkeypatch.setattr(module, "describe", lambda _: of_cpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with FakeTensorMode() if not torch.cuda.is_available() else nullcontext():
        yield device


@pytest.mark.parametrize("name", LOSSES)
def test_loss_on_an_absent_gpu(name: str, absent_gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, launch=False)
    real = [(x.shape, x.dtype, x.requires_grad) for x in LOSSES[name].make(5, 11, torch.float32)]
    inputs = [torch.empty(s, dtype=d, device=absent_gpu).requires_grad_(g) for s, d, g in real]
    loss = LOSSES[name].compute(*inputs, impl="fused")
    assert loss.device == absent_gpu
    assert len(watched.seen) > 3
    del loss
    assert watched.survivors(inputs) == set()

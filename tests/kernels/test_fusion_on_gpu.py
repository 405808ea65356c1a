"""What only a GPU shows of the fusion's kernels: no synchronisation, graphs, races, memory, offsets beyond 2^31."""

import gc
from functools import partial

import pytest
import torch
from torch import Tensor

from support.kernel_inputs import capture
from unikd_fast import AdaptiveFeatureFusion
from unikd_fast.kernels._pooled_plan import plan_for
from unikd_fast.kernels.feature_fusion import blend_plan
from unikd_fast.kernels.pixel_weights import map_sizes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CHANNELS, SIZES = (256, 512, 1024, 2048), (56, 28, 14, 7)  # of a ResNet-50 at 224 pixels
FORMS: dict[str, tuple[dict[str, str], str]] = {
    "collapsed": ({}, "pooled"),
    "normalised": ({"norm": "input"}, "pooled"),
    "spatial": ({}, "forward"),
}
every_form = pytest.mark.parametrize("name", FORMS)


def make(name: str, images: int, width: int = 64) -> tuple[AdaptiveFeatureFusion, list[Tensor]]:
    torch.manual_seed(0)
    fusion = AdaptiveFeatureFusion(CHANNELS, width, impl="fused", **FORMS[name][0]).cuda()
    features = [
        torch.randn(images, c, s, s, device="cuda", dtype=torch.bfloat16)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
        for c, s in zip(CHANNELS, SIZES, strict=True)
    ]
    return fusion, features


def step(name: str, fusion: AdaptiveFeatureFusion, features: list[Tensor]) -> list[Tensor]:
    """Return the result and the gradients of the features and parameters."""
    y = getattr(fusion, FORMS[name][1])(features)
    return [y.detach(), *torch.autograd.grad(y, [*features, *fusion.parameters()], torch.ones_like(y))]


@every_form
def test_no_synchronisation(name: str) -> None:
    fusion, features = make(name, 4)
    step(name, fusion, features)  # compiled before
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(name, fusion, features)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_form
def test_cuda_graph(name: str) -> None:
    """Captured once, replayed on other numbers; a replay gives what eager mode gives, to the bit."""
    fusion, features = make(name, 4)
    graph, captured = capture(partial(step, name, fusion, features))
    for _ in range(2):
        with torch.no_grad():
            features[0].copy_(torch.roll(features[0], 1, 0))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(name, fusion, features), strict=True))


@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
@every_form
def test_graph_replay_after_many_other_sizes(name: str, upsample: str) -> None:
    """More than any cache of plans holds: what the graph reads is its own, and is not freed with them."""
    fusion, features = make(name, 4)
    fusion.upsample = upsample
    graph, captured = capture(partial(step, name, fusion, features))
    graph.replay()
    expected = [x.clone() for x in captured]
    for height in range(8, 308):
        levels = [torch.empty(1, 16, height // divisor, 8, device="cuda") for divisor in (1, 2)]
        plan_for(levels, upsample)
        blend_plan(*levels, upsample)
    gc.collect()
    torch.cuda.empty_cache()
    filled = [torch.full((size,), float("nan"), device="cuda") for size in 1000 * [128] + 100 * [2**18]]
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
    del filled


@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
@every_form
def test_reduce_overhead(name: str, upsample: str) -> None:
    """CUDA graph trees refuse what survives a call in their pool."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fusion, features = make(name, 4)
    fusion.upsample = upsample
    fuse = getattr(fusion, FORMS[name][1])
    compiled = torch.compile(lambda *x: fuse(x), mode="reduce-overhead")
    wanted = [*features, *fusion.parameters()]
    for _ in range(5):  # warmed up, recorded and replayed
        with torch.no_grad():
            features[0].copy_(torch.roll(features[0], 1, 0))
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(*features)
        results = [x.detach().clone() for x in (y, *torch.autograd.grad(y, wanted, torch.ones_like(y)))]
        expected = step(name, fusion, features)
        torch.testing.assert_close(results, expected, rtol=2e-2, atol=2e-2)  # products that inductor may fuse
    if name != "normalised":  # whose running statistics are changed in place
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@every_form
def test_same_bits_twenty_times(name: str) -> None:
    """With more programs than run at once."""
    fusion, features = make(name, 32)
    y = getattr(fusion, FORMS[name][1])
    with torch.no_grad():
        expected = y(features)
        assert all(torch.equal(y(features), expected) for _ in range(20))
    expected = step(name, fusion, features)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(step(name, fusion, features), expected, strict=True))


@every_form
def test_images_are_independent(name: str) -> None:
    """Eight images at once and each alone: another grid, the same numbers."""
    fusion, features = make(name, 8)
    fusion.eval()  # batch statistics are those of all neighbours
    y = getattr(fusion, FORMS[name][1])
    with torch.no_grad():
        together = y(features)
        alone = torch.cat([y([f[i : i + 1] for f in features]) for i in range(8)])
    torch.testing.assert_close(together, alone, rtol=2e-2, atol=2e-2)  # cuDNN and cuBLAS choose by size


def test_more_than_2_to_the_31_elements() -> None:
    """The last images equal the same images alone."""
    images, channels = 2**31 // (256 * 56 * 56) + 3, (256, 16)
    if torch.cuda.mem_get_info()[0] < 4 * images * 256 * 56 * 56 * 2:
        pytest.skip("needs 18 GB of GPU memory")
    torch.manual_seed(0)
    fusion = AdaptiveFeatureFusion(channels, 16, impl="fused").cuda()
    features = [
        torch.randn(images, c, s, s, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for c, s in zip(channels, (56, 28), strict=True)
    ]
    tail = [f.detach()[-2:].clone().requires_grad_() for f in features]
    results = []
    for levels in (features, tail):
        y = fusion.pooled(levels)
        results.append([y[-2:], *(g[-2:] for g in torch.autograd.grad(y, levels, torch.ones_like(y)))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-5)  # the products around them are cuBLAS's


def test_memory_of_collapsed_form() -> None:
    """Scalar maps in fp32 and nothing with D channels."""
    fusion, features = make("collapsed", 64, width=256)
    step("collapsed", fusion, features)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    pixels, seen, own, state = (sum(part) for part in map_sizes([s * s for s in SIZES]))
    slack = 16 * 2**20  # composite weights, twice
    y = fusion.pooled(features)
    assert torch.cuda.max_memory_allocated() - before < 4 * 64 * (seen + own + state + 2 * pixels) + slack
    assert torch.cuda.memory_allocated() - before < 4 * 64 * (seen + state + 2 * pixels) + slack
    del y

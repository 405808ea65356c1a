"""The kernels of the collapsed AFF against the stage-wise form, values and every gradient."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from support.kernel_inputs import drawn, long
from support.numerics import assert_no_worse_than_eager, outputs_and_gradients, relative_error
from unikd_fast import AdaptiveFeatureFusion
from unikd_fast.kernels._pooled_plan import plan_of
from unikd_fast.kernels.pixel_weights import empty_maps, geometry, pixel_weights_forward
from unikd_fast.kernels.pooled_fusion import fused_pool
from unikd_fast.kernels.reference_fusion import fuse_stagewise
from unikd_fast.kernels.reference_moments import ChannelStatistics, channel_moments
from unikd_fast.kernels.reference_pooled import TAPS, pixel_weights, pool_collapsed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Sums over pixels, channels and images in another order than eager's.
UNITS = 8.0

# L = 1 to 5; a ratio of 2, odd sizes, other ratios, equal sizes, one pixel; channels below, at, off a multiple of 16.
PYRAMIDS = {
    "one level": ((5,), ((5, 4),)),
    "ratio 2": ((16, 8), ((8, 8), (4, 4))),
    "odd": ((3, 20, 33), ((7, 9), (4, 5), (3, 2))),
    "equal and one pixel": ((17, 70, 8, 4), ((6, 6), (6, 6), (3, 3), (1, 1))),
    "five": ((2, 3, 4, 5, 6), ((9, 7), (7, 7), (7, 5), (3, 4), (1, 2))),
    "many pixels": ((2, 3), ((33, 32), (17, 16))),  # more than a block of them
    "many pixels, large ratios": ((4, 5), ((40, 30), (7, 9))),
}


MODES = ("nearest", "bilinear")
some_pyramids = pytest.mark.parametrize("pyramid", ["ratio 2", long("odd")])


def inputs(
    pyramid: str,
    width: int = 6,
    *,
    images: int = 2,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    seed: int = 0,
) -> list[Tensor]:
    """Features in `dtype`, then parameters in fp32 as a module under autocast has them; all ask for a gradient."""
    channels, sizes = PYRAMIDS[pyramid]
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = [
        randn(images, c, *size).to(dtype).contiguous(memory_format=layout)
        for c, size in zip(channels, sizes, strict=True)
    ]
    parameters = [
        *(randn(width, c, 1, 1, scale=c**-0.5) for c in channels),
        *(randn(width) for _ in channels),
        *(randn(1, 2 * width, 3, 3, scale=(18 * width) ** -0.5) for _ in channels[1:]),
        *(randn(1) for _ in channels[1:]),
    ]
    return [x.to(DEVICE).requires_grad_() for x in (*features, *parameters)]


def groups(x: Sequence[Any]) -> tuple[Sequence[Any], ...]:
    """Split the list that `inputs` gives: three a level, and two a gate."""
    n = (len(x) + 2) // 5
    return x[:n], x[n : 2 * n], x[2 * n : 3 * n], x[3 * n : 4 * n - 1], x[4 * n - 1 :]


def fused(*x: Tensor, upsample: str = "nearest") -> Tensor:
    return fused_pool(*groups(x), upsample=upsample)


def statistics_of(features: Sequence[Tensor]) -> list[ChannelStatistics]:
    moments = [channel_moments(feature) for feature in features]
    return [ChannelStatistics(mean, torch.rsqrt(variance + 1e-5), 1e-5) for mean, variance in moments]


def fused_normalised(*x: Tensor, upsample: str = "nearest") -> Tensor:
    return fused_pool(*groups(x), upsample=upsample, statistics=statistics_of(groups(x)[0]))


def plain_normalised(*x: Tensor, upsample: str = "nearest") -> Tensor:
    return pool_collapsed(*groups(x), upsample=upsample, statistics=statistics_of(groups(x)[0]))


def fused_pixel_weights(projections: Sequence[Tensor], biases: Sequence[Tensor], upsample: str) -> list[Tensor]:
    layout = geometry(tuple((x.shape[2], x.shape[3]) for x in projections), upsample)
    seen = torch.cat([x[:, : TAPS * level].flatten(1) for level, x in enumerate(projections)], dim=1)
    own = torch.cat([x[:, TAPS * level :].flatten(1) for level, x in enumerate(projections)], dim=1)
    maps = empty_maps(seen, projections)._replace(seen=seen)
    pixel_weights_forward(maps, own, torch.cat(list(biases)), layout, upsample)
    return list((maps.gates * maps.remaining).split([x.shape[2] * x.shape[3] for x in projections], dim=1))


def rows_of_level(level: int, levels: int) -> int:
    """How many taps look at a level: those of every finer gate, and of the own one if there is one."""
    return TAPS * (level + (level < levels - 1))


def stagewise(*x: Tensor, upsample: str = "nearest") -> Tensor:
    result = fuse_stagewise(*groups(x), upsample=upsample)
    return result.mean((2, 3), dtype=torch.promote_types(result.dtype, torch.float32))


def stagewise_normalised(*x: Tensor, upsample: str = "nearest") -> Tensor:
    features, *parameters = groups(x)
    normalised = [F.batch_norm(feature, None, None, training=True) for feature in features]
    return stagewise(*normalised, *(p for group in parameters for p in group), upsample=upsample)


def assert_no_worse(
    x: Sequence[Tensor],
    *,
    upsample: str = "nearest",
    tested: Callable[..., Tensor] = fused,
    plain: Callable[..., Tensor] = stagewise,
    units: float = UNITS,
) -> None:
    """The oracle of `numerics`, for the value and for the gradients of each kind of input taken together.

    Together, because the gradient of one gate's bias is a sum of numbers that cancel: its error belongs to their size,
    not to its own.
    """
    forms = [partial(form, upsample=upsample) for form in (tested, plain)]
    assert_no_worse_than_eager(*forms, [t.detach() for t in x], units=units)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in x]
    truth, ours, theirs = (
        outputs_and_gradients(form, given)[1] for form, given in ((forms[1], exact), (forms[0], x), (forms[1], x))
    )
    wanted = [i for i, t in enumerate(x) if t.requires_grad]
    kinds = {i: kind for kind, group in enumerate(groups(range(len(x)))) for i in group}
    for kind in {kinds[i] for i in wanted}:
        members = [j for j, i in enumerate(wanted) if kinds[i] == kind]
        together = [torch.cat([g[j].double().flatten() for j in members]) for g in (ours, theirs, truth)]
        error, allowance = relative_error(together[0], together[2]), relative_error(together[1], together[2])
        eps = torch.finfo(ours[members[0]].dtype).eps
        assert error <= allowance + units * eps, f"gradients of kind {kind}: {error:.1e}, plain {allowance:.1e}"


@pytest.mark.parametrize(
    ("pyramid", "upsample"),
    [
        *((pyramid, upsample) for pyramid in ("one level", "ratio 2") for upsample in MODES),
        ("odd", "nearest"),
        ("many pixels", "nearest"),
        *(long(*x) for x in itertools.product(("odd", "many pixels"), ("bilinear",))),
        *(long(*x) for x in itertools.product(("equal and one pixel", "five", "many pixels, large ratios"), MODES)),
    ],
)
def test_no_worse_than_stagewise(pyramid: str, upsample: str) -> None:
    assert_no_worse(inputs(pyramid, images=1 if pyramid == "many pixels" else 2), upsample=upsample)


@pytest.mark.parametrize(("dtype", "upsample"), [(torch.bfloat16, "bilinear"), (torch.float16, "nearest")], ids=str)
@pytest.mark.parametrize("pyramid", ["one level", "ratio 2", long("odd"), long("equal and one pixel")])
def test_no_worse_than_stagewise_in_half_precision(pyramid: str, dtype: torch.dtype, upsample: str) -> None:
    assert_no_worse(inputs(pyramid, dtype=dtype, channels_last=dtype == torch.bfloat16), upsample=upsample)


@pytest.mark.parametrize(
    ("form", "dtype", "mean"),
    [
        pytest.param(fused_normalised, torch.float32, 5.0, id="fused-fp32"),
        pytest.param(fused_normalised, torch.bfloat16, 5.0, id="fused-bf16"),
        pytest.param(plain_normalised, torch.float32, 5.0, id="plain-fp32"),
        pytest.param(plain_normalised, torch.bfloat16, 1.0, id="plain-bf16"),
    ],
)
@pytest.mark.parametrize("pyramid", ["one level", "ratio 2", long("odd")])
def test_normalised_no_worse_than_stagewise(
    pyramid: str, form: Callable[..., Tensor], dtype: torch.dtype, mean: float
) -> None:
    """Of any mean: the kernels take it away as they read, plain PyTorch from the sums, which are larger by as much."""
    x = inputs(pyramid, images=3, dtype=dtype, channels_last=dtype == torch.bfloat16)
    with torch.no_grad():
        for feature in groups(x)[0]:
            feature += mean
    units = UNITS * (1 + mean) if form is plain_normalised else UNITS
    assert_no_worse(x, tested=form, plain=stagewise_normalised, units=units)


@pytest.mark.long
def test_normalised_with_many_pixels() -> None:
    assert_no_worse(inputs("many pixels, large ratios"), tested=fused_normalised, plain=stagewise_normalised)


@pytest.mark.parametrize(
    ("tested", "plain"), [(fused, stagewise), (fused_normalised, stagewise_normalised)], ids=["as it is", "normalised"]
)
@pytest.mark.parametrize("frozen", ["features", "parameters"])
@some_pyramids
def test_gradients_only_where_required(
    pyramid: str, frozen: str, tested: Callable[..., Tensor], plain: Callable[..., Tensor]
) -> None:
    x = inputs(pyramid)
    levels = len(groups(x)[0])
    for i, t in enumerate(x):
        t.requires_grad_((i < levels) != (frozen == "features"))
    assert_no_worse(x, tested=tested, plain=plain)


def test_more_accurate_than_stagewise_in_bf16() -> None:
    x = [t.detach() for t in inputs("odd", 64, images=4, dtype=torch.bfloat16)]
    exact = stagewise(*(t.double() for t in x))
    assert 2 * relative_error(fused(*x), exact) < relative_error(stagewise(*x), exact)


@pytest.mark.parametrize(("images", "width"), [(1, 1), (1, 6), long(10, 1)])  # 10: more images than groups of ∂M
def test_number_of_images_and_width(images: int, width: int) -> None:
    assert_no_worse(inputs("ratio 2", width, images=images))


def test_no_images() -> None:
    x = inputs("ratio 2", images=0)
    y = fused(*x)
    assert y.shape == (0, 6)
    grads = torch.autograd.grad(y.sum(), x)
    assert all((g == 0).all() for g in grads)


def test_non_contiguous_features() -> None:
    x = inputs("ratio 2")
    strided = [
        t.detach()[:, :, ::1].transpose(2, 3).requires_grad_() if t.ndim == 4 and i < 2 else t for i, t in enumerate(x)
    ]
    wide = torch.randn(2, 16, 8, 16, device=DEVICE)[..., ::2].detach().requires_grad_()
    assert not wide.is_contiguous()
    assert_no_worse([wide, *strided[1:]])


@some_pyramids
@pytest.mark.parametrize("bias", [-1e4, 1e4])
def test_saturated_gates(bias: float, pyramid: str) -> None:
    x = inputs(pyramid)
    with torch.no_grad():
        for gate in groups(x)[4]:
            gate.fill_(bias)
    assert_no_worse(x)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_nonfinite_values_stay_in_their_image(value: float) -> None:
    x = [t.detach() for t in inputs("odd")]
    clean = fused(*x)
    x[1][1, 0, 2, 2] = value
    spoilt = fused(*x)
    assert torch.equal(spoilt[0], clean[0])
    assert not spoilt[1].isfinite().any()


@some_pyramids
def test_same_bits_twice_and_a_second_backward_pass(pyramid: str) -> None:
    x = inputs(pyramid, dtype=torch.bfloat16)
    runs = []
    for _ in range(2):
        y = fused(*x)
        upstream = torch.arange(y.numel(), device=DEVICE).view_as(y) / y.numel()
        first = torch.autograd.grad(y, x, upstream, retain_graph=True)
        second = torch.autograd.grad(y, x, 2 * upstream)
        runs.append([y, *first])
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(2 * a.float(), b.float(), rtol=1e-2, atol=1e-4)  # bf16 rounds both
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
def test_pixel_weights_sum_to_one(upsample: str) -> None:
    sizes = ((7, 9), (4, 5), (3, 2))
    projections = [torch.randn(2, rows_of_level(i, 3), *s, device=DEVICE) for i, s in enumerate(sizes)]
    biases = [torch.randn(1, device=DEVICE) for _ in sizes[1:]]
    weights = fused_pixel_weights(projections, biases, upsample)
    total = sum(w.sum(1) for w in weights)
    torch.testing.assert_close(total, torch.ones_like(total))
    for w, expected in zip(weights, pixel_weights(projections, biases, upsample), strict=True):
        torch.testing.assert_close(w, expected)


def test_features_too_large_are_rejected() -> None:
    geometry(((64, 1024), (32, 512)), "nearest")
    with pytest.raises(ValueError, match=r"at level 1 .* H W max\(H, W\) < 119304647, got 500 x 500 pixels; use impl="):
        geometry(((600, 600), (500, 500), (5, 5)), "nearest")
    with pytest.raises(ValueError, match=r"at most 2\^31 values an image, got 4096 x 512 x 1024; use impl='reference'"):
        plan_of(((4096, 512, 1024, True),), torch.bfloat16, "nearest", torch.device("cpu"))


@pytest.mark.parametrize("examples", [6, long(30)])
def test_any_sizes(examples: int) -> None:
    drawn(compare_any_sizes, examples)


def compare_any_sizes(data: st.DataObject) -> None:
    """Sizes that shrink by any ratio, from the sums of what is drawn."""
    corners = data.draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=3))
    upsample, seed = data.draw(st.sampled_from(MODES)), data.draw(st.integers(0, 2**16))
    sizes = [(sum(h for h, _ in corners[i:]), sum(w for _, w in corners[i:])) for i in range(len(corners))]
    generator = torch.Generator().manual_seed(seed)
    projections = [
        torch.randn(1, rows_of_level(i, len(sizes)), *s, generator=generator).to(DEVICE) for i, s in enumerate(sizes)
    ]
    biases = [torch.randn(1, generator=generator).to(DEVICE) for _ in sizes[1:]]
    for w, expected in zip(
        fused_pixel_weights(projections, biases, upsample), pixel_weights(projections, biases, upsample), strict=True
    ):
        torch.testing.assert_close(w, expected, rtol=1e-4, atol=1e-6)  # fp32 through up to two sigmoids


class TestModule:
    def test_pooled_takes_the_kernel(self) -> None:
        torch.manual_seed(0)
        modules = [AdaptiveFeatureFusion([4, 6], 5, impl=impl).to(DEVICE) for impl in ("fused", "reference")]
        modules[0].load_state_dict(modules[1].state_dict())
        features = [torch.randn(2, 4, 8, 8, device=DEVICE), torch.randn(2, 6, 4, 4, device=DEVICE)]
        results = [m.pooled(features) for m in modules]
        torch.testing.assert_close(*results)
        assert not torch.equal(*results)  # another order of summation: it was another path
        assert torch.equal(
            results[1],
            pool_collapsed(
                features,
                [e.weight for e in modules[1].expanders],
                [e.bias for e in modules[1].expanders],
                modules[1].gate_kernels,
                [g.bias for g in modules[1].gates],
            ),
        )

    def test_fused_without_a_gpu_is_rejected(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        fusion = AdaptiveFeatureFusion([4], 5, impl="fused")
        with pytest.raises(RuntimeError, match="AdaptiveFeatureFusion: impl='fused' needs a GPU, got tensors on cpu"):
            fusion.pooled([torch.zeros(1, 4, 2, 2)])

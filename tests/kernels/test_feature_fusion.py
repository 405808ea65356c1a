"""One fused stage of the AFF against the plain one, values and every gradient."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from support.kernel_inputs import long
from support.numerics import assert_no_worse_than_eager
from unikd_fast.kernels.feature_fusion import fused_blend
from unikd_fast.kernels.reference_fusion import blend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Sums over pixels, channels and images in another order than eager's.
UNITS = 8.0

# Ratio 2, odd sizes, another ratio, equal sizes, one coarse pixel.
SIZES = {
    "ratio 2": ((8, 8), (4, 4)),
    "odd": ((7, 9), (4, 5)),
    "ratios 3 and 4": ((9, 8), (3, 2)),
    "equal": ((5, 6), (5, 6)),
    "one pixel": ((6, 5), (1, 1)),
}


def inputs(
    sizes: str = "ratio 2",
    width: int = 6,
    *,
    images: int = 2,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> list[Tensor]:
    """(E, R above, weight, bias), maps in `dtype` and parameters in fp32; all ask for a gradient."""
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    maps = [torch.randn(images, width, *s, generator=generator).to(dtype) for s in SIZES[sizes]]
    parameters = [
        torch.randn(1, 2 * width, 3, 3, generator=generator) * (18 * width) ** -0.5,
        torch.randn(1, generator=generator),
    ]
    tensors = [*(x.contiguous(memory_format=layout) for x in maps), *parameters]
    return [x.to(DEVICE).requires_grad_() for x in tensors]


def with_parameters_as_one(
    form: Callable[..., Tensor], fine: Tensor, coarse: Tensor, flat: Tensor, **options: Any
) -> Tensor:
    """`flat` is the gate's weights and then its bias.

    As one input they are held to one allowance. The gradient of a single bias is a sum of numbers that cancel: its
    error belongs to their size, not to its own.
    """
    return form(fine, coarse, flat[:-1].view(1, 2 * fine.shape[1], 3, 3), flat[-1:], **options)


def assert_no_worse(x: list[Tensor], *, upsample: str = "nearest", pool: bool = False) -> None:
    fine, coarse, weight, bias = x
    flat = torch.cat([weight.detach().flatten(), bias.detach()]).requires_grad_(weight.requires_grad)
    forms = [partial(with_parameters_as_one, form, upsample=upsample, pool=pool) for form in (fused_blend, blend)]
    assert_no_worse_than_eager(*forms, [fine, coarse, flat], units=UNITS)


@pytest.mark.parametrize(
    ("sizes", "upsample"),
    [
        *((sizes, "nearest") for sizes in SIZES if sizes != "one pixel"),
        ("odd", "bilinear"),
        long("one pixel", "nearest"),
        *(long(sizes, "bilinear") for sizes in SIZES if sizes != "odd"),
    ],
)
def test_no_worse_than_plain(sizes: str, upsample: str) -> None:
    assert_no_worse(inputs(sizes), upsample=upsample)


@pytest.mark.parametrize(("dtype", "upsample"), [(torch.bfloat16, "bilinear"), (torch.float16, "nearest")], ids=str)
@pytest.mark.parametrize("sizes", ["odd", "equal"])
def test_no_worse_than_plain_in_half_precision(sizes: str, dtype: torch.dtype, upsample: str) -> None:
    assert_no_worse(inputs(sizes, dtype=dtype, channels_last=dtype == torch.bfloat16), upsample=upsample)


@pytest.mark.parametrize(("sizes", "upsample"), [("ratio 2", "nearest"), ("equal", "nearest"), long("odd", "bilinear")])
def test_pooled(sizes: str, upsample: str) -> None:
    assert_no_worse(inputs(sizes), upsample=upsample, pool=True)


@pytest.mark.parametrize(("images", "width"), [(1, 1), (1, 70), (5, 17)])
def test_number_of_images_and_width(images: int, width: int) -> None:
    assert_no_worse(inputs("ratio 2", width, images=images))


@pytest.mark.parametrize("pool", [False, True])
def test_no_images(pool: bool) -> None:
    x = inputs(images=0)
    y = fused_blend(*x, pool=pool)
    assert y.shape == ((0, 6) if pool else (0, 6, 8, 8))
    assert all((g == 0).all() for g in torch.autograd.grad(y.sum(), x))


def test_mixed_layouts_and_expanded_upstream() -> None:
    x = inputs()
    x[0] = x[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    x[1] = torch.randn(2, 6, 4, 8, device=DEVICE)[..., ::2].detach().requires_grad_()
    assert_no_worse(x)
    results = [torch.autograd.grad(form(*x).mean(), x) for form in (fused_blend, blend)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2, 3), (0, 1), (0, 2, 3)], ids=str)
def test_gradients_only_where_required(frozen: tuple[int, ...]) -> None:
    x = inputs("odd")
    for i in frozen:
        x[i].requires_grad_(False)
    assert_no_worse(x)


@pytest.mark.parametrize("bias", [-1e4, 1e4])
def test_saturated_gates(bias: float) -> None:
    x = inputs()
    with torch.no_grad():
        x[3].fill_(bias)
    assert_no_worse(x)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_nonfinite_values_stay_in_their_image(value: float) -> None:
    x = [t.detach() for t in inputs()]
    clean = fused_blend(*x)
    x[1][1, 0, 2, 2] = value
    spoilt = fused_blend(*x)
    assert torch.equal(spoilt[0], clean[0])
    # Every output whose gate looks at the pixel, and no other.
    assert torch.equal(spoilt[1].isfinite(), blend(*x)[1].isfinite())
    assert not spoilt[1].isfinite().all()


def test_same_bits_twice_and_a_second_backward_pass() -> None:
    x = inputs("odd", dtype=torch.bfloat16)
    runs = []
    for _ in range(2):
        y = fused_blend(*x)
        upstream = torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y).to(y.dtype)
        first = torch.autograd.grad(y, x, upstream, retain_graph=True)
        second = torch.autograd.grad(y, x, 2 * upstream)
        runs.append([y, *first])
        for a, b in zip(first, second, strict=True):
            assert torch.equal(2 * a, b)  # a power of two changes no rounding
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_forward_mode_and_transforms_are_rejected() -> None:
    x = [t.detach() for t in inputs()]
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"blend: .* under forward-mode diff.*'reference'"):
        fused_blend(forward_ad.make_dual(x[0], x[0]), *x[1:])
    with pytest.raises(
        RuntimeError, match=r"blend: the kernel .* under torch\.vmap or another transform of torch\.func"
    ):
        torch.func.grad(lambda fine: fused_blend(fine, *x[1:]).sum())(x[0])


def test_second_derivatives_are_rejected() -> None:
    x = inputs()
    (grad,) = torch.autograd.grad(fused_blend(*x).square().sum(), x[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once, got a second derivative; use impl='reference'"):
        torch.autograd.grad(grad.sum(), x[:1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: (2, 5, 8, 8)}, r"blend: fine and coarse must be .* got \(2, 5, 8, 8\) and \(2, 6, 4, 4\); expand"),
        ({1: (2, 6, 9, 4)}, r"blend: coarse must not be larger than fine, got \(9, 4\) over \(8, 8\); swap"),
        ({2: (1, 6, 3, 3)}, r"blend: gate_weight must be \(1, 12, 3, 3\) or \(6, 12, 3, 3\) for D = 6, got"),
        ({3: (2,)}, r"blend: gate_bias must be \(1,\) to match the outputs of gate_weight, got \(2,\)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", [fused_blend, blend])
def test_mismatched_shapes_are_named(form: object, change: dict[int, tuple[int, ...]], message: str) -> None:
    x = inputs()
    for i, shape in change.items():
        x[i] = torch.zeros(shape, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        form(*x)  # type: ignore[operator]


def test_a_gate_per_channel_is_rejected() -> None:
    fine, coarse, _, _ = inputs()
    gate = torch.zeros(6, 12, 3, 3, device=DEVICE), torch.zeros(6, device=DEVICE)
    with pytest.raises(ValueError, match=r"blend: the kernel needs one gate map, .* got \(6, 12, 3, 3\); use impl="):
        fused_blend(fine, coarse, *gate)

"""Resizing in the kernels, source by source, against PyTorch's interpolation."""

import itertools

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from unikd_fast.kernels._resize_device import axis, first_reached, reach_weight, up
from unikd_fast.kernels.pixel_weights import reach_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit(do_not_specialize=["SIZE", "SMALL", "REACH"])
def _resize_kernel(x_ptr, out_ptr, weights_ptr, SIZE, SMALL, REACH, NEAREST: tl.constexpr, BLOCK: tl.constexpr):
    """Up of one row, and Upᵀ as a matrix (SMALL, SIZE)."""
    p = tl.arange(0, BLOCK)
    row = axis(SIZE // SIZE, SIZE // SIZE)
    along = axis(SIZE, SMALL)
    tl.store(out_ptr + p, up(x_ptr, 0 * p, p, p < SIZE, row, along, NEAREST), mask=p < SIZE)
    first = first_reached(p, along, NEAREST)
    for d in range(REACH):
        weight = reach_weight(p, first + d, along, NEAREST)
        tl.store(weights_ptr + p * SIZE + first + d, weight, mask=(p < SMALL) & (first + d < SIZE))


@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
def test_every_pair_of_sizes(upsample: str) -> None:
    """Up is PyTorch's, and Upᵀ its transpose: nobody who looks at a coarse position is left out."""
    sizes = [
        *itertools.combinations_with_replacement((1, 2, 3, 5, 8), 2),
        (7, 14),
        (7, 56),
        (49, 98),
        (41, 97),
    ]
    for small, size in sizes:
        x = torch.randn(small, generator=torch.Generator().manual_seed(small)).to(DEVICE)
        up_x, weights = torch.zeros(size, device=DEVICE), torch.zeros(small, size, device=DEVICE)
        _resize_kernel[(1,)](
            x,
            up_x,
            weights,
            size,
            small,
            reach_of(small, size, upsample),
            upsample == "nearest",
            triton.next_power_of_2(size),
        )
        mode = {"nearest": "nearest", "bilinear": "linear"}[upsample]
        torch.testing.assert_close(up_x, F.interpolate(x[None, None], size=size, mode=mode)[0, 0], rtol=1e-5, atol=1e-6)
        matrix = F.interpolate(torch.eye(small, device=DEVICE)[:, None], size=size, mode=mode)[:, 0]
        torch.testing.assert_close(weights, matrix, rtol=1e-5, atol=2e-5)  # a rounding of the position, of up to 97
        if upsample == "nearest":
            assert torch.equal(weights, matrix)


def test_reach_of_an_axis() -> None:
    """A coarse position is copied by as many fine ones as the ratio; of ratio 2 it is seen by four bilinearly."""
    assert [reach_of(7, size, "nearest") for size in (7, 14, 21)] == [1, 2, 3]
    assert reach_of(7, 14, "bilinear") == 4
    assert reach_of(1, 9, "bilinear") == 9
    assert reach_of(7, 7, "bilinear") == 1
    assert reach_of(5, 8, "nearest") == 2

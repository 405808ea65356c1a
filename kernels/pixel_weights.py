"""The gates of the collapsed AFF and the weights of its pixels, all levels in one launch (`reference_pooled`).

    a_l = Σ_t shift_t( S_l[t] + Up(Z_{l+1})[t] ) + b_l,    g_l = sigmoid(a_l)
    Z_l = Up(Z_{l+1}) + g_l (S_l - Up(Z_{l+1})),    Z_L = S_L
    w_l = g_l r_l,    r_1 = 1 / (H_1 W_1),    r_{l+1} = Upᵀ( (1 - g_l) r_l ),    w_L = r_L

S_l is what the taps of the gates see of level l, Z_l the same of the fused map R_l. All of it are scalar maps; a
program takes one image through all levels, and levels wait for each other at a barrier. Bytes moved: S read and w
written, a hundredth of the features.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unikd_fast.kernels._launch import MAX_PROGRAMS, Launch, describe, on_device
from unikd_fast.kernels._pixel_weights_device import pixel_weights_backward_kernel, pixel_weights_kernel
from unikd_fast.kernels._resize_tables import axis_table

TAPS = 9


class Geometry(NamedTuple):
    """Where each level lies in the buffers of one image; everything but the tables is a constant of the kernel."""

    heights: tuple[int, ...]
    widths: tuple[int, ...]
    pixels: tuple[int, ...]  # offset of each level in a buffer of one map a level
    seen: tuple[int, ...]  # offset of each level in the buffer of S
    state: tuple[int, ...]  # offset of each level in the buffer of Z
    pixel_size: int
    seen_size: int
    state_size: int
    integers: tuple[int, ...]  # offset of each transition in the tables
    floats: tuple[int, ...]
    reach_y: tuple[int, ...]
    reach_x: tuple[int, ...]
    integer_table: Tensor
    float_table: Tensor


def rows_of_level(level: int, levels: int) -> int:
    """Give how many maps S_l has: the taps of every finer gate, and of the own one if there is one."""
    return TAPS * (level + (level < levels - 1))


@functools.lru_cache(maxsize=64)
def geometry(sizes: tuple[tuple[int, int], ...], upsample: str, device: torch.device) -> Geometry:
    """Give the layout for levels of (H_l, W_l), fine to coarse."""
    levels = len(sizes)
    areas = [h * w for h, w in sizes]
    pixels, pixel_size = _offsets(areas)
    seen, seen_size = _offsets([rows_of_level(i, levels) * area for i, area in enumerate(areas)])
    # Z_L is S_L, and Z_1 is not needed.
    state, state_size = _offsets([TAPS * i * area if i < levels - 1 else 0 for i, area in enumerate(areas)])
    integers = [torch.empty(0, dtype=torch.int32, device=device)]
    floats = [torch.empty(0, device=device)]
    at_integer, at_float, reach_y, reach_x = [], [], [], []
    for (h, w), (small_h, small_w) in itertools.pairwise(sizes):
        y, x = axis_table(small_h, h, upsample, device), axis_table(small_w, w, upsample, device)
        at_integer.append(sum(t.numel() for t in integers))
        at_float.append(sum(t.numel() for t in floats))
        integers += [y.i0, y.i1, x.i0, x.i1, y.start, x.start]
        floats += [y.w0, y.w1, x.w0, x.w1]
        reach_y.append(y.reach)
        reach_x.append(x.reach)
    return Geometry(
        tuple(h for h, _ in sizes),
        tuple(w for _, w in sizes),
        pixels,
        seen,
        state,
        pixel_size,
        seen_size,
        state_size,
        tuple(at_integer),
        tuple(at_float),
        tuple(reach_y),
        tuple(reach_x),
        torch.cat(integers),
        torch.cat(floats),
    )


def _offsets(sizes: Sequence[int]) -> tuple[tuple[int, ...], int]:
    return tuple(sum(sizes[:i]) for i in range(len(sizes))), sum(sizes)


def _constants(layout: Geometry, upsample: str) -> dict[str, Any]:
    device = describe(layout.integer_table.device)
    block = 512 if device.amd else 1024  # one pixel a thread, or two
    return {
        "L": len(layout.heights),
        "HS": layout.heights,
        "WS": layout.widths,
        "PIXELS": layout.pixels,
        "SEEN": layout.seen,
        "STATE": layout.state,
        "PIXEL_SIZE": layout.pixel_size,
        "SEEN_SIZE": layout.seen_size,
        "STATE_SIZE": layout.state_size,
        "INTEGERS": layout.integers,
        "FLOATS": layout.floats,
        "REACH_Y": layout.reach_y,
        "REACH_X": layout.reach_x,
        "NEAREST": upsample == "nearest",
        "BLOCK": block,
        **Launch(1, block, True, 512 // device.warp_size, MAX_PROGRAMS, device.amd).options,
    }


class Saved(NamedTuple):
    """What backward needs: scalar maps."""

    seen: Tensor
    gates: Tensor
    states: Tensor
    remaining: Tensor


def pixel_weights_forward(seen: Tensor, biases: Tensor, layout: Geometry, upsample: str) -> tuple[Tensor, Saved]:
    """Launch: from S (N, seen_size) and the gates' biases (L - 1,) to the weights (N, pixel_size)."""
    images = seen.shape[0]
    gates, remaining, weights = (seen.new_empty(images, layout.pixel_size) for _ in range(3))
    states = seen.new_empty(images, max(layout.state_size, 1))
    if images:
        with on_device(seen):
            pixel_weights_kernel[(images,)](
                seen, biases, layout.integer_table, layout.float_table, gates, states, remaining, weights,
                **_constants(layout, upsample),
            )  # fmt: skip
    return weights, Saved(seen, gates, states, remaining)


def pixel_weights_backward(
    saved: Saved, grad_weights: Tensor, layout: Geometry, upsample: str
) -> tuple[Tensor, Tensor]:
    """Launch: from the gradient of the weights to those of S (N, seen_size) and of the biases (L - 1,)."""
    seen, gates, states, remaining = saved
    images, levels = seen.shape[0], len(layout.heights)
    grad_remaining, grad_gates = torch.empty_like(gates), torch.empty_like(gates)
    grad_states, grad_seen = torch.empty_like(states), torch.empty_like(seen)
    grad_biases = seen.new_empty(images, levels - 1)
    if images:
        with on_device(seen):
            pixel_weights_backward_kernel[(images,)](
                seen, layout.integer_table, layout.float_table, gates, states, remaining, grad_weights, grad_remaining,
                grad_gates, grad_states, grad_seen, grad_biases, **_constants(layout, upsample),
            )  # fmt: skip
    return grad_seen, grad_biases.sum(0)

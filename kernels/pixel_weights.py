"""The gates of the collapsed AFF and the weights of its pixels, all levels in one launch (`reference_pooled`).

    a_l = Σ_t shift_t( S_l[t] + Up(Z_{l+1})[t] ) + b_l,    g_l = sigmoid(a_l)
    Z_l = Up(Z_{l+1}) + g_l (S_l - Up(Z_{l+1})),    Z_L = S_L
    w_l = g_l r_l,    r_1 = 1 / (H_1 W_1),    r_{l+1} = Upᵀ( (1 - g_l) r_l ),    g_L = 1

S_l is what the taps of the gates see of level l, in two buffers: `own` for the taps of its own gate, which backward
does not need, and `seen` for those of the finer gates. Z_l is the same of the fused map R_l. All maps are scalar; a
program takes one image through all levels, with a barrier between levels. Bytes moved: S read and g, r, Z written, a
tenth of the features of a ResNet-50 in bf16.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from unikd_fast.kernels._launch import MAX_PROGRAMS, Launch, describe, on_device
from unikd_fast.kernels._pixel_weights_device import pixel_weights_backward_kernel, pixel_weights_kernel
from unikd_fast.kernels.reference_fusion import resize
from unikd_fast.kernels.reference_pooled import TAPS

Sizes = tuple[tuple[int, int], ...]


class Geometry(NamedTuple):
    """The levels' sizes, which the kernels take as arguments, and those of the buffers of one image."""

    heights: tuple[int, ...]
    widths: tuple[int, ...]
    reach_y: tuple[int, ...]  # of each transition, fine to coarse, and 1: there is always one
    reach_x: tuple[int, ...]
    reach: tuple[int, ...]  # of both axes, in whole steps
    pixel_size: int  # of a buffer of one map a level
    seen_size: int  # of what the finer gates' taps see
    own_size: int  # of what the own gate's taps see
    state_size: int  # of Z
    table_size: int  # in the scratch memory of an image
    scratch_size: int


@functools.lru_cache(maxsize=256)
def reach_of(coarse: int, fine: int, upsample: str) -> int:
    """Return how many fine positions of an axis, from the first on, a coarse one reaches at most.

    That is what Upᵀ visits: from PyTorch's interpolation of the unit vectors. A first position
    (`_resize_device.first_reached`) may be one too early where the two round differently: its weight is 0.
    """
    unit_vectors = torch.eye(coarse, dtype=torch.float32, device="cpu")[None, None]
    used = resize(unit_vectors, (fine, coarse), upsample)[0, 0] != 0  # (fine, coarse); columns stay as they are
    rows, columns = torch.arange(fine, device="cpu"), torch.arange(coarse, device="cpu")
    first = (columns * fine + coarse - 1) // coarse
    if upsample == "bilinear":
        first = ((2 * columns - 1) * fine + coarse).clamp(min=0) // (2 * coarse)
    last = torch.where(used, rows[:, None], -1).amax(0)
    return max(int((last - first).max()) + 1, 1)


@functools.lru_cache(maxsize=64)
def geometry(sizes: Sizes, upsample: str) -> Geometry:
    """Return the layout for levels of (H_l, W_l), fine to coarse.

    Raises:
        ValueError: a map has too many pixels for the kernels' divisions (`quotient`).
    """
    for level, (h, w) in enumerate(sizes[:-1]):
        limit = 2**31 // (TAPS * (level + 1))
        if h * w * max(h, w) >= limit:
            raise ValueError(
                f"AFF: at level {level} the kernels take features of H W max(H, W) < {limit}, got {h} x {w} pixels; "
                f"use impl='reference'"
            )
    pixels, seen, own, state = map_sizes([h * w for h, w in sizes])
    y, x = (
        (*(reach_of(coarse[i], fine[i], upsample) for fine, coarse in itertools.pairwise(sizes)), 1) for i in range(2)
    )
    # Of a coarse position as many fine ones as are unrolled at a time; one too many has weight 0.
    step = 2 if upsample == "nearest" else 4
    reach = tuple(-(-max(pair) // step) * step for pair in zip(y, x, strict=True))
    tables, columns = [0], [0]
    for i, ((h, w), (small_h, small_w)) in enumerate(itertools.pairwise(sizes)):
        tables.append((small_h + small_w) * (reach[i] + 1))
        # Upᵀ along x of all maps at once, or Up along x for the three rows of a gate's taps.
        columns.append(max((TAPS * i + 3) * h * small_w, 3 * small_h * w))
    return Geometry(
        tuple(h for h, _ in sizes),
        tuple(w for _, w in sizes),
        y,
        x,
        reach,
        sum(pixels),
        sum(seen),
        sum(own),
        sum(state),
        max(tables),
        max(tables) + max(columns),
    )


def varying(numbers: Sequence[int]) -> tuple[int, ...]:
    """Return numbers as a launch takes them without a new compilation: odd ones (`_pooled_device.number`).

    Of a tuple Triton makes 1 a constant and multiples of 16 known as such, whatever it is told about the argument.
    """
    return tuple(2 * x + 1 for x in numbers)


def map_sizes(areas: Sequence[int]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return the size of each level in the buffers of one image, given its pixels: one map, `seen`, `own`, Z."""
    gates = len(areas) - 1
    seen = [TAPS * level * area for level, area in enumerate(areas)]
    own = [TAPS * area if level < gates else 0 for level, area in enumerate(areas)]
    # Z_L is S_L, and Z_1 is not needed.
    state = [size if level < gates else 0 for level, size in enumerate(seen)]
    return list(areas), seen, own, state


def offsets(sizes: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Return the offset of each part in a common buffer, and the size of the buffer."""
    ends = list(itertools.accumulate(sizes, initial=0))
    return tuple(ends[:-1]), ends[-1]


def _options(layout: Geometry, upsample: str, where: torch.device) -> dict[str, Any]:
    device = describe(where)
    # One pixel of one group of taps a thread: in `_gate_gradient` the copies of a tile that a larger launch would have
    # could read what has been replaced.
    block = 512
    gates = len(layout.heights) - 1
    return {
        "HS": varying(layout.heights),
        "WS": varying(layout.widths),
        "REACH": varying(layout.reach),
        "TABLES": layout.table_size,
        "SCRATCH": layout.scratch_size,
        "TAP_ROWS": 3,
        "L": len(layout.heights),
        "GROUPS": tuple(triton.next_power_of_2(max(gate, 1)) for gate in range(gates)),
        "NEAREST": upsample == "nearest",
        "BLOCK": block,
        **Launch(1, block, True, block // device.warp_size, MAX_PROGRAMS, device.amd).options,
    }


class ScalarMaps(NamedTuple):
    """What backward needs from the gates, one row per image."""

    seen: Tensor  # (N, seen_size)
    gates: Tensor  # (N, pixel_size), 1 at the coarsest level
    states: Tensor  # (N, state_size)
    remaining: Tensor  # (N, pixel_size); the weights are gates * remaining


class GradMaps(NamedTuple):
    """Gradients of S, of a and of the biases; the taps of the own gate have that of a, shifted back."""

    seen: Tensor  # (N, seen_size)
    a: Tensor  # (N, pixel_size)
    biases: Tensor  # (N, L - 1), to be summed over the images


def empty_maps(like: Tensor, levels: Sequence[Tensor]) -> ScalarMaps:
    """Return the buffers for levels (N, C_l, H_l, W_l)."""
    pixels, seen, _, state = (sum(part) for part in map_sizes([x.shape[2] * x.shape[3] for x in levels]))
    return ScalarMaps(*(like.new_empty(levels[0].shape[0], size) for size in (seen, pixels, state, pixels)))


def pixel_weights_forward(maps: ScalarMaps, own: Tensor, biases: Tensor, layout: Geometry, upsample: str) -> None:
    """Launch: from S in `maps.seen` and `own` (N, own_size) and the gates' biases (L - 1,) to the rest of the maps."""
    with on_device(own):
        pixel_weights_kernel[(len(own),)](
            maps.seen, own, biases, maps.gates, maps.states, maps.remaining,
            own.new_empty(len(own), layout.scratch_size), **_options(layout, upsample, own.device),
        )  # fmt: skip


def pixel_weights_backward(maps: ScalarMaps, grad_weights: Tensor, layout: Geometry, upsample: str) -> GradMaps:
    """Launch: from the gradient of the weights (N, pixel_size), which is overwritten."""
    seen, gates, states, remaining = maps
    images = len(gates)
    grad_states = gates.new_empty(images, layout.state_size)
    sizes = (layout.seen_size, layout.pixel_size, len(layout.heights) - 1)
    grads = GradMaps(*(gates.new_empty(images, size) for size in sizes))
    with on_device(gates):
        pixel_weights_backward_kernel[(images,)](
            seen, gates, states, remaining, grad_weights, grads.a, grad_states, grads.seen, grads.biases,
            gates.new_empty(images, layout.scratch_size), **_options(layout, upsample, gates.device),
        )  # fmt: skip
    return grads

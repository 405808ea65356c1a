"""What the launches of `pooled_fusion` need to know about the levels: sizes, layouts and offsets."""

import functools
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from unikd_fast.kernels._launch import MAX_PROGRAMS, Launch, describe
from unikd_fast.kernels._pooled_device import CHANNELS_LAST, CONTIGUOUS, WHOLE_CHANNELS
from unikd_fast.kernels.pixel_weights import Geometry, geometry, offsets, varying
from unikd_fast.kernels.reference_pooled import TAPS

# Programs that share the features in backward, a multiprocessor: as many as are resident. Each leaves a part of ∂M.
SHARES = 2
_STAGES = 4  # tiles that are under way or in use
_SUM_BLOCK = 128
_NORM_BLOCK = 64


Level = tuple[int, int, int, bool]  # (C, H, W, channels_last)


class Plan(NamedTuple):
    """Arguments of the launches; none depends on the number of images, and no constant on their size."""

    layout: Geometry
    parts: int  # numbers that the parts of ∂M take
    project: dict[str, Any]
    average: dict[str, Any]
    weight_gradient: dict[str, Any]
    feature_gradient: dict[str, Any]
    blend_gradient: dict[str, Any]  # the same for a blend, which needs more registers
    sum_parts: dict[str, Any]
    norm_gradient: dict[str, Any]
    pixel_blocks: int
    channel_blocks: int
    sum_programs: int
    norm_programs: int
    channel_blocks_of: tuple[int, ...]
    groups: tuple[int, ...]
    pixel_blocks_of: tuple[int, ...]

    def gradient_programs(self, images: int) -> int:
        shares = (min(images * b, g) for b, g in zip(self.pixel_blocks_of, self.groups, strict=True))
        return sum(c * g for c, g in zip(self.channel_blocks_of, shares, strict=True))


def plan_for(features: Sequence[Tensor], upsample: str) -> Plan:
    return plan_of(levels_of(features), features[0].dtype, upsample, features[0].device)


def levels_of(features: Sequence[Tensor]) -> tuple[Level, ...]:
    """Return (C, H, W, channels_last) of each level; one of a single pixel, which is both, is as the finest."""
    finest = not features[0].is_contiguous()
    return tuple((*f.shape[1:], finest if f.shape[2] * f.shape[3] == 1 else not f.is_contiguous()) for f in features)


def layout_of(height: int, width: int, channels_last: bool) -> int:
    """Return the layout of a level for the kernels, which is all that they are compiled for beside its channels."""
    if channels_last:
        return CHANNELS_LAST.value
    return (CONTIGUOUS if height * width % 8 else WHOLE_CHANNELS).value


@functools.lru_cache(maxsize=64)
def plan_of(levels: tuple[Level, ...], dtype: torch.dtype, upsample: str, device: torch.device) -> Plan:
    """Plan for levels, see `levels_of`."""
    for c, h, w, _ in levels:
        if c * h * w >= 2**31:  # `offsets_in_image`
            raise ValueError(
                f"AFF: the kernels take features of at most 2^31 values an image, got {c} x {h} x {w}; "
                f"use impl='reference'"
            )
    gates = len(levels) - 1
    layout = geometry(tuple((h, w) for _, h, w, _ in levels), upsample)
    channels = [c for c, *_ in levels]
    pixels = [h * w for _, h, w, _ in levels]
    column, width = offsets(channels)
    rows = [TAPS * (i + (i < gates)) for i in range(len(levels))]
    description = describe(device)
    narrow = Launch(1, 64, True, 128 // description.warp_size, MAX_PROGRAMS, description.amd)
    # Two products and two sums at a time need the registers of twice the threads.
    wide = narrow._replace(num_warps=2 * narrow.num_warps)
    # The interpreter multiplies half precision wrongly; a product in fp32 takes its operands in registers.
    exact = dtype == torch.float32 or os.environ.get("TRITON_INTERPRET") == "1"
    largest = 32 if dtype == torch.float32 else 64
    block_c = min(largest, _power_of_two(max(channels)))
    gradient_c, gradient_p = min(2 * largest, _power_of_two(max(channels))), 32
    channel_blocks_of = [math.ceil(c / gradient_c) for c in channels]
    pixel_blocks_of = [math.ceil(p / gradient_p) for p in pixels]
    groups = _groups(
        pixel_blocks_of, channel_blocks_of, SHARES * description.multiprocessors if device.type == "cuda" else 8
    )
    block_cs = [min(largest, _power_of_two(c)) for c in channels]
    channel_first, channel_blocks = offsets([math.ceil(c / b) for c, b in zip(channels, block_cs, strict=True)])
    sum_first, sum_programs = offsets(
        [r * math.ceil((c + 1) / _SUM_BLOCK) for r, c in zip(rows, channels, strict=True)]
    )
    sizes = {"HS": varying(layout.heights), "WS": varying(layout.widths)}
    shared = sizes | {
        "L": len(levels),
        "CS": tuple(channels),
        "COLUMN": (*column, width),
        "COLUMNS": width + len(levels),
    }
    layouts = {"LAYOUTS": tuple(layout_of(*level[1:]) for level in levels)}
    of_rows = {"ROWS": tuple(rows), "ROWS_PADDED": tuple(_power_of_two(r) for r in rows)}
    of_groups = {"GROUPS": varying(groups), "BLOCK_P": gradient_p}
    by_pixels = {"BLOCK_P": largest, "BLOCK_C": block_c}
    gradient = (
        shared
        | layouts
        | of_rows
        | of_groups
        | {
            "REACH_Y": varying(layout.reach_y),
            "REACH_X": varying(layout.reach_x),
            "NEAREST": upsample == "nearest",
            "EXACT": exact,
            "STAGES": None if description.amd else _STAGES,
            "BLOCK_C": gradient_c,
        }
        | wide.options
        | {"num_stages": _STAGES}
    )
    # With the taps of five levels' gates, or the pixels that a blend looks at, the registers are too few for that.
    resident = {}
    if not description.amd and max(rows) <= 32:
        resident["maxnreg"] = 65536 // (SHARES * 32 * wide.num_warps)
    return Plan(
        layout,
        sum(g * r * (c + 1) for g, r, c in zip(groups, rows, channels, strict=True)),
        project=shared | layouts | of_rows | by_pixels | {"EXACT": exact} | narrow.options,
        average=shared
        | layouts
        | {"FIRST": (*channel_first, channel_blocks), "BLOCK_P": largest, "BLOCK_CS": tuple(block_cs)}
        | narrow.options,
        weight_gradient=shared | layouts | by_pixels | narrow.options,
        feature_gradient=gradient | resident,
        blend_gradient=gradient,
        sum_parts=shared
        | of_groups
        | {"ROWS": tuple(rows), "FIRST": (*sum_first, sum_programs), "BLOCK": _SUM_BLOCK}
        | narrow.options,
        norm_gradient=sizes
        | {key: shared[key] for key in ("L", "COLUMN", "COLUMNS")}
        | {"ROWS": 2 * TAPS * gates, "BLOCK": 16, "BLOCK_C": _NORM_BLOCK}
        | narrow.options,
        pixel_blocks=sum(math.ceil(p / largest) for p in pixels),
        channel_blocks=channel_blocks,
        sum_programs=sum_programs,
        norm_programs=math.ceil(width / _NORM_BLOCK),
        channel_blocks_of=tuple(channel_blocks_of),
        groups=tuple(groups),
        pixel_blocks_of=tuple(pixel_blocks_of),
    )


def _groups(pixel_blocks: Sequence[int], channel_blocks: Sequence[int], programs: int) -> list[int]:
    """Divide programs among the levels so that the longest takes as few blocks of pixels as it can.

    A level's groups share its blocks of pixels, with a program for each block of channels.
    """
    groups = [1] * len(pixel_blocks)
    while True:
        longest = max(range(len(groups)), key=lambda i: pixel_blocks[i] / groups[i])
        groups[longest] += 1
        if sum(g * c for g, c in zip(groups, channel_blocks, strict=True)) > programs:
            groups[longest] -= 1
            return groups


def _power_of_two(size: int) -> int:
    """Return the smallest tile that holds `size`; a product of tiles needs 16."""
    return max(16, triton.next_power_of_2(size))

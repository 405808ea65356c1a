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
from unikd_fast.kernels.pixel_weights import Geometry, geometry, offsets
from unikd_fast.kernels.reference_pooled import TAPS

# Programs that share the features in backward, a multiprocessor; each leaves a part of ∂M.
SHARES = 8
_SUM_BLOCK = 128
_NORM_BLOCK = 64


class Plan(NamedTuple):
    """Arguments of the launches; none depends on the number of images."""

    layout: Geometry
    parts: int  # numbers that the parts of ∂M take
    project: dict[str, Any]
    average: dict[str, Any]
    weight_gradient: dict[str, Any]
    feature_gradient: dict[str, Any]
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
    levels = tuple((*f.shape[1:], not f.is_contiguous()) for f in features)
    return plan_of(levels, features[0].dtype, upsample, features[0].device)


@functools.lru_cache(maxsize=64)
def plan_of(
    levels: tuple[tuple[int, int, int, bool], ...], dtype: torch.dtype, upsample: str, device: torch.device
) -> Plan:
    """Plan for levels (C, H, W, channels_last)."""
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
    block_ps = [min(largest, _power_of_two(p)) for p in pixels]
    # Where a channel has many pixels, fewer channels a program.
    block_cs = [min(32 if p >= 1024 else largest, _power_of_two(c)) for c, p in zip(channels, pixels, strict=True)]
    block_c, block_p = min(largest, _power_of_two(max(channels))), min(32, _power_of_two(max(pixels)))
    channel_blocks_of = [math.ceil(c / block_c) for c in channels]
    shares = SHARES * description.multiprocessors if device.type == "cuda" else 8
    size = sum(c * p for c, p in zip(channels, pixels, strict=True))
    groups = [
        max(1, round(shares * c * p / size / b)) for c, p, b in zip(channels, pixels, channel_blocks_of, strict=True)
    ]
    parts, parts_size = offsets([g * r * (c + 1) for g, r, c in zip(groups, rows, channels, strict=True)])
    pixel_first, pixel_blocks = offsets([math.ceil(p / b) for p, b in zip(pixels, block_ps, strict=True)])
    channel_first, channel_blocks = offsets([math.ceil(c / b) for c, b in zip(channels, block_cs, strict=True)])
    sum_first, sum_programs = offsets(
        [r * math.ceil((c + 1) / _SUM_BLOCK) for r, c in zip(rows, channels, strict=True)]
    )
    shared = {
        "L": len(levels),
        "CS": tuple(channels),
        "COLUMN": (*column, width),
        "COLUMNS": width + len(levels),
    }
    strides = {
        "SCS": tuple(1 if last else p for (*_, last), p in zip(levels, pixels, strict=True)),
        "SPS": tuple(c if last else 1 for c, *_, last in levels),
    }
    of_rows = {"ROWS": tuple(rows), "ROWS_PADDED": tuple(_power_of_two(r) for r in rows)}
    of_pixels = {"PIXELS": layout.pixels, "PIXEL_SIZE": layout.pixel_size}
    of_seen = {"SEEN": layout.seen, "SEEN_SIZE": layout.seen_size}
    by_pixels = {"PS": tuple(pixels), "FIRST": (*pixel_first, pixel_blocks), "BLOCK_PS": tuple(block_ps)}
    of_groups = {"GROUPS": tuple(groups), "PARTS": parts, "BLOCK_P": block_p}
    return Plan(
        layout,
        parts_size,
        project=shared
        | strides
        | of_seen
        | of_rows
        | by_pixels
        | {"OWN": layout.own, "OWN_SIZE": layout.own_size, "EXACT": exact, "BLOCK_C": block_c}
        | narrow.options,
        average=shared
        | strides
        | of_pixels
        | {
            "PS": tuple(pixels),
            "FIRST": (*channel_first, channel_blocks),
            "BLOCK_PS": tuple(block_ps),
            "BLOCK_CS": tuple(block_cs),
        }
        | narrow.options,
        weight_gradient=shared | strides | of_pixels | by_pixels | {"BLOCK_C": block_c} | narrow.options,
        feature_gradient=shared
        | strides
        | of_pixels
        | of_seen
        | of_rows
        | of_groups
        | {
            "HS": layout.heights,
            "WS": layout.widths,
            # Of the first transition, for two levels; one level has none.
            "RYS": (*layout.ratio_y, 0),
            "RXS": (*layout.ratio_x, 0),
            "REACH_Y": (*layout.reach_y, 0),
            "REACH_X": (*layout.reach_x, 0),
            "NEAREST": upsample == "nearest",
            "EXACT": exact,
            "BLOCK_C": block_c,
        }
        | wide.options,
        sum_parts=shared
        | of_groups
        | {
            "PS": tuple(pixels),
            "ROWS": tuple(rows),
            "FIRST": (*sum_first, sum_programs),
            "BLOCK": _SUM_BLOCK,
        }
        | narrow.options,
        norm_gradient={key: shared[key] for key in ("L", "COLUMN", "COLUMNS")}
        | {"PS": tuple(pixels), "ROWS": 2 * TAPS * gates, "BLOCK": 16, "BLOCK_C": _NORM_BLOCK}
        | narrow.options,
        pixel_blocks=pixel_blocks,
        channel_blocks=channel_blocks,
        sum_programs=sum_programs,
        norm_programs=math.ceil(width / _NORM_BLOCK),
        channel_blocks_of=tuple(channel_blocks_of),
        groups=tuple(groups),
        pixel_blocks_of=tuple(math.ceil(p / block_p) for p in pixels),
    )


def _power_of_two(size: int) -> int:
    """Return the smallest tile that holds `size`; a product of tiles needs 16."""
    return max(16, triton.next_power_of_2(size))

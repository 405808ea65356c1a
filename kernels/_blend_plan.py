"""What the kernels of one blend need to know of its two levels."""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from unikd_fast.kernels._launch import MAX_PROGRAMS, Launch, describe
from unikd_fast.kernels.pixel_weights import axis_of

Level = tuple[int, int, int, bool]  # (C, H, W, channels_last)


class BlendPlan(NamedTuple):
    """Sizes and constants, nothing on a device; nothing of it depends on the number of images."""

    blocks: int  # of fine pixels
    coarse_blocks: int  # of coarse pixels, times those of channels
    constants: dict[str, Any]  # of all kernels
    reach: dict[str, int]  # of those that go back to the coarse level
    pixels: int


def level_of(x: Tensor) -> Level:
    _, c, h, w = x.shape
    return c, h, w, not x.is_contiguous()


def blend_plan(fine: Tensor, coarse: Tensor, upsample: str) -> BlendPlan:
    return plan_of(level_of(fine), level_of(coarse), upsample, fine.device)


@functools.lru_cache(maxsize=256)
def plan_of(fine: Level, coarse: Level, upsample: str, device: torch.device) -> BlendPlan:
    channels, h, w, _ = fine
    _, small_h, small_w, _ = coarse
    y, x = axis_of(small_h, h, upsample), axis_of(small_w, w, upsample)
    description = describe(device)
    launch = Launch(1, 64, True, 128 // description.warp_size, MAX_PROGRAMS, description.amd)
    block_p, block_c = (min(size, max(16, triton.next_power_of_2(x))) for size, x in ((32, h * w), (64, channels)))
    (sc, sp), (small_sc, small_sp) = strides(fine), strides(coarse)
    return BlendPlan(
        math.ceil(h * w / block_p),
        math.ceil(small_h * small_w / block_p) * math.ceil(channels / block_c),
        {
            "C": channels,
            "H": h,
            "W": w,
            "SMALL_H": small_h,
            "SMALL_W": small_w,
            "SC": sc,
            "SP": sp,
            "SMALL_SC": small_sc,
            "SMALL_SP": small_sp,
            "RY": y.ratio,
            "RX": x.ratio,
            "NEAREST": upsample == "nearest",
            "BLOCK_P": block_p,
            "BLOCK_C": block_c,
            **launch.options,
        },
        {"REACH_Y": y.reach, "REACH_X": x.reach},
        h * w,
    )


def strides(level: Level) -> tuple[int, int]:
    """Give (channel stride, pixel stride)."""
    channels, h, w, channels_last = level
    return (1, channels) if channels_last else (h * w, 1)


def laid_out_as(x: Tensor, upstream: Tensor) -> Tensor:
    """Give a gradient in the layout of `x`; that of an average, for example, is expanded and has none."""
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return upstream.contiguous(memory_format=layout)

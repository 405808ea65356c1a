"""What resizing does along one axis, as tables that kernels look up: exactly what PyTorch's interpolation does."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from unikd_fast.kernels.reference_fusion import resize


class AxisTable(NamedTuple):
    """Each of the fine positions is w0 coarse[i0] + w1 coarse[i1]."""

    i0: Tensor  # (fine,) int32
    i1: Tensor  # (fine,) int32
    w0: Tensor  # (fine,) fp32
    w1: Tensor  # (fine,) fp32, 0 where i1 is i0
    start: Tensor  # (coarse,) int32, the first fine position that a coarse one reaches
    reach: int  # how many fine positions a coarse one reaches at most
    ratio: int  # r where the fine position i is a copy of the coarse i // r, else 0: then kernels need no table


@functools.lru_cache(maxsize=256)
def axis_table(coarse: int, fine: int, upsample: str, device: torch.device) -> AxisTable:
    """Give the table of one axis; `upsample` is "nearest" or "bilinear"."""
    unit_vectors = torch.eye(coarse, dtype=torch.float32)[None, None]
    matrix = resize(unit_vectors, (fine, coarse), upsample)[0, 0]  # (fine, coarse); columns stay as they are
    used = matrix != 0
    positions = torch.arange(coarse)
    i0 = torch.where(used, positions, coarse).amin(1)
    i1 = torch.where(used, positions, -1).amax(1)
    rows = torch.arange(fine)
    w1 = torch.where(i1 == i0, 0.0, matrix[rows, i1])
    first = torch.where(used, rows[:, None], fine).amin(0)
    last = torch.where(used, rows[:, None], -1).amax(0)
    first = torch.where(last < 0, 0, first)  # no fine position looks at it
    ratio = -(-fine // coarse)
    copies = torch.equal(i0, i1) and torch.equal(i0, rows // ratio)
    return AxisTable(
        i0.int().to(device),
        i1.int().to(device),
        matrix[rows, i0].to(device),
        w1.to(device),
        first.int().to(device),
        max(int((last - first).max()) + 1, 1),
        ratio if copies else 0,
    )

"""Multiplies gradients computed in forward by the upstream gradient: in place, in one launch, without a host read."""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from unikd_fast.kernels._launch import elementwise_launch_for, on_device, programs_for
from unikd_fast.kernels._rows_device import (
    row_pointers,
    store_tile,
    tile_pointers,
)

MOST_BUFFERS = 8


def multiply_in_place(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Multiply each gradient (..., K) by its factor, all in one launch without a host read.

    A factor is 0-d, for a gradient that is dense in whatever order, or (...,), for one that is dense in rows.
    """
    for start in range(0, len(pairs), MOST_BUFFERS):
        _multiply(pairs[start : start + MOST_BUFFERS])


def _multiply(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    if not pairs:
        return
    arguments: list[Any] = []
    shapes: list[int] = []
    per_row: list[bool] = []
    most = 0
    for gradient, factor in pairs:
        classes = gradient.shape[-1]
        arguments += [gradient, factor.contiguous(), gradient.numel() // classes]
        shapes.append(classes)
        per_row.append(factor.ndim > 0)
        most = max(most, arguments[-1])
    padding = MOST_BUFFERS - len(pairs)
    arguments += [None, None, 0] * padding
    shapes += [1] * padding
    per_row += [False] * padding
    widest = max((g for g, _ in pairs), key=lambda g: g.shape[-1])
    launch = elementwise_launch_for(widest)
    with on_device(widest):
        _multiply_kernel[(programs_for(launch, most, widest.device), len(pairs))](
            *arguments,
            *shapes,
            *per_row,
            ROWS=launch.rows,
            BLOCK_K=launch.block_k,
            **launch.options,
        )


@triton.jit
def _multiply_rows(
    ptr, factor_ptr, N, K: tl.constexpr, PER_ROW: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr
):
    if PER_ROW:
        tiles = tl.cdiv(N, ROWS)
    else:
        factor = tl.load(factor_ptr).to(tl.float32)
        tiles = tl.where(factor == 1.0, 0, tl.cdiv(N, ROWS))
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        live = rows < N
        if PER_ROW:
            factors = tl.load(factor_ptr + rows, mask=live, other=0.0).to(tl.float32)[:, None]
        else:
            factors = factor
        row_ptrs = row_pointers(ptr, rows, K)
        for start in range(0, K, BLOCK_K):
            cols = start + tl.arange(0, BLOCK_K)
            inside = live[:, None] & (cols < K)[None, :]
            x = tl.load(tile_pointers(row_ptrs, cols, 1), mask=inside, other=0.0).to(tl.float32)
            # An ignored row stays 0: 0 · inf is NaN.
            store_tile(row_ptrs, cols, live, tl.where(x == 0.0, 0.0, x * factors), K)


@triton.jit(do_not_specialize=["n0", "n1", "n2", "n3", "n4", "n5", "n6", "n7"])
def _multiply_kernel(
    g0, f0, n0, g1, f1, n1, g2, f2, n2, g3, f3, n3, g4, f4, n4, g5, f5, n5, g6, f6, n6, g7, f7, n7,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, K3: tl.constexpr,
    K4: tl.constexpr, K5: tl.constexpr, K6: tl.constexpr, K7: tl.constexpr,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr,
    R4: tl.constexpr, R5: tl.constexpr, R6: tl.constexpr, R7: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(1)
    if which == 0:
        _multiply_rows(g0, f0, n0, K0, R0, ROWS, BLOCK_K)
    if g1 is not None:
        if which == 1:
            _multiply_rows(g1, f1, n1, K1, R1, ROWS, BLOCK_K)
    if g2 is not None:
        if which == 2:
            _multiply_rows(g2, f2, n2, K2, R2, ROWS, BLOCK_K)
    if g3 is not None:
        if which == 3:
            _multiply_rows(g3, f3, n3, K3, R3, ROWS, BLOCK_K)
    if g4 is not None:
        if which == 4:
            _multiply_rows(g4, f4, n4, K4, R4, ROWS, BLOCK_K)
    if g5 is not None:
        if which == 5:
            _multiply_rows(g5, f5, n5, K5, R5, ROWS, BLOCK_K)
    if g6 is not None:
        if which == 6:
            _multiply_rows(g6, f6, n6, K6, R6, ROWS, BLOCK_K)
    if g7 is not None:
        if which == 7:
            _multiply_rows(g7, f7, n7, K7, R7, ROWS, BLOCK_K)

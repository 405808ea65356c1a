"""Device code of `pooled_fusion`, backward through the batch statistics of normalised features x̂ = (x - μ) r.

With the averages A of x̂, the sums of their weights, M on x̂ and what its rows saw, S, the sums of a channel are

    Σ ∂x̂    = Σ_n ∂A Σ_p w + Mᵀ Σ ∂S,        Σ ∂x̂ x̂ = Σ_n ∂A A + diag( Mᵀ ∂M ),    ∂M = r Σ ∂S (x - μ)ᵀ

and what the norm adds to ∂x is slope (x - μ) + offset, as `_pooled_gradient_device` has it. A program takes a block of
channels through all images and rows, in their order.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N"])
def norm_gradient_kernel(
    upstream_ptr,  # (N, COLUMNS), of the averages and of the sums of the weights
    average_ptr,  # (N, COLUMNS), these
    composite_ptr,  # (ROWS, COLUMNS), M
    grad_composite_ptr,  # (ROWS, COLUMNS), Σ ∂S (x - μ)ᵀ, replaced by ∂M; and Σ ∂S of each level
    rstd_ptr,  # (COLUMNS,)
    slope_ptr,  # (COLUMNS,), filled where there are channels
    offset_ptr,
    N,
    L: tl.constexpr,
    PS: tl.constexpr,
    COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < COLUMN[L]
    level = tl.zeros([BLOCK_C], tl.int32)
    pixels = tl.full([BLOCK_C], PS[0], tl.int32)
    for i in tl.static_range(1, L):
        level = tl.where(c >= COLUMN[i], i, level)
        pixels = tl.where(c >= COLUMN[i], PS[i], pixels)
    beside = COLUMN[L] + level
    drift = tl.zeros([BLOCK, BLOCK_C], tl.float32)
    stretch = tl.zeros([BLOCK, BLOCK_C], tl.float32)
    rstd = tl.load(rstd_ptr + c, mask=inside, other=0.0)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        row = n[:, None].to(tl.int64) * COLUMNS
        mask = (n < N)[:, None] & inside[None, :]
        grad = tl.load(upstream_ptr + row + c[None, :], mask=mask, other=0.0)
        drift += grad * tl.load(average_ptr + row + beside[None, :], mask=mask, other=0.0)
        stretch += grad * tl.load(average_ptr + row + c[None, :], mask=mask, other=0.0)
    for start in range(0, ROWS, BLOCK):
        r = start + tl.arange(0, BLOCK)
        row = r[:, None].to(tl.int64) * COLUMNS
        mask = (r < ROWS)[:, None] & inside[None, :]
        m = tl.load(composite_ptr + row + c[None, :], mask=mask, other=0.0)
        grad = tl.load(grad_composite_ptr + row + c[None, :], mask=mask, other=0.0) * rstd[None, :]
        tl.store(grad_composite_ptr + row + c[None, :], grad, mask=mask)
        drift += m * tl.load(grad_composite_ptr + row + beside[None, :], mask=mask, other=0.0)
        stretch += m * grad
    share = rstd / (pixels.to(tl.float32) * N)
    tl.store(slope_ptr + c, -rstd * share * tl.sum(stretch, axis=0), mask=inside)
    tl.store(offset_ptr + c, -share * tl.sum(drift, axis=0), mask=inside)

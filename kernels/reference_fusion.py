"""Adaptive Features Fusion (AFF) stage by stage in plain PyTorch: section 3.1 of the UniKD paper.

    R_L = E_L(F_L)
    g_l = sigmoid( conv3x3( E_l(F_l) ⊕ Up(R_{l+1}) ) )                       l = L-1 .. 1
    R_l = g_l ⊙ E_l(F_l) + (1 - g_l) ⊙ Up(R_{l+1}),    F_R = R_1             (Eq. 4)

Letters: N batch, D fused width, L levels from fine (1) to coarse (L), C_l x H_l x W_l the size of level l. Parameters
are laid out as the convolutions that hold them: expand_weights[l] (D, C_l, 1, 1), expand_biases[l] (D,),
gate_weights[l] (1 or D, 2D, 3, 3) with the input channels of E_l(F_l) before those of Up(R_{l+1}), gate_biases[l]
(1,) or (D,). There is one gate fewer than there are levels. Lists start at level 1, index 0.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def fuse_stagewise(
    features: Sequence[Tensor],
    expand_weights: Sequence[Tensor],
    expand_biases: Sequence[Tensor],
    gate_weights: Sequence[Tensor],
    gate_biases: Sequence[Tensor],
    *,
    upsample: str = "nearest",
) -> Tensor:
    """Fuse a pyramid of features into one map at the finest resolution, Eq. 4.

    Args:
        features: L tensors (N, C_l, H_l, W_l), fine to coarse.
        expand_weights: weights of the 1x1 convolutions E_l, (D, C_l, 1, 1).
        expand_biases: their biases, (D,).
        gate_weights: weights of the 3x3 convolutions of the gates, (1, 2D, 3, 3) or (D, 2D, 3, 3).
        gate_biases: their biases, (1,) or (D,).
        upsample: "nearest" or "bilinear" (align_corners=False), to the size of the finer level.

    Returns:
        F_R (N, D, H_1, W_1) in the dtype of the features, or of autocast if it is enabled.

    Example:
        >>> features = [torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)]
        >>> expand = [torch.randn(5, 4, 1, 1), torch.randn(5, 6, 1, 1)]
        >>> fuse_stagewise(features, expand, [torch.zeros(5)] * 2, [torch.randn(1, 10, 3, 3)], [torch.zeros(1)]).shape
        torch.Size([2, 5, 8, 8])
    """
    levels = zip(features, expand_weights, expand_biases, strict=True)
    expanded = [expand(feature, weight, bias) for feature, weight, bias in levels]
    return blend_top_down(expanded, gate_weights, gate_biases, upsample=upsample)


def expand(feature: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return E_l(F_l) (N, D, H_l, W_l), a 1x1 convolution in the dtype of the feature."""
    return F.conv2d(feature, weight.to(feature.dtype), bias.to(feature.dtype))


def blend(
    fine: Tensor,
    coarse: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    *,
    upsample: str = "nearest",
    pool: bool = False,
) -> Tensor:
    """Blend one level with the fused map above it: R_l of Eq. 4.

    Args:
        fine: E_l(F_l) (N, D, H, W).
        coarse: R_{l+1} (N, D, h, w).
        gate_weight: of the 3x3 convolution, (1, 2D, 3, 3) or (D, 2D, 3, 3).
        gate_bias: its bias, (1,) or (D,).
        upsample: "nearest" or "bilinear" (align_corners=False).
        pool: whether to return the mean of R_l over its pixels instead.

    Returns:
        R_l (N, D, H, W) in the dtype of `fine`; or (N, D) in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: If the shapes do not match.
    """
    check_blend(fine, coarse, gate_weight, gate_bias)
    coarse = resize(coarse, fine.shape[-2:], upsample)
    both = torch.cat([fine, coarse], dim=1)
    gate = torch.sigmoid(F.conv2d(both, gate_weight.to(both.dtype), gate_bias.to(both.dtype), padding=1))
    fused = gate * fine + (1 - gate) * coarse
    return _mean(fused) if pool else fused


def blend_top_down(
    expanded: Sequence[Tensor],
    gate_weights: Sequence[Tensor],
    gate_biases: Sequence[Tensor],
    *,
    upsample: str = "nearest",
    pool: bool = False,
    stage: Callable[..., Tensor] = blend,
) -> Tensor:
    """Blend the expanded levels E_l(F_l) (N, D, H_l, W_l) from coarse to fine: the recursion of Eq. 4.

    With `pool` the result is the mean of F_R over its pixels, as in `blend`, which `stage` may replace.
    """
    fused = expanded[-1]
    for level in reversed(range(len(expanded) - 1)):
        gate = gate_weights[level], gate_biases[level]
        fused = stage(expanded[level], fused, *gate, upsample=upsample, pool=pool and level == 0)
    return _mean(fused) if pool and len(expanded) == 1 else fused


def _mean(x: Tensor) -> Tensor:
    """Return the mean over the pixels, (N, D), in fp32 at least."""
    return x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))


def check_blend(fine: Tensor, coarse: Tensor, gate_weight: Tensor, gate_bias: Tensor) -> None:
    """Raise ValueError if the shapes do not match."""
    if fine.ndim != 4 or coarse.shape[:2] != fine.shape[:2] or coarse.ndim != 4:
        raise ValueError(
            f"blend: fine and coarse must be (N, D, H, W) of one N and D, got {tuple(fine.shape)} and "
            f"{tuple(coarse.shape)}; expand both to the fused width first"
        )
    if any(large < small for large, small in zip(fine.shape[2:], coarse.shape[2:], strict=True)):
        raise ValueError(
            f"blend: coarse must not be larger than fine, got {tuple(coarse.shape[2:])} over {tuple(fine.shape[2:])}; "
            f"swap them"
        )
    width = fine.shape[1]
    if tuple(gate_weight.shape) not in ((1, 2 * width, 3, 3), (width, 2 * width, 3, 3)):
        raise ValueError(
            f"blend: gate_weight must be (1, {2 * width}, 3, 3) or ({width}, {2 * width}, 3, 3) for D = {width}, got "
            f"{tuple(gate_weight.shape)}; its inputs are E_l(F_l) and then Up(R_{{l+1}})"
        )
    if gate_bias.shape != gate_weight.shape[:1]:
        raise ValueError(
            f"blend: gate_bias must be ({len(gate_weight)},) to match the outputs of gate_weight, got "
            f"{tuple(gate_bias.shape)}"
        )


def resize(x: Tensor, size: Sequence[int], upsample: str) -> Tensor:
    """Return Up(x), `x` (N, C, h, w) at the size (H, W); no copy if the size is the same."""
    return x if tuple(x.shape[-2:]) == tuple(size) else F.interpolate(x, size=tuple(size), mode=upsample)


def resize_adjoint(x: Tensor, size: Sequence[int], upsample: str) -> Tensor:
    """Return Upᵀ(x): the transpose of `resize` from `size` (h, w), applied to `x` (N, C, H, W).

    Up works on rows and columns apart, Up(z) = A z Bᵀ, so Upᵀ(x) = Aᵀ x B. As products rather than by the backward
    operator of the upsampling, which on a GPU adds in no fixed order and does not compile for changing sizes.
    """
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    rows = _resize_matrix(size[0], x.shape[-2], x, upsample)
    columns = _resize_matrix(size[1], x.shape[-1], x, upsample)
    return rows.t() @ x @ columns


def _resize_matrix(small: int, large: int, like: Tensor, upsample: str) -> Tensor:
    """Return the matrix (large, small) by which Up acts on one axis, from the unit vectors."""
    unit_vectors = torch.eye(small, dtype=like.dtype, device=like.device)[None, None]
    return resize(unit_vectors, (large, small), upsample)[0, 0]

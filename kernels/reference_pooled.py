"""The collapsed AFF in plain PyTorch: the global average of F_R without a single D-channel map.

The features' distribution is predicted from the average of F_R (section 3.2), and with spatial gates F_R is linear in
the features once the gates are known. So each level is read twice, once to project it on the taps of the gates and once
to average it with the weights of its pixels in F_R; everything in between is scalar maps:

    pooled = 1/(H_1 W_1) Σ_l [ E_l ( Σ_p w_l(p) F_l(p) ) + bias_l Σ_p w_l(p) ]
    w_l = g_l ⊙ remaining_l,    remaining_1 = 1,    remaining_{l+1} = Upᵀ( (1 - g_l) ⊙ remaining_l ),    g_L = 1

Upᵀ is the adjoint of the upsampling. This is Eq. 4 averaged, not an approximation of it: it follows from the
linearity of E, Up and the average. Letters and the layout of the parameters are those of `reference_fusion`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from unikd_fast.kernels.reference import autocast_off
from unikd_fast.kernels.reference_fusion import resize, resize_adjoint
from unikd_fast.kernels.reference_moments import ChannelStatistics
from unikd_fast.kernels.reference_readings import Moments, average, project, takes_handles

TAPS = 9  # of a 3x3 gate


def pool_collapsed(
    features: Sequence[Tensor],
    expand_weights: Sequence[Tensor],
    expand_biases: Sequence[Tensor],
    gate_weights: Sequence[Tensor],
    gate_biases: Sequence[Tensor],
    *,
    upsample: str = "nearest",
    statistics: Sequence[ChannelStatistics] | None = None,
) -> Tensor:
    """Return the mean over H_1 x W_1 of `fuse_stagewise`, for spatial gates, by the formula above.

    Args:
        features: L tensors (N, C_l, H_l, W_l), fine to coarse, contiguous or channels_last.
        expand_weights: weights of the 1x1 convolutions E_l, (D, C_l, 1, 1).
        expand_biases: their biases, (D,).
        gate_weights: weights of the 3x3 convolutions of the gates, (1, 2D, 3, 3).
        gate_biases: their biases, (1,).
        upsample: "nearest" or "bilinear" (align_corners=False).
        statistics: batch statistics of each level's features to normalise them with. If None, the features are used as
            they are. The gradient flows through the statistics as if they were computed here.

    Returns:
        (N, D) in fp32, or fp64 if a feature is fp64, under autocast too. Features in half precision are multiplied
        as they are; the composite weights, gates and pixel weights are formed in fp32. Differentiable once.

    Example:
        >>> features = [torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)]
        >>> expand = [torch.randn(5, 4, 1, 1), torch.randn(5, 6, 1, 1)]
        >>> pool_collapsed(features, expand, [torch.zeros(5)] * 2, [torch.randn(1, 10, 3, 3)], [torch.zeros(1)]).shape
        torch.Size([2, 5])
    """
    exact = torch.float64 if any(feature.dtype == torch.float64 for feature in features) else torch.float32
    expand = [weight.flatten(1).to(exact) for weight in expand_weights]  # (D, C_l)
    biases = [bias.to(exact) for bias in expand_biases]
    taps = [weight.reshape(2, -1, TAPS).to(exact) for weight in gate_weights]  # own half, coarse half
    if statistics is not None and not takes_handles():
        features = [
            F.batch_norm(feature, None, None, training=True, eps=known.eps)
            for feature, known in zip(features, statistics, strict=True)
        ]
        statistics = None
    moments: list[Moments] = [(None, None)] * len(features)
    if statistics is not None:
        moments = [(known.mean.to(exact), known.rstd.to(exact)) for known in statistics]
    with autocast_off(features[0].device):  # it would form the composite weights in half precision
        projections, factors = [], []
        for level, feature in enumerate(features):
            composite = taps_on(level, taps, expand[level])  # (9 * gates, D)
            offset = composite @ biases[level]
            seen, factor = project(feature, composite @ expand[level], offset, moments[level])
            projections.append(seen.unflatten(2, feature.shape[-2:]))
            factors.append(factor)
        weights = pixel_weights(projections, [bias.to(exact) for bias in gate_biases], upsample)
        return _pool(features, factors, expand, biases, weights, moments)


def taps_on(level: int, taps: Sequence[Tensor], expand: Tensor) -> Tensor:
    """Stack the taps that look at E_l(F_l), (9 * gates, D): every finer gate's coarse half, then the own gate's."""
    columns = [taps[gate][1] for gate in range(level)]
    if level < len(taps):
        columns.append(taps[level][0])
    return torch.cat(columns, dim=1).t() if columns else expand.new_empty(0, expand.shape[0])


def pixel_weights(projections: Sequence[Tensor], gate_biases: Sequence[Tensor], upsample: str) -> list[Tensor]:
    """Return the weight of each pixel in the average of F_R, w_l / (H_1 W_1), by level (N, H_l W_l); they sum to 1.

    Args:
        projections: what the taps of the gates saw of each level, (N, 9 * gates, H_l, W_l), see `taps_on`.
        gate_biases: (1,) each.
        upsample: "nearest" or "bilinear".
    """
    gates = _gates(projections, gate_biases, upsample)
    n, _, height, width = projections[0].shape
    remaining = projections[0].new_full((n, 1, height, width), 1 / (height * width))
    weights = []
    for level, gate in enumerate(gates):
        weights.append((remaining * gate).flatten(1))
        remaining = resize_adjoint(remaining * (1 - gate), projections[level + 1].shape[-2:], upsample)
    return [*weights, remaining.flatten(1)]


def _gates(projections: Sequence[Tensor], biases: Sequence[Tensor], upsample: str) -> list[Tensor]:
    """Return the gates g_l (N, 1, H_l, W_l) of Eq. 4, from the projections (N, 9 * gates, H_l, W_l) alone.

    Projection commutes with Up and with a spatial gate, so the taps of R_l obey the recursion that R_l obeys.
    """
    gates: list[Tensor] = []
    state = projections[-1]  # the taps of R_{l+1} for gates 1..l
    for level in reversed(range(len(biases))):
        seen, own = _split(projections[level], TAPS * level)
        coarse, coarse_own = _split(resize(state, own.shape[-2:], upsample), TAPS * level)
        gate = torch.sigmoid(_SumTaps.apply(own + coarse_own) + biases[level])
        state = torch.lerp(coarse, seen, gate)
        gates.insert(0, gate)
    return gates


def _split(taps: Tensor, finer: int) -> tuple[Tensor, Tensor]:
    """Return the taps of the finer gates and those of the own one; the gradient of two slices is twice as large."""
    if finer == 0:
        return taps[:, :0], taps
    of_finer, own = taps.split((finer, TAPS), dim=1)
    return of_finer, own


class _SumTaps(torch.autograd.Function):
    """Finishes a zero-padded 3x3 convolution from what its taps saw, (N, 9, H, W): shifts each and adds, (N, 1, H, W).

    Rows first, then columns, in place. `fold` does the same in one call, but takes longer, and compiles to atomic adds,
    which are not reproducible.
    """

    @staticmethod
    def forward(taps: Tensor) -> Tensor:
        above, rows, below = taps.unflatten(1, (3, 3)).unbind(1)
        rows = rows.clone()
        rows[:, :, 1:] += above[:, :, :-1]
        rows[:, :, :-1] += below[:, :, 1:]
        left, sums, right = rows.unbind(1)
        sums = sums.clone()
        sums[:, :, 1:] += left[:, :, :-1]
        sums[:, :, :-1] += right[:, :, 1:]
        return sums[:, None]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        h, w = gradient.shape[-2:]
        padded = F.pad(gradient[:, 0], (1, 1, 1, 1))
        shifted = [padded[:, y : y + h, x : x + w] for y in (2, 1, 0) for x in (2, 1, 0)]
        return torch.stack(shifted, dim=1)


def _pool(
    features: Sequence[Tensor],
    factors: Sequence[Tensor | None],
    expand: Sequence[Tensor],
    biases: Sequence[Tensor],
    weights: Sequence[Tensor],
    moments: Sequence[Moments],
) -> Tensor:
    """Average each level with its pixels' weights in F_R, then expand the averages: (N, D)."""
    pooled: Tensor | None = None
    for level, (feature, weight) in enumerate(zip(features, weights, strict=True)):
        averaged = average(feature.flatten(2), weight, factors[level], moments[level])  # (N, C_l)
        part = torch.addmm(weight.sum(1, keepdim=True) * biases[level], averaged, expand[level].t())
        pooled = part if pooled is None else pooled + part
    assert pooled is not None
    return pooled

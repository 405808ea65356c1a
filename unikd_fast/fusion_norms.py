"""Batch normalisation beside a 1x1 convolution E, without forming a normalised map, in training neither.

    after E:    γ (W F + b - μ) / sqrt(σ² + ε) + β,    μ, σ² of E(F)
    before E:   W (F - μ) / sqrt(σ² + ε) + b,          μ, σ² of F

Either folds into E, but for the batch statistics of what lies before it, whose gradient is one with that of the
features (`reference_readings`). In training the statistics are those of the batch, and the running ones follow them as
torch's modules have it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from unikd_fast.kernels.reference_moments import ChannelStatistics, channel_moments, projected_moments


def fold_after(norm: _BatchNorm, feature: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Give weight and bias of a convolution that does ``norm(F.conv2d(feature, weight, bias))``.

    Args:
        norm: of D channels. In training mode its running statistics move.
        feature: (N, C, H, W), read in training mode alone.
        weight: (D, C, 1, 1).
        bias: (D,).

    Returns:
        (D, C, 1, 1) and (D,), differentiable in all arguments.

    Raises:
        ValueError: one pixel in training mode, whose variance says nothing.
    """
    mean, variance = _running_moments(norm)
    if norm.training:
        mean, variance = projected_moments(feature, weight, bias)
        _follow(norm, mean, variance, feature)
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return weight * scale[:, None, None, None], (bias - mean) * scale + norm.bias


def fold_before(norm: _BatchNorm, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Give weight and bias of a convolution that does ``F.conv2d(norm(feature), weight, bias)`` in eval mode.

    Args:
        norm: of C channels, without parameters of its own, which E would make redundant.
        weight: (D, C, 1, 1).
        bias: (D,).
    """
    mean, variance = _running_moments(norm)
    weight = weight * torch.rsqrt(variance + norm.eps)[:, None, None]
    return weight, bias - (weight.flatten(1) * mean).sum(1)  # no product of matrices, which autocast would round


def batch_statistics(norm: _BatchNorm, feature: Tensor) -> ChannelStatistics:
    """Give what `norm` normalises `feature` (N, C, H, W) with in training; its running statistics move.

    Raises:
        ValueError: one pixel, whose variance says nothing.
    """
    mean, variance = channel_moments(feature)
    _follow(norm, mean, variance, feature)
    return ChannelStatistics(mean, torch.rsqrt(variance + norm.eps), norm.eps)


def batch_norms(modules: Iterable[nn.Module]) -> list[_BatchNorm]:
    """Give them typed; conversion to SyncBatchNorm leaves another subclass here."""
    return [module for module in modules if isinstance(module, _BatchNorm)]


def _running_moments(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Give the running mean and variance."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


@torch.no_grad()
def _follow(norm: _BatchNorm, mean: Tensor, variance: Tensor, feature: Tensor) -> None:
    """Move the running statistics as batch normalisation in training does, which keeps the unbiased variance."""
    running_mean, running_var = _running_moments(norm)
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    count = feature.numel() // feature.shape[1]
    norm.num_batches_tracked.add_(1)
    running_mean.lerp_(mean.to(running_mean.dtype), norm.momentum)
    running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), norm.momentum)

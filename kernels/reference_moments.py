"""Batch statistics of features, and of a 1x1 convolution's output from them: no map of the output is formed.

E is linear, so over all pixels of all images

    mean( E(F) )   = W mean(F) + b
    var( E(F) )_d  = w_dᵀ cov(F) w_d

With these, batch normalisation in training folds into E as its running statistics do in evaluation.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from unikd_fast.kernels.reference import autocast_off


def projected_moments(feature: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and biased variance over N, H and W of ``F.conv2d(feature, weight, bias)``.

    Args:
        feature: (N, C, H, W), at least two pixels in total.
        weight: (D, C, 1, 1).
        bias: (D,).

    Returns:
        Two (D,) in fp32, or fp64 if an argument is fp64, under autocast too; differentiable in all arguments.

    Raises:
        ValueError: If there is one pixel, which has no variance.

    Example:
        >>> feature, weight, bias = torch.randn(2, 4, 8, 8), torch.randn(5, 4, 1, 1), torch.randn(5)
        >>> mean, variance = projected_moments(feature, weight, bias)
        >>> torch.allclose(mean, torch.nn.functional.conv2d(feature, weight, bias).mean((0, 2, 3)), atol=1e-5)
        True
    """
    exact = torch.promote_types(weight.dtype, _exact(feature))
    with autocast_off(feature.device):
        _check_pixels(feature)
        pixels = feature.permute(0, 2, 3, 1).reshape(-1, feature.shape[1]).to(exact)
        mean = pixels.mean(0)
        centred = pixels - mean  # E[x²] - E[x]² cancels where the mean is large
        covariance = centred.t() @ centred / len(pixels)
        rows = weight.flatten(1).to(exact)
        return rows @ mean + bias.to(exact), ((rows @ covariance) * rows).sum(1)


class ChannelStatistics(NamedTuple):
    """What batch normalisation takes of a batch of features: x̂ = (x - mean) rstd, with rstd = 1 / sqrt(σ² + ε)."""

    mean: Tensor  # (C,)
    rstd: Tensor  # (C,)
    eps: float


@torch.no_grad()
def channel_moments(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and biased variance of each channel over N, H and W, without a gradient.

    The gradient through them belongs to the normalisation that uses them (`reference_readings`).

    Args:
        feature: (N, C, H, W), at least two pixels in total.

    Returns:
        Two (C,) in fp32, or fp64 for fp64.

    Raises:
        ValueError: If there is one pixel, which has no variance.

    Example:
        >>> mean, variance = channel_moments(torch.tensor([[[[1.0, 3.0]]]]))
        >>> mean, variance
        (tensor([2.]), tensor([1.]))
    """
    _check_pixels(feature)
    if torch.compiler.is_compiling():  # the operator below is not supported there, and this becomes one loop
        variance, mean = torch.var_mean(feature.to(_exact(feature)), (0, 2, 3), correction=0)
        return mean, variance
    if feature.device.type == "cpu" and feature.is_contiguous() and feature.dtype == _exact(feature):
        return _moments_by_image(feature)
    # Batch normalisation's own sums take a tenth of `var_mean`'s time on a CPU. The results have the dtype of the
    # running statistics, so they are not rounded to half precision.
    unused = feature.new_zeros((2, feature.shape[1]), dtype=_exact(feature))
    mean, variance = torch.ops.aten.batch_norm_update_stats(feature, unused[0], unused[1], 0.0)
    return mean, variance


def _moments_by_image(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Combine the moments of each image, from instance normalisation: faster, although that writes its result too."""
    images, channels, height, width = feature.shape
    _, means, rstds = torch.native_group_norm(feature, None, None, images, channels, height * width, channels, 0.0)
    means = means.double()
    mean = means.mean(0)
    variance = (rstds.double().pow(-2) + (means - mean).square()).mean(0)
    return mean.to(feature.dtype), variance.to(feature.dtype)


def _exact(feature: Tensor) -> torch.dtype:
    return torch.promote_types(feature.dtype, torch.float32)


def _check_pixels(feature: Tensor) -> None:
    if feature.numel() < 2 * feature.shape[1]:
        raise ValueError(
            f"batch statistics need two pixels or more, got a feature of {tuple(feature.shape)}; use a larger batch "
            f"or eval mode"
        )

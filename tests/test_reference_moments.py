"""Batch statistics of features, against float64."""

import pytest
import torch

from support.numerics import relative_error
from unikd_fast.kernels.reference_moments import channel_moments


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0.0, 1.9, 100.0])
def test_channel_moments(shift: float, dtype: torch.dtype, channels_last: bool) -> None:
    """With means up to a hundred deviations."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    feature = torch.randn(6, 5, 17, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + shift
    feature[:, 1] = 3.0  # no variance
    feature[:, 2] = 0.0
    feature = feature.to(dtype).contiguous(memory_format=layout)
    mean, variance = channel_moments(feature)
    assert mean.dtype == variance.dtype == torch.promote_types(dtype, torch.float32)
    exact = feature.double()
    # What is added are numbers of the size of the mean; E[x²] - E[x]² would be wrong by its square.
    bound = (8 + shift) * torch.finfo(mean.dtype).eps
    assert relative_error(mean, exact.mean((0, 2, 3))) < bound
    assert relative_error(variance, exact.var((0, 2, 3), correction=0)) < bound
    assert (variance >= 0).all()


def test_moments_have_no_gradient() -> None:
    mean, variance = channel_moments(torch.randn(2, 3, 4, 4, requires_grad=True))
    assert not mean.requires_grad
    assert not variance.requires_grad


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_nonfinite_values_stay_in_their_channel(value: float) -> None:
    feature = torch.randn(2, 3, 4, 4)
    clean = channel_moments(feature)
    feature[1, 1, 2, 2] = value
    for spoilt, before in zip(channel_moments(feature), clean, strict=True):
        assert not spoilt[1].isfinite()
        torch.testing.assert_close(spoilt[[0, 2]], before[[0, 2]])


def test_one_pixel_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"two pixels or more, got a feature of \(1, 3, 1, 1\)"):
        channel_moments(torch.zeros(1, 3, 1, 1))

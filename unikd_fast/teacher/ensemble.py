"""Several networks as one teacher."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unikd_fast.values import Channels, Features

Affine = tuple[Channels, Channels]
"""Scale and shift per channel."""


class Ensemble(nn.Module):
    """Maps images to the features of its first network, with the weighted mean of the logits of all.

        z = Σ_m w_m z_m / Σ_m w_m

    Args:
        members: two or more networks that map images (N, 3, H, W) to Features with the same classes.
        weights: weight w > 0 of each. If None, all are the same.
        renormalise: (scale, shift) from the first network's images to those of each, None where they are the same,
            computed in fp32. If None, all see the same images.

    Raises:
        ValueError: there are fewer than two networks, not as many weights, or a weight is not positive.

    Example:
        >>> Ensemble([LogitsOnly(one), LogitsOnly(other)], [2.0, 1.0])(images).logits
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        weights: Sequence[float] | None = None,
        renormalise: Sequence[Affine | None] | None = None,
    ) -> None:
        super().__init__()
        given = [1.0] * len(members) if weights is None else list(weights)
        if len(members) < 2 or len(given) != len(members):
            raise ValueError(
                f"Ensemble: needs at least two networks and a weight for each, got {len(members)} networks and "
                f"{len(given)} weights"
            )
        if not all(0 < weight < float("inf") for weight in given):
            raise ValueError(f"Ensemble: weights must be above 0, got {given}; leave out a network that has none")
        self.members = nn.ModuleList(members)
        self.weights = [weight / sum(given) for weight in given]
        self._renormalise = [None] * len(members) if renormalise is None else list(renormalise)

    @property
    def first(self) -> nn.Module:
        """Return the network whose features are those of the ensemble."""
        return self.members[0]

    @property
    def level_names(self) -> tuple[str, ...]:
        """Return the names of the first network's levels."""
        return getattr(self.first, "level_names", ())

    @property
    def level_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Return the shape (C_l, H_l, W_l) of each of the first network's levels."""
        return getattr(self.first, "level_shapes", ())

    def forward(self, images: Tensor) -> Features:
        features: Features | None = None
        total: Any = 0.0
        for network, weight, affine in zip(self.members, self.weights, self._renormalise, strict=True):
            found: Features = network(images if affine is None else _shifted(images, affine))
            features = found if features is None else features
            total = total + weight * found.logits.float()
        assert features is not None
        return features._replace(logits=total)


def _shifted(images: Tensor, affine: Affine) -> Tensor:
    """Return images * scale + shift in their dtype and layout; the numbers are constants, so nothing is copied to the
    device."""
    shifted = images.to(torch.float32, copy=True)
    for channel, (scale, shift) in enumerate(zip(*affine, strict=True)):
        shifted[:, channel].mul_(scale).add_(shift)
    return shifted.to(images.dtype)

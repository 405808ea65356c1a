"""Feature Distribution Prediction (FDP), section 3.2 of the UniKD paper: the Gaussian of a pooled feature."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unikd_fast.kernels.reference import autocast_off
from unikd_fast.values import Gaussian


class FeatureDistributionPrediction(nn.Module):
    """Predicts the mean and variance of the class-wise Gaussian of a pooled, fused feature.

        h = W_p norm(x) + b_p                              projection to the K classes
        m = W_m h + b_m,    v = softplus(W_v h + b_v) + floor

    This is ``form="projected"``, the paper's, with 2 K² weights in m and v. For many classes use ``form="direct"``,
    which omits the projection: m and v are two layers D -> K on norm(x).

    Teacher and student share the module. The norm and the floor are not in the paper: without them training diverges
    at the learning rates of its recipes, because a small v_t multiplies the error of the mean in Eq. 6 without limit.

    Args:
        width: D, the width of the pooled feature.
        num_classes: K, the number of classes.
        form: "projected" or "direct".
        norm: "layer" to apply layer normalisation to the pooled feature, or "none".
        variance_floor: lower bound of the variance, > 0.

    Raises:
        ValueError: If an argument is not valid.

    Example:
        >>> mean, log_var = FeatureDistributionPrediction(32, 10)(torch.randn(4, 32))
        >>> mean.shape, bool((log_var > -2.31).all())
        (torch.Size([4, 10]), True)
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        *,
        form: str = "projected",
        norm: str = "layer",
        variance_floor: float = 0.1,
    ) -> None:
        super().__init__()
        if min(width, num_classes) < 1:
            raise ValueError(
                f"FeatureDistributionPrediction: width and num_classes must be at least 1, got {width} and "
                f"{num_classes}"
            )
        if form not in ("projected", "direct"):
            raise ValueError(f"FeatureDistributionPrediction: form must be 'projected' or 'direct', got {form!r}")
        if norm not in ("layer", "none"):
            raise ValueError(f"FeatureDistributionPrediction: norm must be 'layer' or 'none', got {norm!r}")
        if not 0 < variance_floor < float("inf"):
            raise ValueError(
                f"FeatureDistributionPrediction: variance_floor must be finite and above 0, got {variance_floor}; "
                f"without a floor softplus underflows to a variance of 0"
            )
        self.width, self.num_classes, self.variance_floor = width, num_classes, variance_floor
        self.norm = nn.LayerNorm(width) if norm == "layer" else nn.Identity()
        if form == "projected":
            self.projection: nn.Linear | None = nn.Linear(width, num_classes)
        else:
            self.projection = None
        inside = width if self.projection is None else num_classes
        self.mean = nn.Linear(inside, num_classes)
        self.variance = nn.Linear(inside, num_classes)

    def forward(self, pooled: Tensor) -> Gaussian:
        """Return (mean, log_var), each (N, K) in fp32 (fp64 for fp64 inputs), under autocast and with half weights too.

        Args:
            pooled: (N, D), the global average of F_R.

        Raises:
            ValueError: If pooled is not (N, D).
        """
        if pooled.ndim != 2 or pooled.shape[1] != self.width:
            raise ValueError(
                f"FeatureDistributionPrediction: pooled must be (N, {self.width}), got {tuple(pooled.shape)}; "
                f"average F_R over its pixels first"
            )
        with autocast_off(pooled.device):
            x = pooled.to(torch.promote_types(pooled.dtype, torch.float32))
            if isinstance(self.norm, nn.LayerNorm):
                weight, bias = self.norm.weight.to(x.dtype), self.norm.bias.to(x.dtype)
                x = F.layer_norm(x, self.norm.normalized_shape, weight, bias, self.norm.eps)
            if self.projection is not None:
                x = _linear(self.projection, x)
            mean, raw = _linear(self.mean, x), _linear(self.variance, x)
            return Gaussian(mean, torch.log(F.softplus(raw) + self.variance_floor))

    def extra_repr(self) -> str:
        return f"variance_floor={self.variance_floor}"


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply the layer in the dtype of `x`: an engine may keep its weights in half precision."""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))

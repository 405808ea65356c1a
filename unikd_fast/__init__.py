"""unikd_fast: a fast, exact engine for knowledge distillation.

The public names are loaded on first use: ``import unikd_fast`` needs only torch, and reading a configuration not even
that.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unikd_fast.api import Distiller
    from unikd_fast.distillation import distill
    from unikd_fast.distribution import FeatureDistributionPrediction
    from unikd_fast.fusion import AdaptiveFeatureFusion
    from unikd_fast.losses import (
        LossTerms,
        channel_wise_kl,
        dkd_loss,
        gaussian_kl,
        linear_softmax_kl,
        quantize_logits,
        softmax_kl,
        top_k_logits,
        unikd_loss,
    )
    from unikd_fast.losses.modules import ChannelWiseKL, DKDLoss, GaussianKL, LinearSoftmaxKL, SoftmaxKL, UniKDLoss
    from unikd_fast.values import Batch, Features, Gaussian, QuantizedLogits, TopKLogits

__version__ = "0.1.0"

__all__ = [
    "AdaptiveFeatureFusion",
    "Batch",
    "ChannelWiseKL",
    "DKDLoss",
    "Distiller",
    "FeatureDistributionPrediction",
    "Features",
    "Gaussian",
    "GaussianKL",
    "LinearSoftmaxKL",
    "LossTerms",
    "QuantizedLogits",
    "SoftmaxKL",
    "TopKLogits",
    "UniKDLoss",
    "channel_wise_kl",
    "distill",
    "dkd_loss",
    "gaussian_kl",
    "linear_softmax_kl",
    "quantize_logits",
    "softmax_kl",
    "top_k_logits",
    "unikd_loss",
]

_HOME = {
    "AdaptiveFeatureFusion": "fusion",
    "Distiller": "api",
    "distill": "distillation",
    "FeatureDistributionPrediction": "distribution",
    "ChannelWiseKL": "losses.modules",
    "DKDLoss": "losses.modules",
    "GaussianKL": "losses.modules",
    "LinearSoftmaxKL": "losses.modules",
    "SoftmaxKL": "losses.modules",
    "UniKDLoss": "losses.modules",
    "Batch": "values",
    "Features": "values",
    "Gaussian": "values",
    "QuantizedLogits": "values",
    "TopKLogits": "values",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'unikd_fast' has no attribute {name!r}")
    home = _HOME.get(name, "losses")
    try:
        return getattr(import_module(f"unikd_fast.{home}"), name)
    except ModuleNotFoundError as error:
        if home not in ("api", "distillation"):
            raise
        raise ImportError(f"unikd_fast.{name} needs {error.name}; pip install 'unikd-fast[train]'") from error


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""unikd_fast: a fast, exact engine for knowledge distillation.

The public names are loaded on first use: ``import unikd_fast`` needs torch alone, and reading a configuration needs
not even that.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unikd_fast.distribution import FeatureDistributionPrediction
    from unikd_fast.fusion import AdaptiveFeatureFusion
    from unikd_fast.loss_modules import GaussianKL, SoftmaxKL, UniKDLoss
    from unikd_fast.losses import LossTerms, gaussian_kl, softmax_kl, unikd_loss
    from unikd_fast.values import Batch, Features, Gaussian

__version__ = "0.1.0"

__all__ = [
    "AdaptiveFeatureFusion",
    "Batch",
    "FeatureDistributionPrediction",
    "Features",
    "Gaussian",
    "GaussianKL",
    "LossTerms",
    "SoftmaxKL",
    "UniKDLoss",
    "gaussian_kl",
    "softmax_kl",
    "unikd_loss",
]

_HOME = {
    "AdaptiveFeatureFusion": "fusion",
    "FeatureDistributionPrediction": "distribution",
    "GaussianKL": "loss_modules",
    "SoftmaxKL": "loss_modules",
    "UniKDLoss": "loss_modules",
    "Batch": "values",
    "Features": "values",
    "Gaussian": "values",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'unikd_fast' has no attribute {name!r}")
    return getattr(import_module(f"unikd_fast.{_HOME.get(name, 'losses')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

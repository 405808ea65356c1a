"""The losses: checks of the arguments, and the choice between the kernels and plain PyTorch.

The formulas live in `unikd_fast.kernels.reference`, the checks in `unikd_fast.kernels._checks`.
"""

from unikd_fast.losses.gaussian import gaussian_kl
from unikd_fast.losses.logits import dkd_loss, softmax_kl
from unikd_fast.losses.objective import LossTerms, unikd_loss

__all__ = ["LossTerms", "dkd_loss", "gaussian_kl", "softmax_kl", "unikd_loss"]

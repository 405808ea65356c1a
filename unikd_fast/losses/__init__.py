"""The losses: checks of the arguments, and the choice between the kernels and plain PyTorch.

The formulas live in `unikd_fast.kernels.reference`, the checks in `unikd_fast.kernels._checks`.
"""

from unikd_fast.losses.functional import (
    LossTerms,
    channel_wise_kl,
    dkd_loss,
    gaussian_kl,
    linear_softmax_kl,
    softmax_kl,
    unikd_loss,
)
from unikd_fast.losses.stored import quantize_logits, top_k_logits

__all__ = [
    "LossTerms",
    "channel_wise_kl",
    "dkd_loss",
    "gaussian_kl",
    "linear_softmax_kl",
    "quantize_logits",
    "softmax_kl",
    "top_k_logits",
    "unikd_loss",
]

"""Drop-ins for losses of mmrazor: `KLDivergence` and `ChannelWiseDivergence` of mmrazor.models.losses.

mmrazor finds losses by name in its registry. To use one of these by name, register it in a module that the
configuration lists in `custom_imports`:

    from mmrazor.registry import MODELS
    from unikd_fast.compat.mmrazor import KLDivergence

    MODELS.register_module(name="UniKDFastKLDivergence", module=KLDivergence)
"""

from torch import Tensor, nn

from unikd_fast.compat._kl_div import kl_div
from unikd_fast.losses import channel_wise_kl

_REDUCTIONS = ("none", "batchmean", "sum", "mean")


class KLDivergence(nn.Module):
    """mmrazor's `KLDivergence`: the divergence over axis 1, times τ² and a weight.

        L = λ τ² KL( softmax_1(z_t / τ) || softmax_1(z_s / τ) )

    It computes in fp32 and returns it, where mmrazor keeps the dtype of the logits.

    Args:
        tau: τ > 0.
        reduction: as in `torch.nn.functional.kl_div`: "batchmean" divides by N alone, "mean" by the number of
            elements; "none" gives the terms of the sum, in plain PyTorch.
        loss_weight: λ.
        teacher_detach: whether the teacher is a constant; if False, it gets a gradient.

    Raises:
        ValueError: an unknown reduction, where mmrazor asserts.
    """

    def __init__(
        self, tau: float = 1.0, reduction: str = "batchmean", loss_weight: float = 1.0, teacher_detach: bool = True
    ) -> None:
        super().__init__()
        if reduction not in _REDUCTIONS:
            raise ValueError(f"KLDivergence: reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
        self.tau = tau
        self.reduction = reduction
        self.loss_weight = loss_weight
        self.teacher_detach = teacher_detach

    def forward(self, preds_S: Tensor, preds_T: Tensor) -> Tensor:
        """Return the loss.

        Args:
            preds_S: student's logits (N, K) or (N, K, H, W).
            preds_T: teacher's logits, the same shape.
        """
        teacher = preds_T.detach() if self.teacher_detach else preds_T
        return self.loss_weight * kl_div(preds_S, teacher, temperature=self.tau, reduction=self.reduction, dim=1)


class ChannelWiseDivergence(nn.Module):
    """mmrazor's `ChannelWiseDivergence`: the divergence over the positions of each channel, times τ² and a weight.

        L = λ τ² / (N C) Σ_n Σ_c KL( softmax(t_nc / τ) || softmax(s_nc / τ) )

    It computes in fp32 and returns it, where mmrazor keeps the dtype of the maps. The teacher gets a gradient if it
    requires one.

    Args:
        tau: τ > 0.
        loss_weight: λ.
    """

    def __init__(self, tau: float = 1.0, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.tau = tau
        self.loss_weight = loss_weight

    def forward(self, preds_S: Tensor, preds_T: Tensor) -> Tensor:
        """Return the loss.

        Args:
            preds_S: student's maps (N, C, H, W).
            preds_T: teacher's maps, the same shape.
        """
        return self.loss_weight * channel_wise_kl(preds_S, preds_T, temperature=self.tau)

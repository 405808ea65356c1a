"""Drop-ins for the loss of NVIDIA's Model Optimizer: `LogitsDistillationLoss` of modelopt.torch.distill.losses.

Its releases differ: 0.33 flattens the rows and defaults to "batchmean"; 0.47 keeps the shape, defaults to "mean", which
divides by the number of classes as well, and its "none" gives rows. Both are here; both detach the teacher, compute in
fp32 and return it, where Model Optimizer keeps the dtype of the logits.
"""

from torch import Tensor, nn

from unikd_fast.compat._kl_div import kl_div
from unikd_fast.losses import softmax_kl


class LogitsDistillationLoss(nn.Module):
    """Model Optimizer 0.47's `LogitsDistillationLoss`: the divergence over the last axis, times τ².

        L = τ² KL( softmax(z_t / τ) || softmax(z_s / τ) )

    Args:
        temperature: τ > 0.
        reduction: "mean" divides by the number of elements, "batchmean" by N alone, "sum"; "none" gives the rows.

    Raises:
        ValueError: at the call, what `softmax_kl` refuses.
    """

    def __init__(self, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        self._temperature = temperature
        self._reduction = reduction

    def forward(self, logits_s: Tensor, logits_t: Tensor) -> Tensor:
        """Return the loss.

        Args:
            logits_s: student's logits (N, ..., K).
            logits_t: teacher's logits, the same shape; a constant.
        """
        teacher = logits_t.detach()
        if self._reduction == "none":
            return softmax_kl(logits_s, teacher, temperature=self._temperature, reduction="none")
        return kl_div(logits_s, teacher, temperature=self._temperature, reduction=self._reduction)


class FlattenedLogitsDistillationLoss(LogitsDistillationLoss):
    """Model Optimizer 0.33's `LogitsDistillationLoss`: the rows are flattened, so "batchmean" divides by all of them.

    Args:
        temperature: τ > 0.
        reduction: "batchmean", "mean", "sum"; "none" gives the terms of the sum (rows, K), in plain PyTorch.
    """

    def __init__(self, temperature: float = 1.0, reduction: str = "batchmean") -> None:
        super().__init__(temperature, reduction)

    def forward(self, logits_s: Tensor, logits_t: Tensor) -> Tensor:
        """Return the loss of logits (..., K)."""
        classes = logits_s.shape[-1]
        return kl_div(
            logits_s.reshape(-1, classes),
            logits_t.detach().reshape(-1, classes),
            temperature=self._temperature,
            reduction=self._reduction,
        )

"""Drop-in for the loss of RepDistiller: `DistillKL` of distiller_zoo/KD.py."""

from torch import Tensor, nn

from unikd_fast.compat._kl_div import kl_div


class DistillKL(nn.Module):
    """RepDistiller's `DistillKL`: the divergence summed over everything, divided by the first axis, times τ².

        L = τ² / N Σ p ( ln p - ln q ),    p = softmax_1(z_t / τ),  q = softmax_1(z_s / τ)

    It computes in fp32 and returns it, where RepDistiller keeps the dtype of the logits. An empty batch gives 0, not
    NaN.

    Args:
        T: τ > 0.
    """

    def __init__(self, T: float) -> None:
        super().__init__()
        self.T = T

    def forward(self, y_s: Tensor, y_t: Tensor) -> Tensor:
        """Return the loss.

        Args:
            y_s: student's logits (N, K) or (N, K, H, W), divided by N alone.
            y_t: teacher's logits, the same shape; they get a gradient if they ask for one.

        Raises:
            ValueError: what `softmax_kl` refuses.
        """
        return kl_div(y_s, y_t, temperature=self.T, dim=1)

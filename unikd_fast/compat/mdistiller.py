"""Drop-ins for the losses of mdistiller: `kd_loss` of distillers/KD.py and `dkd_loss` of distillers/DKD.py.

Both compute in fp32 and return it, where mdistiller keeps the dtype of the logits. Neither detaches the teacher.
"""

from torch import Tensor

from unikd_fast.losses import dkd_loss as _dkd_loss
from unikd_fast.losses import softmax_kl


def kd_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float) -> Tensor:
    """Return mdistiller's `kd_loss`: the divergence summed over axis 1, the mean over all other axes, times τ².

        L = τ² mean_n Σ_k p_nk ( ln p_nk - ln q_nk ),    p = softmax_1(z_t / τ),  q = softmax_1(z_s / τ)

    Args:
        logits_student: z_s (N, K) or (N, K, H, W), where n runs over N·H·W.
        logits_teacher: z_t, the same shape; it receives a gradient if it requires one.
        temperature: τ > 0, a number.

    Raises:
        ValueError: what `softmax_kl` refuses.
    """
    return softmax_kl(logits_student.movedim(1, -1), logits_teacher.movedim(1, -1), temperature=temperature)


def dkd_loss(
    logits_student: Tensor, logits_teacher: Tensor, target: Tensor, alpha: float, beta: float, temperature: float
) -> Tensor:
    """Return mdistiller's `dkd_loss`: α TCKD + β NCKD, each summed over the classes, averaged over N, times τ².

    mdistiller leaves the target class out of NCKD by subtracting 1000 from its logit; here it is left out altogether.
    The two agree to the last digit unless the target's logit exceeds the others by hundreds of τ. And 1 - q_y is
    summed over the other classes here, in logarithms, so where mdistiller's underflows to ln 0 = -inf this is finite.

    Args:
        logits_student: (N, K).
        logits_teacher: (N, K); it receives a gradient if it requires one, where mdistiller's is NaN (0 ln 0).
        target: (N,) integer, or any shape of N elements.
        alpha: weight of TCKD.
        beta: weight of NCKD.
        temperature: τ > 0, a number.

    Raises:
        ValueError: what `dkd_loss` of `unikd_fast` refuses: labels out of range among them. A label of -100, which
            mdistiller's scatter refuses, leaves the row out.
    """
    return _dkd_loss(
        logits_student,
        logits_teacher,
        target.reshape(-1),
        alpha=alpha,
        beta=beta,
        temperature=temperature,
    )

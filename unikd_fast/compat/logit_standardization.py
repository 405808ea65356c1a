"""Drop-ins for the losses of logit-standardization-KD, the fork of mdistiller: `kd_loss` and `dkd_loss`.

Both compute in fp32 and return it, where the fork keeps the dtype of the logits. Neither detaches the teacher.
"""

from torch import Tensor

from unikd_fast.kernels.reference import at_least_fp32, standardize
from unikd_fast.losses import dkd_loss as _dkd_loss
from unikd_fast.losses import softmax_kl


def kd_loss(logits_student_in: Tensor, logits_teacher_in: Tensor, temperature: float, logit_stand: bool) -> Tensor:
    """Return the fork's `kd_loss` (mdistiller/distillers/KD.py): that of mdistiller, on standardised logits.

        L = τ² mean_n KL( softmax_1(Z(z_t) / τ) || softmax_1(Z(z_s) / τ) ),    Z(z) = (z - mean z) / (1e-7 + std z)

    std is the unbiased one, over the last axis, gradient included.

    Args:
        logits_student_in: z_s (N, K). Of (N, K, H, W) the fork standardises the last axis, W, and takes the softmax
            over K; so does this, in plain PyTorch up to the softmax.
        logits_teacher_in: z_t, the same shape; it receives a gradient if it requires one.
        temperature: τ > 0, a number.
        logit_stand: whether to standardise.

    Raises:
        ValueError: what `softmax_kl` refuses.
    """
    if logits_student_in.ndim == 2:
        return softmax_kl(logits_student_in, logits_teacher_in, temperature=temperature, standardized=bool(logit_stand))
    student, teacher = logits_student_in, logits_teacher_in
    if logit_stand:
        student, teacher = standardize(at_least_fp32(student)), standardize(at_least_fp32(teacher))
    return softmax_kl(student.movedim(1, -1), teacher.movedim(1, -1), temperature=temperature)


def dkd_loss(
    logits_student_in: Tensor,
    logits_teacher_in: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    logit_stand: bool,
) -> Tensor:
    """Return the fork's `dkd_loss` (mdistiller/distillers/DKD.py): that of mdistiller, on standardised logits.

    Args:
        logits_student_in, logits_teacher_in: (N, K).
        target, alpha, beta, temperature: as in `unikd_fast.compat.mdistiller.dkd_loss`, whose notes hold here too.
        logit_stand: whether to standardise, as in `kd_loss`.

    Raises:
        ValueError: what `dkd_loss` of `unikd_fast` refuses.
    """
    return _dkd_loss(
        logits_student_in,
        logits_teacher_in,
        target.reshape(-1),
        alpha=alpha,
        beta=beta,
        temperature=temperature,
        standardized=bool(logit_stand),
    )

"""Drop-in for the loss of TRL: `GKDTrainer.generalized_jsd_loss` (trl.experimental.gkd, earlier trl.trainer)."""

import torch.nn.functional as F
from torch import Tensor

from unikd_fast.compat._kl_div import jsd_terms
from unikd_fast.kernels.reference import at_least_fp32, is_ignored
from unikd_fast.losses import softmax_kl


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """Return TRL's `generalized_jsd_loss`, the generalised Jensen-Shannon divergence (Agarwal et al. 2024, Eq. 1).

        β KL(p || m) + (1 - β) KL(q || m),  m = β p + (1 - β) q;    β = 0: KL(p || q),  β = 1: KL(q || p)

    There is no factor τ². It is computed in fp32 and returned so, where TRL keeps the dtype of the logits; nothing is
    detached. No tokens kept give 0, for "mean" as well, where TRL gives NaN.

    Args:
        student_logits: (N, T, K), q = softmax(z_s / τ).
        teacher_logits: (N, T, K), p = softmax(z_t / τ); they get a gradient if they ask for one.
        labels: (N, T); -100 leaves a token out.
        beta: β in [0, 1].
        temperature: τ > 0.
        reduction: "batchmean" divides by the tokens kept if there are labels and by N if there are none, as in TRL;
            "mean" by the tokens kept times K; "sum"; anything else gives the terms of the sum, of the tokens kept,
            in plain PyTorch.
        num_items_in_batch: if not None, divisor of the sum for any reduction.

    Raises:
        ValueError: what `softmax_kl` refuses: beta outside of [0, 1], where TRL gives NaN, among them.
    """
    mask = is_ignored(labels, -100) if labels is not None else None
    if num_items_in_batch is None and reduction not in ("batchmean", "sum", "mean"):
        log_q, log_p = (F.log_softmax(at_least_fp32(x) / temperature, dim=-1) for x in (student_logits, teacher_logits))
        terms = jsd_terms(log_q, log_p, beta)
        return terms if mask is None else terms[~mask]
    divide_by: int | Tensor | None = None
    if num_items_in_batch is not None:
        divide_by = num_items_in_batch
        if isinstance(divide_by, Tensor):
            divide_by = divide_by.to(student_logits.device)
    elif reduction == "batchmean" and mask is None:
        divide_by = max(student_logits.shape[0], 1)
    loss = softmax_kl(
        student_logits,
        teacher_logits,
        temperature=temperature,
        reduction=reduction if divide_by is None else "sum",
        scale_by_t2=False,
        ignore_mask=mask,
        divergence={0.0: "forward", 1.0: "reverse"}.get(beta, "jsd"),
        beta=beta,
    )
    return loss if divide_by is None else loss / divide_by

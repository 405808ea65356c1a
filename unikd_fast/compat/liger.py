"""Drop-ins for the losses of Liger-Kernel: `LigerKLDIVLoss` and `LigerJSD` of liger_kernel.transformers.

Both are plain PyTorch, not `softmax_kl`, and the reason is the gradient. Liger takes log-probabilities and treats them
as free variables: its d KL / d ln q is -p / N. `softmax_kl` at τ = 1 takes log-probabilities too, for
softmax(ln q) = q, and gives the same value; but it sees logits, and its gradient is (q - p) / N. Through the
log_softmax before it, both become (q - p) / N for the logits, so a training step cannot tell them apart; what hangs
on ln q itself can, as can a ln q that is not normalised, or only up to bf16. A drop-in has to keep that.

On a GPU nothing is gained here over Liger's kernels. What gains is to hand over the logits, which spares the two
tensors of log-probabilities: `softmax_kl(student_logits, teacher_logits, divergence="jsd", beta=β)` for
LigerJSD(beta=β) of their log_softmax.
"""

from typing import Any

from torch import Tensor, nn

from unikd_fast.compat._kl_div import jsd_terms
from unikd_fast.kernels.reference import at_least_fp32, is_ignored


class LigerKLDIVLoss(nn.KLDivLoss):
    """Liger's `LigerKLDIVLoss`: the divergence of log-probabilities from probabilities.

        L = Σ_k p_k ( ln max(p_k, ε) - ln q_k ),    or with log_target, for y = ln p:  Σ_k eʸ (y_k - ln q_k)

    As in Liger, the default reduction is that of `torch.nn.KLDivLoss`, "mean": divided by the number of elements. It is
    computed in fp32 and returned so. The teacher gets no gradient.

    Args:
        eps: ε, where p_k is smaller.
        args, kwargs: arguments of `torch.nn.KLDivLoss`: size_average, reduce, reduction ("mean", "batchmean", "sum",
            "none") and log_target.
    """

    def __init__(self, eps: float = 1e-10, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eps = eps

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """Return the loss.

        Args:
            y_pred: the student's log-probabilities (N, K).
            y_true: the teacher's probabilities (N, K), log-probabilities with log_target. A constant.

        Raises:
            ValueError: shapes that differ or are not (N, K); an unknown reduction.
        """
        _check_rows("LigerKLDIVLoss", y_pred, y_true)
        log_q, target = at_least_fp32(y_pred), at_least_fp32(y_true.detach())
        if self.log_target:
            terms = target.exp() * (target - log_q)
        else:
            terms = target * (target.clamp_min(self.eps).log() - log_q)
        if self.reduction == "none":
            return terms
        if self.reduction == "sum":
            return terms.sum()
        if self.reduction == "batchmean":
            return terms.sum() / max(terms.shape[0], 1)
        if self.reduction == "mean":
            return terms.sum() / max(terms.numel(), 1)
        raise ValueError(f"LigerKLDIVLoss: reduction must be one of mean, batchmean, sum, none, got {self.reduction!r}")


class LigerJSD(nn.Module):
    """Liger's `LigerJSD`: the generalised Jensen-Shannon divergence of log-probabilities, mean over the rows kept.

        L = 1/N Σ β p (ln p - ln m) + (1 - β) q (ln q - ln m),  m = β p + (1 - β) q;   β = 0: KL(p || q),  1: KL(q || p)

    It is computed in fp32 and returned in the dtype of log_q, as Liger does. The teacher gets no gradient. No rows kept
    give 0. A class at -inf counts 0 where p or q is 0 there, where Liger gives NaN.

    Args:
        beta: β in [0, 1].
        ignore_index: label of the rows to leave out.
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        self.beta = beta
        self.ignore_index = ignore_index

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """Return the loss.

        Args:
            log_q: the student's log-probabilities (N, K).
            log_p: the teacher's log-probabilities (N, K). A constant.
            shift_labels: (N,) integer; only whether a label is `ignore_index` matters.

        Raises:
            ValueError: shapes that differ or are not (N, K); labels that are not (N,); beta not in [0, 1].
        """
        _check_rows("LigerJSD", log_q, log_p)
        if not 0 <= self.beta <= 1:
            raise ValueError(f"LigerJSD: beta must lie in [0, 1], got {self.beta}")
        student, teacher = at_least_fp32(log_q), at_least_fp32(log_p.detach())
        if shift_labels is None:
            return (jsd_terms(student, teacher, self.beta).sum() / max(student.shape[0], 1)).to(log_q.dtype)
        if shift_labels.shape != log_q.shape[:1]:
            raise ValueError(
                f"LigerJSD: shift_labels must be ({log_q.shape[0]},), one per row, got {tuple(shift_labels.shape)}"
            )
        ignored = is_ignored(shift_labels, self.ignore_index)
        # Before the arithmetic: what is ignored may be NaN. Two equal rows differ by exactly 0.
        student, teacher = (x.masked_fill(ignored[:, None], 0.0) for x in (student, teacher))
        terms = jsd_terms(student, teacher, self.beta).masked_fill(ignored[:, None], 0.0)
        return (terms.sum() / (~ignored).sum().clamp(min=1)).to(log_q.dtype)


def _check_rows(function: str, student: Tensor, teacher: Tensor) -> None:
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"{function}: student and teacher must both be (N, K), got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; flatten the positions of a sequence"
        )

"""Drop-ins for the losses of liger_kernel.transformers: `LigerKLDIVLoss`, `LigerJSD` and `LigerFusedLinearJSD`.

The last one is `linear_softmax_kl`. The first two are plain PyTorch, not `softmax_kl`, and the reason is the
gradient. Liger takes log-probabilities and treats them as free variables: its d KL / d ln q is -p / N. `softmax_kl`
at τ = 1 takes log-probabilities too, for softmax(ln q) = q, and gives the same value; but it sees logits, and its
gradient is (q - p) / N. Through the log_softmax before it, both become (q - p) / N for the logits, so a training step
cannot tell them apart; what hangs on ln q itself can, as can a ln q that is not normalised, or only up to bf16. A
drop-in has to keep that.

On a GPU these two gain nothing over Liger's kernels. What gains is to hand over the logits, which spares the two
tensors of log-probabilities: `softmax_kl(student_logits, teacher_logits, divergence="jsd", beta=β)` for
LigerJSD(beta=β) of their log_softmax.
"""

from typing import Any

import torch
from torch import Tensor, nn

from unikd_fast.compat._kl_div import jsd_terms
from unikd_fast.kernels.reference import at_least_fp32, is_ignored
from unikd_fast.losses import linear_softmax_kl


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
        _check_beta("LigerJSD", "beta", self.beta)
        student, teacher = at_least_fp32(log_q), at_least_fp32(log_p.detach())
        if shift_labels is None:
            return (jsd_terms(student, teacher, self.beta).sum() / max(student.shape[0], 1)).to(log_q.dtype)
        _check_labels("LigerJSD", shift_labels, log_q.shape[0])
        ignored = is_ignored(shift_labels, self.ignore_index)
        # Before the arithmetic: what is ignored may be NaN. Two equal rows differ by exactly 0.
        student, teacher = (x.masked_fill(ignored[:, None], 0.0) for x in (student, teacher))
        terms = jsd_terms(student, teacher, self.beta).masked_fill(ignored[:, None], 0.0)
        return (terms.sum() / (~ignored).sum().clamp(min=1)).to(log_q.dtype)


class LigerFusedLinearJSD(nn.Module):
    """Liger's `LigerFusedLinearJSD`: `LigerJSD` of the logits of two last layers, which never exist all at once.

        L = LigerJSD( ln softmax(h_s W_sᵀ / τ), ln softmax(h_t W_tᵀ / τ) ),    without τ²

    By `linear_softmax_kl`, so on a GPU from the fused kernels. It is returned in fp32, as Liger does (fp64 for fp64
    inputs). The teacher gets no gradient. No rows kept give 0.

    Args:
        jsd_beta: β in [0, 1]; 0: KL(p || q), 1: KL(q || p).
        ignore_index: label of the rows to leave out.
        temperature: τ.
        accum_dtype: dtype in which the gradient of the student's weight is summed: that of the weight, which None
            stands for, and no other.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.jsd_beta = jsd_beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None,
    ) -> Tensor:
        """Return the loss.

        Args:
            student_input: the student's hidden states (N, D_s).
            student_weight: the weight of its last layer (K, D_s).
            teacher_input: the teacher's hidden states (N, D_t). A constant.
            teacher_weight: the weight of its last layer (K, D_t). A constant.
            shift_labels: (N,) integer, or None; only whether a label is `ignore_index` matters.

        Raises:
            ValueError: labels that are not (N,); jsd_beta not in [0, 1]; another accum_dtype; what `linear_softmax_kl`
                refuses.
        """
        name = "LigerFusedLinearJSD"
        _check_beta(name, "jsd_beta", self.jsd_beta)
        if self.accum_dtype not in (None, student_weight.dtype):
            raise ValueError(
                f"{name}: accum_dtype must be that of the weight, {student_weight.dtype}, got {self.accum_dtype}; "
                f"leave it out"
            )
        if shift_labels is not None:
            _check_labels(name, shift_labels, student_input.shape[0])
        return linear_softmax_kl(
            student_input,
            student_weight,
            teacher_input.detach(),
            teacher_weight.detach(),
            temperature=self.temperature,
            scale_by_t2=False,
            ignore_mask=None if shift_labels is None else is_ignored(shift_labels, self.ignore_index),
            divergence={0.0: "forward", 1.0: "reverse"}.get(self.jsd_beta, "jsd"),
            beta=self.jsd_beta,
        )


def _check_beta(function: str, name: str, beta: float) -> None:
    if not 0 <= beta <= 1:
        raise ValueError(f"{function}: {name} must lie in [0, 1], got {beta}")


def _check_labels(function: str, labels: Tensor, rows: int) -> None:
    if labels.shape != (rows,):
        raise ValueError(f"{function}: shift_labels must be ({rows},), one per row, got {tuple(labels.shape)}")


def _check_rows(function: str, student: Tensor, teacher: Tensor) -> None:
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"{function}: student and teacher must both be (N, K), got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; flatten the positions of a sequence"
        )

"""The losses of UniKD: checks of the arguments, and the choice of an implementation.

    L = L_CE + α L_FL + β L_L                                                (Eq. 7)

The formulas live in `unikd_fast.kernels.reference`, the checks in `unikd_fast.kernels._checks`.
"""

from typing import NamedTuple

from torch import Tensor

from unikd_fast.kernels import reference
from unikd_fast.kernels._checks import (
    check_feature_reduction,
    check_gaussians,
    check_label_smoothing,
    check_labels,
    check_logits,
    check_mask,
    check_reduction,
    check_temperature,
    choose_impl,
)
from unikd_fast.values import Gaussian


class LossTerms(NamedTuple):
    """The terms of Eq. 7: 0-d tensors on the device, fp32 (fp64 for fp64 inputs). All but `total` are unweighted."""

    total: Tensor  # L
    ce: Tensor  # L_CE
    feature_kl: Tensor  # L_FL
    logit_kl: Tensor  # L_L
    anchor: Tensor | None = None  # L_anchor, where the teacher's head trains along


def softmax_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    scale_by_t2: bool = True,
    ignore_mask: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Give the divergence of the student's class distribution from the teacher's, Eq. 1 and 2.

        L_L = τ² KL( softmax(z_t / τ) || softmax(z_s / τ) )

    Args:
        student_logits: z_s (..., K); every axis before the classes counts rows.
        teacher_logits: z_t (..., K); its dtype may differ. It gets a gradient only if it asks for one.
        temperature: τ > 0.
        reduction: over rows: "batchmean" divides by the rows kept, "mean" by rows kept times K, "sum", "none" (...,).
        scale_by_t2: whether the factor τ² is there.
        ignore_mask: (...,) bool, True for a row to leave out.
        impl: "auto" takes the best implementation there is, "reference" plain PyTorch, "fused" the kernel or an error.

    Returns:
        A scalar, or (...,) for "none"; fp32 (fp64 for fp64 inputs) under autocast too. No rows kept give 0.

    Raises:
        TypeError: a tensor of the wrong dtype.
        ValueError: shapes or devices that differ, a bad temperature, an unknown reduction or impl.
        NotImplementedError: impl="fused" where there is no kernel.

    Example:
        >>> softmax_kl(torch.zeros(8, 10), torch.randn(8, 10), temperature=4.0) > 0
        tensor(True)
    """
    name = "softmax_kl"
    check_temperature(name, temperature)
    check_reduction(name, reduction)
    check_logits(name, student_logits, teacher_logits)
    check_mask(name, ignore_mask, student_logits)
    choose_impl(name, impl)
    return reference.softmax_kl(
        student_logits,
        teacher_logits,
        temperature=temperature,
        reduction=reduction,
        scale_by_t2=scale_by_t2,
        ignore_mask=ignore_mask,
    )


def gaussian_kl(
    student_mean: Tensor,
    student_log_var: Tensor,
    teacher_mean: Tensor,
    teacher_log_var: Tensor,
    *,
    reduction: str = "batchmean",
    feature_reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Give the divergence of the teacher's feature distribution from the student's, Eq. 6, for v = σ².

        L_FL = KL( q_s || q_t ) = 1/2 Σ_k [ v_s/v_t + (m_t - m_s)² / v_t - 1 + ln( v_t / v_s ) ]

    Args:
        student_mean: m_s (..., K).
        student_log_var: ln v_s (..., K).
        teacher_mean: m_t (..., K).
        teacher_log_var: ln v_t (..., K).
        reduction: over rows: "batchmean" and "mean" divide by the rows, "sum", "none" (...,).
        feature_reduction: over k: "mean", so that α keeps its meaning across K, or "sum" as Eq. 6 has it.
        impl: "auto", "reference" or "fused", as in `softmax_kl`.

    Returns:
        A scalar, or (...,) for "none"; fp32 (fp64 for fp64 inputs) under autocast too. No rows give 0.

    Raises:
        TypeError: a tensor that is not floating point.
        ValueError: shapes or devices that differ, an unknown reduction, feature_reduction or impl.
        NotImplementedError: impl="fused" where there is no kernel.

    Example:
        >>> mean, log_var = torch.randn(8, 10), torch.zeros(8, 10)
        >>> gaussian_kl(mean, log_var, mean, log_var)
        tensor(0.)
    """
    name = "gaussian_kl"
    check_reduction(name, reduction)
    check_feature_reduction(name, feature_reduction)
    check_gaussians(name, (student_mean, student_log_var), (teacher_mean, teacher_log_var))
    choose_impl(name, impl)
    return reference.gaussian_kl(
        student_mean,
        student_log_var,
        teacher_mean,
        teacher_log_var,
        reduction=reduction,
        feature_reduction=feature_reduction,
    )


def unikd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    student: Gaussian | tuple[Tensor, Tensor],
    teacher: Gaussian | tuple[Tensor, Tensor],
    *,
    alpha: float | Tensor = 4.0,
    beta: float | Tensor = 1.0,
    temperature: float = 4.0,
    scale_by_t2: bool = True,
    feature_reduction: str = "mean",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    impl: str = "auto",
) -> LossTerms:
    """Give the whole objective of UniKD and its terms.

        L = L_CE + α L_FL + β L_L                                            (Eq. 7)

    Args:
        student_logits: z_s (..., K).
        teacher_logits: z_t (..., K).
        labels: (...,) integer.
        student: (mean, log_var) of the student's features, each (N, K).
        teacher: (mean, log_var) of the teacher's features, each (N, K).
        alpha: weight of L_FL, a number or a 0-d tensor: a tensor can ramp without synchronisation or recompilation.
        beta: weight of L_L, likewise.
        temperature: τ > 0 of L_L.
        scale_by_t2: whether L_L carries τ².
        feature_reduction: "mean" or "sum" over k in L_FL.
        label_smoothing: of L_CE, in [0, 1].
        ignore_index: label of rows without one. They are left out of L_CE alone: distillation needs no labels.
        impl: "auto", "reference" or "fused", as in `softmax_kl`.

    Raises:
        TypeError: a tensor of the wrong dtype.
        ValueError: shapes or devices that differ, student or teacher no pair, labels out of range (looked at on the
            CPU), a bad setting.
        NotImplementedError: impl="fused" where there is no kernel.

    Example:
        >>> logits, labels = torch.randn(8, 10, requires_grad=True), torch.arange(8)
        >>> student, teacher = (torch.randn(8, 10), torch.zeros(8, 10)), (torch.randn(8, 10), torch.zeros(8, 10))
        >>> unikd_loss(logits, torch.randn(8, 10), labels, student, teacher, alpha=2.0).total.backward()
    """
    name = "unikd_loss"
    check_temperature(name, temperature)
    check_feature_reduction(name, feature_reduction)
    check_label_smoothing(name, label_smoothing)
    check_logits(name, student_logits, teacher_logits)
    check_labels(name, labels, student_logits, ignore_index)
    check_gaussians(name, student, teacher)
    choose_impl(name, impl)
    ce = reference.cross_entropy(student_logits, labels, label_smoothing=label_smoothing, ignore_index=ignore_index)
    feature_kl = reference.gaussian_kl(*student, *teacher, feature_reduction=feature_reduction)
    logit_kl = reference.softmax_kl(student_logits, teacher_logits, temperature=temperature, scale_by_t2=scale_by_t2)
    return LossTerms(ce + alpha * feature_kl + beta * logit_kl, ce, feature_kl, logit_kl)

"""The loss of features: the divergence of diagonal Gaussians."""

from typing import Any

from torch import Tensor

from unikd_fast.kernels import _checks as checks
from unikd_fast.kernels import reference


def gaussian_kl(
    student_mean: Tensor,
    student_log_var: Tensor,
    teacher_mean: Tensor,
    teacher_log_var: Tensor,
    *,
    reduction: str = "batchmean",
    feature_reduction: str = "mean",
    normalizer: float | Tensor | None = None,
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
        normalizer, impl: as in `softmax_kl`.

    Returns:
        A scalar, or (...,) for "none"; fp32 (fp64 for fp64 inputs) under autocast too. No rows give 0.

    Raises:
        TypeError: a tensor that is not floating point.
        ValueError: shapes or devices that differ, an unknown reduction, feature_reduction or impl.
        RuntimeError: impl="fused" where no kernel can run.

    Example:
        >>> mean, log_var = torch.randn(8, 10), torch.zeros(8, 10)
        >>> gaussian_kl(mean, log_var, mean, log_var)
        tensor(0.)
    """
    name = "gaussian_kl"
    checks.check_reduction(name, reduction)
    checks.check_feature_reduction(name, feature_reduction)
    checks.check_gaussians(name, (student_mean, student_log_var), (teacher_mean, teacher_log_var))
    checks.check_normalizer(name, normalizer, student_mean)
    parameters = (student_mean, student_log_var, teacher_mean, teacher_log_var)
    settings: dict[str, Any] = {
        "reduction": reduction,
        "feature_reduction": feature_reduction,
        "normalizer": normalizer,
    }
    if checks.choose_impl(name, impl, *parameters) == "fused":
        from unikd_fast.kernels.gaussian_kl import fused_gaussian_kl

        return fused_gaussian_kl(*parameters, **settings)
    return reference.gaussian_kl(*parameters, **settings)

"""Losses of logits: the divergence of class distributions, and decoupled distillation."""

from typing import Any

from torch import Tensor

from unikd_fast.kernels import _checks as checks
from unikd_fast.kernels import reference
from unikd_fast.kernels.reference_compressed import dequantize_rows, topk_kl
from unikd_fast.kernels.reference_dkd import dkd
from unikd_fast.values import QuantizedLogits, TopKLogits


def softmax_kl(
    student_logits: Tensor,
    teacher_logits: Tensor | QuantizedLogits | TopKLogits,
    *,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    scale_by_t2: bool = True,
    ignore_mask: Tensor | None = None,
    divergence: str = "forward",
    beta: float = 0.5,
    standardized: bool = False,
    normalizer: float | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Give the divergence of the student's class distribution from the teacher's, Eq. 1 and 2.

        L_L = τ² KL( softmax(z_t / τ) || softmax(z_s / τ) )

    Both sides are logits. Probabilities passed by mistake cannot be told from logits; they give a loss, a wrong one.

    Args:
        student_logits: z_s (..., K); every axis before the classes counts rows.
        teacher_logits: z_t (..., K); its dtype may differ, and it gets a gradient only if it asks for one. Or what a
            cache stores: `QuantizedLogits`, or `TopKLogits`, whose other classes count as one (`topk_kl`; τ = 1 and
            the forward divergence alone).
        temperature: τ > 0.
        reduction: over rows: "batchmean" divides by the rows kept, "mean" by rows kept times K, "sum", "none" (...,).
        scale_by_t2: whether the factor τ² is there.
        ignore_mask: (...,) bool, True for a row to leave out.
        divergence: "forward" KL(p_t || p_s), "reverse" KL(p_s || p_t), or "jsd", the generalised Jensen-Shannon
            divergence β KL(p_t || m) + (1 - β) KL(p_s || m), m = β p_t + (1 - β) p_s (Agarwal et al. 2024).
        beta: β of "jsd", in (0, 1).
        standardized: logit standardisation (Sun et al. 2024): each row to mean 0 and standard deviation 1 first.
        normalizer: number or 0-d tensor that "batchmean" and "mean" divide by in place of the rows kept: the rows of
            the whole batch, when it is accumulated from unequal micro-batches.
        impl: "auto" takes the kernel on a GPU and plain PyTorch elsewhere, "reference" plain PyTorch, "fused" the
            kernel or an error.

    Returns:
        A scalar, or (...,) for "none"; fp32 (fp64 for fp64 inputs) under autocast too. No rows kept give 0.

    Raises:
        TypeError: a tensor of the wrong dtype.
        ValueError: shapes or devices that differ, a bad temperature, an unknown reduction or impl.
        RuntimeError: impl="fused" where no kernel can run.

    Example:
        >>> softmax_kl(torch.zeros(8, 10), torch.randn(8, 10), temperature=4.0) > 0
        tensor(True)
    """
    name = "softmax_kl"
    checks.check_temperature(name, temperature)
    checks.check_reduction(name, reduction)
    checks.check_divergence(name, divergence, beta)
    checks.check_teacher(name, student_logits, teacher_logits)
    checks.check_mask(name, ignore_mask, student_logits)
    checks.check_normalizer(name, normalizer, student_logits)
    if standardized:
        checks.check_standardizable(name, student_logits)
    if isinstance(teacher_logits, TopKLogits):
        checks.check_topk_settings(name, temperature, divergence, standardized, impl)
        return topk_kl(
            student_logits, *teacher_logits, reduction=reduction, ignore_mask=ignore_mask, normalizer=normalizer
        )
    settings: dict[str, Any] = {
        "temperature": temperature,
        "reduction": reduction,
        "scale_by_t2": scale_by_t2,
        "ignore_mask": ignore_mask,
        "divergence": divergence,
        "beta": beta,
        "standardized": standardized,
        "normalizer": normalizer,
    }
    if checks.choose_impl(name, impl, student_logits, *tensors_of(teacher_logits)) == "fused":
        from unikd_fast.kernels.softmax_kl import fused_softmax_kl

        values, scale = stored_rows(teacher_logits)
        return fused_softmax_kl(student_logits, values, scale, **settings)
    return reference.softmax_kl(student_logits, dense_logits(teacher_logits), **settings)


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | QuantizedLogits,
    labels: Tensor,
    *,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 8.0,
    temperature: float = 4.0,
    reduction: str = "batchmean",
    ignore_index: int = -100,
    standardized: bool = False,
    normalizer: float | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Give the loss of decoupled knowledge distillation (Zhao et al., CVPR 2022, Eq. 7): α TCKD + β NCKD, times τ².

        TCKD = KL( (p_y, 1 - p_y) || (q_y, 1 - q_y) ),    NCKD = KL( p without y || q without y, both renormalised )

    Args:
        student_logits: (..., K), K >= 2; logits, not probabilities.
        teacher_logits: (..., K), or `QuantizedLogits`. The kernel takes it as a constant: where it asks
            for a gradient "auto" is plain PyTorch and "fused" an error.
        labels: (...,) integer. Out of range is an error on the CPU. On a GPU, where looking would cost a
            synchronisation, the fused kernel answers NaN, loss and gradient of that row.
        alpha, beta: weights of the two terms, numbers or 0-d tensors.
        temperature: τ > 0.
        reduction: as in `softmax_kl`.
        ignore_index: label of rows to leave out.
        standardized, normalizer, impl: as in `softmax_kl`.

    Returns:
        A scalar, or (...,) for "none"; fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError: a tensor of the wrong dtype.
        ValueError: shapes or devices that differ, labels out of range, a bad setting.
        RuntimeError: impl="fused" where no kernel can run.

    Example:
        >>> dkd_loss(torch.zeros(8, 10), torch.randn(8, 10), torch.arange(8)) > 0
        tensor(True)
    """
    name = "dkd_loss"
    checks.check_temperature(name, temperature)
    checks.check_reduction(name, reduction)
    checks.check_teacher(name, student_logits, teacher_logits)
    checks.check_two_classes(name, student_logits)
    checks.check_labels(name, labels, student_logits, ignore_index)
    checks.check_normalizer(name, normalizer, student_logits)
    checks.check_weight(name, "alpha", alpha, student_logits)
    checks.check_weight(name, "beta", beta, student_logits)
    if isinstance(teacher_logits, TopKLogits):
        raise TypeError(f"{name}: needs all of the teacher's logits, got TopKLogits; store QuantizedLogits instead")
    settings: dict[str, Any] = {
        "alpha": alpha,
        "beta": beta,
        "temperature": temperature,
        "reduction": reduction,
        "ignore_index": ignore_index,
        "standardized": standardized,
        "normalizer": normalizer,
    }
    impl = checks.without_teacher_gradient(name, impl, teacher_logits)
    if checks.choose_impl(name, impl, student_logits, *tensors_of(teacher_logits)) == "fused":
        from unikd_fast.kernels.dkd import fused_dkd

        values, scale = stored_rows(teacher_logits)
        return fused_dkd(student_logits, values, scale, labels, **settings)
    return dkd(student_logits, dense_logits(teacher_logits), labels, **settings)


def dense_logits(teacher: Tensor | QuantizedLogits) -> Tensor:
    """Give the logits (..., K), expanded from their stored form if they have one."""
    return dequantize_rows(*teacher) if isinstance(teacher, QuantizedLogits) else teacher


def stored_rows(teacher: Tensor | QuantizedLogits) -> tuple[Tensor, Tensor | None]:
    """Give what a kernel reads: values (..., K) and scale (...,). A softmax does not see the offset."""
    return (teacher.values, teacher.scale) if isinstance(teacher, QuantizedLogits) else (teacher, None)


def tensors_of(teacher: Tensor | QuantizedLogits) -> tuple[Tensor, ...]:
    """Give what a teacher is stored in."""
    return (teacher,) if isinstance(teacher, Tensor) else tuple(teacher)

"""The whole objective of UniKD and its terms.

L = L_CE + α L_FL + β L_L                                                (Eq. 7)
"""

from typing import NamedTuple

from torch import Tensor

from unikd_fast.kernels import _checks as checks
from unikd_fast.kernels import reference
from unikd_fast.kernels.reference_compressed import topk_kl
from unikd_fast.losses.logits import dense_logits, stored_rows, tensors_of
from unikd_fast.values import Gaussian, QuantizedLogits, TopKLogits

GaussianPair = Gaussian | tuple[Tensor, Tensor]


class LossTerms(NamedTuple):
    """The terms of Eq. 7: 0-d tensors on the device, fp32 (fp64 for fp64 inputs). All but `total` are unweighted.

    `total` and `anchor` carry gradients; the others are for the log.
    """

    total: Tensor  # L
    ce: Tensor  # L_CE
    feature_kl: Tensor  # L_FL
    logit_kl: Tensor  # L_L
    anchor: Tensor | None = None  # L_anchor, where the teacher's head trains along


def unikd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | QuantizedLogits | TopKLogits,
    labels: Tensor,
    student: GaussianPair | None = None,
    teacher: GaussianPair | None = None,
    *,
    alpha: float | Tensor = 4.0,
    beta: float | Tensor = 1.0,
    ce_weight: float = 1.0,
    temperature: float = 4.0,
    scale_by_t2: bool = True,
    feature_reduction: str = "mean",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    anchor: GaussianPair | None = None,
    normalizer: float | Tensor | None = None,
    impl: str = "auto",
) -> LossTerms:
    """Give the whole objective of UniKD and its terms.

        L = L_CE + α L_FL + β L_L                                            (Eq. 7)

    Args:
        student_logits: z_s (..., K); logits, not probabilities.
        teacher_logits: z_t (..., K), or what a cache stores, as in `softmax_kl`.
        labels: (...,) integer, or (..., K) floating-point weights of the classes. An integer out of range is an error
            on the CPU. On a GPU, where looking would cost a synchronisation, the fused kernel answers NaN: the
            loss, and the gradient of that row.
        student: (mean, log_var) of the student's features, each (N, K). With neither Gaussian there is no L_FL: plain
            distillation of logits.
        teacher: (mean, log_var) of the teacher's features, each (N, K).
        alpha: weight of L_FL, a number or a 0-d tensor: a tensor can ramp without synchronisation or recompilation.
        beta: weight of L_L, likewise.
        ce_weight: weight of L_CE.
        temperature: τ > 0 of L_L.
        scale_by_t2: whether L_L carries τ².
        feature_reduction: "mean" or "sum" over k in L_FL.
        label_smoothing: of L_CE, in [0, 1].
        ignore_index: label of rows without one. They are left out of L_CE alone: distillation needs no labels.
        anchor: (mean, log_var), each (N, K), to be held to the teacher's logits (`reference.gaussian_anchor`), which
            must be (N, K) and not top-k. The term is not part of `total`.
        normalizer: number or 0-d tensor every sum over rows is divided by in place of the number of rows (of labelled
            rows in L_CE), for batches accumulated from unequal micro-batches.
        impl: "auto", "reference" or "fused", as in `softmax_kl`.

    Returns:
        The terms; `total` and `anchor` carry gradients. The kernel takes the teacher's logits as a constant: where they
        ask for a gradient "auto" is plain PyTorch and "fused" an error.

    Raises:
        TypeError: a tensor of the wrong dtype.
        ValueError: shapes or devices that differ, student or teacher no pair, labels out of range (looked at on the
            CPU), a bad setting.
        RuntimeError: impl="fused" where no kernel can run.

    Example:
        >>> logits, labels = torch.randn(8, 10, requires_grad=True), torch.arange(8)
        >>> student, teacher = (torch.randn(8, 10), torch.zeros(8, 10)), (torch.randn(8, 10), torch.zeros(8, 10))
        >>> unikd_loss(logits, torch.randn(8, 10), labels, student, teacher, alpha=2.0).total.backward()
    """
    name = "unikd_loss"
    checks.check_temperature(name, temperature)
    checks.check_feature_reduction(name, feature_reduction)
    checks.check_label_smoothing(name, label_smoothing)
    checks.check_teacher(name, student_logits, teacher_logits)
    checks.check_labels(name, labels, student_logits, ignore_index, soft=True)
    checks.check_normalizer(name, normalizer, student_logits)
    checks.check_weight(name, "alpha", alpha, student_logits)
    checks.check_weight(name, "beta", beta, student_logits)
    if (student is None) != (teacher is None):
        missing = "student" if student is None else "teacher"
        raise ValueError(f"{name}: student and teacher Gaussians come together, got no {missing}; pass both or neither")
    pairs: tuple[Tensor, ...] = ()
    if student is not None and teacher is not None:
        checks.check_gaussians(name, student, teacher)
        pairs = (*student, *teacher)
    if anchor is not None:
        checks.check_anchor(name, anchor, teacher_logits)
        pairs = (*pairs, *anchor)
    if isinstance(teacher_logits, TopKLogits):
        checks.check_topk_settings(name, temperature, "forward", standardized=False, impl=impl)
    else:
        impl = checks.without_teacher_gradient(name, impl, teacher_logits)
        if checks.choose_impl(name, impl, student_logits, *tensors_of(teacher_logits), *pairs) == "fused":
            from unikd_fast.kernels.unikd_loss import fused_unikd_loss

            values, scale = stored_rows(teacher_logits)
            total, ce, feature_kl, logit_kl, anchor_term = fused_unikd_loss(
                student_logits,
                values,
                scale,
                labels,
                student,
                teacher,
                anchor,
                alpha=alpha,
                beta=beta,
                ce_weight=ce_weight,
                temperature=temperature,
                scale_by_t2=scale_by_t2,
                feature_reduction=feature_reduction,
                label_smoothing=label_smoothing,
                ignore_index=ignore_index,
                normalizer=normalizer,
            )
            return LossTerms(total, ce, feature_kl, logit_kl, anchor_term if anchor is not None else None)
    ce = reference.cross_entropy(
        student_logits, labels, label_smoothing=label_smoothing, ignore_index=ignore_index, normalizer=normalizer
    )
    if isinstance(teacher_logits, TopKLogits):
        logit_kl = topk_kl(student_logits, *teacher_logits, normalizer=normalizer)
    else:
        logit_kl = reference.softmax_kl(
            student_logits,
            dense_logits(teacher_logits),
            temperature=temperature,
            scale_by_t2=scale_by_t2,
            normalizer=normalizer,
        )
    total = ce_weight * ce
    feature_kl = ce.new_zeros(())
    if student is not None and teacher is not None:
        feature_kl = reference.gaussian_kl(
            *student, *teacher, feature_reduction=feature_reduction, normalizer=normalizer
        )
        total = total + alpha * feature_kl
    total = total + beta * logit_kl
    anchored: Tensor | None = None
    if anchor is not None and not isinstance(teacher_logits, TopKLogits):
        logits = dense_logits(teacher_logits).detach()
        anchored = reference.gaussian_anchor(logits, *anchor, normalizer=normalizer)
    return LossTerms(total, ce.detach(), feature_kl.detach(), logit_kl.detach(), anchored)

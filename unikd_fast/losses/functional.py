"""The losses as functions: checks of the arguments, and the choice between the kernels and plain PyTorch."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from unikd_fast.kernels import _checks as checks
from unikd_fast.kernels import reference
from unikd_fast.losses.stored import dense_logits, stored_rows, tensors_of
from unikd_fast.values import Gaussian, QuantizedLogits, TopKLogits

GaussianPair = Gaussian | tuple[Tensor, Tensor]


class LossTerms(NamedTuple):
    """The terms of Eq. 7: 0-d tensors on the device, fp32 (fp64 for fp64 inputs). All but `total` are unweighted.

    `total` and `anchor` carry gradients; the others are for logging.
    """

    total: Tensor  # L
    ce: Tensor  # L_CE
    feature_kl: Tensor  # L_FL
    logit_kl: Tensor  # L_L
    anchor: Tensor | None = None  # L_anchor, if an anchor was passed


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
    """Return the divergence of the student's class distribution from the teacher's, Eq. 1 and 2.

        L_L = τ² KL( softmax(z_t / τ) || softmax(z_s / τ) )

    Pass logits, not probabilities: the two cannot be told apart, and probabilities yield a wrong loss without an error.

    Args:
        student_logits: z_s (..., K); all axes before the class axis count rows.
        teacher_logits: z_t (..., K); its dtype may differ, and it receives a gradient only if it requires one. Or the
            stored forms of a cache: `QuantizedLogits`, or `TopKLogits`, whose other classes count as one
            (`reference.topk_kl`; only for τ = 1 and the forward divergence, always in plain PyTorch).
        temperature: τ > 0.
        reduction: reduction over rows: "batchmean" divides by the number of rows kept, "mean" by that number times K;
            "sum"; "none" returns (...,).
        scale_by_t2: whether to multiply by τ².
        ignore_mask: (...,) bool, True for rows to leave out.
        divergence: "forward" KL(p_t || p_s), "reverse" KL(p_s || p_t), or "jsd", the generalised Jensen-Shannon
            divergence β KL(p_t || m) + (1 - β) KL(p_s || m), m = β p_t + (1 - β) p_s (Agarwal et al. 2024).
        beta: β of "jsd", in (0, 1).
        standardized: whether to standardise each row of logits first, to mean 0 and deviation 1 (Sun et al. 2024).
        normalizer: number or 0-d tensor that "batchmean" and "mean" divide by instead of the number of rows kept: the
            rows of the whole batch when it is accumulated from unequal micro-batches.
        impl: "auto" uses the kernel on a GPU and plain PyTorch elsewhere, "reference" always plain PyTorch; "fused"
            uses the kernel or raises.

    Returns:
        A scalar, or (...,) for "none"; fp32 (fp64 for fp64 inputs), under autocast too; 0 if no row is kept.

    Raises:
        TypeError: If a tensor has the wrong dtype.
        ValueError: If shapes or devices differ, or a setting is not valid.
        RuntimeError: If impl="fused" and the kernel cannot run.

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
        return reference.topk_kl(
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


def channel_wise_kl(
    student_maps: Tensor, teacher_maps: Tensor, *, temperature: float = 1.0, impl: str = "auto"
) -> Tensor:
    """Return the divergence of each channel's distribution over the positions (Shu et al., ICCV 2021, Eq. 3 and 4).

        L = τ² / (N C) Σ_n Σ_c KL( softmax(t_nc / τ) || softmax(s_nc / τ) )

    For dense prediction, on class maps or features; the softmax is over positions and not over classes: the pixel-wise
    loss of class maps is `softmax_kl(student.movedim(1, -1), teacher.movedim(1, -1))`. NCHW maps are read as they are;
    channels-last ones of more than 512 positions are copied.

    Args:
        student_maps: s (N, C, ...), such as (N, C, H, W); all axes after the channels are positions.
        teacher_maps: t, the same shape; it receives a gradient only if it requires one.
        temperature: τ > 0.
        impl: as in `softmax_kl`.

    Returns:
        A scalar; fp32 (fp64 for fp64 inputs), under autocast too; 0 if there is no channel.

    Raises:
        TypeError: If a tensor has the wrong dtype.
        ValueError: If shapes or devices differ, or the temperature is not valid.
        RuntimeError: If impl="fused" and the kernel cannot run.

    Example:
        >>> channel_wise_kl(torch.zeros(2, 19, 8, 8), torch.randn(2, 19, 8, 8), temperature=4.0) > 0
        tensor(True)
    """
    name = "channel_wise_kl"
    checks.check_temperature(name, temperature)
    checks.check_maps(name, student_maps, teacher_maps)
    impl = checks.choose_impl(name, impl, student_maps, teacher_maps)
    return softmax_kl(student_maps.flatten(2), teacher_maps.flatten(2), temperature=temperature, impl=impl)


def linear_softmax_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Tensor | QuantizedLogits,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    ce_weight: float = 1.0,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    scale_by_t2: bool = True,
    ignore_mask: Tensor | None = None,
    ignore_index: int = -100,
    divergence: str = "forward",
    beta: float = 0.5,
    normalizer: float | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return `softmax_kl` of two linear layers, and the cross-entropy with labels, without the logits of all rows.

        L = L_L( h_t W_tᵀ + b_t, h_s W_sᵀ + b_s ) + w L_CE( h_s W_sᵀ + b_s, y )

    For language models and heads of many classes, whose logits are the largest tensors of a step. The rows are taken
    in chunks, and the gradients of the student's hidden states, weight and bias are computed with the loss: beside
    them, for 4,096 rows and more, one eighth of the student's logits is all the memory it takes.

    Args:
        student_hidden: h_s (..., D_s), the input of the last layer; all axes before the last one count rows. Where no
            view flattens them, as in hidden[:, :-1], they are copied: leave rows out by `ignore_mask` instead.
        student_weight: W_s (K, D_s), of h_s's dtype. Under autocast both are cast as a linear layer would.
        teacher: h_t (..., D_t) with a teacher_weight; without, the teacher's logits (..., K), or `QuantizedLogits`.
            The teacher is a constant.
        teacher_weight: W_t (K, D_t).
        labels: (...,) integer, as in `unikd_loss`. If None, there is no cross-entropy.
        student_bias: b_s (K,).
        teacher_bias: b_t (K,).
        ce_weight: w.
        temperature: τ > 0 of L_L; L_CE has none.
        reduction: as in `softmax_kl`. L_CE is the mean over the labelled rows, for "sum" their sum; "none" is without
            labels, and computes its gradient in backward, with the logits once more.
        scale_by_t2: whether to multiply L_L by τ².
        ignore_mask: (...,) bool, True for rows to leave out of both terms.
        ignore_index: label of the rows to leave out of L_CE only. In language models, where these have no target
            at all, pass ignore_mask=labels == ignore_index too.
        divergence, beta: as in `softmax_kl`.
        normalizer: number or 0-d tensor that both sums over rows are divided by instead of the numbers of rows, as in
            `unikd_loss`.
        impl: "auto" computes each chunk's loss by the kernels on a GPU and in plain PyTorch elsewhere, "reference"
            always in plain PyTorch; "fused" uses the kernels or raises.

    Returns:
        A scalar, or (...,) for "none"; fp32 (fp64 for fp64 inputs), under autocast too; 0 if no row is kept. It can be
        differentiated once, in reverse mode.

    Raises:
        TypeError: If a tensor has the wrong dtype.
        ValueError: If shapes or devices differ, the teacher requires a gradient, a label is out of range, or a setting
            is not valid.
        RuntimeError: If impl="fused" and the kernels cannot run, or a tensor is under a transform of torch.func.

    Example:
        >>> head, teacher_head = torch.nn.Linear(16, 1000), torch.nn.Linear(64, 1000).requires_grad_(False)
        >>> hidden, teacher_hidden = torch.randn(8, 16, requires_grad=True), torch.randn(8, 64)
        >>> linear_softmax_kl(hidden, head.weight, teacher_hidden, teacher_head.weight, temperature=2.0).backward()
    """
    name = "linear_softmax_kl"
    checks.check_temperature(name, temperature)
    checks.check_reduction(name, reduction)
    checks.check_divergence(name, divergence, beta)
    if isinstance(teacher, TopKLogits):
        raise TypeError(f"{name}: needs all of the teacher's logits, got TopKLogits; store QuantizedLogits instead")
    student_hidden, student_weight, student_bias = _as_autocast(student_hidden, student_weight, student_bias)
    checks.check_linear(name, "student", student_hidden, student_weight, student_bias)
    student_logits = _shape_of_logits(student_hidden, student_weight)
    values, scale = stored_rows(teacher)
    if teacher_weight is not None and scale is None:
        values, teacher_weight, teacher_bias = _as_autocast(values, teacher_weight, teacher_bias)
        checks.check_linear(name, "teacher", values, teacher_weight, teacher_bias)
        checks.check_teacher(name, student_logits, _shape_of_logits(values, teacher_weight))
    elif teacher_weight is None and teacher_bias is None:
        checks.check_teacher(name, student_logits, teacher)
    else:
        raise ValueError(
            f"{name}: teacher_weight goes with hidden states and teacher_bias with a teacher_weight, got a "
            f"{'teacher_bias alone' if teacher_weight is None else 'teacher_weight for QuantizedLogits'}; leave it out"
        )
    checks.check_mask(name, ignore_mask, student_logits)
    checks.check_normalizer(name, normalizer, student_logits)
    if labels is not None:
        checks.check_labels(name, labels, student_logits, ignore_index)
        if reduction == "none":
            raise ValueError(f"{name}: reduction='none' has no cross-entropy, got labels; leave them out")
    constants = {"teacher": values, "teacher_weight": teacher_weight, "teacher_bias": teacher_bias}
    checks.check_constant(name, **constants)
    present = [x for x in (student_hidden, student_weight, student_bias, *constants.values()) if x is not None]
    checks.check_transforms(name, present, "softmax_kl of the logits")
    from unikd_fast.kernels.linear_softmax_kl import linear_softmax_kl as compute

    return compute(
        student_hidden,
        student_weight,
        student_bias,
        values,
        teacher_weight,
        teacher_bias,
        scale,
        labels,
        fused=checks.choose_impl(name, impl, *present) == "fused",
        temperature=temperature,
        reduction=reduction,
        scale_by_t2=scale_by_t2,
        ignore_mask=ignore_mask,
        divergence=divergence,
        beta=beta,
        ce_weight=ce_weight,
        ignore_index=ignore_index,
        normalizer=normalizer,
    )


def _as_autocast(*tensors: Tensor | None) -> list[Any]:
    """Return the tensors as a linear layer would take them: under autocast in its dtype, but for fp64."""
    device = next(x.device.type for x in tensors if x is not None)
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors]


def _shape_of_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return a tensor with the shape, dtype and device of the logits, and without memory."""
    return hidden.detach().new_empty(()).expand(*hidden.shape[:-1], weight.shape[0])


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
    """Return the loss of decoupled knowledge distillation (Zhao et al., CVPR 2022, Eq. 7): α TCKD + β NCKD, times τ².

        TCKD = KL( (p_y, 1 - p_y) || (q_y, 1 - q_y) ),    NCKD = KL( p without y || q without y, both renormalised )

    Args:
        student_logits: (..., K), K >= 2; logits, not probabilities.
        teacher_logits: (..., K), or `QuantizedLogits`. The kernel treats it as a constant: if it requires a gradient,
            "auto" uses plain PyTorch and "fused" raises.
        labels: (...,) integer. A label out of range raises on the CPU. On a GPU, where checking would synchronise, the
            fused kernel returns NaN for the loss and the gradient of that row.
        alpha, beta: weights of the two terms, numbers or 0-d tensors.
        temperature: τ > 0.
        reduction: as in `softmax_kl`.
        ignore_index: label of the rows to leave out.
        standardized, normalizer, impl: as in `softmax_kl`.

    Returns:
        A scalar, or (...,) for "none"; fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError: If a tensor has the wrong dtype.
        ValueError: If shapes or devices differ, a label is out of range, or a setting is not valid.
        RuntimeError: If impl="fused" and the kernel cannot run.

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
    return reference.dkd(student_logits, dense_logits(teacher_logits), labels, **settings)


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
    """Return the divergence of the teacher's feature distribution from the student's, Eq. 6, for v = σ².

        L_FL = KL( q_s || q_t ) = 1/2 Σ_k [ v_s/v_t + (m_t - m_s)² / v_t - 1 + ln( v_t / v_s ) ]

    Args:
        student_mean: m_s (..., K).
        student_log_var: ln v_s (..., K).
        teacher_mean: m_t (..., K).
        teacher_log_var: ln v_t (..., K).
        reduction: reduction over rows: "batchmean" and "mean" divide by the number of rows; "sum"; "none" returns
            (...,).
        feature_reduction: reduction over k: "mean", so that α keeps its meaning across K, or "sum" as in Eq. 6.
        normalizer, impl: as in `softmax_kl`.

    Returns:
        A scalar, or (...,) for "none"; fp32 (fp64 for fp64 inputs), under autocast too; 0 if there are no rows.

    Raises:
        TypeError: If a tensor is not floating point.
        ValueError: If shapes or devices differ, or a setting is not valid.
        RuntimeError: If impl="fused" and the kernel cannot run.

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
    """Return the whole objective of UniKD and its terms.

        L = L_CE + α L_FL + β L_L                                            (Eq. 7)

    Args:
        student_logits: z_s (..., K); logits, not probabilities.
        teacher_logits: z_t (..., K), or a stored form of it, as in `softmax_kl`. The kernel treats it as a constant:
            if it requires a gradient, "auto" uses plain PyTorch and "fused" raises.
        labels: (...,) integer, or (..., K) floating-point class weights. An integer out of range raises on the CPU. On
            a GPU, where checking would synchronise, the fused kernel returns NaN for the loss and the gradient of that
            row.
        student: (mean, log_var) of the student's features, each (N, K). If None, there is no L_FL: plain distillation
            of logits.
        teacher: (mean, log_var) of the teacher's features, each (N, K).
        alpha: weight of L_FL, a number or a 0-d tensor, which can be ramped without synchronisation or recompilation.
        beta: weight of L_L, likewise.
        ce_weight: weight of L_CE.
        temperature: τ > 0 of L_L.
        scale_by_t2: whether to multiply L_L by τ².
        feature_reduction: reduction over k in L_FL, "mean" or "sum".
        label_smoothing: label smoothing of L_CE, in [0, 1].
        ignore_index: label of unlabelled rows. They are left out of L_CE only: distillation needs no labels.
        anchor: (mean, log_var), each (N, K), to fit to the teacher's logits (`reference.gaussian_anchor`), which must
            be (N, K) and not top-k. The term is not part of `total`.
        normalizer: number or 0-d tensor that sums over rows are divided by instead of the number of rows (labelled
            rows in L_CE), for batches accumulated from unequal micro-batches.
        impl: "auto", "reference" or "fused", as in `softmax_kl`.

    Returns:
        The terms; `total` and `anchor` carry gradients.

    Raises:
        TypeError: If a tensor has the wrong dtype.
        ValueError: If shapes or devices differ, `student` or `teacher` is not a pair, a label is out of range, or a
            setting is not valid.
        RuntimeError: If impl="fused" and the kernel cannot run.

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
        raise ValueError(
            f"{name}: the student's and the teacher's Gaussian go together, got no {missing}; pass both or neither"
        )
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
        logit_kl = reference.topk_kl(student_logits, *teacher_logits, normalizer=normalizer)
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

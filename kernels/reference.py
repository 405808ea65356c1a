"""The losses in plain PyTorch: divergences of logits and of Gaussians, DKD, cross-entropy, and the anchor of UniKD.

Letters: N rows (samples, or positions of samples), K classes, τ temperature; p the teacher's and q the student's
probabilities; φ(u) = eᵘ - 1 - u. The class axis is the last one and every axis before it counts rows. Everything is
computed in fp32, or in fp64 for fp64 inputs, also under autocast; nothing is detached: a tensor receives a gradient if
it requires one. The fused kernels follow the reductions and the rules for ignored rows that are defined here.

Every divergence is written as sums of p φ(u): because p and q both sum to one that is the textbook form, and as every
term is positive nothing cancels when the student is close to its teacher.
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

DIVERGENCES = ("forward", "reverse", "jsd")


def softmax_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    scale_by_t2: bool = True,
    ignore_mask: Tensor | None = None,
    divergence: str = "forward",
    beta: float = 0.5,
    standardized: bool = False,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Return the divergence of the student's class distribution from the teacher's, Eq. 1 and 2.

        L_L = τ² KL( p_t || p_s ) = τ² Σ_k p_t,k ( ln p_t,k - ln p_s,k ),    p = softmax(z / τ)

    Args:
        student_logits: (..., K).
        teacher_logits: (..., K).
        temperature: τ > 0.
        reduction: reduction over rows: "none" (...,); "sum"; "batchmean" divides by the number of rows kept, "mean" by
            that number times K.
        scale_by_t2: whether to multiply by τ², which Eq. 1 does not; it keeps the gradient's size independent of τ.
        ignore_mask: (...,) bool, True for rows to leave out: loss 0 and gradient 0 whatever the row holds.
        divergence: "forward" as above, "reverse" or "jsd", see `divergence_rows`.
        beta: weight of the teacher in "jsd".
        standardized: whether to standardise each row of logits first, gradient included.
        normalizer: what "batchmean" and "mean" divide by instead of the number of rows kept.

    Returns:
        A scalar, or (...,); 0 if there are no rows. A class at -inf in both adds 0, in the student alone +inf.

    Example:
        >>> softmax_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, float("-inf")]]))
        tensor(0.6931)
    """
    student, teacher = at_least_fp32(student_logits), at_least_fp32(teacher_logits)
    weight, classes = temperature**2 if scale_by_t2 else 1.0, student.shape[-1]
    if ignore_mask is not None:  # before the softmax: what is masked may be NaN, and 0 * NaN is NaN in a gradient
        student = student.masked_fill(ignore_mask[..., None], 0.0)
        teacher = teacher.masked_fill(ignore_mask[..., None], 0.0)
    if standardized:
        student, teacher = standardize(student), standardize(teacher)
    if temperature != 1:
        student, teacher = student / temperature, teacher / temperature
    log_q, log_p = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    if divergence == "forward" and ignore_mask is None and not isinstance(normalizer, Tensor):
        textbook = _textbook_kl(log_p, log_q, per_row=reduction == "none")
        if textbook is not None:
            if reduction in ("batchmean", "mean"):
                weight /= (normalizer or max(student.numel() // classes, 1)) * (classes if reduction == "mean" else 1)
            return textbook * weight
    rows = divergence_rows(log_p, log_q, divergence, beta) * weight
    return reduce_rows(rows, reduction, classes=classes, ignore_mask=ignore_mask, normalizer=normalizer)


def _textbook_kl(log_p: Tensor, log_q: Tensor, *, per_row: bool) -> Tensor | None:
    """Return Σ p (ln p - ln q) if reading its value is free and shows that it is accurate, else None.

    Its error is about ε, so it is accurate unless it is small; and it is a third of the work.
    """
    if log_p.device.type != "cpu" or torch.compiler.is_compiling() or log_p.numel() == 0:
        return None
    if transform_of(log_p, log_q) is not None:
        return None
    loss = F.kl_div(log_q, log_p, log_target=True, reduction="none" if per_row else "sum")
    if per_row:
        loss = loss.sum(dim=-1)
        smallest = loss.detach().min().item()
    else:
        smallest = loss.item() / (log_p.numel() // log_p.shape[-1])
    return loss if 2**16 * torch.finfo(log_p.dtype).eps < smallest < float("inf") else None


def topk_kl(
    student_logits: Tensor,
    values: Tensor,
    indices: Tensor,
    log_sum_exp: Tensor,
    *,
    reduction: str = "batchmean",
    ignore_mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Return the divergence from a teacher given by its k largest logits and the log-sum-exp of all, τ = 1.

        Σ_{j in top k} p_j ln( p_j / q_j ) + r_t ln( r_t / r_s ),    r = 1 - Σ_{j in top k} p_j,    p_j = e^{z_j - lse}

    This is the KL divergence with all other classes merged into one: never above the full one (data-processing
    inequality), and equal to it if the student spreads r as the teacher does.

    Args:
        student_logits: (..., K).
        values: the teacher's largest logits (..., k), k <= K.
        indices: their classes (..., k), distinct.
        log_sum_exp: log-sum-exp (...,) of all K of the teacher's logits; the stored probabilities sum to at most one.
        reduction, ignore_mask, normalizer: as in `softmax_kl`.
    """
    student, top, lse = at_least_fp32(student_logits), at_least_fp32(values), at_least_fp32(log_sum_exp)
    if ignore_mask is not None:
        student, top = (x.masked_fill(ignore_mask[..., None], 0.0) for x in (student, top))
        lse = lse.masked_fill(ignore_mask, math.log(top.shape[-1]))
    index = indices.long()
    log_p, log_q_all = top - lse[..., None], F.log_softmax(student, dim=-1)
    log_q = log_q_all.gather(-1, index)
    if index.shape[-1] < student.shape[-1]:
        rest_p = (1 - log_p.exp().sum(dim=-1, keepdim=True)).clamp(min=0).log()
        rest_q = log_q_all.scatter(-1, index, -math.inf).logsumexp(dim=-1, keepdim=True)
        log_p, log_q = torch.cat([log_p, rest_p], dim=-1), torch.cat([log_q, rest_q], dim=-1)
    rows = kl_rows(log_p, log_q)
    return reduce_rows(rows, reduction, classes=student.shape[-1], ignore_mask=ignore_mask, normalizer=normalizer)


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 8.0,
    temperature: float = 4.0,
    reduction: str = "batchmean",
    ignore_index: int = -100,
    standardized: bool = False,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Return α TCKD + β NCKD, Eq. 7 of the paper, times τ².

        TCKD = KL( (p_y, 1 - p_y) || (q_y, 1 - q_y) ),    NCKD = KL( p without y || q without y, both renormalised )

    for the teacher's p, the student's q = softmax(z / τ) and the label y. 1 - q_y is the sum of the other classes, so
    a student that is nearly certain loses no digits.

    Args:
        student_logits: (..., K), K >= 2.
        teacher_logits: (..., K).
        labels: (...,) integer.
        alpha, beta: weights, numbers or 0-d tensors.
        temperature: τ > 0.
        reduction: reduction over rows, as in `softmax_kl`.
        ignore_index: label of the rows to leave out.
        standardized: whether to standardise each row of logits first.
        normalizer: what "batchmean" and "mean" divide by instead of the number of rows kept.
    """
    student, teacher = at_least_fp32(student_logits), at_least_fp32(teacher_logits)
    ignored = is_ignored(labels, ignore_index)
    student = student.masked_fill(ignored[..., None], 0.0)
    teacher = teacher.masked_fill(ignored[..., None], 0.0)
    if standardized:
        student, teacher = standardize(student), standardize(teacher)
    target = labels.long().masked_fill(ignored, 0)[..., None]
    classes = torch.arange(student.shape[-1], device=student.device)
    is_target = classes == target
    binary, others = [], []
    for logits in (teacher, student):
        log_p = F.log_softmax(logits / temperature, dim=-1)
        without_target = log_p.masked_fill(is_target, -math.inf)
        binary.append(torch.cat([log_p.gather(-1, target), without_target.logsumexp(-1, keepdim=True)], dim=-1))
        others.append(F.log_softmax(without_target, dim=-1))
    rows = (alpha * kl_rows(*binary) + beta * kl_rows(*others)) * temperature**2
    return reduce_rows(rows, reduction, classes=student.shape[-1], ignore_mask=ignored, normalizer=normalizer)


def gaussian_kl(
    student_mean: Tensor,
    student_log_var: Tensor,
    teacher_mean: Tensor,
    teacher_log_var: Tensor,
    *,
    reduction: str = "batchmean",
    feature_reduction: str = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Return the divergence of the teacher's feature distribution from the student's, Eq. 6, for v = σ².

        L_FL = KL( q_s || q_t ) = 1/2 Σ_k [ v_s/v_t + (m_t - m_s)² / v_t - 1 + ln( v_t / v_s ) ]

    The direction is opposite to that of Eq. 1, as in the paper. In terms of d = ln v_s - ln v_t: v_s/v_t - 1 = eᵈ - 1.

    Args:
        student_mean: m_s (..., K).
        student_log_var: ln v_s (..., K).
        teacher_mean: m_t (..., K).
        teacher_log_var: ln v_t (..., K).
        reduction: reduction over rows: "none" (...,); "sum"; "batchmean" and "mean" divide by the number of rows.
        feature_reduction: reduction over k: "sum" as in Eq. 6, or "mean", so that α keeps its meaning across K.
        normalizer: what "batchmean" and "mean" divide by instead of the number of rows.

    Returns:
        A scalar, or (...,).

    Example:
        >>> zero = torch.zeros(1, 2)
        >>> gaussian_kl(zero + 2, zero, zero, zero, feature_reduction="sum")
        tensor(4.)
    """
    mean_s, log_var_s = at_least_fp32(student_mean), at_least_fp32(student_log_var)
    mean_t, log_var_t = at_least_fp32(teacher_mean), at_least_fp32(teacher_log_var)
    d = log_var_s - log_var_t
    terms = 0.5 * (torch.expm1(d) - d + (mean_t - mean_s).square() * torch.exp(-log_var_t))
    rows = terms.mean(dim=-1) if feature_reduction == "mean" else terms.sum(dim=-1)
    # The class axis is reduced already, so "mean" has no K left to divide by.
    return reduce_rows(rows, reduction, classes=1, normalizer=normalizer)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Return the task loss L_CE of Eq. 7, the mean over the labelled rows; 0 if there are none.

    Args:
        logits: (..., K).
        labels: (...,) integer, or (..., K) floating-point weights of the classes, as mixup makes them.
        label_smoothing: share of the target spread evenly over the K classes, in [0, 1].
        ignore_index: label of the rows to leave out.
        normalizer: what the sum over rows is divided by instead of the number of labelled rows.

    Example:
        >>> cross_entropy(torch.zeros(1, 2), torch.tensor([1]))
        tensor(0.6931)
    """
    rows = at_least_fp32(logits).reshape(-1, logits.shape[-1])
    if labels.is_floating_point():
        targets, kept = at_least_fp32(labels).reshape(rows.shape), max(rows.shape[0], 1)
        total = F.cross_entropy(rows, targets.to(rows.dtype), label_smoothing=label_smoothing, reduction="sum")
        return total / (kept if normalizer is None else normalizer)
    total = F.cross_entropy(
        rows, labels.reshape(-1).long(), label_smoothing=label_smoothing, ignore_index=ignore_index, reduction="sum"
    )
    return total / ((~is_ignored(labels, ignore_index)).sum().clamp(min=1) if normalizer is None else normalizer)


def gaussian_anchor(
    teacher_logits: Tensor, mean: Tensor, log_var: Tensor, *, normalizer: float | Tensor | None = None
) -> Tensor:
    """Return the loss that fits the predicted Gaussian to the teacher's own logits, so that the head cannot collapse.

        L_anchor = 1/2 mean_k[ (y - m)² / v + ln v ],    y = ( z - mean_k z ) / sqrt( var_k z + 1e-5 )

    The negative log-likelihood of y under N(m, v) without its constant, mean over rows and k. The variance of z is the
    biased one, so that mean_k y² = 1 for any K (the unbiased one would be undefined for K = 1), and 1e-5, as in layer
    normalisation, gives y = 0 for a row of equal logits.

    Args:
        teacher_logits: z (..., K), before the temperature.
        mean: m (..., K), predicted from the teacher's features.
        log_var: ln v (..., K), likewise.
        normalizer: what the sum over rows is divided by instead of their number.

    Returns:
        A scalar, which may be negative.

    Example:
        >>> zero = torch.zeros(1, 2)
        >>> gaussian_anchor(torch.tensor([[1.0, 3.0]]), zero, zero)
        tensor(0.5000)
    """
    logits, mean, log_var = at_least_fp32(teacher_logits), at_least_fp32(mean), at_least_fp32(log_var)
    # Rows whose squares could overflow are scaled by a unit of their own, in which eps is negligible.
    unit = unit_of(logits)
    is_large = unit > 2.0**40
    rows = torch.where(is_large, logits / unit, 0)
    centred = rows - rows.mean(dim=-1, keepdim=True)
    large = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + 1e-5 / unit / unit)
    usual = F.layer_norm(torch.where(is_large, 0, logits), logits.shape[-1:], eps=1e-5)
    target = torch.where(is_large, large, usual)
    terms = 0.5 * ((target - mean).square() * torch.exp(-log_var) + log_var)
    return reduce_rows(terms.mean(dim=-1), "batchmean", classes=1, normalizer=normalizer)


def divergence_rows(log_p: Tensor, log_q: Tensor, divergence: str, beta: float) -> Tensor:
    """Return the divergence of each row.

        forward    KL(p || q)
        reverse    KL(q || p)
        jsd        β KL(p || m) + (1 - β) KL(q || m),    m = β p + (1 - β) q

    The last one, the generalised Jensen-Shannon divergence (Agarwal et al. 2024, Eq. 1), lies in [0, ln 2] for β = 1/2.
    At β = 0 and 1 its own value is 0; the forward and the reverse KL are its limits divided by β and 1 - β.

    Args:
        log_p: (..., K), the teacher's.
        log_q: (..., K), the student's.
        divergence: one of the three.
        beta: β in (0, 1), used by "jsd" alone.
    """
    if divergence == "forward":
        return kl_rows(log_p, log_q)
    if divergence == "reverse":
        return kl_rows(log_q, log_p)
    absent = (log_p == -math.inf) & (log_q == -math.inf)  # logaddexp(-inf, -inf) has no gradient
    log_p, log_q = log_p.masked_fill(absent, 0.0), log_q.masked_fill(absent, 0.0)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    log_p, log_q, log_m = (x.masked_fill(absent, -math.inf) for x in (log_p, log_q, log_m))
    return beta * kl_rows(log_p, log_m) + (1 - beta) * kl_rows(log_q, log_m)


def kl_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) = Σ_k p_k φ(u_k), u = ln q - ln p, of each row (..., K)."""
    q, p = log_q.exp(), log_p.exp()
    absent = p == 0  # 0 ln 0 = 0
    u = (log_q - log_p).masked_fill(absent, 0.0)
    far = absent | (u.abs() >= 1)
    # eᵘ may overflow where p is tiny, so away from u = 0 write p eᵘ as q; there nothing cancels.
    small_u = u.masked_fill(far, 0.0)
    terms = torch.where(far, q - p - p * u, p * (torch.expm1(small_u) - small_u))
    return terms.sum(dim=-1)


def standardize(logits: Tensor) -> Tensor:
    """Return (z - mean_k z) / (std_k z + 1e-7), std unbiased, with its gradient (Sun et al. 2024, Eq. 13).

    A row of equal logits becomes 0, and its gradient that of the mean alone.
    """
    unit = unit_of(logits)
    rows = logits / unit
    centred = rows - rows.mean(dim=-1, keepdim=True)
    return centred / (rows.std(dim=-1, keepdim=True) + 1e-7 / unit)


def unit_of(logits: Tensor) -> Tensor:
    """Return the power of two (..., 1) below each row's largest logit, at least 1; in this unit no square overflows."""
    return torch.exp2(torch.log2(logits.detach().abs().amax(dim=-1, keepdim=True).clamp(min=1)).floor())


def reduce_rows(
    rows: Tensor,
    reduction: str,
    *,
    classes: int,
    ignore_mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Reduce per-row losses (...,); ignored rows do not count and no rows give 0. The count stays on the device."""
    if ignore_mask is not None:
        rows = rows.masked_fill(ignore_mask, 0.0)
    if reduction == "none":
        return rows
    total = rows.sum()
    if reduction == "sum":
        return total
    kept: float | Tensor
    if normalizer is not None:
        kept = normalizer
    else:
        kept = max(rows.numel(), 1) if ignore_mask is None else (~ignore_mask).sum().clamp(min=1)
    return total / (kept * classes if reduction == "mean" else kept)


def transform_of(*tensors: object) -> str | None:
    """Name the transform other than autograd that one of the tensors is under, or None: then its values can be read.

    In a compiled graph it is None: no values are read there.
    """
    if torch.compiler.is_compiling():
        return None
    stacked, dual = torch._C._functorch.peek_interpreter_stack() is not None, forward_ad._current_level >= 0
    for x in tensors if stacked or dual else ():
        if isinstance(x, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x):
            return "torch.vmap or another transform of torch.func"
        if dual and isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            return "forward-mode differentiation"
    return None


def is_ignored(labels: Tensor, ignore_index: int) -> Tensor:
    """Tell which labels are `ignore_index`, in int64: compared as uint8, for example, -100 would wrap to 156."""
    return labels.long() == ignore_index


def at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Switch autocast off for products that need full precision; the losses contain no such products."""
    # The meta device has no autocast. Asking torch whether a device has breaks a compiled graph in torch 2.11.
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)

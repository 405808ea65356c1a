"""The last linear layer and the divergence of its softmax in one: the logits never exist all at once.

    L = τ² D( softmax(z_t / τ), softmax(z_s / τ) ) + w CE(z_s, y),    z = h Wᵀ + b
    ∂L/∂h_s = g W_s,    ∂L/∂W_s = gᵀ h_s,    ∂L/∂b_s = Σ_rows g,    g = ∂L/∂z_s

D is one of `reference.divergence_rows`; the teacher is a constant. Forward goes through the rows chunk by chunk and
writes the gradients with the value. Of a chunk it keeps g; the logits, which the kernels of `softmax_kl` and
`unikd_loss` or the plain losses read, it makes for a tile of the chunk at a time.

Memory beside inputs and gradients, in shares of the student's logits: 1/16 for g and 1/16 for a tile, 12.5 %, for 4,096
rows and more. Of fewer rows a chunk has 256, since each product reads a whole weight. The gradient of the weight is
summed by `addmm` in its own dtype: the products are summed in fp32, and the sum is rounded once a chunk, at most 20
times, which errs like two or three roundings. A sum in fp32 would take 4 K D_s bytes, for 8,192 rows and D_s = 4096 as
much as all of the student's logits in bf16.

Bytes moved: for each chunk W_s once and its gradient read and written, for each tile W_s and W_t; g and logits as in
`softmax_kl`, and once more by the products.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from unikd_fast.kernels import reference
from unikd_fast.kernels._autograd import FusedLoss, Tensors
from unikd_fast.kernels._launch import flat, normalizer_of, normalizer_or_rows, rows_of

CHUNKS = 16
LEAST_ROWS = 256
# The plain losses take so many logits at a time: their temporaries in fp32 stay in a processor's cache.
PLAIN_ELEMENTS = 2**17

_INPUTS = (
    "student_hidden",
    "student_weight",
    "student_bias",
    "teacher",  # hidden states if there is a weight, else logits
    "teacher_weight",
    "teacher_bias",
    "scale",
    "labels",
    "ignore_mask",
    "normalizer",
    "ce_normalizer",
)


class _Settings(NamedTuple):
    """The loss of a tile."""

    temperature: float
    weight: float  # of a row's divergence
    divergence: str
    beta: float
    ce_weight: float
    ignore_index: int
    per_row: bool


class _Tile(NamedTuple):
    """Some rows, and where their loss and its gradient go."""

    student: Tensor  # (R, K)
    teacher: Tensor  # (R, K)
    scale: Tensor | None  # (R,)
    labels: Tensor | None  # (R,)
    mask: Tensor | None  # (R,)
    upstream: Tensor | None  # 0-d or (R,)
    loss: Tensor | None  # 0-d or (R,)
    gradient: Tensor | None  # (R, K)


def rows_at_once(rows: int, student_bytes: int, other_bytes: int) -> tuple[int, int]:
    """Return the rows of a chunk, and those of a tile, which takes no more memory than the chunk's gradient.

    Args:
        rows: number of rows.
        student_bytes: bytes of one of the student's logits.
        other_bytes: bytes that a tile needs besides for each of them.
    """
    chunk = max(rows // CHUNKS // 64 * 64, LEAST_ROWS)
    # In sixteens, so that every tile of a tensor begins at a multiple of 16 bytes.
    tile = max(chunk * student_bytes // (student_bytes + other_bytes) // 16, 1) * 16
    return chunk, tile


def _launch(
    tensors: Tensors,  # as _INPUTS
    outputs: Tensors,
    gradients: Tensors,
    upstream: Tensors,
    *,
    fused: bool,
    normalizer_value: float,
    **chosen: Any,
) -> None:
    student, student_weight, student_bias, teacher, teacher_weight, teacher_bias, *others = tensors
    scale, labels, mask = map(flat, others[:3])
    normalizer, ce_normalizer = others[3:]
    assert student is not None
    assert student_weight is not None
    assert teacher is not None
    hidden, of_teacher = rows_of(student), rows_of(teacher)
    (rows, _), classes = hidden.shape, student_weight.shape[0]
    divisor = normalizer_or_rows(normalizer_value, normalizer, rows)
    settings, loss_of_tile = _Settings(**chosen), _fused_loss if fused else _plain_loss

    grad_hidden, grad_weight, grad_bias = gradients[:3]
    wanted = any(g is not None for g in gradients)
    other_bytes = of_teacher.element_size() if teacher_weight is not None else 0
    other_bytes += student_weight.element_size() if fused and labels is not None else 0
    chunk, tile = rows_at_once(rows, student_weight.element_size(), other_bytes)
    logits = student_weight.new_empty(min(tile, rows), classes)
    teacher_logits = of_teacher.new_empty(min(tile, rows), classes) if teacher_weight is not None else None
    grad_logits = student_weight.new_empty(min(chunk, rows), classes) if wanted else None
    bias_sum = student_weight.new_zeros(classes, dtype=torch.promote_types(student_weight.dtype, torch.float32))
    if grad_weight is not None:
        grad_weight.zero_()
    losses: list[Tensor] = []
    for start in range(0, rows, chunk):
        h = hidden[start : start + chunk]
        if mask is not None:  # an ignored row may hold NaN, and 0 · NaN is NaN in the gradient of the weight
            h = h.masked_fill(mask[start : start + chunk, None], 0.0)
        for first in range(0, h.shape[0], tile):
            s = _linear(h[first : first + tile], student_weight, student_bias, logits)
            part = slice(start + first, start + first + s.shape[0])
            t = of_teacher[part]
            if teacher_weight is not None and teacher_logits is not None:
                t = _linear(t, teacher_weight, teacher_bias, teacher_logits)
            loss, factor = outputs[0], upstream[0]
            if settings.per_row:
                loss, factor = (None if x is None else x.view(-1)[part] for x in (loss, factor))
            else:
                factor = None if factor is None else factor.view(())
                if loss is not None:
                    loss = torch.empty_like(loss)
                    losses.append(loss)
            g = None if grad_logits is None else grad_logits[first : first + s.shape[0]]
            a, y, m = (None if x is None else x[part] for x in (scale, labels, mask))
            loss_of_tile(_Tile(s, t, a, y, m, factor, loss, g), settings, divisor, ce_normalizer)
        if grad_logits is None:
            continue
        g = grad_logits[: h.shape[0]]
        if grad_hidden is not None:
            torch.mm(g, student_weight, out=grad_hidden.view(hidden.shape)[start : start + chunk])
        if grad_weight is not None:
            grad_weight.addmm_(g.t(), h)
        if grad_bias is not None:
            bias_sum += g.sum(dim=0)
    if grad_bias is not None:
        grad_bias.copy_(bias_sum)
    if outputs[0] is not None and not settings.per_row:
        outputs[0].copy_(torch.stack([outputs[0].new_zeros(()), *losses]).sum())


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """Return h Wᵀ + b in the first rows of a buffer."""
    logits = buffer[: hidden.shape[0]]
    if bias is None:
        return torch.mm(hidden, weight.t(), out=logits)
    return torch.addmm(bias, hidden, weight.t(), out=logits)


def _fused_loss(tile: _Tile, settings: _Settings, normalizer: float | Tensor, ce_normalizer: Tensor | None) -> None:
    from unikd_fast.kernels import softmax_kl, unikd_loss

    number, tensor = (1.0, normalizer) if isinstance(normalizer, Tensor) else (normalizer, None)
    softmax_kl._launch(
        (tile.student, tile.teacher, tile.scale, tile.mask, tensor),
        (tile.loss,),
        (tile.gradient, None, None, None, None),
        (tile.upstream,),
        temperature=settings.temperature,
        weight=settings.weight,
        divergence=settings.divergence,
        beta=settings.beta,
        standardized=False,
        per_row=settings.per_row,
        normalizer_value=number,
    )
    if tile.labels is None:
        return
    # The cross-entropy of `unikd_loss` alone. Its own divergence has no mask and one direction; here it is that of
    # the student from itself, times 0.
    outputs = [None if tile.loss is None else torch.empty_like(tile.loss) for _ in range(5)]
    gradient = None if tile.gradient is None else torch.empty_like(tile.gradient)
    unikd_loss._launch(
        (tile.student, tile.student, None, tile.labels, *[None] * 8, ce_normalizer),
        outputs,
        (gradient, *[None] * 12),
        (tile.upstream, None),
        alpha_value=0.0,
        beta_value=0.0,
        normalizer_value=1.0,
        ce_weight=settings.ce_weight,
        temperature=1.0,
        scale_by_t2=False,
        mean_over_features=False,
        label_smoothing=0.0,
        ignore_index=settings.ignore_index,
    )
    if tile.loss is not None and outputs[0] is not None:
        tile.loss.add_(outputs[0])
    if tile.gradient is not None and gradient is not None:
        tile.gradient.add_(gradient)


def _plain_loss(tile: _Tile, settings: _Settings, normalizer: float | Tensor, ce_normalizer: Tensor | None) -> None:
    rows, classes = tile.student.shape
    step = max(PLAIN_ELEMENTS // classes, 1)
    parts: list[slice | Tensor] = [slice(first, first + step) for first in range(0, rows, step)]
    if tile.mask is not None:  # the rows kept, which here cost no synchronisation
        parts = list((~tile.mask).nonzero()[:, 0].split(step))
        for x in (tile.loss, tile.gradient):
            if x is not None:
                x.zero_()
    # Autograd records nothing inside of an operator unless it is told to.
    key = torch._C.DispatchKey.AutogradFunctionality
    wanted = tile.gradient is not None
    losses = []
    for part in parts:
        teacher = tile.teacher[part] if tile.scale is None else tile.teacher[part] * tile.scale[part][:, None]
        with torch.set_grad_enabled(wanted), torch._C._SetExcludeDispatchKeyGuard(key, False):
            student = tile.student[part].detach().requires_grad_(wanted)
            loss = reference.softmax_kl(
                student,
                teacher,
                temperature=settings.temperature,
                reduction="none" if settings.per_row else "sum",
                scale_by_t2=False,
                divergence=settings.divergence,
                beta=settings.beta,
            )
            loss = loss * settings.weight / normalizer
            if tile.labels is not None:
                loss = loss + settings.ce_weight * reference.cross_entropy(
                    student,
                    tile.labels[part],
                    ignore_index=settings.ignore_index,
                    normalizer=1.0 if ce_normalizer is None else ce_normalizer,
                )
            if tile.gradient is not None:
                factor = tile.upstream[part] if tile.upstream is not None and settings.per_row else tile.upstream
                tile.gradient[part] = torch.autograd.grad(loss, student, factor)[0]
        if settings.per_row and tile.loss is not None:
            tile.loss[part] = loss.detach()
        losses.append(loss.detach())
    if tile.loss is not None and not settings.per_row:
        tile.loss.copy_(torch.stack(losses).sum())


_loss = FusedLoss(
    "linear_softmax_kl",
    inputs=_INPUTS,
    gradient_of=(0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1),
    settings={
        "fused": "bool",
        "temperature": "float",
        "weight": "float",
        "divergence": "str",
        "beta": "float",
        "ce_weight": "float",
        "ignore_index": "int",
        "per_row": "bool",
        "normalizer_value": "float",
    },
    outputs=1,
    launch=_launch,
    sums_rows=True,
)


def linear_softmax_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    scale: Tensor | None,
    labels: Tensor | None,
    *,
    fused: bool,
    temperature: float,
    reduction: str,
    scale_by_t2: bool,
    ignore_mask: Tensor | None,
    divergence: str,
    beta: float,
    ce_weight: float,
    ignore_index: int,
    normalizer: float | Tensor | None,
) -> Tensor:
    """Return the loss, from kernels if `fused`; `scale` (...,) multiplies the teacher's stored logits."""
    weight = temperature**2 if scale_by_t2 else 1.0
    if reduction == "mean":
        weight /= student_weight.shape[0]
    value, tensor = normalizer_of(student_hidden, reduction, ignore_mask, normalizer)
    ce_normalizer = None
    if labels is not None:
        ignored = reference.is_ignored(labels, ignore_index)
        if ignore_mask is not None:
            ignored = ignored | ignore_mask
            labels = labels.long().masked_fill(ignore_mask, ignore_index)
        if isinstance(normalizer, Tensor) and reduction != "sum":
            ce_normalizer = normalizer
        elif normalizer is not None and reduction != "sum":
            ce_weight /= float(normalizer)
        elif reduction != "sum":
            ce_normalizer = (~ignored).sum().clamp(min=1)
    (loss,) = _loss(
        (
            student_hidden,
            student_weight,
            student_bias,
            teacher,
            teacher_weight,
            teacher_bias,
            scale,
            labels,
            ignore_mask,
            tensor,
            ce_normalizer,
        ),
        fused=fused,
        temperature=float(temperature),
        weight=weight,
        divergence=divergence,
        beta=float(beta),
        ce_weight=float(ce_weight),
        ignore_index=ignore_index,
        per_row=reduction == "none",
        normalizer_value=value,
    )
    return loss

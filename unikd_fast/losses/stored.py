"""A teacher's logits in fewer bytes, as a cache stores them, and as the losses read them."""

import torch
from torch import Tensor

from unikd_fast.values import QuantizedLogits, TopKLogits


def quantize_logits(logits: Tensor, dtype: torch.dtype = torch.uint8) -> QuantizedLogits:
    """Store each row of logits as z ≈ scale values + offset.

    Args:
        logits: (..., K).
        dtype: torch.uint8, with an error of at most (max - min) / 510 in a row, or torch.float16.

    Raises:
        TypeError: If dtype is neither.
        ValueError: If uint8 logits are not finite; checking this reads the values.

    Example:
        >>> quantize_logits(torch.tensor([[0.0, 255.0]])).values
        tensor([[  0, 255]], dtype=torch.uint8)
    """
    if dtype not in (torch.uint8, torch.float16):
        raise TypeError(f"quantize_logits: dtype must be torch.uint8 or torch.float16, got {dtype}")
    if dtype == torch.uint8 and not bool(logits.isfinite().all()):
        raise ValueError("quantize_logits: uint8 needs finite logits, got inf or NaN; use torch.float16")
    rows = logits.detach().float()
    if dtype == torch.uint8:
        low, high = rows.amin(dim=-1), rows.amax(dim=-1)
        scale = (high - low) / 255
        steps = (rows - low[..., None]) / torch.where(scale == 0, 1.0, scale)[..., None]
        return QuantizedLogits(steps.round().clamp(0, 255).to(torch.uint8), scale, low)
    # Rows beyond the range of fp16 are divided by a power of two; -inf stays -inf.
    largest = rows.abs().masked_fill(rows.isinf(), 0.0).amax(dim=-1)
    scale = torch.exp2(torch.ceil(torch.log2(largest / 32768.0)).clamp(min=0.0))
    return QuantizedLogits((rows / scale[..., None]).to(torch.float16), scale, torch.zeros_like(scale))


def top_k_logits(logits: Tensor, k: int) -> TopKLogits:
    """Keep the k largest logits of each row and the log-sum-exp of all.

    Args:
        logits: (..., K).
        k: number of logits to keep, at most K.

    Raises:
        ValueError: If k is not in [1, K].

    Example:
        >>> top_k_logits(torch.tensor([[1.0, 3.0, 2.0]]), k=1).indices
        tensor([[1]], dtype=torch.int32)
    """
    classes = logits.shape[-1]
    if not 1 <= k <= classes:
        raise ValueError(f"top_k_logits: k must be in [1, {classes}], got {k}")
    rows = logits.detach().float()
    values, indices = rows.topk(k, dim=-1)
    return TopKLogits(values.to(logits.dtype), indices.to(torch.int32), rows.logsumexp(dim=-1))


def dense_logits(teacher: Tensor | QuantizedLogits) -> Tensor:
    """Return the logits (..., K), expanded from their stored form if they have one."""
    if not isinstance(teacher, QuantizedLogits):
        return teacher
    values, scale, offset = teacher
    return values.to(scale.dtype) * scale[..., None] + offset[..., None]


def stored_rows(teacher: Tensor | QuantizedLogits) -> tuple[Tensor, Tensor | None]:
    """Return the values (..., K) and scale (...,) that a kernel reads; a softmax does not depend on the offset."""
    return (teacher.values, teacher.scale) if isinstance(teacher, QuantizedLogits) else (teacher, None)


def tensors_of(teacher: Tensor | QuantizedLogits) -> tuple[Tensor, ...]:
    """Return the tensors that hold a teacher's logits."""
    return (teacher,) if isinstance(teacher, Tensor) else tuple(teacher)

"""A teacher's logits in fewer bytes; the losses read these forms directly."""

import torch
from torch import Tensor

from unikd_fast.kernels.reference_compressed import quantize_rows
from unikd_fast.values import QuantizedLogits, TopKLogits


def quantize_logits(logits: Tensor, dtype: torch.dtype = torch.uint8) -> QuantizedLogits:
    """Store each row of logits as z ≈ scale values + offset.

    Args:
        logits: (..., K).
        dtype: torch.uint8 (an error of at most (max - min) / 510 in a row) or torch.float16 (10 bits of mantissa).

    Raises:
        TypeError: another dtype.
        ValueError: inf or NaN in logits for uint8, which has no code for them (this looks at the values).

    Example:
        >>> quantize_logits(torch.tensor([[0.0, 255.0]])).values
        tensor([[  0, 255]], dtype=torch.uint8)
    """
    if dtype not in (torch.uint8, torch.float16):
        raise TypeError(f"quantize_logits: dtype must be torch.uint8 or torch.float16, got {dtype}")
    if dtype == torch.uint8 and not bool(logits.isfinite().all()):
        raise ValueError("quantize_logits: uint8 holds finite logits only, got inf or NaN; use torch.float16")
    return QuantizedLogits(*quantize_rows(logits, dtype))


def top_k_logits(logits: Tensor, k: int) -> TopKLogits:
    """Keep the k largest logits of each row, and the log-sum-exp of all.

    Args:
        logits: (..., K).
        k: how many, at most K.

    Raises:
        ValueError: k outside of [1, K].

    Example:
        >>> top_k_logits(torch.tensor([[1.0, 3.0, 2.0]]), k=1).indices
        tensor([[1]], dtype=torch.int32)
    """
    classes = logits.shape[-1]
    if not 1 <= k <= classes:
        raise ValueError(f"top_k_logits: k must lie in [1, {classes}], got {k}")
    rows = logits.detach().float()
    values, indices = rows.topk(k, dim=-1)
    return TopKLogits(values.to(logits.dtype), indices.to(torch.int32), rows.logsumexp(dim=-1))

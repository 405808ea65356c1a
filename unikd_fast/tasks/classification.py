"""Image classification: accuracy and cross-entropy."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # reports, which read figures, need no torch
    from torch import Tensor


def count(logits: "Tensor", labels: "Tensor") -> "Tensor":
    """Return what a batch adds to an evaluation, without reading the device: (4,) fp64, to be summed.

    Args:
        logits: logits (N, K) in fp32.
        labels: class indices (N,).
    """
    import torch

    top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    top5 = top.sum() if logits.shape[1] > 5 else torch.full_like(ce, torch.nan)
    samples = torch.full_like(ce, len(logits), dtype=torch.float64)
    return torch.stack([top[:, 0].sum(), top5, ce, samples]).double()


def figures(counts: "Tensor") -> dict[str, float]:
    """Return the figures of summed `count`: accuracy and top5 in percent, ce, and the number of samples."""
    top1, top5, ce, samples = counts.tolist()
    most = max(samples, 1.0)
    five = {} if top5 != top5 else {"top5": 100 * top5 / most}
    return {"accuracy": 100 * top1 / most, **five, "ce": ce / most, "samples": int(samples)}

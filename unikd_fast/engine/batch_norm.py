"""BatchNorm buffers across processes. Each process updates its own; DeepSpeed never synchronises them."""

import math

import torch
from torch import nn

from unikd_fast.engine.processes import Processes

_SETTLED = 0.01
"""Share of the initial values below which running averages are those of the data."""


def initial_share(module: nn.Module) -> tuple[float, int]:
    """How much of its initial value a BatchNorm's running average still has, at most, and after how many batches.

    Example:
        >>> initial_share(nn.BatchNorm2d(3))
        (1.0, 0)
    """
    found = [(0.0, 0)]
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.num_batches_tracked is not None:
            batches = int(norm.num_batches_tracked)
            # Without a momentum it is the mean of all batches.
            share = float(batches == 0) if norm.momentum is None else (1 - norm.momentum) ** batches
            found.append((share, batches))
    return max(found)


def doubt_about(cross_entropy: float, network: nn.Module, num_classes: int) -> str | None:
    """Why an evaluation is worse than a guess, if it is because of BatchNorm's averages; None otherwise.

    Args:
        cross_entropy: of the evaluation, in nats.
    """
    share, batches = initial_share(network)
    if share < _SETTLED or not cross_entropy > 2 * math.log(num_classes):
        return None
    return (
        f"this cross-entropy, {cross_entropy:.2g}, says little yet: evaluation goes by BatchNorm's running averages, "
        f"which after {batches} batches are still {100 * share:.0f} % their initial values"
    )


@torch.no_grad()
def average_buffers(module: nn.Module, processes: Processes) -> None:
    """Replaces every floating-point buffer by its mean over all processes, so that they agree bit for bit."""
    if processes.world_size == 1:
        return
    buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    if not buffers:
        return
    flat = torch.cat([buffer.detach().double().flatten() for buffer in buffers])
    processes.sum_(flat).div_(processes.world_size)
    for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))

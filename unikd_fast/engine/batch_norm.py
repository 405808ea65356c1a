"""BatchNorm buffers across processes. Each process updates its own; DeepSpeed never synchronises them."""

import torch
from torch import nn

from unikd_fast.engine.processes import Processes


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

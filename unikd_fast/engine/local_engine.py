"""What DeepSpeed's engine does for one process at ZeRO stage 0, without what it does on the host besides."""

from typing import Any

import torch
from torch import Tensor, nn

from unikd_fast.config import Config
from unikd_fast.engine.networks import StudentSide
from unikd_fast.engine.optimizer import build_capturable_optimizer, clip_before_update


class LocalEngine:
    """Stands in for the DeepSpeed engine where a step is captured: it has that part of it which our engine calls.

    DeepSpeed's own step reads clocks and counters; none of it may be in a CUDA graph.

    Args:
        config: whose precision, clipping, accumulation, layout and compilation it follows.
        module: to train, with the weights to start from.
        device: where it is.

    Attributes:
        learning_rate: 0-d tensor that the optimiser reads.
    """

    def __init__(self, config: Config, module: StudentSide, device: torch.device) -> None:
        train = config.train
        self.module: nn.Module = module
        self.optimizer = build_capturable_optimizer(module.parameters(), train, device)
        clip_before_update(self.optimizer, train.clip_grad_norm)
        self.learning_rate: Tensor = self.optimizer.param_groups[0]["lr"]
        self._accumulation_steps, self._micro_steps = train.accumulation_steps, 0
        self._device, self._autocast = device.type, torch.bfloat16 if train.precision == "bf16" else None
        if train.channels_last:
            module.to(memory_format=torch.channels_last)
        if train.compile is not None:
            module.compile(mode=train.compile)

    def __call__(self, *views: Tensor) -> Any:
        with torch.autocast(self._device, self._autocast, enabled=self._autocast is not None):
            return self.module(*views)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a micro-batch's share of the loss."""
        count = self._accumulation_steps
        (loss if count == 1 else loss / count).backward()

    def step(self) -> None:
        """After every micro-batch; the last one of a step updates the parameters."""
        self._micro_steps = (self._micro_steps + 1) % self._accumulation_steps
        if self._micro_steps:
            return
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def start_over(self) -> None:
        """Forget the micro-batches since the last update."""
        self._micro_steps = 0
        self.optimizer.zero_grad(set_to_none=True)

    def gradient_accumulation_steps(self) -> int:
        return self._accumulation_steps

    def zero_optimization(self) -> bool:
        return False

    def zero_optimization_stage(self) -> int:
        return 0

    def train(self) -> None:
        self.module.train()

    def destroy(self) -> None:
        """Holds nothing that would outlive it."""

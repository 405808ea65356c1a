"""The engine of a single process at ZeRO stage 0, in place of DeepSpeed's.

DeepSpeed flattens every gradient, reduces it with itself and copies it back, and its step reads clocks and counters on
the host, which a CUDA graph cannot hold.
"""

from typing import Any

import torch
from torch import Tensor, nn

from unikd_fast.config.schema import TrainConfig
from unikd_fast.engine.optimizer import clip_before_update


class LocalEngine:
    """Trains a module in one process, with the part of DeepSpeed's interface that a run uses.

    Args:
        module: module to train, with the weights to start from.
        optimizer: optimiser of its parameters.
        train: training settings: precision, clipping, accumulation, memory layout and compilation.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, train: TrainConfig) -> None:
        self.module, self.optimizer = module, optimizer
        self._trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._accumulation_steps, self._micro_steps = train.accumulation_steps, 0
        self._autocast = torch.bfloat16 if train.precision == "bf16" else None
        clip_before_update(optimizer, train.clip_grad_norm)
        if train.channels_last:
            module.to(memory_format=torch.channels_last)
        if train.compile is not None:
            module.compile(mode=train.compile)

    def __call__(self, *inputs: Any) -> Any:
        with torch.autocast(self._trained[0].device.type, self._autocast, enabled=self._autocast is not None):
            return self.module(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's share of the loss."""
        count = self._accumulation_steps
        (loss if count == 1 else loss / count).backward()

    def step(self) -> None:
        """Count a micro-batch; the last one of a step updates the parameters."""
        self._micro_steps = (self._micro_steps + 1) % self._accumulation_steps
        if self._micro_steps:
            return
        for parameter in self._trained:
            if parameter.grad is None:  # an unused parameter decays, as with several processes
                parameter.grad = torch.zeros_like(parameter)
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
        """Do nothing: there is nothing to release."""

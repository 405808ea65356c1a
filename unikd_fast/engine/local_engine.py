"""What DeepSpeed's engine does for one process at ZeRO stage 0, without what else it does.

DeepSpeed flattens every gradient, reduces it with itself and copies it back, and its step reads clocks and counters on
the host, none of which may be in a CUDA graph.
"""

from typing import Any

import torch
from torch import Tensor, nn

from unikd_fast.config.schema import TrainConfig
from unikd_fast.engine.optimizer import clip_before_update


class LocalEngine:
    """Train a module in one process; has that part of DeepSpeed's engine which a run calls.

    Args:
        module: module to train, with the weights to start from.
        optimizer: optimiser of its parameters.
        train: settings whose precision, clipping, accumulation, layout and compilation it follows.
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

    def __call__(self, *views: Tensor) -> Any:
        with torch.autocast(views[0].device.type, self._autocast, enabled=self._autocast is not None):
            return self.module(*views)

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
            if parameter.grad is None:  # unused; as in several processes, it still decays
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
        """Do nothing: it holds nothing that would outlive it."""

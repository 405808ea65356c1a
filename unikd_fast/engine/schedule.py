"""The optimiser, and the learning rate as a pure function of the step: resuming needs no schedule state."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from unikd_fast.config.schema import TrainConfig
from unikd_fast.errors import ConfigError


def build_capturable_optimizer(
    parameters: Iterable[nn.Parameter], train: TrainConfig, device: torch.device
) -> torch.optim.Optimizer:
    """torch's, all of it on the device: each group's "lr" is one 0-d tensor, to be filled before a step."""
    rate = torch.tensor(train.learning_rate, device=device)
    if train.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=rate,
            momentum=train.momentum,
            weight_decay=train.weight_decay,
            nesterov=train.nesterov,
            fused=True,  # the only SGD of torch that leaves a rate where it is
        )
    assert train.optimizer == "adamw", train.optimizer
    on_gpu = device.type == "cuda"
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=train.weight_decay, fused=True, capturable=on_gpu)


def build_optimizer(parameters: Iterable[nn.Parameter], train: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser that DeepSpeed shards: torch's, or DeepSpeed's own, which are compiled the first time.

    Raises:
        ConfigError: DeepSpeed's cannot be compiled.
    """
    rates = {"lr": train.learning_rate, "weight_decay": train.weight_decay}
    if train.optimizer in ("fused_adamw", "cpu_adamw"):
        try:
            from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

            if train.optimizer == "fused_adamw":
                return FusedAdam(parameters, adam_w_mode=True, **rates)
            return DeepSpeedCPUAdam(parameters, adamw_mode=True, **rates)
        except Exception as error:  # whatever compilers, their absence and DeepSpeed's checks of versions raise
            said = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ConfigError(
                f"train.optimizer = {train.optimizer!r}: DeepSpeed cannot build it: {said}; set it to 'adamw'"
            ) from error
    if train.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=train.learning_rate,
            momentum=train.momentum,
            weight_decay=train.weight_decay,
            nesterov=train.nesterov,
        )
    return torch.optim.AdamW(parameters, lr=train.learning_rate, weight_decay=train.weight_decay)


def clip_before_update(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Make an optimiser clip the norm of all its gradients together before each update, all of it on the device.

    Args:
        optimizer: holds whole gradients, as without ZeRO.
        max_norm: norm above which gradients are scaled down to it. If 0, they are left alone.
    """
    if not max_norm:
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def clip(*_: Any) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not gradients:
            return
        # torch's clip_grad_norm_ rounds the last bit in another way than DeepSpeed's, by which runs were clipped.
        norm = torch.stack(torch._foreach_norm(gradients)).pow(2).sum().pow(0.5)
        factor = torch.full_like(norm, max_norm).div_(norm + 1e-6).clamp_(max=1.0)
        torch._foreach_mul_(gradients, factor)

    optimizer.register_step_pre_hook(clip)


def learning_rate(train: TrainConfig, step: int, *, total_steps: int, steps_per_epoch: int) -> float:
    """Learning rate of optimiser step ``step`` (from 0): linear warm-up, then the schedule over the remaining steps."""
    warmup_steps = train.warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return train.learning_rate * (step + 1) / warmup_steps
    if train.schedule == "cosine":
        share = (step - warmup_steps) / max(1.0, total_steps - warmup_steps)
        return train.learning_rate * 0.5 * (1.0 + math.cos(math.pi * share))
    if train.schedule == "step":
        drops = sum(step >= milestone * steps_per_epoch for milestone in train.milestones)
        return train.learning_rate * train.gamma**drops
    return train.learning_rate

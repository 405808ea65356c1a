"""The optimiser, and the learning rate as a pure function of the step: resuming needs no schedule state."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from unikd_fast.config.schema import TrainConfig


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
    """The optimiser that DeepSpeed shards: torch's, or DeepSpeed's own, which are compiled the first time."""
    if train.optimizer == "fused_adamw":
        from deepspeed.ops.adam import FusedAdam

        return FusedAdam(parameters, lr=train.learning_rate, weight_decay=train.weight_decay, adam_w_mode=True)
    if train.optimizer == "cpu_adamw":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(parameters, lr=train.learning_rate, weight_decay=train.weight_decay, adamw_mode=True)
    if train.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=train.learning_rate,
            momentum=train.momentum,
            weight_decay=train.weight_decay,
            nesterov=train.nesterov,
        )
    return torch.optim.AdamW(parameters, lr=train.learning_rate, weight_decay=train.weight_decay)


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

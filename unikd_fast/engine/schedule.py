"""The optimiser, and the learning rate as a pure function of the step: resuming needs no schedule state."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from unikd_fast.config.schema import TrainConfig


def build_optimizer(parameters: Iterable[nn.Parameter], train: TrainConfig) -> torch.optim.Optimizer:
    """The plain torch optimiser that DeepSpeed shards."""
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

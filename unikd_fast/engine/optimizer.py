"""The optimiser, the learning rate as a pure function of the step, and the exponential average of the student."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from unikd_fast.config.schema import TrainConfig
from unikd_fast.errors import ConfigError


def build_capturable_optimizer(parameters: Iterable[nn.Parameter], train: TrainConfig) -> torch.optim.Optimizer:
    """Return an optimiser with all state on the device: the "lr" of its group is a 0-d tensor, set before a step."""
    parameters = list(parameters)
    device = parameters[0].device
    rate = torch.tensor(train.learning_rate, device=device)
    if train.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=rate,
            momentum=train.momentum,
            weight_decay=train.weight_decay,
            nesterov=train.nesterov,
            fused=True,  # torch's other SGDs read the rate on the host
        )
    assert train.optimizer == "adamw", train.optimizer
    on_gpu = device.type == "cuda"
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=train.weight_decay, fused=True, capturable=on_gpu)


def build_optimizer(parameters: Iterable[nn.Parameter], train: TrainConfig) -> torch.optim.Optimizer:
    """Return torch's optimiser, or DeepSpeed's own, which are compiled the first time.

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
        # torch's clip_grad_norm_ rounds the last bit differently from DeepSpeed's, which this reproduces.
        norm = torch.stack(torch._foreach_norm(gradients)).pow(2).sum().pow(0.5)
        factor = torch.full_like(norm, max_norm).div_(norm + 1e-6).clamp_(max=1.0)
        torch._foreach_mul_(gradients, factor)

    optimizer.register_step_pre_hook(clip)


def learning_rate(train: TrainConfig, step: int, *, total_steps: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up, then the schedule over the other steps."""
    warmup_steps = train.warmup_steps or train.warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return train.learning_rate * (step + 1) / warmup_steps
    if train.schedule == "cosine":
        share = (step - warmup_steps) / max(1.0, total_steps - warmup_steps)
        return train.learning_rate * 0.5 * (1.0 + math.cos(math.pi * share))
    if train.schedule == "step":
        milestones = train.milestone_steps or [milestone * steps_per_epoch for milestone in train.milestones]
        drops = sum(step >= milestone for milestone in milestones)
        return train.learning_rate * train.gamma**drops
    return train.learning_rate


class StudentAverage(AveragedModel):
    """Averages weights and floating-point buffers, and copies others, such as BatchNorm's count of batches.

    torch's own update copies its count to the device in every step, and takes four launches for each integer buffer.
    Here the count stays on the host.

    Args:
        student: network that is averaged; the average starts as a copy of it.
        decay: share of the average that is kept in a step.
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        super().__init__(student, use_buffers=True)
        self._mix = get_ema_multi_avg_fn(decay)
        self._begun = False  # in this process

    def update_parameters(self, model: nn.Module) -> None:
        """Add the weights of a step to the average."""
        self.mix(model)
        self.count()

    @torch.no_grad()
    def mix(self, model: nn.Module) -> None:
        """Do the device's part of a step: the first one copies."""
        begun = self._begun or bool(self.n_averaged)
        groups: dict[tuple[torch.dtype, bool], tuple[list[Tensor], list[Tensor]]] = {}
        # Looked up each time: at ZeRO stage 3 a parameter's weights move in every step.
        for own, other in zip(_tensors(self.module), _tensors(model), strict=True):
            ours, theirs = groups.setdefault((own.dtype, begun and own.is_floating_point()), ([], []))
            ours.append(own)
            theirs.append(other)
        for (_, averaged), (ours, theirs) in groups.items():
            if averaged:
                self._mix(ours, theirs, 0)
            else:
                torch._foreach_copy_(ours, theirs)

    def count(self) -> None:
        """Count a step, on the host."""
        self.n_averaged += 1
        self._begun = True


def _tensors(module: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in (*module.parameters(), *module.buffers())]

"""Initialisation shared by the CIFAR networks of the distillation literature."""

from torch import nn


def init_kaiming_fan_out(model: nn.Module, *, linear_std: float | None = None) -> None:
    """Draw convolutions from N(0, 2 / (k² C_out)) and set their biases to zero.

    Args:
        model: module that is changed in place. BatchNorm keeps PyTorch's ones and zeros.
        linear_std: standard deviation of the linear weights, with zero biases. If None, PyTorch's default is kept.

    Example:
        >>> init_kaiming_fan_out(nn.Conv2d(3, 16, 3))
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, std=linear_std)
            nn.init.zeros_(module.bias)

"""An engine without ZeRO, as the watch of gradients sees it."""

import torch
from torch import nn


class PlainEngine:
    """What a watch needs of an engine without ZeRO."""

    def __init__(self, module: nn.Module, **options: float) -> None:
        self.module = module
        self.optimizer = torch.optim.SGD(module.parameters(), **options)

    def zero_optimization(self) -> bool:
        return False

"""The loss scale of fp16, at every ZeRO stage: so large that small gradients survive, lowered when large ones do not.

DeepSpeed scales the loss for `torch_autocast` in fp16 too, but under ZeRO it then leaves every update out (seen with
0.19). What an outer scaler needs it offers: `override_loss_scale`.
"""

from typing import Any

import torch
from torch import Tensor

_LARGEST = 2.0**24  # of fp32's integers; a gradient that needs more is zero for all purposes


class LossScale:
    """Multiplies the loss by a power of two, and follows what becomes of the gradients (Micikevicius et al. 2018, 3.2).

    Args:
        value: to start with.
        growth_interval: updates without an overflow until it is doubled.
    """

    def __init__(self, value: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.value, self.growth_interval = value, growth_interval
        self._good_steps = 0
        self._zero: Any = None

    def attach(self, engine: Any) -> None:
        """Makes an engine with ZeRO use it: its optimiser scales the loss, and divides the gradients by as much."""
        self._zero = engine.optimizer if engine.zero_optimization() else None
        if self._zero is not None:
            self._zero.override_loss_scale(self.value)

    def scaled(self, loss: Tensor) -> Tensor:
        """What is to be differentiated: with ZeRO the loss itself, which DeepSpeed scales."""
        return loss if self._zero is not None else loss * self.value

    def unscale_(self, gradients: list[Tensor]) -> None:
        """Divides gradients of a scaled loss in place; a power of two changes no bit of them but the exponent."""
        torch._foreach_mul_(gradients, 1.0 / self.value)

    def update(self, overflowed: bool) -> None:
        """After a step: whether its gradients were not finite."""
        if overflowed:
            self.value, self._good_steps = self.value / 2, 0
        elif self._good_steps + 1 >= self.growth_interval:
            self.value, self._good_steps = min(2 * self.value, _LARGEST), 0
        else:
            self._good_steps += 1
        if self._zero is not None:
            self._zero.override_loss_scale(self.value)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "good_steps": self._good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self._good_steps = state["value"], state["good_steps"]

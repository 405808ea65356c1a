"""A weight that rises linearly from zero over the first epochs."""

import torch
from torch import Tensor


class Ramp:
    """peak min(1, t / T), after t epochs.

    Args:
        peak: the weight from epoch T on.
        epochs: T; 0: the peak from the start.
        device: of the value.

    Attributes:
        value: 0-d fp32, always the same tensor, so that a step needs neither a host read nor a new capture.

    Example:
        >>> ramp = Ramp(4.0, epochs=20)
        >>> ramp.set_progress(5.0)
        >>> ramp.value
        tensor(1.)
    """

    def __init__(self, peak: float, *, epochs: float, device: torch.device | str = "cpu") -> None:
        self.peak, self.epochs = peak, epochs
        self.value: Tensor = torch.full((), peak, dtype=torch.float32, device=device)

    def set_progress(self, epochs: float) -> None:
        """Sets the value for the time after so many epochs."""
        self.value.fill_(self.peak * (min(1.0, epochs / self.epochs) if self.epochs else 1.0))

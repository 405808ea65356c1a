"""The module that DeepSpeed trains: the student and the method's own parameters on the student's side."""

import torch
from torch import Tensor, nn

from unikd_fast.values import Features, StudentOutput


class StudentSide(nn.Module):
    """Runs the student, and what the method makes of its features.

    Args:
        network: maps images (N, 3, H, W) to Features.
        adapter: maps Features to any pytree of tensors, or None.
        companion: further trained parameters that only the loss uses.
        autocast: what operations are cast to; None: nothing, or what DeepSpeed sees to.
    """

    def __init__(
        self,
        network: nn.Module,
        adapter: nn.Module | None,
        companion: nn.Module | None,
        *,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.network, self.adapter, self.companion = network, adapter, companion
        self._autocast = autocast

    def forward(self, images: Tensor, second: Tensor | None = None) -> StudentOutput:
        """The student on images (N, 3, H, W), and then on a second view of them: BatchNorm sees each by itself."""
        if self._autocast is None:
            return self._forward(images, second)
        with torch.autocast(images.device.type, self._autocast):
            return self._forward(images, second)

    def _forward(self, images: Tensor, second: Tensor | None) -> StudentOutput:
        features: Features = self.network(images)
        adapted = None if self.adapter is None else self.adapter(features)
        second_logits = None if second is None else self.network(second).logits
        return StudentOutput(features.logits, adapted, second_logits)

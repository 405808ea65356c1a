"""The module that DeepSpeed trains: the student and the method's own parameters on the student's side."""

from torch import Tensor, nn

from unikd_fast.values import Features, StudentOutput


class StudentSide(nn.Module):
    """Runs the student and, for methods that compare features, fuses and pools its levels.

    Args:
        network: maps images (N, 3, H, W) to Features.
        adapter: maps the levels to (N, D), or None.
        companion: further trained parameters that only the loss uses.
    """

    def __init__(self, network: nn.Module, adapter: nn.Module | None, companion: nn.Module | None) -> None:
        super().__init__()
        self.network, self.adapter, self.companion = network, adapter, companion

    def forward(self, images: Tensor) -> StudentOutput:
        features: Features = self.network(images)
        pooled = None if self.adapter is None else self.adapter(features.levels)
        return StudentOutput(features.logits, pooled)

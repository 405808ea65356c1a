"""A network of which only the logits are wanted: nothing is traced, so any classifier will do."""

from torch import Tensor, nn

from unikd_fast.values import Features


class LogitsOnly(nn.Module):
    """Runs a network and returns `Features((), logits)`.

    Args:
        plain: takes images (N, 3, H, W), returns logits (N, K), or a tuple that starts with them (auxiliary heads).

    Example:
        >>> LogitsOnly(torchvision.models.vit_b_16())(images).levels
        ()
    """

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, images: Tensor) -> Features:
        output = self.plain(images)
        return Features((), output[0] if isinstance(output, tuple) else output)

"""Whether what was read back from a file computes what the plain network computes."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unikd_fast.errors import ConfigError, RunError

BATCHES = (2, 3, 1)  # exporters are shown two images; one is the size that they take for a constant most easily

# Another runtime folds BatchNorm and sums in another order. By how much that may change a logit depends on the network,
# so the yardstick is what the plain network loses to fp32 itself, measured against float64: over fifteen networks of
# all kinds ONNX Runtime differed from it by 0.6 to 1.9 times that (ResNet-152 with statistics of two batches: 1.5e-3 of
# the logits, SqueezeNet: 7e-7). The rounding of three images is one draw, hence 8, and fp32's last bits on top: 2^-19
# of the row's size. A wrong operation shows: GELU by its approximation changes logits by 1e-3.
_TIMES_ROUNDING = 8.0
_LAST_BITS = 2.0**-19
# Of a network that does not run in float64; see `unikd_fast.teacher.unit_rounding`, whose reason it is.
_ROUNDING_UNKNOWN = 2.0**-15


@dataclass(frozen=True)
class Agreement:
    """The largest difference over all batches, as a share of the size of an image's logits, and what was allowed."""

    difference: float
    allowed: float


def random_images(size: int) -> Tensor:
    """The same normalised images every time, as many as the largest batch."""
    return torch.randn(max(BATCHES), 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def plain_logits(network: nn.Module, images: Tensor) -> dict[int, Tensor]:
    """The logits of a plain network for the first images, by the size of the batch.

    Raises:
        ConfigError: it does not take images of this size.
        RunError: its logits are not finite.
    """
    try:
        logits = {count: network(images[:count]) for count in BATCHES}
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"the student does not run on images of {images.shape[-1]} pixels ({_first_line(error)}); give --image-size"
        ) from error
    if not all(bool(found.isfinite().all()) for found in logits.values()):
        raise RunError("the student's logits are not finite for random images; export an earlier checkpoint")
    return logits


@torch.no_grad()
def check(
    run: Callable[[Tensor], Tensor], network: nn.Module, images: Tensor, expected: dict[int, Tensor], *, exact: bool
) -> Agreement:
    """Compares what was read back with the plain network, in fp32 and in several sizes of the batch.

    Args:
        run: what was read back: images to logits.
        expected: by :func:`plain_logits` for the same images.
        exact: allow no difference.

    Raises:
        RunError: it differs by more than the rounding of another order of summation.
    """
    allowed = 0.0 if exact else _allowed(network, images, expected)
    worst = 0.0
    for count, plain in expected.items():
        found = run(images[:count])
        if found.shape != plain.shape or found.dtype != plain.dtype:
            raise RunError(
                f"a batch of {count} gives {found.dtype} {tuple(found.shape)} instead of {plain.dtype} "
                f"{tuple(plain.shape)}"
            )
        difference = relative_difference(found, plain)
        if not difference <= allowed:
            raise RunError(
                f"a batch of {count} gives logits that differ by {difference:.1e} of their size from those of the "
                f"plain network, {allowed:.1e} allowed"
            )
        worst = max(worst, difference)
    return Agreement(worst, allowed)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖ over the logits of an image, of the worst image.

    Example:
        >>> relative_difference(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.5]])) < 0.1
        True
    """
    found, expected = found.double(), expected.double()
    error, size = (found - expected).norm(dim=1), expected.norm(dim=1)
    return float(torch.where(error == 0, 0.0, error / size).max())


def _allowed(network: nn.Module, images: Tensor, expected: dict[int, Tensor]) -> float:
    try:
        exact = copy.deepcopy(network).double()(images.double())
    except RuntimeError:  # it converts something to fp32 on its way
        return _ROUNDING_UNKNOWN
    return _TIMES_ROUNDING * relative_difference(expected[len(images)], exact) + _LAST_BITS


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__

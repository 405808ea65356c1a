"""Crops, resizes and normalisation of a whole batch on its device, without a random number in them."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Resampling weights are whole multiples of 1 / 2^11. With 8-bit pixels every partial sum is then a whole number that
# fp32 and the inputs of TF32 products hold exactly: the pixels depend neither on the batch size nor on the GEMM.
_WEIGHT_UNIT = 2**11

RESIZE_VERSION = 1
"""Raised whenever `resized_crop` comes to give other pixels for the same images and windows, even by a level."""


def pad_crop(images: Tensor, boxes: Tensor, flip: Tensor, padding: int) -> Tensor:
    """Cut one window of the images' own size out of each zero-padded image, then flip it, in one gather.

    Args:
        images: (N, 3, H, W).
        boxes: (N, 4) integer windows (top, left, H, W) in coordinates of the padded images.
        flip: (N,) bool, left to right.
        padding: pixels on each side.

    Returns:
        (N, 3, H, W).

    Example:
        >>> pad_crop(images, torch.tensor([[4, 4, 32, 32]]), torch.tensor([False]), 4).equal(images)
        True
    """
    count, channels, height, width = images.shape
    device = images.device
    columns = torch.arange(width, device=device).expand(count, -1)
    rows = boxes[:, 0, None] + torch.arange(height, device=device)  # (N, H)
    columns = boxes[:, 1, None] + torch.where(flip[:, None], width - 1 - columns, columns)  # (N, W)
    padded = F.pad(images, (padding, padding, padding, padding))
    pixels = rows[:, :, None] * padded.shape[-1] + columns[:, None]  # (N, H, W)
    # Indexing by four tensors takes five times as long on a CPU.
    cut = padded.flatten(2).gather(2, pixels.flatten(1)[:, None].expand(count, channels, -1))
    return cut.view(images.shape)


def resized_crop(images: Tensor, boxes: Tensor, flip: Tensor, size: int) -> Tensor:
    """Cut a window out of each image, resize it to (size, size) by antialiased bilinear interpolation, and flip it.

    Interpolation is separable, so it is one matrix product per axis; within one level of PIL's crop and resize.

    Args:
        images: (N, 3, H, W) uint8.
        boxes: (N, 4) integer windows (top, left, height, width) in pixels.
        flip: (N,) bool, left to right.
        size: height and width of the result in pixels.

    Returns:
        (N, 3, size, size) uint8.

    Example:
        >>> resized_crop(images, torch.tensor([[0, 0, 32, 32]]), torch.tensor([False]), 32).equal(images)
        True
    """
    height, width = images.shape[-2:]
    rows = _weights(boxes[:, 0], boxes[:, 2], size, height)  # (N, size, H)
    columns = _weights(boxes[:, 1], boxes[:, 3], size, width)  # (N, size, W)
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    # Autocast would round the weights to bf16.
    with torch.autocast(images.device.type, enabled=False):
        wide = _to_levels(images.float() @ columns.transpose(1, 2)[:, None])  # (N, 3, H, size)
        return _to_levels(rows[:, None] @ wide).to(torch.uint8)  # (N, 3, size, size)


class Normalise:
    """Turn uint8 images into fp32 with the data set's mean and deviation taken out.

    Args:
        mean, std: per channel, of images in [0, 1].
        device: where the images are.
        channels_last: layout of the result.

    Example:
        >>> Normalise((0.5,) * 3, (0.25,) * 3, device=torch.device("cpu"))(torch.zeros(1, 3, 1, 1, dtype=torch.uint8))
        tensor([[[[-2.]], [[-2.]], [[-2.]]]])
    """

    def __init__(
        self,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        *,
        device: torch.device,
        channels_last: bool = False,
    ) -> None:
        centre, deviation = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (mean, std))
        self._scale = (1 / (255 * deviation)).float().to(device)
        self._shift = (-centre / deviation).float().to(device)
        self._layout = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        return images.to(torch.float32, memory_format=self._layout).mul_(self._scale).add_(self._shift)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device, from pinned memory: the host does not wait for the device."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _weights(starts: Tensor, lengths: Tensor, size: int, extent: int) -> Tensor:
    """Return the (N, size, extent) weights of a triangle filter over the windows, as whole numbers in fp32."""
    pixel = torch.arange(extent, device=starts.device)
    inside = (pixel >= starts[:, None]) & (pixel < (starts + lengths)[:, None])  # (N, extent)
    scale = lengths.float()[:, None, None] / size
    out = torch.arange(size, device=starts.device)[:, None]
    centre = starts[:, None, None] + (out + 0.5) * scale  # (N, size, 1)
    # Downscaling widens the filter to the input pixels under one output pixel; upscaling never narrows it.
    weight = (pixel + 0.5 - centre).abs_().div_(-scale.clamp(min=1)).add_(1).clamp_(min=0).mul_(inside[:, None])
    weight.mul_(_WEIGHT_UNIT / weight.sum(-1, keepdim=True)).round_()
    # What rounding lost or gained goes to the pixel under the centre, so that a flat image stays flat.
    return weight.addcmul_(_WEIGHT_UNIT - weight.sum(-1, keepdim=True), (pixel == centre.floor()).float())


def _to_levels(sums: Tensor) -> Tensor:
    """Return weighted sums as grey levels 0..255, still in fp32; halves go up, as in PIL."""
    return (sums / _WEIGHT_UNIT + 0.5).floor_().clamp_(0, 255)

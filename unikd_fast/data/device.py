"""The loader of small data sets: they live on the device, and a view is an index into them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from unikd_fast.data.augmentation import SECOND_VIEWS, Augmentation, ViewParameters
from unikd_fast.data.images import BadImage
from unikd_fast.data.sampler import Schedule
from unikd_fast.data.splits import DataSplits, Split, TensorImages
from unikd_fast.data.views import chunks, limit_to_one_thread, strong_pixels, strong_view
from unikd_fast.values import Batch

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
        mean, std: mean and deviation per channel, of images in [0, 1].
        device: device of the images.
        channels_last: whether the result has that memory layout.

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


_THREADS = 2
"""That make strong views: the interpreter lets few of them work at a time."""
_AHEAD = 3
"""Batches whose strong views are under way while the one before is used."""


class _Resident(NamedTuple):
    """A split on the device."""

    images: Tensor  # (N, 3, H, W) uint8
    labels: Tensor  # (N,)
    sample_ids: Tensor  # (N,)


class DeviceLoader:
    """Serve a data set from device memory; made by `build_loader`, which documents the methods.

    Args:
        splits: data set, all in memory.
        augmentation: augmentation of the training views.
        schedule: part of this rank.
        device: device of the data set and of the batches.
        channels_last: whether images have that memory layout.
        second: schedule of the second views of each batch. If None, batches have none.

    Raises:
        ValueError: a split is not in memory.

    Example:
        >>> loader = build_loader(splits, augmentation=Augmentation(), seed=0, global_batch_size=64, device="cpu")
    """

    def __init__(
        self,
        splits: DataSplits,
        augmentation: Augmentation,
        schedule: Schedule,
        *,
        device: torch.device,
        channels_last: bool = False,
        second: Schedule | None = None,
    ) -> None:
        self._augmentation = augmentation
        self._schedule = schedule
        self._second = second
        self._shown = [schedule] if second is None else [schedule, second]
        self._device = device
        self._image_size = splits.image_size
        self._normalise = Normalise(splits.mean, splits.std, device=device, channels_last=channels_last)
        self._train = self._to_device(splits.train)
        assert isinstance(splits.train, TensorImages)
        self._on_host = splits.train.images
        self._held_out = {"val": self._to_device(splits.val)}
        self._held_out["test"] = self._held_out["val"] if splits.test_is_val else self._to_device(splits.test)

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of optimiser steps per epoch, the same on every rank."""
        return self._schedule.steps_per_epoch

    @property
    def schedule(self) -> Schedule:
        """Return the part of this rank; see `Loader.schedule`."""
        return self._schedule

    @property
    def pixels(self) -> dict[str, str]:
        """Return what decides a view's pixels besides its numbers; see `Loader.pixels`."""
        ours = f"unikd_fast, separable antialiased bilinear, version {RESIZE_VERSION}"
        return {
            "decoder": "none, uint8 tensors",
            "resize": ours if self._augmentation.crop == "resized" else "none",
            **strong_pixels(self._augmentation),
        }

    @property
    def bad_samples(self) -> tuple[BadImage, ...]:
        """Return no samples, as there are no files."""
        return ()

    def train(
        self, epoch: int, start_step: int = 0, *, stream: int = 0, view_epoch: int | None = None
    ) -> Iterator[Batch]:
        """Yield this rank's micro-batches of an epoch; see `Loader.train`."""
        return self._batches(self._views(epoch, start_step, stream, epoch if view_epoch is None else view_epoch))

    @property
    def unplanned(self) -> str | None:
        """Return why batches cannot be made from `plans`, or None if they can."""
        augmentations = [self._augmentation, *([] if self._second is None else [self._second.augmentation])]
        if not any(augmentation.is_strong for augmentation in augmentations):
            return None
        second = "" if self._augmentation.is_strong else " second"
        return f"jitter, policies and erasing of the{second} views are made image by image, as the host says"

    def plans(self, epoch: int, start_step: int = 0) -> Iterator[Tensor]:
        """Yield what `batch_of` makes the micro-batches of `train` from: all that differs between them.

        Returns:
            (V, N, 6) int64 on the host, pinned if the loader's device is a GPU, for V views of N samples: position,
            window (top, left, height, width), flip.
        """
        assert self.unplanned is None, self.unplanned
        for rows, *shown in self._views(epoch, start_step, 0, epoch):
            plan = torch.from_numpy(np.stack([self._plan(rows, views) for views in shown if views is not None]))
            yield plan if self._device.type == "cpu" else plan.pin_memory()

    def batch_of(self, plan: Tensor) -> Batch:
        """Make a micro-batch of a plan on the device: the same operations for every plan, and no host read."""
        images, *second = (self._planned(own, shown.augmentation) for own, shown in zip(plan, self._shown, strict=True))
        taken = plan[0, :, 0]
        return Batch(
            self._normalise(images),
            self._train.labels.index_select(0, taken),
            self._train.sample_ids.index_select(0, taken),
            self._normalise(second[0]) if second else None,
        )

    def views(self, requests: Iterable[tuple[NDArray[np.int64], int]]) -> Iterator[Batch]:
        """Yield a batch of views for each request; see `Loader.views`."""
        return self._batches((rows, self._schedule.views(rows, epoch), None) for rows, epoch in requests)

    def evaluate(self, split: Literal["val", "test"]) -> Iterator[Batch]:
        """Yield this rank's share of a split; see `Loader.evaluate`."""
        images, labels, sample_ids = self._held_out[split]
        for part in self._schedule.evaluation(len(images)):
            yield Batch(self._normalise(images[part]), labels[part], sample_ids[part])

    def _batches(
        self, shown: Iterator[tuple[NDArray[np.int64], ViewParameters, ViewParameters | None]]
    ) -> Iterator[Batch]:
        """Yield the batches; where views are strong, threads make those of the next batches meanwhile."""
        strong = any(schedule.augmentation.is_strong for schedule in self._shown)
        ahead = _AHEAD if strong and self._device.type != "cpu" else 0
        threads = ThreadPoolExecutor(
            _THREADS, thread_name_prefix="unikd-device-loader", initializer=limit_to_one_thread
        )
        started: deque[tuple[Tensor, list[Callable[[], Tensor]]]] = deque()
        try:
            for rows, *views in shown:
                plans = [(torch.from_numpy(self._plan(rows, own)), own) for own in views if own is not None]
                started.append((plans[0][0], [self._start(plan, own, threads) for plan, own in plans]))
                if len(started) > ahead:
                    yield self._finished(*started.popleft())
            while started:
                yield self._finished(*started.popleft())
        finally:
            threads.shutdown(cancel_futures=True)

    def _start(self, plan: Tensor, views: ViewParameters, threads: Executor) -> Callable[[], Tensor]:
        """Return a function that makes the uint8 views of a plan (N, 6) on the device.

        Strong views are made by these threads on the CPU: torchvision's operations take other numbers for every image,
        and on a device each of them would make the host wait.
        """
        if not views.augmentation.is_strong:
            return lambda: self._planned(to_device(plan, self._device), views.augmentation)

        def make(part: range) -> Tensor:
            weak = self._planned(plan[part.start : part.stop], views.augmentation)
            return torch.stack([strong_view(image, views, i) for i, image in zip(part, weak, strict=True)])

        tasks = [threads.submit(make, part) for part in chunks(len(plan))]
        return lambda: to_device(torch.cat([task.result() for task in tasks]), self._device)

    def _finished(self, plan: Tensor, views: list[Callable[[], Tensor]]) -> Batch:
        taken = to_device(plan[:, 0].contiguous(), self._device)
        images, *second = (self._normalise(view()) for view in views)
        return Batch(images, self._train.labels[taken], self._train.sample_ids[taken], second[0] if second else None)

    def _plan(self, positions: NDArray[np.int64], views: ViewParameters) -> NDArray[np.int64]:
        """Return (N, 6): position, window (top, left, height, width), flip."""
        return np.column_stack((positions, views.crop_boxes(*self._train.images.shape[-2:]), views.flip))

    def _planned(self, plan: Tensor, augmentation: Augmentation) -> Tensor:
        """Return the views of a plan (N, 6) on its device, as uint8 and before strong augmentation."""
        positions, boxes, flip = plan[:, 0], plan[:, 1:5], plan[:, 5].bool()
        images = (self._on_host if plan.device.type == "cpu" else self._train.images).index_select(0, positions)
        if augmentation.crop == "resized":
            return resized_crop(images, boxes, flip, self._image_size)
        return pad_crop(images, boxes, flip, (augmentation.padding or 0) if augmentation.crop == "pad" else 0)

    def _views(
        self, epoch: int, start_step: int, stream: int, shown: int
    ) -> Iterator[tuple[NDArray[np.int64], ViewParameters, ViewParameters | None]]:
        """Yield positions, views and second views of each micro-batch of an epoch, as they look in epoch `shown`."""
        micro_batches = self._schedule.training(epoch, start_step, stream, view_epoch=shown)
        others, other_stream = self._second, stream + SECOND_VIEWS
        return (
            (rows, views, None if others is None else others.views(rows, shown, other_stream))
            for rows, views in micro_batches
        )

    def _to_device(self, split: Split) -> _Resident:
        if not isinstance(split, TensorImages):
            raise ValueError(
                f"DeviceLoader: the data set must be in memory, got {type(split).__name__}; use kind 'torchvision'"
            )
        if split.images.shape[-2:] != (self._image_size, self._image_size):
            raise ValueError(
                f"DeviceLoader: images must be {self._image_size} pixels high and wide, the size of the data set, "
                f"got {tuple(split.images.shape[-2:])}"
            )
        return _Resident(
            split.images.to(self._device),
            torch.from_numpy(split.labels).to(self._device),
            torch.from_numpy(split.sample_ids).to(self._device),
        )

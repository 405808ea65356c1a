"""The loader of image files: worker processes decode them with Pillow, the device normalises."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image, features
from torch import Tensor

from unikd_fast.data.augmentation import SECOND_VIEWS, Augmentation, ViewParameters
from unikd_fast.data.device import Normalise
from unikd_fast.data.images import BadImage, BadImageTally, StoredImage, read_rgb, stand_ins
from unikd_fast.data.sampler import Schedule
from unikd_fast.data.settings import BadImages
from unikd_fast.data.splits import DatasetImages, DataSplits, Split, StoredImages
from unikd_fast.data.views import ViewWindow, Windows, strong_pixels, strong_views
from unikd_fast.data.workers import DecodingWorkers
from unikd_fast.errors import DataError
from unikd_fast.values import Batch, Interpolation

OnBad = Literal["raise", "replace", "leave_out"]

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class DecodeRequest:
    """One micro-batch to decode."""

    images: tuple[Any, ...]  # where they are: StoredImage, or DatasetItem
    labels: NDArray[np.int64]  # (N,)
    sample_ids: NDArray[np.int64]  # (N,)
    views: ViewParameters | None  # None: the view for evaluation
    second: ViewParameters | None = None  # of another view of the same images
    on_bad: OnBad = "raise"  # where an image cannot be decoded


class DecodedBatch(NamedTuple):
    """What became of a request: M images, of which M = N unless bad ones are left out."""

    images: Tensor  # (M, 3, image_size, image_size) uint8, channels_last
    labels: Tensor  # (M,) int64
    sample_ids: Tensor  # (M,) int64
    second: Tensor | None  # as images, another view of them
    bad: Sequence[BadImage]  # those replaced or left out


@dataclass(frozen=True)
class Decoder:
    """Decode requests; indexed by them, as a torch DataLoader wants its data set.

    Args:
        windows: windows of the views.
        interpolation: interpolation of every resize.

    Example:
        >>> images, labels, sample_ids, second, bad = Decoder(Windows(image_size=224, short_side=256))[request]
    """

    windows: Windows
    interpolation: Interpolation = "bilinear"

    def __getitem__(self, request: DecodeRequest) -> DecodedBatch:
        """Decode a batch; the request says whether a bad file is an error, is left out, or is replaced.

        A replaced sample has the image, label and id of the next good sample of the batch.

        Raises:
            DataError: a file, or every file of a batch, cannot be decoded; the message names it.
        """
        bad: dict[int, BadImage] = {}
        size = self.windows.image_size
        shown = [request.views] if request.second is None else [request.views, request.second]
        pixels = np.empty((len(shown), len(request.images), size, size, 3), np.uint8)
        for i, stored in enumerate(request.images):
            try:
                image = self._read(stored)
            except DataError as error:
                if request.on_bad == "raise":
                    raise
                bad[i] = BadImage(stored.name, int(request.sample_ids[i]), str(error))
                continue
            for levels, views in zip(pixels, shown, strict=True):
                view = self.central_view(image) if views is None else self.training_view(image, views, i)
                levels[i] = np.asarray(view)
        images, *second = (
            batch if views is None else strong_views(batch, views)
            for batch, views in zip(torch.from_numpy(pixels).permute(0, 1, 4, 2, 3), shown, strict=True)
        )
        labels, sample_ids = torch.from_numpy(request.labels), torch.from_numpy(request.sample_ids)
        batch = DecodedBatch(images, labels, sample_ids, second[0] if second else None, list(bad.values()))
        return without_bad(batch, list(bad), request.on_bad) if bad else batch

    def _read(self, stored: StoredImage) -> Image.Image:
        image = read_rgb(stored)
        self.windows.check(stored, image.height, image.width)
        return image

    def central_view(self, image: Image.Image) -> Image.Image:
        """Resize the short side, then cut out the centre, as torchvision's Resize and CenterCrop do."""
        return self._cut(image, self.windows.central(image.height, image.width))

    def training_view(self, image: Image.Image, views: ViewParameters, i: int) -> Image.Image:
        """Apply view i: crop, resize where the crop asks for it, flip."""
        return self._cut(image, self.windows.training(views, i, image.height, image.width))

    def _cut(self, image: Image.Image, window: ViewWindow) -> Image.Image:
        # Crop first: given as `box`, PIL would let the filter reach outside the window.
        top, left, height, width = window.box
        image = _crop(image, top, left, height, width)
        if window.size != (height, width):
            image = image.resize(window.size[::-1], _RESAMPLING[self.interpolation])
        for top, left in (window.cut, window.shift):
            image = _crop(image, top, left, self.windows.image_size, self.windows.image_size)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if window.flip else image


def _crop(image: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image:
    """Cut out a window, black outside the image; return the image itself if the window is all of it."""
    if (top, left, height, width) == (0, 0, image.height, image.width):
        return image
    return image.crop((left, top, left + width, top + height))


def without_bad(batch: DecodedBatch, places: Sequence[int], on_bad: OnBad) -> DecodedBatch:
    """Return a batch in which the samples at these places are replaced or left out."""
    good = np.ones(len(batch.labels), np.bool_)
    good[places] = False
    if on_bad == "replace" and not good.any():
        raise DataError(
            f"Decoder: none of the {len(good)} images of a batch can be decoded, so none can stand in for the others; "
            f"the first: {batch.bad[0].reason}"
        )
    taken = torch.from_numpy(stand_ins(good) if on_bad == "replace" else np.flatnonzero(good))
    images, labels, sample_ids, second, bad = batch
    return DecodedBatch(images[taken], labels[taken], sample_ids[taken], None if second is None else second[taken], bad)


class Requested(NamedTuple):
    """The requests of one pass, in order, and where its bad files are counted."""

    requests: Iterator[DecodeRequest]
    tally: BadImageTally


class FileRequests:
    """Turn this rank's part of a data set of files into requests for any decoder.

    Args:
        splits: data set, all files.
        augmentation: augmentation of the training views, and the resize for evaluation.
        schedule: part of this rank.
        second: schedule of the second views of each batch. If None, batches have none.
        bad_images, max_bad_share: what to do about files that cannot be decoded; see `build_loader`.

    Raises:
        ValueError: a split is not of files.

    Example:
        >>> requests, tally = FileRequests(splits, Augmentation(), schedule).training(epoch=0)
        >>> next(requests).images[0].name
        'n01440764_10026.JPEG'
    """

    def __init__(
        self,
        splits: DataSplits,
        augmentation: Augmentation,
        schedule: Schedule,
        *,
        second: Schedule | None = None,
        bad_images: BadImages = "error",
        max_bad_share: float = 0.001,
    ) -> None:
        self._train_files = _files(splits.train)
        self._held_out = {"val": _files(splits.val), "test": _files(splits.test)}
        self.augmentation = augmentation
        self.schedule = schedule
        self._second = second
        self._skip_bad = bad_images == "skip"
        self._max_bad_share = max_bad_share
        self._logged: set[str] = set()
        self._trained = self._new_tally("training", 0)

    @property
    def bad_samples(self) -> tuple[BadImage, ...]:
        """Return the samples of the latest training pass that others stand in for; see `Loader.bad_samples`."""
        return self._trained.images

    def training(self, epoch: int, start_step: int = 0, stream: int = 0, *, view_epoch: int | None = None) -> Requested:
        """Return the requests for this rank's micro-batches of an epoch; see `Loader.train`.

        Raises:
            ValueError: the epoch has no such step.
        """
        micro_batches = self.schedule.training(epoch, start_step, stream, view_epoch=view_epoch)
        shown, others, other_stream = epoch if view_epoch is None else view_epoch, self._second, stream + SECOND_VIEWS
        on_bad: OnBad = "replace" if self._skip_bad else "raise"
        requests = (
            self._request(
                rows,
                views,
                None if others is None else others.views(rows, shown, other_stream),
                on_bad,
                seeds=((shown, stream),) if others is None else ((shown, stream), (shown, other_stream)),
            )
            for rows, views in micro_batches
        )
        self._trained = self._new_tally("training", self.schedule.samples_per_epoch)
        return Requested(requests, self._trained)

    def views(self, asked: Iterable[tuple[NDArray[np.int64], int]]) -> Requested:
        """Return the requests for these views; see `Loader.views`.

        Nothing can stand in for a sample that was asked for, so a bad file is an error in any case.
        """
        requests = (self._request(rows, self.schedule.views(rows, epoch), seeds=((epoch, 0),)) for rows, epoch in asked)
        return Requested(requests, self._new_tally("views", 0))

    def evaluation(self, split: Literal["val", "test"]) -> Requested:
        """Return the requests for this rank's share of a split; see `Loader.evaluate`."""
        files = self._held_out[split]
        sample_ids = files.sample_ids
        on_bad: OnBad = "leave_out" if self._skip_bad else "raise"
        requests = (
            DecodeRequest(
                files.images(range(part.start, part.stop)), files.labels[part], sample_ids[part], None, on_bad=on_bad
            )
            for part in self.schedule.evaluation(len(files))
        )
        return Requested(requests, self._new_tally(split, len(files)))

    def _request(
        self,
        rows: NDArray[np.int64],
        views: ViewParameters,
        second: ViewParameters | None = None,
        on_bad: OnBad = "raise",
        *,
        seeds: tuple[tuple[int, int], ...],
    ) -> DecodeRequest:
        """Return the request for a batch; ``seeds`` are the epoch and the stream of each of its views."""
        files = self._train_files
        images: tuple[Any, ...]
        if isinstance(files, DatasetImages):  # whose items draw random numbers of their own
            images = files.images(rows, *(self.schedule.seeds(rows, epoch, stream) for epoch, stream in seeds))
        else:
            images = files.images(rows)
        return DecodeRequest(images, files.labels[rows], files.sample_ids[rows], views, second, on_bad)

    def _new_tally(self, purpose: str, samples: int) -> BadImageTally:
        return BadImageTally(purpose, samples=samples, max_share=self._max_bad_share, logged=self._logged)


def _files(split: Split) -> StoredImages:
    if not isinstance(split, StoredImages):
        raise ValueError(f"FileRequests: the data set must be image files, got {type(split).__name__}; use 'device'")
    return split


class FolderLoader:
    """Serve image files through worker processes; made by `build_loader`, which documents the methods.

    Its processes are `DecodingWorkers`: a new `train` takes over those of training, and each evaluation has its own.

    Args:
        splits: data set.
        files: requests for what to decode of it.
        device: device of the batches.
        workers: number of decoding processes. With 0, this process decodes.
        channels_last: whether images have that memory layout.

    Raises:
        ValueError: workers is negative.

    Example:
        >>> loader = build_loader(splits, augmentation=Augmentation(), seed=0, global_batch_size=64, device="cuda")
    """

    def __init__(
        self,
        splits: DataSplits,
        files: FileRequests,
        *,
        device: torch.device,
        workers: int = 2,
        channels_last: bool = False,
    ) -> None:
        self._files = files
        self._device = device
        self._is_resized = splits.is_resized
        self._normalise: Callable[[Tensor], Tensor] = Normalise(
            splits.mean, splits.std, device=device, channels_last=channels_last
        )
        windows = Windows.of(splits, files.augmentation)
        self._decoder = Decoder(windows, splits.interpolation)
        if isinstance(splits.train, DatasetImages):
            from unikd_fast.data.datasets import DatasetDecoder

            self._decoder = DatasetDecoder.of(splits, windows)
            if not splits.is_resized:
                layout = torch.channels_last if channels_last else torch.contiguous_format
                self._normalise = partial(Tensor.contiguous, memory_format=layout)
        self._workers = DecodingWorkers(self._decoder, workers, pin_memory=device.type == "cuda")

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of optimiser steps per epoch, the same on every rank."""
        return self._files.schedule.steps_per_epoch

    @property
    def schedule(self) -> Schedule:
        """Return the part of this rank; see `Loader.schedule`."""
        return self._files.schedule

    @property
    def pixels(self) -> dict[str, str]:
        """Return what decides a view's pixels besides its numbers; see `Loader.pixels`."""
        if not self._is_resized:
            return {"decoder": "the data set's own", "resize": "the data set's own"}
        # Versions of libjpeg differ in how they round; the other formats have one decoding.
        turbo = features.version("libjpeg_turbo")
        library = f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {features.version('jpg')}"
        major = PIL.__version__.partition(".")[0]
        resize = f"pillow {major}, {self._decoder.interpolation}, antialiased"
        return {"decoder": f"pillow, {library}", "resize": resize, **strong_pixels(self._files.augmentation)}

    @property
    def bad_samples(self) -> tuple[BadImage, ...]:
        """Return the samples of the latest `train` that others stand in for; see `Loader.bad_samples`."""
        return self._files.bad_samples

    def train(
        self, epoch: int, start_step: int = 0, *, stream: int = 0, view_epoch: int | None = None
    ) -> Iterator[Batch]:
        """Yield this rank's micro-batches of an epoch, decoded ahead; see `Loader.train`.

        Raises:
            LoaderError: a worker died.
            RuntimeError: the iterator is used after a newer `train` took over the workers.
        """
        requests, tally = self._files.training(epoch, start_step, stream, view_epoch=view_epoch)
        return self._workers.train(requests, tally, self._batch)

    def views(self, requests: Iterable[tuple[NDArray[np.int64], int]]) -> Iterator[Batch]:
        """Yield a batch of views for each request, decoded ahead by workers of its own; see `Loader.views`.

        Nothing can stand in for a sample that was asked for, so a bad file is an error in any case.

        Raises:
            LoaderError: a worker died.
        """
        asked, tally = self._files.views(requests)
        return self._workers.once(asked, tally, self._batch)

    def evaluate(self, split: Literal["val", "test"]) -> Iterator[Batch]:
        """Yield this rank's share of a split, without bad files if those are skipped; see `Loader.evaluate`.

        Raises:
            LoaderError: a worker died.
        """
        asked = self._files.evaluation(split)
        requests = list(asked.requests)
        if requests:
            yield from self._workers.once(requests, asked.tally, self._batch)
        asked.tally.log_missing()

    def _batch(self, decoded: DecodedBatch) -> Batch | None:
        """Return a batch on the device, or None if all its images are left out."""
        images, labels, sample_ids, second, _ = decoded
        if not len(images):
            return None
        on_device = (part.to(self._device, non_blocking=True) for part in (images, labels, sample_ids))
        pixels, labels, sample_ids = on_device
        other = None if second is None else self._normalise(second.to(self._device, non_blocking=True))
        return Batch(self._normalise(pixels), labels, sample_ids, other)

"""The loader of image files that decodes with DALI, on the CPU or on the GPU; the device normalises."""

from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from unikd_fast.data.bad_images import BadImage
from unikd_fast.data.dali_pipeline import decoding_pipeline, view_pipeline
from unikd_fast.data.dali_probe import Decoding, gpu_number, pixels_of
from unikd_fast.data.dali_views import PipelineOf, ViewBatch, cpu_views, gpu_views
from unikd_fast.data.decode import DecodeRequest
from unikd_fast.data.file_requests import FileRequests, Requested
from unikd_fast.data.image_feed import ImageFeed, compute_alone
from unikd_fast.data.images import StoredImage
from unikd_fast.data.pixels import Normalise, to_device
from unikd_fast.data.schedule import Schedule
from unikd_fast.data.splits import DataSplits
from unikd_fast.data.strong import strong_pixels
from unikd_fast.data.view_windows import Windows
from unikd_fast.values import Batch


class DaliLoader:
    """Serve image files through DALI; made by `build_loader`, which documents the methods.

    Order, ids, labels and windows are those of `FolderLoader`. On a CPU the decoded pixels are too, and resized about
    one in a hundred differs by one level, one in ten millions by two. On a GPU they differ more: its decoder smooths
    chroma less, and where a window is made smaller, the filter repeats the border instead of ending there. That path
    has never run on a GPU yet.

    Each iterator has threads and a pipeline of its own, from its first batch until it ends or is dropped. So several
    may run at a time, and a new `train` leaves older ones alone.

    Args:
        splits: the data set.
        files: what to decode of it.
        device: where the batches go.
        decoding: who decodes; see `Decoding`.
        threads: of DALI on the CPU, and as many that read files and, on a CPU, resize.
        prefetch: batches under way in DALI at a time.
        channels_last: layout of the images.

    Raises:
        ValueError: a number is below 1.

    Example:
        >>> loader = build_loader(splits, augmentation=Augmentation(), kind="dali", seed=0, global_batch_size=64,
        ...                       device="cuda")
    """

    def __init__(
        self,
        splits: DataSplits,
        files: FileRequests,
        *,
        device: torch.device,
        decoding: Decoding,
        threads: int = 2,
        prefetch: int = 2,
        channels_last: bool = False,
    ) -> None:
        for name, value in (("threads", threads), ("prefetch", prefetch)):
            if value < 1:
                raise ValueError(f"DaliLoader: {name} must be at least 1, got {value}")
        self._files = files
        self._device = device
        self._decoding = decoding
        self._number_of_threads = threads
        self._prefetch = prefetch
        self._normalise = Normalise(splits.mean, splits.std, device=device, channels_last=channels_last)
        self._windows = Windows.of(splits, files.augmentation)
        self._interpolation = splits.interpolation
        self._for_pil: set[StoredImage] = set()

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps per epoch, the same on every rank."""
        return self._files.schedule.steps_per_epoch

    @property
    def schedule(self) -> Schedule:
        """What this rank takes."""
        return self._files.schedule

    @property
    def pixels(self) -> dict[str, str]:
        """What decides a view's pixels besides its numbers; see `Loader.pixels`."""
        return {**pixels_of(self._decoding, self._interpolation), **strong_pixels(self._files.augmentation)}

    @property
    def bad_samples(self) -> tuple[BadImage, ...]:
        """Samples of the latest `train` that others stand in for; see `Loader.bad_samples`."""
        return self._files.bad_samples

    def train(
        self, epoch: int, start_step: int = 0, *, stream: int = 0, view_epoch: int | None = None
    ) -> Iterator[Batch]:
        """Yield this rank's micro-batches of an epoch, decoded ahead; see `Loader.train`."""
        return self._batches(self._files.training(epoch, start_step, stream, view_epoch=view_epoch))

    def views(self, requests: Iterable[tuple[NDArray[np.int64], int]]) -> Iterator[Batch]:
        """Yield a batch of views for each request, decoded ahead; see `Loader.views`.

        Nothing can stand in for a sample that was asked for, so a bad file is an error in any case.
        """
        return self._batches(self._files.views(requests))

    def evaluate(self, split: Literal["val", "test"]) -> Iterator[Batch]:
        """Yield this rank's share of a split, without bad files if those are skipped; see `Loader.evaluate`."""
        asked, samples = self._files.evaluation(split)
        yield from self._batches(asked)
        asked.say_what_is_missing(split, samples)

    def _batches(self, asked: Requested) -> Iterator[Batch]:
        requests, tally = asked
        first = next(requests, None)
        while first is not None:
            # A pipeline is built for a largest batch. Only `views` may ask for a larger one later, which gets another.
            fitting = _UpTo(len(first.images), chain((first,), requests))
            with closing(self._views(first, fitting)) as made:
                for views in made:
                    tally.add(views.batch.bad)
                    if (batch := self._batch(views)) is not None:
                        yield batch
            first = fitting.left_over

    def _batch(self, views: ViewBatch) -> Batch | None:
        """Return what the engine gets of a request; None where all its images are left out."""
        taken, places = views.batch.taken()
        if not len(taken):
            return None
        on_device = (to_device(view, self._device) if view.device.type == "cpu" else view for view in views.views)
        chosen = to_device(torch.from_numpy(taken), self._device)
        images, *second = (self._normalise(view if len(taken) == len(view) else view[chosen]) for view in on_device)
        labels, sample_ids = (
            to_device(torch.from_numpy(part[places]), self._device)
            for part in (views.batch.request.labels, views.batch.request.sample_ids)
        )
        return Batch(images, labels, sample_ids, second[0] if second else None)

    def _views(self, first: DecodeRequest, requests: Iterator[DecodeRequest]) -> Generator[ViewBatch, None, None]:
        pipeline_of = self._pipeline_of(first)
        threads = ThreadPoolExecutor(
            self._number_of_threads, thread_name_prefix="unikd-dali-loader", initializer=compute_alone
        )
        try:
            feed = ImageFeed(requests, self._windows, threads, ahead=self._prefetch + 1, for_pil=self._for_pil)
            if self._decoding == "cpu":
                yield from cpu_views(feed, pipeline_of, threads, self._windows.image_size, self._interpolation)
            else:
                yield from gpu_views(feed, pipeline_of, threads, torch.cuda.current_stream(self._device))
        finally:
            threads.shutdown(cancel_futures=True)

    def _pipeline_of(self, first: DecodeRequest) -> PipelineOf:
        shared: dict[str, Any] = {
            "batch_size": len(first.images),
            "threads": self._number_of_threads,
            "prefetch": self._prefetch,
        }
        if self._decoding == "cpu":
            return lambda source: decoding_pipeline(source, **shared)
        numbers = [views for views in (first.views, first.second) if views is not None]
        return lambda source: view_pipeline(
            source,
            views=1 if first.second is None else 2,
            image_size=self._windows.image_size,
            interpolation=self._interpolation,
            padded=any(views.augmentation.crop == "pad" for views in numbers),
            by_parts=self._decoding == "gpu_parts",
            device_id=gpu_number(self._device),
            **shared,
        )


class _UpTo(Iterator[DecodeRequest]):
    """The requests up to one of more than `size` images, which is left over."""

    def __init__(self, size: int, requests: Iterator[DecodeRequest]) -> None:
        self._size = size
        self._requests = requests
        self.left_over: DecodeRequest | None = None

    def __next__(self) -> DecodeRequest:
        if self.left_over is not None:
            raise StopIteration
        request = next(self._requests)
        if len(request.images) > self._size:
            self.left_over = request
            raise StopIteration
        return request

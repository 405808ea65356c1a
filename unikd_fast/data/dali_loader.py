"""The loader of image files that decodes with DALI, on the CPU or on the GPU; the device normalises."""

import logging
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from unikd_fast.data.augmentation import SECOND_VIEWS, Augmentation, ViewParameters
from unikd_fast.data.bad_images import BadImage, BadImages, BadImageTally
from unikd_fast.data.dali_pipeline import decoding_pipeline, view_pipeline
from unikd_fast.data.dali_probe import Decoding, gpu_number, pixels_of
from unikd_fast.data.dali_views import PipelineOf, ViewBatch, cpu_views, gpu_views
from unikd_fast.data.decode import DecodeRequest, OnBad
from unikd_fast.data.image_feed import ImageFeed
from unikd_fast.data.pixels import Normalise
from unikd_fast.data.schedule import Schedule
from unikd_fast.data.splits import DataSplits, Split, StoredImages
from unikd_fast.data.stored_image import StoredImage
from unikd_fast.data.strong import strong_pixels
from unikd_fast.data.view_windows import Windows
from unikd_fast.values import Batch

_logger = logging.getLogger("unikd_fast")


class DaliLoader:
    """Serve image files through DALI; made by `build_loader`, which documents the methods.

    Order, ids, labels and windows are those of `FolderLoader`. On a CPU the decoded pixels are too, and resized about
    one in a hundred differs by one level, one in ten millions by two. On a GPU they differ more: its decoder smooths
    chroma less, and where a window is made smaller, the filter repeats the border instead of ending there. That path
    has never run on a GPU yet.

    Each iterator has threads and a pipeline of its own, from its first batch until it ends or is dropped. So several
    may run at a time, and a new `train` leaves older ones alone.

    Args:
        splits: the data set, all files.
        augmentation: the views to train on and the resize for evaluation.
        schedule: what this rank takes.
        device: where the batches go.
        decoding: who decodes; see `Decoding`.
        threads: of DALI on the CPU, and as many that read files and, on a CPU, resize.
        prefetch: batches under way in DALI at a time.
        channels_last: layout of the images.
        second: the views of each batch's second images; None: it has none.
        bad_images, max_bad_share: what to do about files that cannot be decoded; see `build_loader`.

    Raises:
        ValueError: a split is not of files, or a number is below 1.

    Example:
        >>> loader = build_loader(splits, augmentation=Augmentation(), kind="dali", seed=0, global_batch_size=64,
        ...                       device="cuda")
    """

    def __init__(
        self,
        splits: DataSplits,
        augmentation: Augmentation,
        schedule: Schedule,
        *,
        device: torch.device,
        decoding: Decoding,
        threads: int = 2,
        prefetch: int = 2,
        channels_last: bool = False,
        second: Schedule | None = None,
        bad_images: BadImages = "error",
        max_bad_share: float = 0.001,
    ) -> None:
        for name, value in (("threads", threads), ("prefetch", prefetch)):
            if value < 1:
                raise ValueError(f"DaliLoader: {name} must be at least 1, got {value}")
        self._train_files = _files(splits.train)
        self._held_out = {"val": _files(splits.val), "test": _files(splits.test)}
        self._augmentation = augmentation
        self._schedule = schedule
        self._second = second
        self._device = device
        self._decoding = decoding
        self._number_of_threads = threads
        self._prefetch = prefetch
        self._normalise = Normalise(splits.mean, splits.std, device=device, channels_last=channels_last)
        self._windows = Windows(splits.image_size, augmentation.short_side(splits.image_size))
        self._skip_bad = bad_images == "skip"
        self._max_bad_share = max_bad_share
        self._logged: set[str] = set()
        self._for_pil: set[StoredImage] = set()
        self._tally = self._new_tally("training", 0)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps per epoch, the same on every rank."""
        return self._schedule.steps_per_epoch

    @property
    def schedule(self) -> Schedule:
        """What this rank takes."""
        return self._schedule

    @property
    def pixels(self) -> dict[str, str]:
        """What decides a view's pixels besides its numbers; see `Loader.pixels`."""
        return {**pixels_of(self._decoding), **strong_pixels(self._augmentation)}

    @property
    def bad_samples(self) -> tuple[BadImage, ...]:
        """Samples of the latest `train` that others stand in for; see `Loader.bad_samples`."""
        return self._tally.images

    def train(
        self, epoch: int, start_step: int = 0, *, stream: int = 0, view_epoch: int | None = None
    ) -> Iterator[Batch]:
        """Yield this rank's micro-batches of an epoch, decoded ahead; see `Loader.train`."""
        micro_batches = self._schedule.training(epoch, start_step, stream, view_epoch=view_epoch)
        shown, others, other_stream = epoch if view_epoch is None else view_epoch, self._second, stream + SECOND_VIEWS
        on_bad: OnBad = "replace" if self._skip_bad else "raise"
        requests = (
            self._request(rows, views, None if others is None else others.views(rows, shown, other_stream), on_bad)
            for rows, views in micro_batches
        )
        self._tally = self._new_tally("training", self._schedule.samples_per_epoch)
        return self._batches(requests, self._tally)

    def views(self, requests: Iterable[tuple[NDArray[np.int64], int]]) -> Iterator[Batch]:
        """Yield a batch of views for each request, decoded ahead; see `Loader.views`.

        Nothing can stand in for a sample that was asked for, so a bad file is an error in any case.
        """
        asked = (self._request(rows, self._schedule.views(rows, epoch)) for rows, epoch in requests)
        return self._batches(asked, self._new_tally("views", 0))

    def evaluate(self, split: Literal["val", "test"]) -> Iterator[Batch]:
        """Yield this rank's share of a split, without bad files if those are skipped; see `Loader.evaluate`."""
        files = self._held_out[split]
        sample_ids = files.sample_ids
        on_bad: OnBad = "leave_out" if self._skip_bad else "raise"
        requests = (
            DecodeRequest(
                files.images(range(part.start, part.stop)), files.labels[part], sample_ids[part], None, on_bad=on_bad
            )
            for part in self._schedule.evaluation(len(files))
        )
        tally = self._new_tally(split, len(files))
        yield from self._batches(requests, tally)
        if tally.images:
            _logger.warning("%s: evaluated without %d of %d samples", split, len(tally.images), len(files))

    def _request(
        self,
        rows: NDArray[np.int64],
        views: ViewParameters,
        second: ViewParameters | None = None,
        on_bad: OnBad = "raise",
    ) -> DecodeRequest:
        files = self._train_files
        return DecodeRequest(files.images(rows), files.labels[rows], files.sample_ids[rows], views, second, on_bad)

    def _new_tally(self, purpose: str, samples: int) -> BadImageTally:
        return BadImageTally(purpose, samples=samples, max_share=self._max_bad_share, logged=self._logged)

    def _batches(self, requests: Iterator[DecodeRequest], tally: BadImageTally) -> Iterator[Batch]:
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
        images, *second = (
            self._normalise((view if len(taken) == len(view) else view[torch.from_numpy(taken)]).to(self._device))
            for view in views.views
        )
        labels, sample_ids = (
            torch.from_numpy(part[places]).to(self._device, non_blocking=True)
            for part in (views.batch.request.labels, views.batch.request.sample_ids)
        )
        return Batch(images, labels, sample_ids, second[0] if second else None)

    def _views(self, first: DecodeRequest, requests: Iterator[DecodeRequest]) -> Generator[ViewBatch, None, None]:
        pipeline_of = self._pipeline_of(first)
        threads = ThreadPoolExecutor(
            self._number_of_threads, thread_name_prefix="unikd-dali-loader", initializer=_compute_alone
        )
        try:
            feed = ImageFeed(requests, self._windows, threads, ahead=self._prefetch + 1, for_pil=self._for_pil)
            if self._decoding == "cpu":
                yield from cpu_views(feed, pipeline_of, threads, self._windows.image_size)
            else:
                yield from gpu_views(feed, pipeline_of, torch.cuda.current_stream(self._device))
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
            padded=any(views.augmentation.crop == "pad" for views in numbers),
            by_parts=self._decoding == "gpu_parts",
            device_id=gpu_number(self._device),
            **shared,
        )


def _compute_alone() -> None:
    """Keep a thread of the loader from opening a team of OpenMP's for every operation.

    OpenMP, which then counts more threads than cores, would put those of the training to sleep between operations: a
    step on 2 cores took half as long again.
    """
    torch.get_num_threads()  # torch sets the number of a thread the first time it is used there
    threadpool_limits(1, user_api="openmp")


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


def _files(split: Split) -> StoredImages:
    if not isinstance(split, StoredImages):
        raise ValueError(f"DaliLoader: the data set must be image files, got {type(split).__name__}; use 'device'")
    return split

"""The loader of image files: worker processes decode, the device normalises."""

import logging
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import features
from torch.utils.data import DataLoader

from unikd_fast.data.augmentation import SECOND_VIEWS, Augmentation, ViewParameters
from unikd_fast.data.bad_images import BadImage, BadImages, BadImageTally
from unikd_fast.data.decode import DecodedBatch, Decoder, DecodeRequest, OnBad
from unikd_fast.data.decoding_workers import cause_of_death, dead_worker, outlive_stop_signals, started
from unikd_fast.data.pixels import Normalise
from unikd_fast.data.schedule import Schedule
from unikd_fast.data.splits import DataSplits, Split, StoredImages
from unikd_fast.data.strong import strong_pixels
from unikd_fast.errors import DataError
from unikd_fast.values import Batch

_logger = logging.getLogger("unikd_fast")


class FolderLoader:
    """Serve image files through worker processes; made by `build_loader`, which documents the methods.

    The training workers live as long as the loader and serve one iterator at a time: a new `train` takes them over.
    Each evaluation has workers of its own and may run in the middle of an epoch.

    Args:
        splits: the data set, all files.
        augmentation: the views to train on and the resize for evaluation.
        schedule: what this rank takes.
        device: where the batches go.
        workers: decoding processes; 0 decodes in this one.
        channels_last: layout of the images.
        second: the views of each batch's second images; None: it has none.
        bad_images, max_bad_share: what to do about files that cannot be decoded; see `build_loader`.

    Raises:
        ValueError: a split is not of files, or workers is negative.

    Example:
        >>> loader = build_loader(splits, augmentation=Augmentation(), seed=0, global_batch_size=64, device="cuda")
    """

    def __init__(
        self,
        splits: DataSplits,
        augmentation: Augmentation,
        schedule: Schedule,
        *,
        device: torch.device,
        workers: int = 2,
        channels_last: bool = False,
        second: Schedule | None = None,
        bad_images: BadImages = "error",
        max_bad_share: float = 0.001,
    ) -> None:
        if workers < 0:
            raise ValueError(f"FolderLoader: workers must be at least 0, got {workers}")
        self._train_files = _files(splits.train)
        self._held_out = {"val": _files(splits.val), "test": _files(splits.test)}
        self._augmentation = augmentation
        self._schedule = schedule
        self._second = second
        self._device = device
        self._workers = workers
        self._normalise = Normalise(splits.mean, splits.std, device=device, channels_last=channels_last)
        self._decoder = Decoder(splits.image_size, augmentation.short_side(splits.image_size))
        self._skip_bad = bad_images == "skip"
        self._max_bad_share = max_bad_share
        self._logged: set[str] = set()
        self._tally = self._new_tally("training", 0)
        self._requests = _Requests()
        self._train_workers = self._data_loader(self._requests, persistent=workers > 0)
        self._latest_train = 0

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
        # Versions of libjpeg differ in how they round; the other formats have one decoding.
        turbo = features.version("libjpeg_turbo")
        library = f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {features.version('jpg')}"
        major = PIL.__version__.partition(".")[0]
        resize = f"pillow {major}, bilinear, antialiased"
        return {"decoder": f"pillow, {library}", "resize": resize, **strong_pixels(self._augmentation)}

    @property
    def bad_samples(self) -> tuple[BadImage, ...]:
        """Samples of the latest `train` that others stand in for; see `Loader.bad_samples`."""
        return self._tally.images

    def train(
        self, epoch: int, start_step: int = 0, *, stream: int = 0, view_epoch: int | None = None
    ) -> Iterator[Batch]:
        """Yield this rank's micro-batches of an epoch, decoded ahead; see `Loader.train`.

        Raises:
            LoaderError: a worker died.
            RuntimeError: the iterator is used after a newer `train` took over the workers.
        """
        micro_batches = self._schedule.training(epoch, start_step, stream, view_epoch=view_epoch)
        shown, others, other_stream = epoch if view_epoch is None else view_epoch, self._second, stream + SECOND_VIEWS
        on_bad: OnBad = "replace" if self._skip_bad else "raise"
        self._requests.pending = (
            self._request(rows, views, None if others is None else others.views(rows, shown, other_stream), on_bad)
            for rows, views in micro_batches
        )
        self._latest_train += 1
        self._tally = self._new_tally("training", self._schedule.samples_per_epoch)
        return self._train_batches(started(self._train_workers), self._latest_train)

    def views(self, requests: Iterable[tuple[NDArray[np.int64], int]]) -> Iterator[Batch]:
        """Yield a batch of views for each request, decoded ahead by workers of its own; see `Loader.views`.

        Nothing can stand in for a sample that was asked for, so a bad file is an error in any case.

        Raises:
            LoaderError: a worker died.
        """
        queue = _Requests()
        queue.pending = (self._request(rows, self._schedule.views(rows, epoch)) for rows, epoch in requests)
        return self._batches(started(self._data_loader(queue, persistent=False)), self._new_tally("views", 0))

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

    def evaluate(self, split: Literal["val", "test"]) -> Iterator[Batch]:
        """Yield this rank's share of a split, without bad files if those are skipped; see `Loader.evaluate`.

        Raises:
            LoaderError: a worker died.
        """
        files = self._held_out[split]
        sample_ids = files.sample_ids
        on_bad: OnBad = "leave_out" if self._skip_bad else "raise"
        requests = [
            DecodeRequest(
                files.images(range(part.start, part.stop)), files.labels[part], sample_ids[part], None, on_bad=on_bad
            )
            for part in self._schedule.evaluation(len(files))
        ]
        tally = self._new_tally(split, len(files))
        if requests:
            yield from self._batches(started(self._data_loader(requests, persistent=False)), tally)
        if tally.images:
            _logger.warning("%s: evaluated without %d of %d samples", split, len(tally.images), len(files))

    def _train_batches(self, decoded: Iterator[DecodedBatch], ticket: int) -> Iterator[Batch]:
        batches = self._batches(decoded, self._tally)
        while True:
            if ticket != self._latest_train:
                raise RuntimeError(
                    "FolderLoader.train: this iterator ended when a newer call of train took over the workers; "
                    "build a second loader to train from two iterators at once"
                )
            batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _batches(self, decoded: Iterator[DecodedBatch], tally: BadImageTally) -> Iterator[Batch]:
        try:
            for images, labels, sample_ids, second, bad in decoded:
                tally.add(bad)
                if not len(images):
                    continue
                on_device = (part.to(self._device, non_blocking=True) for part in (images, labels, sample_ids))
                pixels, labels, sample_ids = on_device
                other = None if second is None else self._normalise(second.to(self._device, non_blocking=True))
                yield Batch(self._normalise(pixels), labels, sample_ids, other)
        except DataError as error:
            # torch has put the worker's traceback into the message, whose end is what is wrong with the file. Its frame
            # here holds the error and is held by the traceback; without one the workers end now and not at some garbage
            # collection.
            error.args = (str(error).rpartition("DataError: ")[2].rstrip(),)
            raise error.with_traceback(None)  # noqa: B904
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise dead_worker(error) from error
        except (EOFError, ConnectionError, FileNotFoundError) as error:
            # Files that cannot be read are DataErrors, so this is a batch whose maker is no longer there to hand over
            # its memory.
            cause = cause_of_death(error)
            raise dead_worker(cause) from cause

    def _data_loader(self, requests: Iterable[DecodeRequest], *, persistent: bool) -> DataLoader:
        return DataLoader(
            self._decoder,  # type: ignore[arg-type]
            sampler=requests,
            batch_size=None,
            num_workers=self._workers,
            collate_fn=_as_decoded,
            pin_memory=self._device.type == "cuda",
            persistent_workers=persistent,
            worker_init_fn=outlive_stop_signals,
            # Without a generator a DataLoader draws from the global one, and a resumed run would see other numbers.
            generator=torch.Generator(),
        )


class _Requests:
    """The queue of the training workers: a long-lived DataLoader asks anew for its sampler's items at each epoch."""

    def __init__(self) -> None:
        self.pending: Iterator[DecodeRequest] = iter(())

    def __iter__(self) -> Iterator[DecodeRequest]:
        return self.pending


def _as_decoded(decoded: Any) -> Any:
    return decoded


def _files(split: Split) -> StoredImages:
    if not isinstance(split, StoredImages):
        raise ValueError(f"FolderLoader: the data set must be image files, got {type(split).__name__}; use 'device'")
    return split

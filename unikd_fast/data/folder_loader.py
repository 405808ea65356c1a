"""The loader of image files: worker processes decode, the device normalises."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import features
from torch.utils.data import DataLoader

from unikd_fast.data.bad_images import BadImage, BadImageTally
from unikd_fast.data.decode import DecodedBatch, Decoder, DecodeRequest
from unikd_fast.data.decoding_workers import cause_of_death, dead_worker, outlive_stop_signals, started
from unikd_fast.data.file_requests import FileRequests
from unikd_fast.data.pixels import Normalise
from unikd_fast.data.schedule import Schedule
from unikd_fast.data.splits import DataSplits
from unikd_fast.data.strong import strong_pixels
from unikd_fast.data.view_windows import Windows
from unikd_fast.errors import DataError
from unikd_fast.values import Batch


class FolderLoader:
    """Serve image files through worker processes; made by `build_loader`, which documents the methods.

    The training workers live as long as the loader and serve one iterator at a time: a new `train` takes them over.
    Each evaluation has workers of its own and may run in the middle of an epoch.

    Args:
        splits: the data set.
        files: what to decode of it.
        device: where the batches go.
        workers: decoding processes; 0 decodes in this one.
        channels_last: layout of the images.

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
        if workers < 0:
            raise ValueError(f"FolderLoader: workers must be at least 0, got {workers}")
        self._files = files
        self._device = device
        self._workers = workers
        self._normalise = Normalise(splits.mean, splits.std, device=device, channels_last=channels_last)
        self._decoder = Decoder(Windows.of(splits, files.augmentation), splits.interpolation)
        self._requests = _Requests()
        self._train_workers = self._data_loader(self._requests, persistent=workers > 0)
        self._latest_train = 0

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
        # Versions of libjpeg differ in how they round; the other formats have one decoding.
        turbo = features.version("libjpeg_turbo")
        library = f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {features.version('jpg')}"
        major = PIL.__version__.partition(".")[0]
        resize = f"pillow {major}, {self._decoder.interpolation}, antialiased"
        return {"decoder": f"pillow, {library}", "resize": resize, **strong_pixels(self._files.augmentation)}

    @property
    def bad_samples(self) -> tuple[BadImage, ...]:
        """Samples of the latest `train` that others stand in for; see `Loader.bad_samples`."""
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
        self._requests.pending = requests
        self._latest_train += 1
        return self._train_batches(started(self._train_workers), tally, self._latest_train)

    def views(self, requests: Iterable[tuple[NDArray[np.int64], int]]) -> Iterator[Batch]:
        """Yield a batch of views for each request, decoded ahead by workers of its own; see `Loader.views`.

        Nothing can stand in for a sample that was asked for, so a bad file is an error in any case.

        Raises:
            LoaderError: a worker died.
        """
        queue = _Requests()
        queue.pending, tally = self._files.views(requests)
        return self._batches(started(self._data_loader(queue, persistent=False)), tally)

    def evaluate(self, split: Literal["val", "test"]) -> Iterator[Batch]:
        """Yield this rank's share of a split, without bad files if those are skipped; see `Loader.evaluate`.

        Raises:
            LoaderError: a worker died.
        """
        asked, samples = self._files.evaluation(split)
        requests = list(asked.requests)
        if requests:
            yield from self._batches(started(self._data_loader(requests, persistent=False)), asked.tally)
        asked.say_what_is_missing(split, samples)

    def _train_batches(self, decoded: Iterator[DecodedBatch], tally: BadImageTally, ticket: int) -> Iterator[Batch]:
        batches = self._batches(decoded, tally)
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

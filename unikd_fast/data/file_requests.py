"""What the loaders of image files are to decode, batch by batch, and the bad files met while they do."""

import logging
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unikd_fast.data.augmentation import SECOND_VIEWS, Augmentation, ViewParameters
from unikd_fast.data.bad_images import BadImage, BadImages, BadImageTally
from unikd_fast.data.decode import DecodeRequest, OnBad
from unikd_fast.data.schedule import Schedule
from unikd_fast.data.splits import DataSplits, Split, StoredImages

_logger = logging.getLogger("unikd_fast")


class Requested(NamedTuple):
    """The requests of one pass, in order, and where its bad files are counted."""

    requests: Iterator[DecodeRequest]
    tally: BadImageTally

    def say_what_is_missing(self, split: str, samples: int) -> None:
        """Log how many samples an evaluation went without, if any."""
        if self.tally.images:
            _logger.warning("%s: evaluated without %d of %d samples", split, len(self.tally.images), samples)


class FileRequests:
    """Turn what this rank takes of a data set of files into requests for a decoder, whoever that is.

    Args:
        splits: the data set, all files.
        augmentation: the views to train on and the resize for evaluation.
        schedule: what this rank takes.
        second: the views of each batch's second images; None: it has none.
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
        """Samples of the latest training pass that others stand in for; see `Loader.bad_samples`."""
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
            self._request(rows, views, None if others is None else others.views(rows, shown, other_stream), on_bad)
            for rows, views in micro_batches
        )
        self._trained = self._new_tally("training", self.schedule.samples_per_epoch)
        return Requested(requests, self._trained)

    def views(self, asked: Iterable[tuple[NDArray[np.int64], int]]) -> Requested:
        """Return the requests for these views; see `Loader.views`.

        Nothing can stand in for a sample that was asked for, so a bad file is an error in any case.
        """
        requests = (self._request(rows, self.schedule.views(rows, epoch)) for rows, epoch in asked)
        return Requested(requests, self._new_tally("views", 0))

    def evaluation(self, split: Literal["val", "test"]) -> tuple[Requested, int]:
        """Return the requests for this rank's share of a split, and the samples of all; see `Loader.evaluate`."""
        files = self._held_out[split]
        sample_ids = files.sample_ids
        on_bad: OnBad = "leave_out" if self._skip_bad else "raise"
        requests = (
            DecodeRequest(
                files.images(range(part.start, part.stop)), files.labels[part], sample_ids[part], None, on_bad=on_bad
            )
            for part in self.schedule.evaluation(len(files))
        )
        return Requested(requests, self._new_tally(split, len(files))), len(files)

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


def _files(split: Split) -> StoredImages:
    if not isinstance(split, StoredImages):
        raise ValueError(f"FileRequests: the data set must be image files, got {type(split).__name__}; use 'device'")
    return split

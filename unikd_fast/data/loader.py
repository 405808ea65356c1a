"""What a loader offers to the engine, and which loader a data set gets."""

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from unikd_fast.data.augmentation import Augmentation
from unikd_fast.data.dali import choose_decoding, dali_problem
from unikd_fast.data.device import DeviceLoader
from unikd_fast.data.files import FileRequests, FolderLoader
from unikd_fast.data.images import BadImage
from unikd_fast.data.mixing import MixedLoader
from unikd_fast.data.sampler import Schedule
from unikd_fast.data.settings import DataSettings, LoaderKind
from unikd_fast.data.splits import DatasetImages, DataSplits, TensorImages
from unikd_fast.values import Batch

_logger = logging.getLogger("unikd_fast")


class Loader(Protocol):
    """Micro-batches of one rank, as a function of (epoch, step); it keeps no position and draws no random numbers."""

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of optimiser steps per epoch, the same on every rank; the incomplete last batch is
        dropped."""
        ...

    @property
    def schedule(self) -> Schedule:
        """Return which samples this rank takes, in which order and under which views."""
        ...

    @property
    def pixels(self) -> dict[str, str]:
        """Return what decides a view's pixels besides its numbers: who decodes ("decoder") and who resizes ("resize").

        The names and values are for keys of what is kept on disk; the version of the numbers is `AUGMENTATION_VERSION`.
        """
        ...

    @property
    def bad_samples(self) -> tuple[BadImage, ...]:
        """Return the samples of the latest `train`, as far as it was read, whose files cannot be decoded and were
        skipped."""
        ...

    def train(
        self, epoch: int, start_step: int = 0, *, stream: int = 0, view_epoch: int | None = None
    ) -> Iterator[Batch]:
        """Yield this rank's micro-batches, `accumulation_steps` for each optimiser step from `start_step` on.

        `train(e, s)` gives what `train(e)` gives after s steps, bit for bit. Another stream gives the same samples in
        the same order under other views; `view_epoch` under those of another epoch. `Batch.second` is there if the
        loader was built to show second views.

        Raises:
            ValueError: the epoch has no such step.
        """
        ...

    def views(self, requests: Iterable[tuple[NDArray[np.int64], int]]) -> Iterator[Batch]:
        """Yield one batch for each request: positions (N,) in the training split, and the epoch whose views to show.

        Each view is the one that `train` shows in this epoch, bit for bit, whatever the batches are.
        """
        ...

    def evaluate(self, split: Literal["val", "test"]) -> Iterator[Batch]:
        """Yield this rank's share of a split, in order: over all ranks each sample once, none padded.

        The last batch may be smaller, and a rank may get fewer batches than another or none.
        """
        ...


def build_loader(
    splits: DataSplits,
    data: DataSettings,
    *,
    seed: int,
    global_batch_size: int,
    accumulation_steps: int = 1,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str,
    channels_last: bool = False,
    second_view: bool = False,
) -> Loader:
    """Return a loader for a data set.

    Its batches hold fp32 images normalised on the device, int64 labels, and the sample ids: positions in the published
    split, also when the run trains on part of it.

    Args:
        splits: data set.
        data: settings of how it is read, augmented and mixed.
        seed: seed of order, views and mixing, in [0, 2^64).
        global_batch_size: number of samples per optimiser step, over all ranks and micro-steps.
        accumulation_steps: number of micro-batches per optimiser step.
        rank, world_size: number of this process, and of all.
        device: device of the batches.
        channels_last: whether images have that memory layout.
        second_view: whether to make another view of each training sample, in `Batch.second`, with numbers of its own,
            for methods that compare a weak and a strong view.

    Raises:
        ValueError: a setting does not fit the data or does not work here, the batch does not divide evenly or is larger
            than the train split.

    Example:
        >>> data = DataSettings(name="digits", image_size=32)
        >>> loader = build_loader(open_data(data), data, seed=0, global_batch_size=64, device="cpu")
        >>> next(loader.train(epoch=0)).images.shape
        torch.Size([64, 3, 32, 32])
    """
    inner = _build_unmixed(
        splits,
        data,
        partial(
            Schedule,
            splits.train.sample_ids,
            seed=seed,
            global_batch_size=global_batch_size,
            accumulation_steps=accumulation_steps,
            rank=rank,
            world_size=world_size,
        ),
        device=torch.device(device),
        channels_last=channels_last,
        second_view=second_view,
    )
    if not data.mixing.is_on:
        return inner
    return MixedLoader(
        inner,
        data.mixing,
        None if splits.unlabelled == len(splits.train) else splits.num_classes,
        seed=seed,
        accumulation_steps=accumulation_steps,
        rank=rank,
        world_size=world_size,
    )


def _build_unmixed(
    splits: DataSplits,
    data: DataSettings,
    follow: Callable[[Augmentation], Schedule],
    *,
    device: torch.device,
    channels_last: bool,
    second_view: bool,
) -> Loader:
    augmentation = data.first_augmentation
    kind = fitting_kind(data.loader, _fitting(splits), type(splits.train).__name__)
    schedule, other = follow(augmentation), follow(data.second_augmentation) if second_view else None
    if kind == "device":
        return DeviceLoader(splits, augmentation, schedule, device=device, channels_last=channels_last, second=other)
    files = FileRequests(
        splits,
        augmentation,
        schedule,
        second=other,
        bad_images=data.bad_images,
        max_bad_share=data.max_bad_share,
    )
    if kind == "dali":
        from unikd_fast.data.dali import DaliLoader  # an optional dependency

        return DaliLoader(
            splits,
            files,
            device=device,
            decoding=choose_decoding(device),
            threads=data.dali_threads,
            channels_last=channels_last,
        )
    return FolderLoader(splits, files, device=device, workers=data.workers, channels_last=channels_last)


def _fitting(splits: DataSplits) -> tuple[LoaderKind, ...]:
    if isinstance(splits.train, TensorImages):
        return ("device",)
    return ("torchvision",) if isinstance(splits.train, DatasetImages) else ("dali", "torchvision")


def fitting_kind(kind: LoaderKind, fitting: tuple[LoaderKind, ...], images: str) -> LoaderKind:
    """Return the kind of loader to use, "auto" resolved.

    Args:
        kind: kind that is set.
        fitting: kinds that load the images.
        images: what messages call them.

    Raises:
        ValueError: the kind is not among these, or is "dali", which does not work here.
    """
    if kind not in ("auto", *fitting):
        raise ValueError(
            f"build_loader: kind {kind!r} does not load {images}; use {', '.join(map(repr, fitting))} or 'auto'"
        )
    if kind == "torchvision" or len(fitting) == 1:
        return fitting[-1]
    problem = dali_problem()
    if kind == "dali" and problem is not None:
        raise ValueError(
            f"build_loader: kind 'dali' does not work on this machine: {problem}; install nvidia-dali (extra dali12 or "
            "dali13, by the version of CUDA), or use 'torchvision'"
        )
    if kind == "auto":
        by_pil = f"PIL in worker processes (torchvision), because DALI does not work: {problem}"
        _log_once(f"image files are decoded by {'DALI' if problem is None else by_pil}")
    return "dali" if problem is None else "torchvision"


@cache
def _log_once(message: str) -> None:
    _logger.info("data.loader: %s", message)

"""What a loader offers to the engine, and which loader a data set gets."""

from collections.abc import Iterable, Iterator
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from unikd_fast.data.augmentation import Augmentation
from unikd_fast.data.device_loader import DeviceLoader
from unikd_fast.data.folder_loader import FolderLoader
from unikd_fast.data.schedule import Schedule
from unikd_fast.data.splits import DataSplits, TensorImages
from unikd_fast.values import Batch

LoaderKind = Literal["auto", "device", "torchvision"]


class Loader(Protocol):
    """Micro-batches of one rank, as a function of (epoch, step); it keeps no position and draws no random numbers."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps per epoch, the same on every rank; the incomplete last batch is dropped."""
        ...

    @property
    def schedule(self) -> Schedule:
        """Which samples this rank takes, in which order and under which views."""
        ...

    @property
    def pixels(self) -> dict[str, str]:
        """What decides a view's pixels besides its numbers: who decodes ("decoder") and who resizes ("resize").

        The names and values are for keys of what is kept on disk; the version of the numbers is `AUGMENTATION_VERSION`.
        """
        ...

    def train(
        self, epoch: int, start_step: int = 0, *, stream: int = 0, view_epoch: int | None = None
    ) -> Iterator[Batch]:
        """Yield this rank's micro-batches, `accumulation_steps` for each optimiser step from `start_step` on.

        `train(e, s)` gives what `train(e)` gives after s steps, bit for bit. Another stream gives the same samples in
        the same order under other views; `view_epoch` under those of another epoch.

        Raises:
            ValueError: the epoch has no such step.
        """
        ...

    def views(self, requests: Iterable[tuple[NDArray[np.int64], int]]) -> Iterator[Batch]:
        """Yield one batch for each request: positions (N,) in the training split, and the epoch whose views to show.

        A view is that which `train` shows in this epoch, bit for bit, whatever the batches.
        """
        ...

    def evaluate(self, split: Literal["val", "test"]) -> Iterator[Batch]:
        """Yield this rank's share of a split, in order: over all ranks each sample once, none padded.

        The last batch may be smaller, and a rank may get fewer batches than another or none.
        """
        ...


def build_loader(
    splits: DataSplits,
    *,
    augmentation: Augmentation,
    kind: LoaderKind = "auto",
    seed: int,
    global_batch_size: int,
    accumulation_steps: int = 1,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str,
    workers: int = 2,
    channels_last: bool = False,
) -> Loader:
    """Return a loader for a data set.

    Its batches hold fp32 images normalised on the device, int64 labels, and the sample ids: positions in the published
    split, also when the run trains on part of it.

    Args:
        splits: the data set.
        augmentation: the views to train on.
        kind: "device" for data in memory, "torchvision" for image files, "auto" for the one that fits.
        seed: in [0, 2^64), of order and views.
        global_batch_size: samples per optimiser step, over all ranks and micro-steps.
        accumulation_steps: micro-batches per optimiser step.
        rank, world_size: this process among all.
        device: where the batches go.
        workers: decoding processes for image files; 0 decodes in this one.
        channels_last: layout of the images.

    Raises:
        ValueError: the kind does not fit the data, the batch does not divide evenly or is larger than the train split.

    Example:
        >>> splits = open_data("digits", root=None, image_size=32)
        >>> loader = build_loader(splits, augmentation=Augmentation(), seed=0, global_batch_size=64, device="cpu")
        >>> next(loader.train(epoch=0)).images.shape
        torch.Size([64, 3, 32, 32])
    """
    if kind not in get_args(LoaderKind):
        raise ValueError(f"build_loader: kind must be one of {get_args(LoaderKind)}, got {kind!r}")
    fitting = "device" if isinstance(splits.train, TensorImages) else "torchvision"
    if kind not in ("auto", fitting):
        raise ValueError(
            f"build_loader: kind {kind!r} does not load {type(splits.train).__name__}; use {fitting!r} or 'auto'"
        )
    schedule = Schedule(
        splits.train.sample_ids,
        augmentation,
        seed=seed,
        global_batch_size=global_batch_size,
        accumulation_steps=accumulation_steps,
        rank=rank,
        world_size=world_size,
    )
    where = torch.device(device)
    if fitting == "device":
        return DeviceLoader(splits, augmentation, schedule, device=where, channels_last=channels_last)
    return FolderLoader(splits, augmentation, schedule, device=where, workers=workers, channels_last=channels_last)

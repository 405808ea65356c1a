"""The order of an epoch and the part of one rank in it, as pure functions of (seed, epoch, position).

There is nothing to save but those three numbers: any rank can compute any batch of any epoch.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from unikd_fast.data.augmentation import Augmentation, ViewParameters, view_parameters
from unikd_fast.data.philox import FIRST_RESERVED_STREAM, check_below, sort_keys

_ORDER_STREAM = FIRST_RESERVED_STREAM
_BATCH_STREAM = FIRST_RESERVED_STREAM + 4


class EpochSampler:
    """Shuffle a data set of `num_samples` anew each epoch and deal it out in global batches.

    Samples that do not fill a last batch are left out of the epoch; another epoch leaves out others.

    Args:
        num_samples: number of samples in the split.
        global_batch_size: number of samples per optimiser step, over all ranks and micro-steps.
        seed: seed in [0, 2^64).
        groups: (N,) group of each sample, such as its image's shape: global batches are then of one group, except for
            one at each border between groups, and come in random order. If None, samples are not grouped.

    Raises:
        ValueError: the split does not fill one global batch, or the seed is out of range.

    Example:
        >>> sampler = EpochSampler(50_000, 64, seed=0)
        >>> sampler.steps_per_epoch
        781
    """

    def __init__(self, num_samples: int, global_batch_size: int, *, seed: int, groups: NDArray | None = None) -> None:
        if global_batch_size < 1:
            raise ValueError(
                f"EpochSampler: global_batch_size must be at least 1, got {global_batch_size}; raise "
                "train.global_batch_size"
            )
        if num_samples < global_batch_size:
            raise ValueError(
                f"EpochSampler: {num_samples} samples do not fill one global batch of {global_batch_size}; "
                f"lower train.global_batch_size to {num_samples} or less, or use more samples"
            )
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.seed = check_below("seed", seed, 2**64)
        self._groups = groups
        self._cached: tuple[int, NDArray[np.int64]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of optimiser steps per epoch; the incomplete last batch is dropped."""
        return self.num_samples // self.global_batch_size

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """Return the order of an epoch, (num_samples,); a stable sort of random 64-bit keys, so ties go by position."""
        if self._cached is None or self._cached[0] != epoch:
            keys = sort_keys(self.seed, epoch, np.arange(self.num_samples), stream=_ORDER_STREAM)
            order = keys.argsort(kind="stable")
            if self._groups is not None:
                order = self._grouped(order, self._groups, epoch)
            order.flags.writeable = False
            self._cached = (epoch, order)
        return self._cached[1]

    def _grouped(self, order: NDArray[np.int64], groups: NDArray, epoch: int) -> NDArray[np.int64]:
        """Return an order in which the samples of each group follow each other, cut into batches and these shuffled.

        The samples of the epoch stay those of `order`: which ones are left out does not depend on their group.
        """
        used = self.steps_per_epoch * self.global_batch_size
        by_group = order[:used][groups[order[:used]].argsort(kind="stable")]
        keys = sort_keys(self.seed, epoch, np.arange(self.steps_per_epoch), stream=_BATCH_STREAM)
        batches = by_group.reshape(self.steps_per_epoch, -1)[keys.argsort(kind="stable")]
        return np.concatenate((batches.ravel(), order[used:]))

    def global_batch(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Return the (global_batch_size,) positions of one optimiser step.

        Raises:
            ValueError: the epoch has no such step.

        Example:
            >>> len(EpochSampler(100, 32, seed=0).global_batch(epoch=3, step=2))
            32
        """
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"EpochSampler.global_batch: step must be in [0, {self.steps_per_epoch}), got {step}")
        start = step * self.global_batch_size
        return self.permutation(epoch)[start : start + self.global_batch_size]

    def local_batch(
        self, epoch: int, step: int, rank: int, world_size: int, micro_step: int = 0, accumulation_steps: int = 1
    ) -> NDArray[np.int64]:
        """Return the positions one rank takes in one micro-step: slice `micro_step * world_size + rank` of the batch.

        All world sizes and accumulations thus see the same samples in one optimiser step, and those with one product
        see the same micro-batches, so BatchNorm does too.

        Raises:
            ValueError: the batch does not divide evenly, or rank or micro-step is out of range.

        Example:
            >>> len(EpochSampler(100, 32, seed=0).local_batch(0, 0, rank=1, world_size=2, accumulation_steps=4))
            4
        """
        size = micro_batch_size(self.global_batch_size, world_size, accumulation_steps)
        if not 0 <= rank < world_size:
            raise ValueError(f"EpochSampler.local_batch: rank must be in [0, {world_size}), got {rank}")
        if not 0 <= micro_step < accumulation_steps:
            raise ValueError(
                f"EpochSampler.local_batch: micro_step must be in [0, {accumulation_steps}), got {micro_step}"
            )
        start = (micro_step * world_size + rank) * size
        return self.global_batch(epoch, step)[start : start + size]


def micro_batch_size(global_batch_size: int, world_size: int, accumulation_steps: int) -> int:
    """Return the samples one rank takes in one micro-step.

    Raises:
        ValueError: the global batch does not divide evenly; the message holds the nearest sizes that do.

    Example:
        >>> micro_batch_size(512, world_size=8, accumulation_steps=2)
        32
    """
    if world_size < 1 or accumulation_steps < 1:
        raise ValueError(
            "micro_batch_size: world_size and accumulation_steps must be at least 1, "
            f"got {world_size} and {accumulation_steps}; raise train.accumulation_steps or start more processes"
        )
    slices = world_size * accumulation_steps
    if global_batch_size % slices:
        below = global_batch_size // slices * slices
        nearest = f"{below} or {below + slices}" if below else str(slices)
        raise ValueError(
            f"micro_batch_size: a global batch of {global_batch_size} does not divide into world_size {world_size} x "
            f"accumulation_steps {accumulation_steps} = {slices} equal micro-batches; set it to {nearest} "
            "(train.global_batch_size)"
        )
    return global_batch_size // slices


class Schedule:
    """The part of one rank in training and evaluation.

    Args:
        sample_ids: (N,) ids of the training samples in their original data set; views are keyed on them.
        augmentation: augmentation of the training views.
        seed: seed of order and views, in [0, 2^64).
        global_batch_size: number of samples per optimiser step, over all ranks and micro-steps.
        accumulation_steps: number of micro-batches per optimiser step.
        rank, world_size: number of this process, and of all.
        groups: (N,) group of each sample; see `EpochSampler`.

    Raises:
        ValueError: the batch does not divide evenly, the split does not fill it, or the rank is out of range.

    Example:
        >>> schedule = Schedule(np.arange(100), Augmentation(), seed=0, global_batch_size=32)
        >>> [len(positions) for positions, _ in schedule.training(epoch=0)]
        [32, 32, 32]
    """

    def __init__(
        self,
        sample_ids: NDArray[np.int64],
        augmentation: Augmentation,
        *,
        seed: int,
        global_batch_size: int,
        accumulation_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        groups: NDArray | None = None,
    ) -> None:
        self.micro_batch_size = micro_batch_size(global_batch_size, world_size, accumulation_steps)
        self._sampler = EpochSampler(len(sample_ids), global_batch_size, seed=seed, groups=groups)
        if not 0 <= rank < world_size:
            raise ValueError(f"Schedule: rank must be in [0, {world_size}), got {rank}")
        self._sample_ids = sample_ids
        self._augmentation = augmentation
        self._accumulation_steps = accumulation_steps
        self._rank = rank
        self._world_size = world_size

    @property
    def augmentation(self) -> Augmentation:
        """Return how the training views are made."""
        return self._augmentation

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of optimiser steps per epoch, the same on every rank."""
        return self._sampler.steps_per_epoch

    @property
    def samples_per_epoch(self) -> int:
        """Return the number of samples in an epoch's optimiser steps, over all ranks."""
        return self._sampler.steps_per_epoch * self._sampler.global_batch_size

    def training(
        self, epoch: int, start_step: int = 0, stream: int = 0, *, view_epoch: int | None = None
    ) -> Iterator[tuple[NDArray[np.int64], ViewParameters]]:
        """Yield the positions and views of each micro-batch of an epoch from optimiser step `start_step` on.

        The order is that of `epoch`, the views are those of `view_epoch` if that is given.

        Raises:
            ValueError: the epoch has no such step.

        Example:
            >>> schedule = Schedule(np.arange(100), Augmentation(), seed=0, global_batch_size=32)
            >>> len(list(schedule.training(epoch=0, start_step=2)))
            1
        """
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"Schedule.training: start_step must be in [0, {self.steps_per_epoch}], got {start_step}")
        shown = epoch if view_epoch is None else view_epoch
        return ((positions, self.views(positions, shown, stream)) for positions in self.order(epoch, start_step))

    def views(self, positions: NDArray[np.int64], epoch: int, stream: int = 0) -> ViewParameters:
        """Return the views in an epoch of the training samples at these positions (N,), whichever rank takes them."""
        return view_parameters(
            self._augmentation,
            seed=self._sampler.seed,
            epoch=epoch,
            sample_ids=self._sample_ids[positions],
            stream=stream,
        )

    def seeds(self, positions: NDArray[np.int64], epoch: int, stream: int = 0) -> NDArray[np.uint64]:
        """Return a seed for the view in an epoch of each of the samples at these positions (N,)."""
        return sort_keys(self._sampler.seed, epoch, self._sample_ids[positions], stream=stream)

    def order(self, epoch: int, start_step: int = 0) -> Iterator[NDArray[np.int64]]:
        """Yield the positions (N,) of each micro-batch of an epoch from optimiser step `start_step` on."""
        for step in range(start_step, self.steps_per_epoch):
            for micro_step in range(self._accumulation_steps):
                yield self._sampler.local_batch(
                    epoch, step, self._rank, self._world_size, micro_step, self._accumulation_steps
                )

    def evaluation(self, num_samples: int) -> Iterator[slice]:
        """Yield this rank's stretches of a split, in order: together the ranks take each sample once, without padding.

        Ranks may get different numbers of batches, and none at all, so nothing collective belongs inside the loop.

        Example:
            >>> list(Schedule(np.arange(9), Augmentation(), seed=0, global_batch_size=4).evaluation(6))
            [slice(0, 4, None), slice(4, 6, None)]
        """
        start, end = (num_samples * rank // self._world_size for rank in (self._rank, self._rank + 1))
        for begin in range(start, end, self.micro_batch_size):
            yield slice(begin, min(begin + self.micro_batch_size, end))

"""Which samples one rank takes, in which order and under which views. No pixels here: every loader follows this."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from unikd_fast.data.augmentation import Augmentation, ViewParameters, view_parameters
from unikd_fast.data.sampler import EpochSampler, micro_batch_size


class Schedule:
    """The part of one rank in training and evaluation.

    Args:
        sample_ids: (N,) ids of the training samples in their original data set; views are keyed on them.
        augmentation: the views to train on.
        seed: in [0, 2^64), of order and views.
        global_batch_size: samples per optimiser step, over all ranks and micro-steps.
        accumulation_steps: micro-batches per optimiser step.
        rank, world_size: this process among all.

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
    ) -> None:
        self.micro_batch_size = micro_batch_size(global_batch_size, world_size, accumulation_steps)
        self._sampler = EpochSampler(len(sample_ids), global_batch_size, seed=seed)
        if not 0 <= rank < world_size:
            raise ValueError(f"Schedule: rank must be in [0, {world_size}), got {rank}")
        self._sample_ids = sample_ids
        self._augmentation = augmentation
        self._accumulation_steps = accumulation_steps
        self._rank = rank
        self._world_size = world_size

    @property
    def augmentation(self) -> Augmentation:
        """The views."""
        return self._augmentation

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps per epoch, the same on every rank."""
        return self._sampler.steps_per_epoch

    @property
    def samples_per_epoch(self) -> int:
        """Samples of an epoch's optimiser steps, over all ranks."""
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
        """Give the views of an epoch of the training samples at these positions, (N,), whoever takes them in it."""
        return view_parameters(
            self._augmentation,
            seed=self._sampler.seed,
            epoch=epoch,
            sample_ids=self._sample_ids[positions],
            stream=stream,
        )

    def order(self, epoch: int, start_step: int = 0) -> Iterator[NDArray[np.int64]]:
        """Yield the positions (N,) of each micro-batch of an epoch from optimiser step `start_step` on."""
        for step in range(start_step, self.steps_per_epoch):
            for micro_step in range(self._accumulation_steps):
                yield self._sampler.local_batch(
                    epoch, step, self._rank, self._world_size, micro_step, self._accumulation_steps
                )

    def evaluation(self, num_samples: int) -> Iterator[slice]:
        """Yield this rank's stretches of a split, in order: together the ranks take each sample once, none is padded.

        Ranks may get different numbers of batches, and none at all, so nothing collective belongs inside the loop.

        Example:
            >>> list(Schedule(np.arange(9), Augmentation(), seed=0, global_batch_size=4).evaluation(6))
            [slice(0, 4, None), slice(4, 6, None)]
        """
        start, end = (num_samples * rank // self._world_size for rank in (self._rank, self._rank + 1))
        for begin in range(start, end, self.micro_batch_size):
            yield slice(begin, min(begin + self.micro_batch_size, end))

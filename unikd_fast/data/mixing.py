"""Mixup and CutMix: each training sample of a micro-batch mixed with another one of it, and its label likewise."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from unikd_fast.data.device import to_device
from unikd_fast.data.images import BadImage
from unikd_fast.data.philox import FIRST_RESERVED_STREAM, check_below, uniforms
from unikd_fast.data.sampler import Schedule
from unikd_fast.settings import Fraction, NonNegative, settings
from unikd_fast.values import Batch

if TYPE_CHECKING:
    from unikd_fast.data.loader import Loader

_MIXING_STREAM = FIRST_RESERVED_STREAM + 0x10

# Columns of the uniforms of a micro-batch; behind them one sort key a sample.
_APPLY, _SWITCH, _SHARE, _ROW, _COLUMN, _KEYS = range(6)


@settings
class Mixing:
    """Training samples mixed in pairs within a micro-batch, and their labels likewise. The teacher sees them mixed too;
    evaluation never does.

    One draw holds for a micro-batch: whether to mix, by which kind, the share λ of each sample in its own image, and,
    by a permutation, which samples are mixed. So a mixed image depends on the composition of its micro-batch: another
    batch size, or another product of world size and accumulation steps, gives other pairs. It belongs to two samples,
    so nothing that is stored per sample, such as a teacher's outputs, fits it.

    Raises:
        ValueError: a field is outside its range.

    Example:
        >>> Mixing(mixup_alpha=0.2, cutmix_alpha=1.0).is_on
        True
    """

    mixup_alpha: NonNegative = 0.0
    """Mixup, x = λ x_i + (1 - λ) x_j, with shares λ drawn from Beta(alpha, alpha). 0 turns it off."""
    cutmix_alpha: NonNegative = 0.0
    """CutMix: a rectangle of about 1 - λ of the area is replaced, with shares λ drawn from Beta(alpha, alpha). 0 turns
    it off."""
    probability: Fraction = 1.0
    """Probability that a micro-batch is mixed."""
    switch_probability: Fraction = 0.5
    """Probability that a mixed micro-batch is mixed by CutMix, if both are on."""

    def __post_init__(self) -> None:
        for name in ("mixup_alpha", "cutmix_alpha"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"Mixing: {name} must be a number of at least 0, got {getattr(self, name)}")
        for name in ("probability", "switch_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Mixing: {name} must be in [0, 1], got {getattr(self, name)}")

    @property
    def is_on(self) -> bool:
        """Whether any micro-batch may be mixed."""
        return self.probability > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)


@dataclass(frozen=True)
class Mix:
    """What is done to one micro-batch of N samples; made by `draw_mix`."""

    partners: NDArray[np.int64]  # (N,) position of the other sample
    share: float  # λ, of a sample in its own image and label
    box: tuple[int, int, int, int] | None  # (top, left, height, width) taken from the other sample; None: mixup


def draw_mix(
    mixing: Mixing,
    count: int,
    height: int,
    width: int,
    *,
    seed: int,
    epoch: int,
    step: int,
    place: int = 0,
    stream: int = 0,
) -> Mix:
    """Draw what is done to a micro-batch; it depends on the arguments and on nothing else.

    Args:
        mixing: settings of what to draw.
        count: number of samples N in the micro-batch.
        height, width: size of the images in pixels.
        seed: seed in [0, 2^64).
        epoch: epoch in [0, 2^32).
        step: optimiser step within the epoch.
        place: position of the micro-batch among all of this step, over ranks and micro-steps.
        stream: stream of its views.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> draw_mix(Mixing(cutmix_alpha=1.0), 64, 224, 224, seed=0, epoch=3, step=7).partners.shape
        (64,)
    """
    parts = check_below("stream", stream, 2**16), check_below("step", step, 2**31), check_below("place", place, 2**16)
    address = parts[0] << 47 | parts[1] << 16 | parts[2]
    draws = uniforms(seed, epoch, [address], _KEYS + count, stream=_MIXING_STREAM)[0]
    if not mixing.is_on or draws[_APPLY] >= mixing.probability:
        return Mix(np.arange(count), 1.0, None)
    partners = draws[_KEYS:].argsort(kind="stable")
    cut = mixing.cutmix_alpha > 0 and (not mixing.mixup_alpha or draws[_SWITCH] < mixing.switch_probability)
    alpha = mixing.cutmix_alpha if cut else mixing.mixup_alpha
    from scipy.special import betaincinv  # type: ignore[import-untyped]

    share = float(betaincinv(alpha, alpha, draws[_SHARE]))
    if not cut:
        return Mix(partners, share, None)
    # As published: a centre anywhere, sides in proportion to the image's, cut off at its border; λ follows the pixels.
    half = 0.5 * (1 - share) ** 0.5
    half_height, half_width = int(half * height), int(half * width)
    row, column = int(draws[_ROW] * height), int(draws[_COLUMN] * width)
    top, left = max(0, row - half_height), max(0, column - half_width)
    bottom, right = min(height, row + half_height), min(width, column + half_width)
    box = top, left, bottom - top, right - left
    return Mix(partners, 1 - box[2] * box[3] / (height * width), box)


def apply_mix(batch: Batch, mix: Mix, num_classes: int | None) -> Batch:
    """Mix images and labels; both views of a sample alike, so that one label holds for both.

    Args:
        batch: batch of N samples with integer labels.
        mix: what is done to it.
        num_classes: number of classes K. If None, no sample has a label, and labels stay as they are.

    Returns:
        The batch with labels (N, K) fp32 that sum to 1, one-hot where nothing is mixed.

    Example:
        >>> batch = Batch(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]), torch.arange(2))
        >>> apply_mix(batch, Mix(np.array([1, 0]), 0.75, None), num_classes=2).labels
        tensor([[0.7500, 0.2500],
                [0.2500, 0.7500]])
    """
    labels = batch.labels if num_classes is None else F.one_hot(batch.labels, num_classes).float()
    if mix.share == 1:
        return batch._replace(labels=labels)
    partners = to_device(torch.from_numpy(mix.partners), labels.device)
    return batch._replace(
        images=_mixed(batch.images, partners, mix),
        labels=labels if num_classes is None else labels * mix.share + labels[partners] * (1 - mix.share),
        second=None if batch.second is None else _mixed(batch.second, partners, mix),
    )


def _mixed(images: Tensor, partners: Tensor, mix: Mix) -> Tensor:
    if mix.box is None:
        return images * mix.share + images[partners] * (1 - mix.share)
    top, left, height, width = mix.box
    rows, columns = slice(top, top + height), slice(left, left + width)
    mixed = images.clone()
    mixed[..., rows, columns] = images[..., rows, columns][partners]
    return mixed


class MixedLoader:
    """A loader whose training batches are mixed; its views for caches and its evaluation are those of the other loader.

    Each mix depends on (seed, epoch, step, place of the micro-batch in the step, stream) and on nothing else.

    Args:
        loader: loader of the batches to mix.
        mixing: settings of what to draw.
        num_classes: number of classes K of the labels, (N, K) fp32. If None, no sample has a label.
        seed, accumulation_steps, rank, world_size: arguments that the loader was built with.

    Raises:
        ValueError: micro-batches of one sample have no pairs.

    Example:
        >>> loader = build_loader(splits, augmentation=Augmentation(), seed=0, global_batch_size=64, device="cpu")
        >>> mixed = MixedLoader(loader, Mixing(mixup_alpha=0.2), splits.num_classes, seed=0)
    """

    def __init__(
        self,
        loader: "Loader",
        mixing: Mixing,
        num_classes: int | None,
        *,
        seed: int,
        accumulation_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if loader.schedule.micro_batch_size < 2:
            raise ValueError(
                "MixedLoader: samples are mixed within a micro-batch, and this one has 1; enlarge the global batch, "
                "lower accumulation_steps or turn mixing off"
            )
        self._loader, self._mixing, self._num_classes, self._seed = loader, mixing, num_classes, seed
        self._accumulation_steps, self._rank, self._world_size = accumulation_steps, rank, world_size

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of optimiser steps per epoch, the same on every rank."""
        return self._loader.steps_per_epoch

    @property
    def schedule(self) -> Schedule:
        """Return the part of this rank; see `Loader.schedule`."""
        return self._loader.schedule

    @property
    def pixels(self) -> dict[str, str]:
        """Return what decides a view's pixels before it is mixed; see `Loader.pixels`."""
        return self._loader.pixels

    @property
    def bad_samples(self) -> tuple[BadImage, ...]:
        """Return the samples that were skipped; see `Loader.bad_samples`."""
        return self._loader.bad_samples

    def train(
        self, epoch: int, start_step: int = 0, *, stream: int = 0, view_epoch: int | None = None
    ) -> Iterator[Batch]:
        """Yield this rank's micro-batches of an epoch, mixed; see `Loader.train`."""
        batches = self._loader.train(epoch, start_step, stream=stream, view_epoch=view_epoch)
        return (self._mix(batch, index, epoch, start_step, stream) for index, batch in enumerate(batches))

    def views(self, requests: Iterable[tuple[NDArray[np.int64], int]]) -> Iterator[Batch]:
        """Yield a batch of views for each request, as they are before they are mixed; see `Loader.views`."""
        return self._loader.views(requests)

    def evaluate(self, split: Literal["val", "test"]) -> Iterator[Batch]:
        """Yield this rank's share of a split, never mixed; see `Loader.evaluate`."""
        return self._loader.evaluate(split)

    def _mix(self, batch: Batch, index: int, epoch: int, start_step: int, stream: int) -> Batch:
        step, micro_step = divmod(index, self._accumulation_steps)
        height, width = batch.images.shape[-2:]
        mix = draw_mix(
            self._mixing,
            len(batch.labels),
            height,
            width,
            seed=self._seed,
            epoch=epoch,
            step=start_step + step,
            # The sampler's numbering of the slices of a step: every division into these slices mixes them alike.
            place=micro_step * self._world_size + self._rank,
            stream=stream,
        )
        return apply_mix(batch, mix, self._num_classes)

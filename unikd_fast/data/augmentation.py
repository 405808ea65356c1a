"""What an augmentation may do, and the numbers that say what it does to each sample of an epoch.

The numbers come from a counter-based generator and the loaders take them as inputs, so a sample has one view per
(seed, epoch, stream), whatever the batch size, the worker count, the world size or the loader.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal, get_args

import numpy as np
from annotated_types import Ge, Le
from numpy.typing import ArrayLike, NDArray

from unikd_fast.data.philox import FIRST_RESERVED_STREAM, check_below, checked_ids, uniforms
from unikd_fast.settings import Fraction, NonNegative, Positive, PositiveInt, settings

Crop = Literal["none", "pad", "resized"]
Policy = Literal["none", "trivial", "rand"]

ATTEMPTS = 10
"""Draws of a resized crop before the central one is taken, and of an erased rectangle before there is none, as in
torchvision."""

MAGNITUDES = 31
"""Steps between an operation's weakest and strongest form, both included, as in torchvision."""

MAX_OPERATIONS = 16

SECOND_VIEWS = 0x100
"""What the stream of a second view is above that of the first."""

AUGMENTATION_VERSION = 1
"""Raised whenever the same seed, epoch, stream and id come to mean another view, for its numbers (`philox`) or for what
is made of them; what is kept of earlier views, such as a teacher's outputs, is then no longer taken for theirs."""

# Columns of the uniforms of a sample. New kinds of augmentation take columns behind these or a stream of their own, so
# that the views of today stay what they are. A view draws no more than it needs; the operations of a policy take three
# columns each and come last, in the room of MAX_OPERATIONS of them.
_FLIP, _PAD, _RESIZED, _STRONG = 0, slice(1, 3), 4, 4 + 4 * ATTEMPTS
JITTER, ERASE, ERASE_ATTEMPTS, OPERATIONS = slice(0, 8), 8, slice(9, 9 + 4 * ATTEMPTS), 9 + 4 * ATTEMPTS
"""Columns of `ViewParameters.strong`: four factors and four sort keys of their order; whether to erase; area, ratio,
top and left of each attempt; operation, magnitude and sign of each of the policy."""


HueShift = Annotated[float, Ge(0.0), Le(0.5)]

_USUAL: dict[str, tuple[Crop, int, float]] = {
    "digits": ("pad", 1, 0.0),  # a mirrored 2 is not a digit
    "cifar100": ("pad", 4, 0.5),
    "synthetic": ("none", 0, 0.5),
    "coco": ("none", 0, 0.5),
    "voc": ("none", 0, 0.5),
    "toy_scenes": ("none", 0, 0.5),
}
_USUAL_OF_FILES: tuple[Crop, int, float] = ("resized", 0, 0.5)


@settings
class Augmentation:
    """How a training view is made of an image, and how image files are resized for evaluation. If crop, padding or
    flip_probability is null, it has the data set's usual value.

    Raises:
        ValueError: a field is outside its range.

    Example:
        >>> Augmentation(crop="pad", padding=4, flip_probability=0.5).crop
        'pad'
    """

    crop: Crop | None = None
    """none; pad: zero padding, then a random crop back to the original size, as in CIFAR recipes; resized: a random
    area and aspect ratio, resized, as torchvision's RandomResizedCrop."""
    padding: Annotated[int, Ge(0)] | None = None
    """Pixels of zero padding on each side, for crop = pad."""
    scale: tuple[Positive, Positive] = (0.08, 1.0)
    """Range of the crop's share of the image's area, for crop = resized."""
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Range of the crop's width divided by its height, for crop = resized."""
    flip_probability: Fraction | None = None
    """Probability of a horizontal flip."""
    eval_resize: PositiveInt | None = None
    """Short side, in pixels, to which an image file is resized before the centre crop for evaluation. If null, what the
    networks' published weights ask for (see docs/data.md), otherwise image_size * 8 / 7."""
    jitter: tuple[NonNegative, NonNegative, NonNegative, HueShift] = (0.0, 0.0, 0.0, 0.0)
    """Strengths of random brightness, contrast, saturation and hue, as in torchvision's ColorJitter: the factor of each
    of the first three is within 1 ± strength and not below 0, the shift of the hue within ± strength. 0 turns one
    off."""
    policy: Policy = "none"
    """Strong augmentation after crop and flip. trivial: one operation of random magnitude, as torchvision's
    TrivialAugmentWide; rand: rand_ops operations of magnitude rand_magnitude, as its RandAugment."""
    rand_ops: Annotated[int, Ge(1), Le(MAX_OPERATIONS)] = 2
    """Number of operations per view, for policy = rand; the same one may come twice."""
    rand_magnitude: Annotated[int, Ge(0), Le(MAGNITUDES - 1)] = 9
    """Magnitude of the operations, from 0 to 30, for policy = rand."""
    erase_probability: Fraction = 0.0
    """Probability that a rectangle is erased to black, as in torchvision's RandomErasing."""
    erase_scale: tuple[Positive, Positive] = (0.02, 0.33)
    """Range of the rectangle's share of the view's area."""
    erase_ratio: tuple[Positive, Positive] = (0.3, 3.3)
    """Range of the rectangle's height divided by its width."""

    def __post_init__(self) -> None:
        if self.crop is not None and self.crop not in get_args(Crop):
            raise ValueError(f"Augmentation: crop must be one of {get_args(Crop)}, got {self.crop!r}")
        if self.padding is not None and self.padding < 0:
            raise ValueError(f"Augmentation: padding must be at least 0 pixels, got {self.padding}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"Augmentation: scale must be an ascending range within (0, 1], got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"Augmentation: ratio must be an ascending range of positive numbers, got {self.ratio}")
        if self.flip_probability is not None and not 0 <= self.flip_probability <= 1:
            raise ValueError(f"Augmentation: flip_probability must be in [0, 1], got {self.flip_probability}")
        if self.eval_resize is not None and self.eval_resize < 1:
            raise ValueError(f"Augmentation: eval_resize must be at least 1 pixel, got {self.eval_resize}")
        self._check_strong()

    def _check_strong(self) -> None:
        if len(self.jitter) != 4 or min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise ValueError(
                "Augmentation: jitter must be four strengths of at least 0 (brightness, contrast, saturation, hue), "
                f"that of hue at most 0.5, got {self.jitter}"
            )
        if self.policy not in get_args(Policy):
            raise ValueError(f"Augmentation: policy must be one of {get_args(Policy)}, got {self.policy!r}")
        if not 1 <= self.rand_ops <= MAX_OPERATIONS:
            raise ValueError(f"Augmentation: rand_ops must be in [1, {MAX_OPERATIONS}], got {self.rand_ops}")
        if not 0 <= self.rand_magnitude < MAGNITUDES:
            raise ValueError(
                f"Augmentation: rand_magnitude must be in [0, {MAGNITUDES - 1}], got {self.rand_magnitude}"
            )
        if not 0 <= self.erase_probability <= 1:
            raise ValueError(f"Augmentation: erase_probability must be in [0, 1], got {self.erase_probability}")
        if not 0 < self.erase_scale[0] <= self.erase_scale[1] <= 1:
            raise ValueError(
                f"Augmentation: erase_scale must be an ascending range within (0, 1], got {self.erase_scale}"
            )
        if not 0 < self.erase_ratio[0] <= self.erase_ratio[1]:
            raise ValueError(
                f"Augmentation: erase_ratio must be an ascending range of positive numbers, got {self.erase_ratio}"
            )

    def for_data(self, name: str) -> "Augmentation":
        """Return a copy in which crop, padding and flip, where they are None, have the data set's usual values.

        Example:
            >>> Augmentation(padding=2).for_data("cifar100").crop
            'pad'
        """
        crop, padding, flip_probability = _USUAL.get(name, _USUAL_OF_FILES)
        return replace(
            self,
            crop=self.crop or crop,
            padding=padding if self.padding is None else self.padding,
            flip_probability=flip_probability if self.flip_probability is None else self.flip_probability,
        )

    @property
    def operations(self) -> int:
        """Return the number of operations of the policy per view."""
        return {"none": 0, "trivial": 1, "rand": self.rand_ops}[self.policy]

    @property
    def is_strong(self) -> bool:
        """Whether views are changed beyond crop, resize and flip."""
        return bool(self.operations or any(self.jitter) or self.erase_probability)

    def short_side(self, image_size: int) -> int:
        """Return the length in pixels the short side of an image file is resized to for evaluation.

        Raises:
            ValueError: `eval_resize` is too small to cut out `image_size`.

        Example:
            >>> Augmentation().short_side(224)
            256
        """
        length = round(image_size * 8 / 7) if self.eval_resize is None else self.eval_resize
        if length < image_size:
            raise ValueError(
                f"Augmentation: eval_resize {length} is below the image size {image_size}; raise it to at least that"
            )
        return length


@dataclass(frozen=True)
class ViewParameters:
    """The random numbers behind the views of N samples; made by `view_parameters`."""

    augmentation: Augmentation
    sample_ids: NDArray[np.int64]  # (N,)
    flip: NDArray[np.bool_]  # (N,)
    offsets: NDArray[np.int64]  # (N, 2) top, left of a "pad" window in the padded image
    attempts: NDArray[np.float64]  # (N, ATTEMPTS, 4) uniforms for area, ratio, top, left; no attempts unless "resized"
    strong: NDArray[np.float64]  # (N, columns) uniforms of `strong_view`; no columns where it has nothing to do

    def __len__(self) -> int:
        return len(self.sample_ids)

    def crop_box(self, i: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the window (top, left, height, width) of view i of an image of this size, in pixels.

        A "pad" window is in coordinates of the padded image, the others in those of the image.

        Example:
            >>> views = view_parameters(Augmentation(crop="resized"), seed=0, epoch=0, sample_ids=[17])
            >>> top, left, height, width = views.crop_box(0, 375, 500)
        """
        top, left, box_height, box_width = self._boxes(slice(i, i + 1), height, width)[0].tolist()
        return top, left, box_height, box_width

    def crop_boxes(self, height: int, width: int) -> NDArray[np.int64]:
        """Return the windows of all views of images of one size, (N, 4); row i is `crop_box(i, height, width)`.

        Example:
            >>> view_parameters(Augmentation(), seed=0, epoch=0, sample_ids=[17, 18]).crop_boxes(32, 32)[0].tolist()
            [0, 0, 32, 32]
        """
        return self._boxes(slice(None), height, width)

    def _boxes(self, rows: slice, height: int, width: int) -> NDArray[np.int64]:
        offsets = self.offsets[rows]
        if self.augmentation.crop != "resized":
            return np.column_stack((offsets, np.broadcast_to(np.array((height, width)), offsets.shape)))
        return _resized_boxes(self.attempts[rows], self.augmentation, height, width)


def view_parameters(
    augmentation: Augmentation, *, seed: int, epoch: int, sample_ids: ArrayLike, stream: int = 0
) -> ViewParameters:
    """Draw the views of some samples; each depends on (seed, epoch, its id, stream) and on nothing else.

    Args:
        augmentation: what to draw.
        seed: in [0, 2^64).
        epoch: in [0, 2^32).
        sample_ids: (N,) positions in the original data set.
        stream: what the views are for: 0 training, 1 fitting a head; `SECOND_VIEWS` more for their second views.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> views = view_parameters(Augmentation(flip_probability=0.5), seed=0, epoch=3, sample_ids=[5, 17, 40_000])
        >>> views.flip.shape
        (3,)
    """
    ids = checked_ids(sample_ids).astype(np.int64)
    check_below("stream", stream, FIRST_RESERVED_STREAM)
    resized = _STRONG if augmentation.crop == "resized" else _RESIZED
    columns = _STRONG + OPERATIONS + 3 * augmentation.operations if augmentation.is_strong else resized
    draws = uniforms(seed, epoch, ids, columns, stream=stream)
    padding = augmentation.padding or 0 if augmentation.crop == "pad" else 0
    return ViewParameters(
        augmentation=augmentation,
        sample_ids=ids,
        flip=draws[:, _FLIP] < (augmentation.flip_probability or 0.0),
        offsets=np.floor(draws[:, _PAD] * (2 * padding + 1)).astype(np.int64),
        attempts=draws[:, _RESIZED:resized].reshape(len(ids), (resized - _RESIZED) // 4, 4),
        strong=draws[:, _STRONG:],
    )


def _resized_boxes(
    attempts: NDArray[np.float64], augmentation: Augmentation, height: int, width: int
) -> NDArray[np.int64]:
    """Return the first attempt of each row that fits the image, else the central window, as torchvision does."""
    log_low, log_high = np.log(augmentation.ratio)
    area = height * width * (augmentation.scale[0] + attempts[..., 0] * (augmentation.scale[1] - augmentation.scale[0]))
    ratio = np.exp(log_low + attempts[..., 1] * (log_high - log_low))
    box_height, box_width = np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))
    top = np.floor(attempts[..., 2] * (height - box_height + 1))
    left = np.floor(attempts[..., 3] * (width - box_width + 1))
    fits = (box_width > 0) & (box_width <= width) & (box_height > 0) & (box_height <= height)
    boxes = np.stack((top, left, box_height, box_width), axis=-1).astype(np.int64)  # (N, ATTEMPTS, 4)
    chosen = boxes[np.arange(len(boxes)), fits.argmax(axis=1)]
    return np.where(fits.any(axis=1)[:, None], chosen, _central_box(augmentation.ratio, height, width))


def _central_box(ratio: tuple[float, float], height: int, width: int) -> NDArray[np.int64]:
    """Return the largest central window whose width over height is within `ratio`."""
    box_height, box_width = height, width
    if width / height < ratio[0]:
        box_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        box_width = round(height * ratio[1])
    return np.array(((height - box_height) // 2, (width - box_width) // 2, box_height, box_width))

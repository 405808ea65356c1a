"""How views are made: which part of an image each is cut from, and its strong augmentation.

Strong augmentation, beyond crop, resize and flip, is made by torchvision's operations on the CPU, in one function for
every loader: the result depends on nothing but the view's pixels and numbers, and no operation makes the host wait for
a device.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from unikd_fast.data.augmentation import (
    ATTEMPTS,
    ERASE,
    ERASE_ATTEMPTS,
    JITTER,
    MAGNITUDES,
    OPERATIONS,
    Augmentation,
    Policy,
    ViewParameters,
)
from unikd_fast.data.images import MAX_PIXELS, StoredImage
from unikd_fast.data.splits import DataSplits
from unikd_fast.errors import DataError


class Box(NamedTuple):
    """Part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def within(self, other: "Box") -> "Box":
        """Return this box in the coordinates of another, which holds it.

        Example:
            >>> Box(10, 20, 5, 5).within(Box(8, 20, 50, 50))
            Box(top=2, left=0, height=5, width=5)
        """
        return self._replace(top=self.top - other.top, left=self.left - other.left)


class ViewWindow(NamedTuple):
    """How a view comes out of an image, step by step; all in pixels."""

    box: Box  # cut out of the image
    size: tuple[int, int]  # height, width it is resized to
    cut: tuple[int, int]  # top, left of the square of the view's size that is cut out of that
    shift: tuple[int, int]  # where in this square the view begins, black outside; other than 0 where views are padded
    flip: bool  # left to right


class Windows:
    """The windows of a loader's views, whoever decodes.

    Args:
        image_size: height and width of the views in pixels.
        short_side: length in pixels that the short side is resized to before the centre is cut out.
        squash: whether the long side is resized to that length too.

    Example:
        >>> Windows(image_size=224, short_side=256).central(400, 500).cut
        (16, 48)
    """

    def __init__(self, image_size: int, short_side: int, *, squash: bool = False) -> None:
        self.image_size = image_size
        self.short_side = short_side
        self.squash = squash

    @classmethod
    def of(cls, splits: DataSplits, augmentation: Augmentation) -> "Windows":
        """Return the windows of a data set's views: `eval_resize` of the augmentation, else that of the data set.

        Raises:
            ValueError: `eval_resize` is too small to cut out the image size.
        """
        if augmentation.eval_resize is None and splits.eval_resize is not None:
            return cls(splits.image_size, splits.eval_resize, squash=splits.squash)
        return cls(splits.image_size, augmentation.short_side(splits.image_size))

    def training(self, views: ViewParameters, i: int, height: int, width: int) -> ViewWindow:
        """Return the window of view i of an image of this size."""
        flip = bool(views.flip[i])
        if views.augmentation.crop == "resized":
            box = Box(*views.crop_box(i, height, width))
            return ViewWindow(box, (self.image_size, self.image_size), (0, 0), (0, 0), flip)
        central = self.central(height, width)
        if views.augmentation.crop in (None, "none"):
            return central._replace(flip=flip)
        padding = views.augmentation.padding or 0
        top, left, _, _ = views.crop_box(i, self.image_size, self.image_size)
        return central._replace(shift=(top - padding, left - padding), flip=flip)

    def central(self, height: int, width: int) -> ViewWindow:
        """Return the window of the view for evaluation of an image of this size."""
        short, long = sorted((height, width))
        long_side = self.short_side if self.squash else int(self.short_side * long / short)
        size = (self.short_side, long_side) if height <= width else (long_side, self.short_side)
        top, left = (round((length - self.image_size) / 2) for length in size)
        return ViewWindow(Box(0, 0, height, width), size, (top, left), (0, 0), False)

    def check(self, stored: StoredImage, height: int, width: int) -> None:
        """Refuse an image, of this size, that would fill the memory when its short side is resized.

        Raises:
            DataError: it becomes larger than `MAX_PIXELS`.
        """
        high, wide = self.central(height, width).size
        if high * wide > MAX_PIXELS:
            raise DataError(
                f"cannot decode {stored.name}: {width} x {height} pixels become {wide} x {high} when the short side is "
                f"resized, {MAX_PIXELS} are allowed; crop the image or remove it"
            )


def enclosing(boxes: list[Box]) -> Box:
    """Return the smallest box that holds all of these.

    Example:
        >>> enclosing([Box(0, 5, 10, 10), Box(8, 0, 10, 10)])
        Box(top=0, left=0, height=18, width=15)
    """
    top, left = min(box.top for box in boxes), min(box.left for box in boxes)
    bottom, right = max(box.top + box.height for box in boxes), max(box.left + box.width for box in boxes)
    return Box(top, left, bottom - top, right - left)


JITTERS = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
"""Names of torchvision's functions."""

POLICY_OPERATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "Identity": lambda image, magnitude: image,
    "ShearX": lambda image, magnitude: _shear(image, x=magnitude),
    "ShearY": lambda image, magnitude: _shear(image, y=magnitude),
    "TranslateX": lambda image, magnitude: _translate(image, x=magnitude),
    "TranslateY": lambda image, magnitude: _translate(image, y=magnitude),
    "Rotate": lambda image, magnitude: _functional().rotate(image, magnitude),
    "Brightness": lambda image, magnitude: _functional().adjust_brightness(image, 1 + magnitude),
    "Color": lambda image, magnitude: _functional().adjust_saturation(image, 1 + magnitude),
    "Contrast": lambda image, magnitude: _functional().adjust_contrast(image, 1 + magnitude),
    "Sharpness": lambda image, magnitude: _functional().adjust_sharpness(image, 1 + magnitude),
    "Posterize": lambda image, magnitude: _functional().posterize(image, int(magnitude)),
    "Solarize": lambda image, magnitude: _functional().solarize(image, 255 * magnitude),
    "AutoContrast": lambda image, magnitude: _functional().autocontrast(image),
    "Equalize": lambda image, magnitude: _functional().equalize(image),
}
"""What "trivial" and "rand" draw from; names and order are torchvision's."""

SIGNED = frozenset(
    ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness")
)
"""Operations that go either way."""


def strong_pixels(augmentation: Augmentation) -> dict[str, str]:
    """Return what makes the pixels of strong views, as an entry of `Loader.pixels`; empty if no view is strong.

    Example:
        >>> strong_pixels(Augmentation(policy="trivial"))
        {'strong': 'torchvision 0.29'}
    """
    if not augmentation.is_strong:
        return {}
    import torchvision

    major, minor, *_ = torchvision.__version__.split(".")
    return {"strong": f"torchvision {major}.{minor}"}


def strong_views(images: Tensor, views: ViewParameters) -> Tensor:
    """Change each image as its view says; return the images themselves if the augmentation is not strong.

    Args:
        images: (N, 3, H, W) uint8, cropped, resized and flipped.
        views: views of these N samples.

    Returns:
        (N, 3, H, W) uint8 in the layout of `images`.

    Example:
        >>> views = view_parameters(Augmentation(policy="trivial"), seed=0, epoch=0, sample_ids=[17])
        >>> strong_views(images, views).dtype
        torch.uint8
    """
    if not views.augmentation.is_strong:
        return images
    changed = torch.empty_like(images)
    for i, image in enumerate(images):
        changed[i] = strong_view(image, views, i)
    return changed


def strong_view(image: Tensor, views: ViewParameters, i: int) -> Tensor:
    """Apply view i to one image (3, H, W) uint8: jitter, then the policy's operations, then erasing.

    Example:
        >>> strong_view(image, views, 0).shape == image.shape
        True
    """
    # One layout for all loaders, whatever the order in which an operation sums pixels.
    image = image.contiguous()
    for change, factor in jitter_factors(views, i):
        image = getattr(_functional(), JITTERS[change])(image, factor)
    height, width = image.shape[-2:]
    for name, magnitude in drawn_operations(views, i, height, width):
        image = POLICY_OPERATIONS[name](image, magnitude)
    rectangle = erased_rectangle(views, i, height, width)
    if rectangle is not None:
        top, left, erased_height, erased_width = rectangle
        image = image.clone()
        image[:, top : top + erased_height, left : left + erased_width] = 0
    return image


def jitter_factors(views: ViewParameters, i: int) -> list[tuple[int, float]]:
    """Return the changes of view i as (index in `JITTERS`, factor), in the order they are made in.

    Example:
        >>> views = view_parameters(Augmentation(jitter=(0.4, 0, 0, 0.1)), seed=0, epoch=0, sample_ids=[17])
        >>> sorted(change for change, _ in jitter_factors(views, 0))
        [0, 3]
    """
    strengths = views.augmentation.jitter
    if not any(strengths):
        return []
    draws = views.strong[i, JITTER].tolist()
    factors = []
    for change in np.argsort(draws[4:], kind="stable").tolist():
        strength = strengths[change]
        low, high = (-strength, strength) if change == 3 else (max(0.0, 1 - strength), 1 + strength)
        if strength:
            factors.append((change, low + draws[change] * (high - low)))
    return factors


def drawn_operations(views: ViewParameters, i: int, height: int, width: int) -> list[tuple[str, float]]:
    """Return the policy's operations on view i of this size in pixels, as (name, signed magnitude).

    Example:
        >>> views = view_parameters(Augmentation(policy="rand", rand_ops=3), seed=0, epoch=0, sample_ids=[17])
        >>> len(drawn_operations(views, 0, 224, 224))
        3
    """
    augmentation = views.augmentation
    names = tuple(POLICY_OPERATIONS)
    drawn = []
    for which, how_much, sign in views.strong[i, OPERATIONS:].reshape(-1, 3).tolist():
        name = names[int(which * len(names))]
        step = augmentation.rand_magnitude if augmentation.policy == "rand" else int(how_much * MAGNITUDES)
        size = magnitude_of(augmentation.policy, name, step, height, width)
        drawn.append((name, -size if name in SIGNED and sign < 0.5 else size))
    return drawn


def magnitude_of(policy: Policy, name: str, step: int, height: int, width: int) -> float:
    """Return the magnitude of an operation at a step in [0, 30], from torchvision's tables; 0 if it takes none.

    Shears are tangents, translations pixels, rotations degrees, Posterize bits kept, Solarize a share of 255, the
    others what is added to a factor of 1.

    Example:
        >>> magnitude_of("trivial", "Rotate", 30, 224, 224)
        135.0
    """
    trivial = policy == "trivial"
    if name == "Posterize":
        return float(round(8 - step / ((MAGNITUDES - 1) / (6 if trivial else 4))))
    limits = {
        "ShearX": 0.99 if trivial else 0.3,
        "ShearY": 0.99 if trivial else 0.3,
        "TranslateX": 32.0 if trivial else 150 / 331 * width,
        "TranslateY": 32.0 if trivial else 150 / 331 * height,
        "Rotate": 135.0 if trivial else 30.0,
        **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), 0.99 if trivial else 0.9),
    }
    start, end = (1.0, 0.0) if name == "Solarize" else (0.0, limits.get(name, 0.0))
    # In fp32, as torchvision: whole pixels are cut from the last bit.
    return torch.linspace(start, end, MAGNITUDES)[step].item()


def erased_rectangle(views: ViewParameters, i: int, height: int, width: int) -> tuple[int, int, int, int] | None:
    """Return what is erased of view i (top, left, height, width) in pixels; None for nothing.

    As in torchvision, the first attempt that leaves part of both sides counts; if none does, nothing is erased.

    Example:
        >>> views = view_parameters(Augmentation(erase_probability=1.0), seed=0, epoch=0, sample_ids=[17])
        >>> top, left, erased_height, erased_width = erased_rectangle(views, 0, 224, 224)
    """
    augmentation = views.augmentation
    if not augmentation.erase_probability or views.strong[i, ERASE] >= augmentation.erase_probability:
        return None
    (low, high), (narrow, tall) = augmentation.erase_scale, (math.log(r) for r in augmentation.erase_ratio)
    for share, shape, down, right in views.strong[i, ERASE_ATTEMPTS].reshape(ATTEMPTS, 4).tolist():
        area = height * width * (low + share * (high - low))
        ratio = math.exp(narrow + shape * (tall - narrow))
        erased_height, erased_width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if erased_height < height and erased_width < width:
            top, left = int(down * (height - erased_height + 1)), int(right * (width - erased_width + 1))
            return top, left, erased_height, erased_width
    return None


def _functional() -> Any:
    """Return torchvision's operations; importing them takes seconds, which runs without strong views are spared."""
    import torchvision.transforms.v2.functional as functional

    return functional


def _shear(image: Tensor, *, x: float = 0.0, y: float = 0.0) -> Tensor:
    # About the corner, by the angles whose tangents are x and y, as the published policies have it.
    angles = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    return _functional().affine(image, angle=0.0, translate=[0, 0], scale=1.0, shear=angles, center=[0, 0])


def _translate(image: Tensor, *, x: float = 0.0, y: float = 0.0) -> Tensor:
    return _functional().affine(image, angle=0.0, translate=[int(x), int(y)], scale=1.0, shear=[0.0, 0.0])


CHUNK = 16
"""Images that one thread takes in a row."""


def chunks(count: int) -> Iterator[range]:
    """Divide `count` images among threads."""
    return (range(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK))


def limit_to_one_thread() -> None:
    """Keep a loader's thread, which calls this first, from starting a team of OpenMP threads for every operation.

    With more threads than cores, OpenMP would put those of the training to sleep between operations: a step on 2 cores
    took half as long again.
    """
    torch.get_num_threads()  # torch sets the number of a thread the first time it is used there
    threadpool_limits(1, user_api="openmp")

"""Made-up images in classes that are hard to tell apart, for comparing methods where the networks are small.

Classes come in families that share a smooth template. A sample is its family's template, the variation of its class, a
fainter image of another class, shifted, and noise: what a teacher with capacity can see in it, a small student alone
cannot learn from few samples.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unikd_fast.data.philox import check_below
from unikd_fast.data.splits import DataSplits, TensorImages

CLASSES_PER_FAMILY = 5

_SIDE = 16  # pixels of a template, and of the images before they are enlarged
_COARSE = 4  # random numbers per side of a template
_VARIATION, _DISTRACTOR, _NOISE = 0.4, 0.7, 1.2  # against a template of standard deviation 1
_SHIFT = 2  # pixels at most, to each side
_MEAN, _DEVIATION = 128.0, 28.0  # grey levels
# Each has random numbers of its own.
_FAMILIES, _VARIATIONS, _TRAIN, _VAL, _TEST = range(5)


def load_fine_grained(num_samples: int, num_classes: int, image_size: int, *, seed: int = 0) -> DataSplits:
    """Make `num_samples` images to train on and a third as many each for val and test.

    Sample i is of class i modulo `num_classes`; it does not depend on the number of samples.

    Args:
        num_samples: number of images in the train split.
        num_classes: number of classes K, a multiple of `CLASSES_PER_FAMILY`.
        image_size: height and width in pixels, a multiple of 16.
        seed: seed of templates and samples, in [0, 2^64).

    Raises:
        ValueError: a number is below 1 or does not divide as it should, or the seed is out of range.

    Example:
        >>> splits = load_fine_grained(3000, 50, 16)
        >>> tuple(splits.train.images.shape), len(splits.test)
        ((3000, 3, 16, 16), 1000)
    """
    for name, value, unit in (
        ("num_samples", num_samples, 1),
        ("num_classes", num_classes, CLASSES_PER_FAMILY),
        ("image_size", image_size, _SIDE),
    ):
        if value < unit or value % unit:
            raise ValueError(f"load_fine_grained: {name} must be a positive multiple of {unit}, got {value}")
    check_below("seed", seed, 2**64)
    held_out = max(1, num_samples // 3)

    def source(purpose: int) -> np.random.Philox:
        return np.random.Philox(key=np.array((seed, purpose), np.uint64))

    families = _smooth(source(_FAMILIES), num_classes // CLASSES_PER_FAMILY)
    variations = _smooth(source(_VARIATIONS), num_classes)
    classes = families.repeat_interleave(CLASSES_PER_FAMILY, 0) + _VARIATION * variations
    train, val, test = (
        _make(classes, count, image_size, source(purpose))
        for purpose, count in ((_TRAIN, num_samples), (_VAL, held_out), (_TEST, held_out))
    )
    level = _MEAN / 255
    deviation = _DEVIATION / 255 * float(np.sqrt((1 + _VARIATION**2) * (1 + _DISTRACTOR**2) + _NOISE**2))
    return DataSplits(
        train=train,
        val=val,
        test=test,
        num_classes=num_classes,
        class_names=None,
        mean=(level, level, level),
        std=(deviation, deviation, deviation),
        image_size=image_size,
    )


def _make(classes: Tensor, count: int, image_size: int, source: np.random.Philox) -> TensorImages:
    labels = np.arange(count) % len(classes)
    images = torch.empty(count, 3, image_size, image_size, dtype=torch.uint8)
    pixels = 3 * _SIDE**2
    for index, label in enumerate(labels):
        words = source.random_raw(3)
        other = (label + 1 + int(words[0] % np.uint64(len(classes) - 1))) % len(classes)
        image = classes[label] + _DISTRACTOR * classes[other]
        shifts = [int(word % np.uint64(2 * _SHIFT + 1)) - _SHIFT for word in words[1:]]
        image = image.roll(shifts, dims=(1, 2)) + _NOISE * _normal(source, pixels).view(3, _SIDE, _SIDE)
        grey = (_MEAN + _DEVIATION * image).round().clamp(0, 255).to(torch.uint8)
        enlarged = grey.repeat_interleave(image_size // _SIDE, 1).repeat_interleave(image_size // _SIDE, 2)
        images[index] = enlarged
    return TensorImages(images, labels)


def _smooth(source: np.random.Philox, count: int) -> Tensor:
    """Return (count, 3, 16, 16) random fields of standard deviation 1."""
    coarse = _normal(source, count * 3 * _COARSE**2).view(count, 3, _COARSE, _COARSE)
    fields = nn.functional.interpolate(coarse, size=(_SIDE, _SIDE), mode="bilinear", align_corners=True)
    return fields / fields.std(dim=(1, 2, 3), keepdim=True)


def _normal(source: np.random.Philox, count: int) -> Tensor:
    """Return (count,) normal numbers by Box and Muller, from the raw words, which numpy promises to keep."""
    words: NDArray[np.uint64] = source.random_raw(2 * -(-count // 2)).reshape(2, -1)
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1)
    radius, angle = np.sqrt(-2 * np.log(uniform[0])), 2 * np.pi * uniform[1]
    return torch.from_numpy(np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count])

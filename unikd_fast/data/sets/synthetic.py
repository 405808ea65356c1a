"""Made-up images a network can learn, for trials and speed measurements without a data set.

Each class has a template of coarse blocks; a sample is the template of its class, enlarged, plus noise of its own.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from unikd_fast.data.philox import check_below
from unikd_fast.data.splits import DataSplits, TensorImages

_BLOCKS = 8  # per side of a template
_CHUNK_BYTES = 2**24

# Each has random numbers of its own.
_TEMPLATES, _TRAIN, _VAL, _TEST = range(4)


def load_synthetic(num_samples: int, num_classes: int, image_size: int, *, seed: int = 0) -> DataSplits:
    """Make `num_samples` images to train on and a quarter as many each for val and test.

    Sample i is of class i modulo `num_classes`; it does not depend on the number of samples.

    Args:
        num_samples: number of images in the train split.
        num_classes: number of classes K.
        image_size: height and width in pixels.
        seed: seed of templates and noise, in [0, 2^64).

    Raises:
        ValueError: a number is below 1, or the seed is out of range.

    Example:
        >>> splits = load_synthetic(256, 10, 32)
        >>> tuple(splits.train.images.shape), len(splits.val)
        ((256, 3, 32, 32), 64)
    """
    for name, value in (("num_samples", num_samples), ("num_classes", num_classes), ("image_size", image_size)):
        if value < 1:
            raise ValueError(f"load_synthetic: {name} must be at least 1, got {value}")
    check_below("seed", seed, 2**64)
    held_out = max(1, num_samples // 4)

    def noise(purpose: int) -> np.random.Philox:
        return np.random.Philox(key=np.array((seed, purpose), np.uint64))

    templates = _levels(noise(_TEMPLATES), num_classes, 3 * _BLOCKS**2).reshape(-1, 3, _BLOCKS, _BLOCKS)
    train, val, test = (
        _make(templates, count, image_size, noise(purpose))
        for purpose, count in ((_TRAIN, num_samples), (_VAL, held_out), (_TEST, held_out))
    )
    return DataSplits(
        train=train,
        val=val,
        test=test,
        num_classes=num_classes,
        class_names=None,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        image_size=image_size,
    )


def _make(templates: NDArray[np.uint8], count: int, image_size: int, noise_source: np.random.Philox) -> TensorImages:
    labels = np.arange(count) % len(templates)
    block_of = np.arange(image_size) * _BLOCKS // image_size
    images = np.empty((count, 3, image_size, image_size), np.uint8)
    per_image = 3 * image_size * image_size
    chunk = max(1, _CHUNK_BYTES // per_image)
    for start in range(0, count, chunk):
        part = images[start : start + chunk]
        part[:] = templates[labels[start : start + chunk]][:, :, block_of[:, None], block_of]
        part += _levels(noise_source, len(part), per_image).reshape(part.shape)
    return TensorImages(torch.from_numpy(images), labels)


def _levels(source: np.random.Philox, rows: int, columns: int) -> NDArray[np.uint8]:
    """Return (rows, columns) random numbers in [0, 128): two of them add up to a grey level without overflow.

    Taken from the raw words, which numpy promises to keep, unlike the numbers its distributions make of them; each row
    starts a new word, so that it does not depend on how many there are.
    """
    words = source.random_raw(rows * -(-columns // 8))
    return words.view(np.uint8).reshape(rows, -1)[:, :columns] & np.uint8(127)

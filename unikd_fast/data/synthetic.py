"""Made-up images a network can learn, for trials and speed measurements without a data set.

Each class has a template of coarse blocks; a sample is the template of its class, enlarged, plus noise of its own.
"""

import numpy as np
import torch

from unikd_fast.data.splits import DataSplits, TensorImages

_BLOCKS = 8  # per side of a template
_NOISE_LEVELS = 128  # a power of two
_CHUNK_BYTES = 2**24

_PARTS = ("train", "val", "test")


def load_synthetic(num_samples: int, num_classes: int, image_size: int, *, seed: int = 0) -> DataSplits:
    """Make `num_samples` images to train on and a quarter as many each for val and test.

    Sample i is of class i modulo `num_classes`; it does not depend on the number of samples.

    Args:
        num_samples: images of the train split.
        num_classes: number of classes K.
        image_size: height and width in pixels.
        seed: in [0, 2^64), of templates and noise.

    Raises:
        ValueError: a number is below 1.

    Example:
        >>> splits = load_synthetic(256, 10, 32)
        >>> tuple(splits.train.images.shape), len(splits.val)
        ((256, 3, 32, 32), 64)
    """
    for name, value in (("num_samples", num_samples), ("num_classes", num_classes), ("image_size", image_size)):
        if value < 1:
            raise ValueError(f"load_synthetic: {name} must be at least 1, got {value}")
    counts = (num_samples, max(1, num_samples // 4), max(1, num_samples // 4))
    templates = _bits(seed, len(_PARTS), num_classes * 3 * _BLOCKS * _BLOCKS) & (255 - (_NOISE_LEVELS - 1))
    templates = templates.reshape(num_classes, 3, _BLOCKS, _BLOCKS)
    train, val, test = (
        _make(templates, count, image_size, np.random.Philox(key=[seed, part])) for part, count in enumerate(counts)
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

"""Scikit-learn's handwritten digits: 1797 images of 8 x 8 greys, which come with the package and train in seconds."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from unikd_fast.data.splits import DataSplits, TensorImages
from unikd_fast.data.subsets import stratified_split

SPLIT_SIZES = (1000, 297, 500)
"""Samples of train, val and test."""

# Part of the definition of the data set, like the sizes: a teacher must never have seen its student's test images.
_SPLIT_SEED = 0


def load_digits(image_size: int) -> DataSplits:
    """Load the digits as RGB images of `image_size` pixels, enlarged by bilinear interpolation.

    The split is fixed; the ids are positions within each part. Mean and deviation are those of the train part.

    Raises:
        ValueError: `image_size` is below the 8 pixels of the originals.
        ModuleNotFoundError: scikit-learn is not installed.

    Example:
        >>> len(load_digits(32).test)
        500
    """
    if image_size < 8:
        raise ValueError(f"load_digits: image_size must be at least the 8 pixels of the originals, got {image_size}")
    # Imported here: other data sets do without scikit-learn, and it takes a second to import.
    from sklearn.datasets import load_digits as load_greys

    greys, targets = load_greys(return_X_y=True)  # (1797, 64) in 0..16, (1797,)
    small = torch.from_numpy(greys).view(-1, 1, 8, 8) * (255 / 16)
    large = F.interpolate(small, size=(image_size, image_size), mode="bilinear", align_corners=False)
    images = large.round().to(torch.uint8).expand(-1, 3, -1, -1)
    labels = targets.astype(np.int64)
    train, val, test = (
        TensorImages(images[torch.from_numpy(part)].contiguous(), labels[part])
        for part in stratified_split(labels, SPLIT_SIZES, seed=_SPLIT_SEED)
    )
    # In whole numbers: a sum of fractions depends on the number of threads, and what is cached is keyed on these.
    levels = train.images[:, 0].long()
    count, total, squares = levels.numel(), int(levels.sum()), int(levels.square().sum())
    mean, std = total / count / 255, math.sqrt(count * squares - total**2) / count / 255
    return DataSplits(
        train=train,
        val=val,
        test=test,
        num_classes=10,
        class_names=tuple("0123456789"),
        mean=(mean, mean, mean),
        std=(std, std, std),
        image_size=image_size,
    )

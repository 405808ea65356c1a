"""Data sets by name."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from unikd_fast.data.roots import check_root, check_unlabeled_root
from unikd_fast.data.sets.image_folder import load_image_folder
from unikd_fast.data.sets.in_memory import CIFAR_SIZE, load_cifar100, load_digits
from unikd_fast.data.sets.synthetic import load_synthetic
from unikd_fast.data.settings import DataSettings
from unikd_fast.data.splits import DataSplits, class_balanced_subset
from unikd_fast.given import find
from unikd_fast.values import NO_LABEL


def open_data(data: DataSettings) -> DataSplits:
    """Open a data set.

    If it is not set, the number of classes is 10 for synthetic, and for arrow with plain numbers as labels one more
    than the largest. A subset keeps the ids of its samples and all images without a label, and mean and deviation stay
    those of the whole.

    Raises:
        ValueError: a setting does not fit the data set, or its files are not what they should be.
        FileNotFoundError: a folder is missing.

    Example:
        >>> open_data(DataSettings(name="digits", image_size=32)).num_classes
        10
    """
    name, image_size, num_classes = data.name, data.image_size, data.num_classes
    unlabelled = check_unlabeled_root(name, data.unlabeled_root)
    folder = check_root(name, data.root, val_samples=data.val_samples, needs_train=unlabelled is None)

    def cifar100() -> DataSplits:
        if image_size != CIFAR_SIZE:
            raise ValueError(
                f"open_data: images of cifar100 have {CIFAR_SIZE} pixels, got image_size {image_size}; "
                f"set it to {CIFAR_SIZE}"
            )
        return load_cifar100(_given(folder), val_samples=data.val_samples)

    def arrow() -> DataSplits:
        from unikd_fast.data.arrow import load_arrow  # with pyarrow

        return load_arrow(_given(folder), image_size, num_classes)

    openers: dict[str, Callable[[], DataSplits]] = {
        "digits": lambda: load_digits(image_size),
        "cifar100": cifar100,
        "image_folder": lambda: load_image_folder(
            _given(folder), image_size, val_samples=data.val_samples, unlabelled=unlabelled
        ),
        "imagenet": lambda: load_image_folder(_given(folder), image_size, unlabelled=unlabelled),
        "arrow": arrow,
        "synthetic": lambda: load_synthetic(data.synthetic_samples, num_classes or 10, image_size, seed=data.seed),
        "given": lambda: find(data.digest, "data.digest"),
    }
    if name not in openers:
        raise ValueError(
            f"open_data: images of {name} have boxes and no label, and the task is classification; choose another "
            "data.name"
        )
    if data.val_samples and name not in ("cifar100", "image_folder"):
        raise ValueError(
            f"open_data: val_samples is for cifar100 and image_folder, {name} has a val split; got {data.val_samples}, "
            "set it to 0"
        )
    splits = openers[name]()
    if num_classes is not None and num_classes != splits.num_classes:
        raise ValueError(
            f"open_data: {name} has {splits.num_classes} classes, got num_classes {num_classes}; "
            f"set it to {splits.num_classes}"
        )
    if data.train_samples is None:
        return splits
    without = splits.train.labels == NO_LABEL
    labelled = np.flatnonzero(~without)
    if not len(labelled):
        raise ValueError(
            f"open_data: train_samples is a number of images with a label, and no training image has one; got "
            f"{data.train_samples}, set it to null"
        )
    subset = labelled[class_balanced_subset(splits.train.labels[labelled], data.train_samples, seed=data.seed)]
    return replace(splits, train=splits.train.select(np.concatenate((subset, np.flatnonzero(without)))))


def _given(folder: Path | None) -> Path:
    assert folder is not None, "check_root returns a folder for data sets of files"
    return folder

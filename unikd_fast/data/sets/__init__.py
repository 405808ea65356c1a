"""Data sets by name."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from unikd_fast.data.roots import check_root
from unikd_fast.data.sets.fine_grained import load_fine_grained
from unikd_fast.data.sets.image_folder import load_image_folder
from unikd_fast.data.sets.in_memory import IMAGE_SIZE as CIFAR_SIZE
from unikd_fast.data.sets.in_memory import load_cifar100, load_digits
from unikd_fast.data.sets.synthetic import load_synthetic
from unikd_fast.data.splits import DataSplits, class_balanced_subset


def open_data(
    name: str,
    *,
    root: str | Path | None,
    image_size: int,
    num_classes: int | None = None,
    train_samples: int | None = None,
    val_samples: int = 0,
    synthetic_samples: int = 1024,
    seed: int = 0,
) -> DataSplits:
    """Open a data set.

    Args:
        name: one of `roots.DATA_NAMES`; "imagenet" is "image_folder" under the name its users look for.
        root: folder of the data set, see `roots.check_root`; not read by digits, synthetic and fine_grained.
        image_size: height and width in pixels of the images; 32 for cifar100.
        num_classes: number of classes; decides for synthetic (10 if None), fine_grained (50 if None) and plain numbers
            as labels of arrow (one more than the largest if None), for the others it is checked.
        train_samples: train on a class-balanced subset of this many samples; they keep their ids, and mean and
            deviation stay those of the whole. If None, on all of them.
        val_samples: samples of the train split of cifar100 held out for validation.
        synthetic_samples: images of the train split of synthetic and fine_grained.
        seed: of the subset and of the images of these two. It is one of the data set, to be kept while the seed of the
            runs changes: runs over several seeds then see one data set, and a teacher fits them all.

    Raises:
        ValueError: an argument does not fit the data set, or its files are not what they should be.
        FileNotFoundError: a folder is missing.

    Example:
        >>> open_data("digits", root=None, image_size=32).num_classes
        10
    """
    folder = check_root(name, None if root is None else str(root))

    def cifar100() -> DataSplits:
        if image_size != CIFAR_SIZE:
            raise ValueError(
                f"open_data: images of cifar100 have {CIFAR_SIZE} pixels, got image_size {image_size}; "
                f"set it to {CIFAR_SIZE}"
            )
        return load_cifar100(_given(folder), val_samples=val_samples)

    def arrow() -> DataSplits:
        from unikd_fast.data.arrow import load_arrow  # with pyarrow

        return load_arrow(_given(folder), image_size, num_classes)

    openers: dict[str, Callable[[], DataSplits]] = {
        "digits": lambda: load_digits(image_size),
        "cifar100": cifar100,
        "image_folder": lambda: load_image_folder(_given(folder), image_size),
        "imagenet": lambda: load_image_folder(_given(folder), image_size),
        "arrow": arrow,
        "synthetic": lambda: load_synthetic(synthetic_samples, num_classes or 10, image_size, seed=seed),
        "fine_grained": lambda: load_fine_grained(synthetic_samples, num_classes or 50, image_size, seed=seed),
    }
    if val_samples and name != "cifar100":
        raise ValueError(
            f"open_data: val_samples is for cifar100, {name} has a val split; got {val_samples}, set it to 0"
        )
    splits = openers[name]()
    if num_classes is not None and num_classes != splits.num_classes:
        raise ValueError(
            f"open_data: {name} has {splits.num_classes} classes, got num_classes {num_classes}; "
            f"set it to {splits.num_classes}"
        )
    if train_samples is None:
        return splits
    subset = class_balanced_subset(splits.train.labels, train_samples, seed=seed)
    return replace(splits, train=splits.train.select(subset))


def _given(folder: Path | None) -> Path:
    assert folder is not None, "check_root returns a folder for data sets of files"
    return folder

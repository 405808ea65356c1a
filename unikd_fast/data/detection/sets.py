"""Data sets of images with boxes by name."""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from unikd_fast.data.detection.coco import load_coco
from unikd_fast.data.detection.scenes import BoxedImages, DetectionSplits, named_few
from unikd_fast.data.detection.toy_scenes import load_toy_scenes
from unikd_fast.data.detection.voc import load_voc
from unikd_fast.data.images import StoredImage
from unikd_fast.data.philox import FIRST_RESERVED_STREAM, sort_keys
from unikd_fast.data.roots import check_root, check_unlabeled_root
from unikd_fast.data.settings import DataSettings
from unikd_fast.errors import DataError

_SUBSET_STREAM = FIRST_RESERVED_STREAM + 5

_logger = logging.getLogger("unikd_fast")


def open_scenes(data: DataSettings) -> DetectionSplits:
    """Open a data set of images with boxes.

    Images without a box to train on are left out of the train split, and named in the log. `data.train_samples` takes
    that many of the others at random, by `data.seed`; a smaller subset is part of every larger one.

    Raises:
        ValueError: a setting does not fit the data set, or its files are not what they should be.
        FileNotFoundError: a folder or file is missing.

    Example:
        >>> open_scenes(DataSettings(name="toy_scenes")).num_classes
        4
    """
    openers: dict[str, Callable[[Path | None], DetectionSplits]] = {
        "coco": lambda root: load_coco(_given(root)),
        "voc": lambda root: load_voc(_given(root)),
        "toy_scenes": lambda _: load_toy_scenes(data.synthetic_samples, seed=data.seed),
    }
    if data.name not in openers:
        raise ValueError(
            f"open_scenes: {data.name} has no boxes, and the task is detection; set data.name to {', '.join(openers)}"
        )
    check_unlabeled_root(data.name, data.unlabeled_root)
    splits = openers[data.name](check_root(data.name, data.root))
    if data.num_classes not in (None, splits.num_classes):
        raise ValueError(
            f"open_scenes: {data.name} has {splits.num_classes} classes, got num_classes {data.num_classes}; set it to "
            f"{splits.num_classes}"
        )
    if data.val_samples:
        raise ValueError(f"open_scenes: {data.name} has a val split, got val_samples {data.val_samples}; set it to 0")
    parts = {"train": splits.train, "val": splits.val} | ({} if splits.test_is_val else {"test": splits.test})
    for part, split in parts.items():
        if data.bad_images == "error":  # or else the loader counts them
            _check_files(part, split)
        _log_without_area(part, split)
    train = _with_boxes(splits.train)
    _log_unseen_classes(replace(splits, train=train))
    if data.train_samples is not None:
        train = _subset(train, data.train_samples, data.seed)
    return replace(splits, train=train)


def _given(root: Path | None) -> Path:
    assert root is not None
    return root


def _check_files(part: str, split: BoxedImages) -> None:
    """Check that the images of a split exist; folders are listed, which is quicker than to look for each file.

    Raises:
        DataError: some are missing.
    """
    paths = [image.path for image in split.images if isinstance(image, StoredImage)]
    there = {folder: _listed(folder) for folder in {os.path.dirname(path) for path in paths}}  # noqa: PTH120
    missing = [path for path in paths if os.path.basename(path) not in there[os.path.dirname(path)]]  # noqa: PTH119, PTH120
    if missing:
        raise DataError(
            f"open_scenes: {len(missing)} of the {len(paths)} images of {part} are missing: {named_few(missing)}; "
            "restore them, remove them from the annotations, or set data.bad_images to skip"
        )


def _listed(folder: str) -> set[str]:
    try:
        return set(os.listdir(folder))  # noqa: PTH208
    except (OSError, ValueError):  # the latter for names that no file can have
        return set()


def _log_without_area(part: str, split: BoxedImages) -> None:
    rows = np.flatnonzero(~split.has_area & ~split.is_crowd)
    if len(rows):
        images = np.unique(split.image_of[rows]).tolist()
        _logger.warning(
            "open_scenes: %d of %d boxes of %s have no area within their image, and %s: %s",
            len(rows),
            len(split.boxes),
            part,
            "are not trained on" if part == "train" else "count as missed, as COCO's evaluation has it",
            named_few(map(split.name, images)),
        )


def _with_boxes(train: BoxedImages) -> BoxedImages:
    """Return the images that have a box to train on; say how many others there are."""
    has_box = np.zeros(len(train), np.bool_)
    has_box[train.image_of[train.is_trainable]] = True
    without = np.flatnonzero(~has_box)
    if not len(without):
        return train
    _logger.info(
        "open_scenes: %d of %d training images are left out, they have no box to train on: %s",
        len(without),
        len(train),
        named_few(map(train.name, without.tolist())),
    )
    return train.select(np.flatnonzero(has_box))


def _log_unseen_classes(splits: DetectionSplits) -> None:
    seen = np.bincount(splits.train.labels[splits.train.is_trainable], minlength=splits.num_classes)
    unseen = [name for name, count in zip(splits.class_names, seen, strict=True) if not count]
    if unseen:
        _logger.warning(
            "open_scenes: %d of %d classes have no box to train on: %s",
            len(unseen),
            splits.num_classes,
            named_few(unseen),
        )


def _subset(train: BoxedImages, count: int, seed: int) -> BoxedImages:
    if count > len(train):
        raise ValueError(
            f"open_scenes: train_samples is {count}, and {len(train)} training images have boxes; lower it to "
            f"{len(train)} or less"
        )
    chosen = sort_keys(seed, 0, train.ids, stream=_SUBSET_STREAM).argsort(kind="stable")[:count]
    return train.select(np.sort(chosen))

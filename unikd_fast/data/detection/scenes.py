"""A data set of images with boxes, as its loader and an evaluation see it."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unikd_fast.data.images import StoredImage
from unikd_fast.data.splits import IMAGENET_MEAN, IMAGENET_STD
from unikd_fast.values import Channels

LARGEST_SIDE = 2**31 - 1
"""Largest side of an image, and largest number in a box, that is taken for one of pixels."""

_NAMED = 5


def named_few(names: Iterable[object]) -> str:
    """Return the first few of these names, for messages.

    Example:
        >>> named_few(range(9))
        '0, 1, 2, 3, 4, ...'
    """
    few = [str(name) for name in itertools.islice(names, _NAMED + 1)]
    text = ", ".join(few[:_NAMED]) + (", ..." if len(few) > _NAMED else "")
    return text.encode("utf-8", "backslashreplace").decode()  # so that any stream can show it


@dataclass(frozen=True, eq=False)
class BoxedImages:
    """A split of N images with M boxes in all.

    Args:
        images: N images: where each lies, or (3, H, W) uint8.
        sizes: (N, 2) int64, height and width in pixels.
        boxes: (M, 4) float64, x1, y1, x2, y2 in pixels, as annotated: perhaps beyond the image or without an area.
        labels: (M,) int64, classes from 0.
        is_crowd: (M,) bool, whether a box is around a crowd, or marked as difficult: it is not trained on, and an
            evaluation neither asks for it nor counts what is found in it.
        areas: (M,) float64, pixels of each object, by which an evaluation tells small from large.
        offsets: (N + 1,) int64; the boxes of image i are those from offsets[i] to offsets[i + 1].
        ids: (N,) int64, position of each image in the published split; views are keyed on them.
        image_ids: (N,) int64, ids of the annotation file.

    Raises:
        ValueError: the arrays do not have these lengths.

    Example:
        >>> split = open_scenes(DataSettings(name="toy_scenes")).val
        >>> split.boxes[split.rows(0)].shape
        (3, 4)
    """

    images: Sequence[StoredImage | Tensor]
    sizes: NDArray[np.int64]
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    is_crowd: NDArray[np.bool_]
    areas: NDArray[np.float64]
    offsets: NDArray[np.int64]
    ids: NDArray[np.int64]
    image_ids: NDArray[np.int64]

    def __post_init__(self) -> None:
        images, boxes = len(self.images), len(self.boxes)
        shapes = {
            "sizes": (images, 2),
            "boxes": (boxes, 4),
            "labels": (boxes,),
            "is_crowd": (boxes,),
            "areas": (boxes,),
            "offsets": (images + 1,),
            "ids": (images,),
            "image_ids": (images,),
        }
        for name, shape in shapes.items():
            if (found := getattr(self, name).shape) != shape:
                raise ValueError(f"BoxedImages: {name} must have shape {shape}, got {found}")

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, i: int) -> slice:
        """Return which boxes are those of image i."""
        return slice(int(self.offsets[i]), int(self.offsets[i + 1]))

    def name(self, i: int) -> str:
        """Return the file name of image i, or for one in memory its id."""
        image = self.images[i]
        return Path(image.name).name if isinstance(image, StoredImage) else f"image {self.image_ids[i]}"

    @property
    def image_of(self) -> NDArray[np.int64]:
        """Return the (M,) position of each box's image."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    @property
    def is_trainable(self) -> NDArray[np.bool_]:
        """Return which boxes (M,) can be trained on: those not around a crowd, with an area within the image."""
        return ~self.is_crowd & self.has_area

    @property
    def has_area(self) -> NDArray[np.bool_]:
        """Return which boxes (M,) have an area within the image."""
        far = self.sizes[self.image_of][:, ::-1].astype(np.float64)  # (M, 2) width, height
        sides = np.minimum(self.boxes[:, 2:], far) - np.maximum(self.boxes[:, :2], 0)
        return np.asarray((sides > 0).all(axis=1))

    @property
    def is_portrait(self) -> NDArray[np.bool_]:
        """Return which images (N,) are higher than wide; batches are made of one kind, which saves padding."""
        return self.sizes[:, 0] > self.sizes[:, 1]

    def select(self, positions: NDArray[np.int64]) -> "BoxedImages":
        """Return the images at these positions with their boxes; they keep their ids."""
        counts = np.diff(self.offsets)[positions]
        offsets = np.concatenate(([0], counts.cumsum()))
        rows = np.repeat(self.offsets[positions] - offsets[:-1], counts) + np.arange(offsets[-1])
        return BoxedImages(
            images=[self.images[i] for i in positions],
            sizes=self.sizes[positions],
            boxes=self.boxes[rows],
            labels=self.labels[rows],
            is_crowd=self.is_crowd[rows],
            areas=self.areas[rows],
            offsets=offsets,
            ids=self.ids[positions],
            image_ids=self.image_ids[positions],
        )


@dataclass(frozen=True, eq=False)
class DetectionSplits:
    """A data set of images with boxes.

    Args:
        train, val, test: splits. If none is published for testing, `test` is `val`, and `test_is_val` is true.
        class_names: K names.
        category_ids: (K,) int64, ids of the classes in the annotation file.
        mean, std: mean and deviation per channel, of images in [0, 1].

    Raises:
        ValueError: there is nothing to train on or to evaluate on, or a label is not below K.

    Example:
        >>> splits = open_scenes(DataSettings(name="toy_scenes"))
        >>> splits.num_classes, splits.category_ids.tolist()
        (4, [1, 3, 7, 90])
    """

    train: BoxedImages
    val: BoxedImages
    test: BoxedImages
    class_names: tuple[str, ...]
    category_ids: NDArray[np.int64]
    mean: Channels = IMAGENET_MEAN
    std: Channels = IMAGENET_STD

    def __post_init__(self) -> None:
        if not len(self.train):
            raise ValueError("DetectionSplits: no training image has a box to train on; annotate some")
        for name, split in (("val", self.val), ("test", self.test)):
            if split.is_crowd.all():
                raise ValueError(
                    f"DetectionSplits: {name} has {len(split)} images and no box to be found (around crowds it has "
                    f"{len(split.boxes)}), and an average precision needs some; annotate them"
                )
        for name, split in (("train", self.train), ("val", self.val), ("test", self.test)):
            if (largest := int(split.labels.max(initial=0))) >= self.num_classes:
                raise ValueError(
                    f"DetectionSplits: labels of {name} must be below the number of classes, {self.num_classes}, got "
                    f"{largest}; correct the label or the classes"
                )

    @property
    def num_classes(self) -> int:
        """Return the number of classes K, without a background."""
        return len(self.class_names)

    @property
    def unlabelled(self) -> int:
        """Return the number of training images without a label: none is trained on."""
        return 0

    @property
    def test_is_val(self) -> bool:
        """Whether `test` is the same split as `val`."""
        return self.test is self.val

    def ground_truth(self, part: Literal["train", "val", "test"]) -> dict[str, Any]:
        """Return the annotations of a split in COCO's format, as its evaluators read them, with ids from 1."""
        split: BoxedImages = getattr(self, part)
        images = [
            {"id": split.image_ids[i].item(), "file_name": split.name(i), "height": height, "width": width}
            for i, (height, width) in enumerate(split.sizes.tolist())
        ]
        corners = split.boxes
        annotations = [
            {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": crowd}
            for number, (image, category, box, area, crowd) in enumerate(
                zip(
                    split.image_ids[split.image_of].tolist(),
                    self.category_ids[split.labels].tolist(),
                    np.hstack((corners[:, :2], corners[:, 2:] - corners[:, :2])).tolist(),
                    split.areas.tolist(),
                    split.is_crowd.astype(int).tolist(),
                    strict=True,
                ),
                start=1,
            )
        ]
        categories = [
            {"id": category, "name": name}
            for category, name in zip(self.category_ids.tolist(), self.class_names, strict=True)
        ]
        return {"images": images, "annotations": annotations, "categories": categories}

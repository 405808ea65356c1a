"""A data set as the loaders see it: splits in memory or on disk, and what belongs to all of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy, uint8

from unikd_fast.data.images import StoredImage
from unikd_fast.values import Channels, Interpolation

IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class TensorImages:
    """A split held in memory.

    Args:
        images: (N, 3, H, W) uint8.
        labels: (N,) int64.
        ids: (N,) position of each sample in the published split it comes from; None if the split is whole. Views and
            caches are keyed on these, so they stay valid when a run takes part of a data set.

    Raises:
        ValueError: the images are not a uint8 RGB batch, the labels are not one per image, or a number is negative.

    Example:
        >>> split = TensorImages(torch.zeros(10, 3, 8, 8, dtype=torch.uint8), np.arange(10))
        >>> split.select(np.array([7, 2])).sample_ids.tolist()
        [7, 2]
    """

    images: Tensor
    labels: NDArray[np.int64]
    ids: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != uint8 or self.images.ndim != 4 or self.images.shape[1] != 3:
            raise ValueError(
                f"TensorImages: images must be (N, 3, H, W) uint8, got {tuple(self.images.shape)} {self.images.dtype}"
            )
        _check_numbers("TensorImages", len(self.images), self.labels, self.ids)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def sample_ids(self) -> NDArray[np.int64]:
        """(N,) position of each sample in the published split."""
        return np.arange(len(self)) if self.ids is None else self.ids

    def select(self, positions: NDArray[np.int64]) -> "TensorImages":
        """Return the samples at these positions; they keep their ids."""
        return TensorImages(self.images[from_numpy(positions)], self.labels[positions], self.sample_ids[positions])


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """A split of image files; paths (N,), labels and ids as for `TensorImages`.

    Raises:
        ValueError: the labels are not one per path, or a number is negative.

    Example:
        >>> len(ImageFiles(["a.jpeg", "b.jpeg"], np.array([0, 1])))
        2
    """

    paths: Sequence[str]
    labels: NDArray[np.int64]
    ids: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        _check_numbers("ImageFiles", len(self.paths), self.labels, self.ids)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def sample_ids(self) -> NDArray[np.int64]:
        """(N,) position of each sample in the published split."""
        return np.arange(len(self)) if self.ids is None else self.ids

    def select(self, positions: NDArray[np.int64]) -> "ImageFiles":
        """Return the samples at these positions; they keep their ids."""
        return ImageFiles([self.paths[i] for i in positions], self.labels[positions], self.sample_ids[positions])

    def images(self, positions: Iterable[int]) -> tuple[StoredImage, ...]:
        """Where the images at these positions lie."""
        return tuple(StoredImage(self.paths[i]) for i in positions)


@dataclass(frozen=True, eq=False)
class ArrowImages:
    """A split of images in Arrow files; labels and ids as for `TensorImages`.

    Args:
        files: paths of the Arrow files.
        column: name of the column with the images; see `arrow.load_arrow`.
        rows: (N, 2) of each sample the number of its file and its row in it.

    Raises:
        ValueError: the labels are not one per image, or a number is negative.

    Example:
        >>> ArrowImages(("a.arrow",), "image", np.array([[0, 7]]), np.array([3])).images([0])[0].row
        7
    """

    files: tuple[str, ...]
    column: str
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    ids: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        _check_numbers("ArrowImages", len(self.rows), self.labels, self.ids)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sample_ids(self) -> NDArray[np.int64]:
        """(N,) position of each sample in the published split."""
        return np.arange(len(self)) if self.ids is None else self.ids

    def select(self, positions: NDArray[np.int64]) -> "ArrowImages":
        """Return the samples at these positions; they keep their ids."""
        rows, labels, ids = self.rows[positions], self.labels[positions], self.sample_ids[positions]
        return ArrowImages(self.files, self.column, rows, labels, ids)

    def images(self, positions: Iterable[int]) -> tuple[StoredImage, ...]:
        """Where the images at these positions lie."""
        places = (self.rows[i].tolist() for i in positions)
        return tuple(StoredImage(self.files[file], row, self.column) for file, row in places)


StoredImages = ImageFiles | ArrowImages
Split = TensorImages | ImageFiles | ArrowImages


@dataclass(frozen=True, eq=False)
class DataSplits:
    """A data set, ready for a loader.

    Args:
        train, val, test: the splits. Where none is published for testing, `test` is `val` and `test_is_val` says so.
        num_classes: number of classes K.
        class_names: K names, or None.
        mean, std: per channel, of images in [0, 1].
        image_size: height and width in pixels of the images a loader delivers.
        interpolation: of every resize of image files.
        eval_resize: length in pixels the short side of image files is resized to for evaluation, unless the
            augmentation says another; if None, 8/7 of the image size.
        squash: whether both sides are resized to `eval_resize`.

    Example:
        >>> splits = open_data("digits", root=None, image_size=32)
        >>> len(splits.train), len(splits.val), len(splits.test), splits.test_is_val
        (1000, 297, 500, False)
    """

    train: Split
    val: Split
    test: Split
    num_classes: int
    class_names: tuple[str, ...] | None
    mean: Channels
    std: Channels
    image_size: int
    interpolation: Interpolation = "bilinear"
    eval_resize: int | None = None
    squash: bool = False

    def __post_init__(self) -> None:
        for name, split in (("train", self.train), ("val", self.val), ("test", self.test)):
            largest = int(split.labels.max(initial=0))
            if largest >= self.num_classes:
                raise ValueError(
                    f"DataSplits: labels of {name} must be below the number of classes, {self.num_classes}, got "
                    f"{largest} at position {int(split.labels.argmax())}; correct the label or the number of classes"
                )

    @property
    def test_is_val(self) -> bool:
        """Whether `test` is but another name of `val`, so that its accuracy is one of a split used for selection."""
        return self.test is self.val


def _check_numbers(kind: str, count: int, labels: NDArray, ids: NDArray | None) -> None:
    for name, numbers in (("labels", labels), ("ids", ids)):
        if numbers is None:
            continue
        if numbers.shape != (count,):
            raise ValueError(f"{kind}: {count} images need {count} {name}, got an array of shape {numbers.shape}")
        if numbers.dtype.kind not in "iu":
            raise ValueError(f"{kind}: {name} must be whole numbers, got {numbers.dtype}")
        if count and numbers.min() < 0:
            place = int(numbers.argmin())
            # Of labels, losses leave out the negative ones without a word.
            raise ValueError(f"{kind}: {name} must be at least 0, got {numbers[place]} at position {place}; correct it")

"""A data set as the loaders see it: its splits, parts of them, and the hash that identifies one."""

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, from_numpy, uint8

from unikd_fast.data.images import StoredImage
from unikd_fast.data.philox import FIRST_RESERVED_STREAM, sort_keys, uniforms
from unikd_fast.errors import DataError
from unikd_fast.values import NO_LABEL, Channels, Interpolation

IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)


class _Samples:
    """N samples, numbered by their place in the published split."""

    labels: NDArray[np.int64]
    ids: NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sample_ids(self) -> NDArray[np.int64]:
        """Return the (N,) position of each sample in the published split."""
        return np.arange(len(self)) if self.ids is None else self.ids


@dataclass(frozen=True, eq=False)
class TensorImages(_Samples):
    """A split held in memory.

    Args:
        images: (N, 3, H, W) uint8.
        labels: (N,) int64, `NO_LABEL` for a training image without one.
        ids: (N,) position of each sample in the published split that it comes from. If None, the split is whole. Views
            and caches are keyed on these, so they stay valid when a run takes part of a data set.

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

    def select(self, positions: NDArray[np.int64]) -> "TensorImages":
        """Return the samples at these positions; they keep their ids."""
        return TensorImages(self.images[from_numpy(positions)], self.labels[positions], self.sample_ids[positions])


@dataclass(frozen=True, eq=False)
class ImageFiles(_Samples):
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

    def select(self, positions: NDArray[np.int64]) -> "ImageFiles":
        """Return the samples at these positions; they keep their ids."""
        return ImageFiles([self.paths[i] for i in positions], self.labels[positions], self.sample_ids[positions])

    def images(self, positions: Iterable[int]) -> tuple[StoredImage, ...]:
        """Return where the images at these positions lie."""
        return tuple(StoredImage(self.paths[i]) for i in positions)


@dataclass(frozen=True, eq=False)
class ArrowImages(_Samples):
    """A split of images in Arrow files; labels and ids as for `TensorImages`.

    Args:
        files: paths of the Arrow files.
        column: name of the column with the images; see `arrow.load_arrow`.
        rows: (N, 2) number of each sample's file, and its row in it.

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

    def select(self, positions: NDArray[np.int64]) -> "ArrowImages":
        """Return the samples at these positions; they keep their ids."""
        rows, labels, ids = self.rows[positions], self.labels[positions], self.sample_ids[positions]
        return ArrowImages(self.files, self.column, rows, labels, ids)

    def images(self, positions: Iterable[int]) -> tuple[StoredImage, ...]:
        """Return where the images at these positions lie."""
        places = (self.rows[i].tolist() for i in positions)
        return tuple(StoredImage(self.files[file], row, self.column) for file, row in places)


class DatasetItem(NamedTuple):
    """One sample of a data set given as an object; what a worker process is told to read."""

    part: str  # "train", "val" or "test"
    row: int
    label: int
    seeds: tuple[int, ...] = (0,)  # of the data set's own random numbers, for each view

    @property
    def name(self) -> str:
        """Return what messages call it."""
        return f"item {self.row} of the {self.part} data set"


@dataclass(frozen=True, eq=False)
class DatasetImages(_Samples):
    """A split of a map-style data set, given as an object; labels and ids as for `TensorImages`.

    Args:
        dataset: data set whose items are an image and a label; see `datasets.load_datasets`.
        part: "train", "val" or "test".
        is_ready: whether its images are inputs of the networks, (3, H, W) of floats, made by transforms of its own.
        rows: (N,) items that the split takes.
        labels, ids: as for `TensorImages`.

    Raises:
        ValueError: the labels are not one per item, or a number is negative.

    Example:
        >>> DatasetImages(CIFAR10("data"), "train", False, np.arange(8), np.zeros(8, np.int64)).images([5])[0].name
        'item 5 of the train data set'
    """

    dataset: Any
    part: str
    is_ready: bool
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    ids: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        _check_numbers("DatasetImages", len(self.rows), self.labels, self.ids)

    def select(self, positions: NDArray[np.int64]) -> "DatasetImages":
        """Return the samples at these positions; they keep their ids."""
        rows, labels, ids = self.rows[positions], self.labels[positions], self.sample_ids[positions]
        return DatasetImages(self.dataset, self.part, self.is_ready, rows, labels, ids)

    def images(self, positions: Iterable[int], *seeds: NDArray[np.uint64]) -> tuple[DatasetItem, ...]:
        """Return the items at these N positions, with the seeds (N,) of each view; without seeds they are 0."""
        own = zip(*(each.tolist() for each in seeds), strict=True) if seeds else itertools.repeat((0,))
        return tuple(
            DatasetItem(self.part, int(self.rows[i]), int(self.labels[i]), each)
            for i, each in zip(positions, own, strict=False)
        )


StoredImages = ImageFiles | ArrowImages | DatasetImages
Split = TensorImages | StoredImages


@dataclass(frozen=True, eq=False)
class DataSplits:
    """A data set, ready for a loader.

    Args:
        train, val, test: splits. If none is published for testing, `test` is `val`, and `test_is_val` is true. Only
            training images may lack a label.
        num_classes: number of classes K.
        class_names: K names, or None.
        mean, std: mean and deviation per channel, of images in [0, 1].
        image_size: height and width in pixels of the images a loader delivers.
        interpolation: interpolation of every resize of image files.
        eval_resize: length in pixels that the short side of image files is resized to for evaluation, unless the
            augmentation has another. If None, 8/7 of the image size.
        squash: whether both sides are resized to `eval_resize`.
        is_described: whether the fields above say how images are preprocessed; of images that are ready it may be
            unknown.

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
    is_described: bool = True

    def __post_init__(self) -> None:
        for name, split in (("train", self.train), ("val", self.val), ("test", self.test)):
            largest = int(split.labels.max(initial=0))
            if largest >= self.num_classes:
                raise ValueError(
                    f"DataSplits: labels of {name} must be below the number of classes, {self.num_classes}, got "
                    f"{largest} at position {int(split.labels.argmax())}; correct the label or the number of classes"
                )
            if name != "train" and split.labels.min(initial=0) < 0:
                raise ValueError(
                    f"DataSplits: {name} has no label at position {int(split.labels.argmin())}, and accuracies need "
                    "one for every image; add it, or leave the image out"
                )
        (name, count), *_ = Counter(self.class_names or ("",)).most_common(1)
        if count > 1:
            raise ValueError(f"DataSplits: {count} classes have the name {name!r}; rename them, or make them one")

    @property
    def is_resized(self) -> bool:
        """Whether a loader resizes, crops and normalises the images as the networks' weights ask for; those in memory,
        and those that are ready, are taken as they are."""
        ready = isinstance(self.train, DatasetImages) and self.train.is_ready
        return not (ready or isinstance(self.train, TensorImages))

    @property
    def test_is_val(self) -> bool:
        """Whether `test` is the same split as `val`, so that its accuracy is that of a split used for selection."""
        return self.test is self.val

    @property
    def unlabelled(self) -> int:
        """Return the number of training images without a label."""
        return int((self.train.labels == NO_LABEL).sum())


def _check_numbers(kind: str, count: int, labels: NDArray, ids: NDArray | None) -> None:
    for name, numbers in (("labels", labels), ("ids", ids)):
        if numbers is None:
            continue
        if numbers.shape != (count,):
            raise ValueError(f"{kind}: {count} images need {count} {name}, got an array of shape {numbers.shape}")
        if numbers.dtype.kind not in "iu":
            raise ValueError(f"{kind}: {name} must be whole numbers, got {numbers.dtype}")
        wrong = (numbers < 0) & ((numbers != NO_LABEL) | (name == "ids"))
        if wrong.any():
            place = int(wrong.argmax())
            raise ValueError(
                f"{kind}: {name} must be at least 0{f', or {NO_LABEL} for none' if name == 'labels' else ''}, got "
                f"{numbers[place]} at position {place}; correct it"
            )


_SUBSET_STREAM = FIRST_RESERVED_STREAM + 1
_SPLIT_STREAM = FIRST_RESERVED_STREAM + 2
_CLASS_STREAM = FIRST_RESERVED_STREAM + 3


def class_balanced_subset(labels: ArrayLike, total: int, *, seed: int) -> NDArray[np.int64]:
    """Choose `total` samples, equally many of each class; a remainder goes to randomly chosen classes, one each.

    With one seed a smaller subset is part of every larger one, so curves over the number of labels are comparable.

    Args:
        labels: (N,) class of each sample.
        total: number of samples to choose, at least one per class.
        seed: seed in [0, 2^64).

    Returns:
        (total,) sorted positions in `labels`.

    Raises:
        ValueError: fewer samples than classes are asked for, or a class is too small.

    Example:
        >>> class_balanced_subset([0, 0, 0, 1, 1, 1], 2, seed=0).shape
        (2,)
    """
    values = np.asarray(labels)
    classes, counts = np.unique(values, return_counts=True)
    if not len(classes) <= total <= len(values):
        raise ValueError(
            f"class_balanced_subset: total must be between the {len(classes)} classes and the {len(values)} samples, "
            f"got {total}"
        )
    share, remainder = divmod(total, len(classes))
    wanted = np.full(len(classes), share)
    wanted[sort_keys(seed, 0, np.arange(len(classes)), stream=_CLASS_STREAM).argsort(kind="stable")[:remainder]] += 1
    if (counts < wanted).any():
        small = int((counts < wanted).argmax())
        raise ValueError(
            f"class_balanced_subset: class {classes[small]} has {counts[small]} samples, "
            f"{wanted[small]} are needed for a balanced subset of {total}; lower the total to "
            f"{int(counts.min()) * len(classes)} or less"
        )
    order, rank_in_class = _shuffle_classes(values, seed, _SUBSET_STREAM)
    return np.sort(order[rank_in_class < wanted[np.searchsorted(classes, values[order])]])


def stratified_split(labels: ArrayLike, sizes: Sequence[int], *, seed: int) -> tuple[NDArray[np.int64], ...]:
    """Cut a data set into disjoint parts that each hold the classes in the proportions of the whole.

    Args:
        labels: (N,) class of each sample.
        sizes: number of samples of each part, in all at most N.
        seed: seed in [0, 2^64).

    Returns:
        One vector of sorted positions in `labels` per part.

    Raises:
        ValueError: a part is empty, or the parts hold more than N samples.

    Example:
        >>> train, val = stratified_split([0, 1] * 10, (14, 6), seed=0)
    """
    values = np.asarray(labels)
    if min(sizes, default=0) < 1 or sum(sizes) > len(values):
        raise ValueError(
            f"stratified_split: sizes must be positive and add up to at most {len(values)} samples, got {tuple(sizes)}"
        )
    # Spread each class evenly over (0, 1), at an offset of its own: any stretch of the line then holds the classes in
    # proportion, whatever its length.
    classes, class_of, counts = np.unique(values, return_inverse=True, return_counts=True)
    offsets = uniforms(seed, 0, np.arange(len(classes)), 1, stream=_CLASS_STREAM)[:, 0]
    order, rank_in_class = _shuffle_classes(values, seed, _SPLIT_STREAM)
    places = (rank_in_class + offsets[class_of[order]]) / counts[class_of[order]]
    line = order[places.argsort(kind="stable")]
    ends = np.cumsum(sizes)
    return tuple(np.sort(line[end - size : end]) for size, end in zip(sizes, ends, strict=True))


def _shuffle_classes(labels: NDArray, seed: int, stream: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return positions grouped by class in random order, (N,), and the rank of each within its class, (N,)."""
    keys = sort_keys(seed, 0, np.arange(len(labels)), stream=stream)
    order = np.lexsort((keys, labels))
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    return order, np.arange(len(labels)) - np.repeat(starts, counts)


# A file system over a network answers many questions at a time, each late.
_THREADS = 32
_FILES_AT_A_TIME = 1024
_HASHED_BYTES = 2**24


def hash_split(split: Split) -> str:
    """Hash the samples of a split, their order and their ids, but not their labels, which no teacher sees.

    Images in memory are hashed with their shape. Of images on disk only names and sizes are: one overwritten by another
    of the same size goes unnoticed, because to read all of ImageNet would cost as much as an epoch. Names are relative
    to the deepest folder that holds all, or all without a label, so a data set may move, and a folder and the files
    packed from it are the same data set. Pixels in Arrow files that have no names are hashed as a whole. Of data sets
    given as objects a few items are hashed, and their number.

    Args:
        split: N samples.

    Returns:
        SHA-256, 64 hexadecimal digits.

    Raises:
        DataError: the size of a file cannot be read; the message names it.

    Example:
        >>> len(hash_split(open_data("digits", root=None, image_size=32).train))
        64
    """
    chunks: Iterator[bytes | memoryview]
    if isinstance(split, TensorImages):
        header, chunks = ["images", *split.images.shape], _pixels(split)
    elif isinstance(split, DatasetImages):
        from unikd_fast.data.datasets import describe_items

        header, chunks = ["items", len(split)], describe_items(split)
    else:
        header, chunks = ["files", len(split)], _files(split) if isinstance(split, ImageFiles) else _rows(split)
    # The header says how many ids of 8 bytes, and how many images or lines, come after it.
    digest = hashlib.sha256(json.dumps(header).encode() + b"\n")
    digest.update(split.sample_ids.astype("<i8").tobytes())
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _pixels(split: TensorImages) -> Iterator[memoryview]:
    count = max(1, _HASHED_BYTES // max(1, split.images[:1].numel()))
    for start in range(0, len(split), count):
        yield split.images[start : start + count].cpu().numpy().ravel().data


def _files(split: ImageFiles) -> Iterator[bytes]:
    """Yield a line of JSON [folder, name, size in bytes] for each file; folders are relative to the one of them all, or
    of all without a label."""
    groups: tuple[list[str], list[str]] = [], []
    for path, label in zip(split.paths, split.labels.tolist(), strict=True):
        groups[label == NO_LABEL].append(path)
    relative = _relative(groups[0]) | _relative(groups[1])

    def describe(paths: Sequence[str]) -> bytes:
        return "".join(_line(relative, path, _size(path)) for path in paths).encode()

    chunks = (split.paths[start : start + _FILES_AT_A_TIME] for start in range(0, len(split), _FILES_AT_A_TIME))
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="hash-split") as threads:
        yield from threads.map(describe, chunks)


def _rows(split: ArrowImages) -> Iterator[bytes]:
    """Yield lines as `_files` does, for images in Arrow files."""
    from unikd_fast.data.arrow import describe_rows

    described = [describe_rows(path, split.column) for path in split.files]
    taken = [described[file][row] for file, row in split.rows.tolist()]
    relative = _relative([name for name, _ in taken])
    for name, size in taken:
        yield _line(relative, name, size).encode()


def _relative(paths: Sequence[str]) -> dict[str, str]:
    absolute = {folder: str(Path(folder).absolute()) for folder in set(map(os.path.dirname, paths))}
    root = os.path.commonpath(absolute.values()) if absolute else ""
    return {folder: os.path.relpath(path, root) for folder, path in absolute.items()}


def _line(relative: dict[str, str], path: str, size: Any) -> str:
    folder, name = os.path.split(path)
    return json.dumps([relative[folder], name, size]) + "\n"


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116  a Path of each of a million files takes longer than its size
    except OSError as error:
        raise DataError(
            f"hash_split: cannot find out the size of {path}: {error.strerror}; restore the file or remove it"
        ) from error

"""Map-style data sets of (image, label) that are given as objects: their labels, and how their items are read.

An item's random transforms draw from torch's, NumPy's and Python's generators, which are seeded for each item by the
run's seed, the epoch and the sample. A sample so has one view an epoch, as by our own augmentation, whatever the batch
size, the number of workers or processes, and after a resume. Generators of a transform's own are not seeded.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset

from unikd_fast.data.files import DecodedBatch, Decoder, DecodeRequest, without_bad
from unikd_fast.data.images import BadImage, as_rgb
from unikd_fast.data.splits import IMAGENET_MEAN, IMAGENET_STD, DatasetImages, DatasetItem, DataSplits
from unikd_fast.data.views import Windows
from unikd_fast.data.workers import worker_died
from unikd_fast.errors import DataError
from unikd_fast.values import NO_LABEL, Interpolation

_IMAGE_KEYS = ("image", "img", "images", "pixel_values")
_LABEL_KEYS = ("label", "labels", "fine_label", "target")
_LABEL_ATTRIBUTES = ("targets", "labels", "_labels")
_PLAIN_STEPS = ("ToTensor", "PILToTensor", "ToImage", "ConvertImageDtype", "MaybeToTensor")
_HASHED_ITEMS = 32
_SEEDS_OF_NUMPY = 2**32
_LARGEST_DEFAULT = 224


def load_datasets(
    train: Any, val: Any, test: Any, *, num_classes: int, image_size: int | None = None, workers: int = 0
) -> DataSplits:
    """Return the splits of data sets given as objects.

    Images are PIL images or uint8 tensors (3, H, W), of which the loader makes views, or float tensors (3, S, S), which
    are taken as they are. Labels are whole numbers, -100 for a training image without one; they are found in
    ``targets`` or ``labels``, in the columns of a Hugging Face data set, or else every item is read once.

    Args:
        train, val: map-style data sets whose items are (image, label), or dictionaries with "image" and "label".
        test: data set, or None for that of val.
        num_classes: number of classes K.
        image_size: height and width in pixels of the images that the networks see. If None, those of the float tensors,
            or the short side of the first image and at most 224.
        workers: number of processes that read labels.

    Raises:
        ValueError: a data set cannot be indexed or is empty; an item is not an image and a label; a label is outside 0
            to K - 1; images of train and val are of different kinds or sizes.

    Example:
        >>> load_datasets(CIFAR10("data"), CIFAR10("data", train=False), None, num_classes=10).image_size
        32
    """
    parts = {"train": train, "val": val} | ({} if test is None else {"test": test})
    found = {part: _split(dataset, part, num_classes, workers) for part, dataset in parts.items()}
    shapes = {part: _shape(split) for part, split in found.items()}
    (first, kind), *others = ((part, split.is_ready) for part, split in found.items())
    for part, other in others:
        if other != kind:
            said = {True: "float tensors", False: "images without a transform to tensors"}
            raise ValueError(
                f"the items of the {first} data set are {said[kind]} and those of {part} {said[other]}; give both the "
                "same kind"
            )
    if kind:
        sizes = set(shapes.values())
        if len(sizes) > 1 or image_size not in (None, shapes["train"][0]):
            listed = ", ".join(f"{part} {height} x {width}" for part, (height, width) in shapes.items())
            asked = "" if image_size is None else f", and image_size = {image_size}"
            raise ValueError(f"images are {listed}{asked}; let the data sets' transforms make images of one size")
        size = shapes["train"][0]
    else:
        size = image_size or min(*shapes["train"], _LARGEST_DEFAULT)
    splits = DataSplits(
        train=found["train"],
        val=found["val"],
        test=found.get("test", found["val"]),
        num_classes=num_classes,
        class_names=_class_names(train, num_classes),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        image_size=size,
    )
    return _described_by(val, splits) if kind else splits


def _described_by(dataset: Any, splits: DataSplits) -> DataSplits:
    """Return the splits with the preprocessing of a data set's own transforms, if they are known ones."""
    transform = getattr(_base(dataset), "transform", None)
    changes: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    for step in getattr(transform, "transforms", [transform]):
        name, known = type(step).__name__, False
        if name == "Resize":
            sides = step.size if isinstance(step.size, Sequence) else [step.size]
            interpolation = getattr(step.interpolation, "value", step.interpolation)  # v2 holds the value alone
            known = len(set(sides)) == 1 and sides[0] is not None and interpolation in get_args(Interpolation)
            known = known and step.max_size is None and "eval_resize" not in changes
            changes |= {"eval_resize": sides[0], "squash": len(sides) == 2, "interpolation": interpolation}
        elif name == "CenterCrop":
            known = "eval_resize" in changes  # otherwise it crops images as they are, which is not told to users
        elif name == "Normalize":
            known = len(step.mean) == len(step.std) == 3
            changes |= {"mean": tuple(map(float, step.mean)), "std": tuple(map(float, step.std))}
        elif name == "ToDtype":
            known = step.scale  # otherwise levels stay 0 to 255
        if not known and name not in _PLAIN_STEPS:
            return replace(splits, is_described=False)
    return replace(splits, **changes)


def _base(dataset: Any) -> Any:
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


def first_size(dataset: Any, image_size: int | None) -> int:
    """Return the height and width in pixels of the images that the networks see; see `load_datasets`.

    Raises:
        ValueError: the data set cannot be indexed or is empty, or its first item is not an image and a label.
    """
    image, _ = _first(dataset, "train")
    if isinstance(image, Tensor):
        if image_size not in (None, image.shape[-1]):
            raise ValueError(
                f"image_size = {image_size!r} with images that the data set's transforms make {tuple(image.shape)}; "
                "leave it out, or change the transforms"
            )
        return image.shape[-1]
    if image_size is not None and (not isinstance(image_size, int) or image_size < 1):
        raise ValueError(f"image_size = {image_size!r}; give the height and width as one number of pixels")
    return min(image.height, image.width, _LARGEST_DEFAULT) if image_size is None else image_size


def digest(splits: DataSplits) -> str:
    """Return a digest of the splits of `load_datasets`: their labels, their numbers, and a few of their items."""
    whole = hashlib.sha256(f"{splits.num_classes} {splits.image_size}".encode())
    for split in (splits.train, splits.val, splits.test):
        assert isinstance(split, DatasetImages)
        whole.update(f"{len(split)} {split.is_ready}\n".encode() + split.labels.astype("<i8").tobytes())
        for described in describe_items(split):
            whole.update(described)
    return whole.hexdigest()[:12]


def describe_items(split: DatasetImages) -> Iterator[bytes]:
    """Yield the pixels of a few items, evenly spread; of those that cannot be read, that they cannot."""
    for position in range(0, len(split), max(1, len(split) // _HASHED_ITEMS)):
        (item,) = split.images([position])
        try:
            image = read_item(split.dataset, item)
        except DataError:  # the loader does what data.bad_images says
            yield b"unreadable\n"
            continue
        pixels = image.numpy() if isinstance(image, Tensor) else np.asarray(image)
        yield f"{pixels.shape} {pixels.dtype}\n".encode() + np.ascontiguousarray(pixels).tobytes()


def read_item(dataset: Any, item: DatasetItem, view: int = 0) -> Image.Image | Tensor:
    """Return the image of an item: RGB, or a float tensor (3, H, W).

    Raises:
        DataError: the data set raises an error, or the item is not an image with the label that it had before.
    """
    image, label = _read(dataset, item.row, item.name, item.seeds[view])
    try:
        own = _as_label(label)
    except ValueError as error:
        raise DataError(f"{item.name}: {error}") from error
    if own != item.label:
        raise DataError(
            f"{item.name} has the label {own}, and had {item.label} before; make labels the same every time"
        )
    return image


def _read(dataset: Any, row: int, name: str, seed: int) -> tuple[Image.Image | Tensor, Any]:
    """Return the image and the label of an item, whose random numbers are those of a seed."""
    with _seeded(seed):
        try:
            found = dataset[row]
        except Exception as error:
            if isinstance(error, MemoryError) or "DataLoader worker" in str(error):
                raise
            raise DataError(
                f"{name} cannot be read ({type(error).__name__}: {error}); correct it, or take a subset without it"
            ) from error
    try:
        return _pair(found)
    except ValueError as error:
        raise DataError(f"{name}: {error}") from error


@dataclass(frozen=True)
class DatasetDecoder(Decoder):
    """Make views of the items of data sets given as objects, as `Decoder` does of files.

    Args:
        windows, interpolation: as for `Decoder`.
        datasets: data sets by the name of their split.
        is_ready: see `DatasetImages`.
    """

    datasets: Mapping[str, Any] = field(default_factory=dict)
    is_ready: bool = False

    @classmethod
    def of(cls, splits: DataSplits, windows: Windows) -> "DatasetDecoder":
        """Return the decoder of these splits."""
        parts = [split for split in (splits.train, splits.val, splits.test) if isinstance(split, DatasetImages)]
        datasets = {split.part: split.dataset for split in parts}
        return cls(windows, splits.interpolation, datasets, not splits.is_resized)

    def __getitem__(self, request: DecodeRequest) -> DecodedBatch:
        """Read a batch of items; see `Decoder`."""
        return self._ready(request) if self.is_ready else super().__getitem__(request)

    def _read(self, stored: Any) -> Image.Image:
        image = read_item(self.datasets[stored.part], stored)
        assert isinstance(image, Image.Image)
        self.windows.check(stored, image.height, image.width)
        return image

    def _ready(self, request: DecodeRequest) -> DecodedBatch:
        size = self.windows.image_size
        pixels = torch.zeros(1 if request.second is None else 2, len(request.images), 3, size, size)
        bad: dict[int, BadImage] = {}
        for i, item in enumerate(request.images):
            for view, images in enumerate(pixels):
                try:
                    image = read_item(self.datasets[item.part], item, view)
                    assert isinstance(image, Tensor)
                    if image.shape != images[i].shape:
                        raise DataError(
                            f"{item.name} is {tuple(image.shape)}, and the first {tuple(images[i].shape)}; let the "
                            "data set's transforms make images of one size"
                        )
                    images[i] = image
                except DataError as error:
                    if request.on_bad == "raise":
                        raise
                    bad[i] = BadImage(item.name, int(request.sample_ids[i]), str(error))
        images, *second = pixels
        labels, sample_ids = torch.from_numpy(request.labels), torch.from_numpy(request.sample_ids)
        batch = DecodedBatch(images, labels, sample_ids, second[0] if second else None, list(bad.values()))
        return without_bad(batch, list(bad), request.on_bad) if bad else batch


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's, NumPy's and Python's generators, and restore them afterwards."""
    python, numpy, torch_ = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % _SEEDS_OF_NUMPY)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(torch_)


def _first(dataset: Any, part: str) -> tuple[Image.Image | Tensor, Any]:
    """Return the first image and label of a data set."""
    kind = type(dataset).__name__
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise ValueError(
            f"the {part} data set is a {kind}, which cannot be indexed; give a data set with __len__ and __getitem__, "
            "whose items are (image, label), or use unikd_fast.Distiller in a loop of your own"
        )
    if isinstance(dataset, str | bytes | Tensor | np.ndarray | Mapping | tuple):
        raise ValueError(
            f"the {part} data set is a {kind}; give a torch.utils.data.Dataset whose items are (image, label), such as "
            "TensorDataset(images, labels) or torchvision.datasets.ImageFolder(root)"
        )
    if not len(dataset):
        raise ValueError(f"the {part} data set, a {kind}, is empty; give one with images")
    return _read(dataset, 0, f"item 0 of the {part} data set", 0)


def _split(dataset: Any, part: str, num_classes: int, workers: int) -> DatasetImages:
    image, _ = _first(dataset, part)
    labels = _labels(dataset, part, workers)
    numbered = labels[labels != NO_LABEL] if part == "train" else labels
    low, high = int(numbered.min(initial=num_classes - 1)), int(numbered.max(initial=0))
    if low < 0 or high >= num_classes:
        shift = "; subtract 1" if (low, high) == (1, num_classes) else ""
        raise ValueError(
            f"the labels of the {part} data set are {low} to {high}, and the networks have {num_classes} classes, 0 to "
            f"{num_classes - 1}{shift or '; number them so, or give networks with as many classes'}"
        )
    return DatasetImages(dataset, part, isinstance(image, Tensor), np.arange(len(dataset)), labels)


def _pair(item: Any) -> tuple[Image.Image | Tensor, Any]:
    """Return the image and the label of an item.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(item, Mapping):
        keys = [next((key for key in known if key in item), None) for known in (_IMAGE_KEYS, _LABEL_KEYS)]
        if None in keys:
            raise ValueError(
                f"it has the keys {', '.join(map(str, item))}; an item must have an image ({', '.join(_IMAGE_KEYS)}) "
                f"and a label ({', '.join(_LABEL_KEYS)})"
            )
        return _as_image(item[keys[0]]), item[keys[1]]
    if not isinstance(item, tuple | list) or len(item) < 2:
        raise ValueError(f"it is a {type(item).__name__}; an item must be (image, label)")
    return _as_image(item[0]), item[1]


def _as_image(image: Any) -> Image.Image | Tensor:
    if isinstance(image, Image.Image):
        try:
            return as_rgb(image)
        except OSError as error:  # it was opened, and is decoded here
            raise ValueError(
                f"its image cannot be decoded: {error}; repair the file, or take a subset without it"
            ) from error
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        if image.ndim == 2 or (image.ndim == 3 and image.shape[-1] in (3, 4)):
            return Image.fromarray(image).convert("RGB")
        raise ValueError(f"its image is an array {image.shape}; it must be (H, W, 3)")
    if not isinstance(image, Tensor):
        raise ValueError(
            f"its image is a {type(image).__name__}; it must be a PIL image, a uint8 tensor or a float tensor (3, H, W)"
        )
    if image.ndim != 3 or image.shape[0] != 3:
        grey = ", such as image.expand(3, -1, -1) of a grey one" if image.ndim == 3 and image.shape[0] == 1 else ""
        raise ValueError(f"its image is a tensor {tuple(image.shape)}; it must be (3, H, W){grey}")
    if image.layout != torch.strided or image.is_meta:
        raise ValueError(f"its image is a tensor of layout {image.layout} on {image.device}; it must be dense")
    if image.dtype == torch.uint8:
        return Image.fromarray(image.permute(1, 2, 0).cpu().contiguous().numpy())
    if not image.is_floating_point():
        raise ValueError(f"its image is a tensor of {image.dtype}; it must be uint8, or floating-point")
    return image.detach().to("cpu", torch.float32)


def _shape(split: DatasetImages) -> tuple[int, int]:
    (item,) = split.images([0])
    image = read_item(split.dataset, item)
    if not isinstance(image, Tensor):
        return image.height, image.width
    height, width = image.shape[1:]
    if height != width:
        raise ValueError(
            f"{item.name} is a tensor {tuple(image.shape)}; networks are given square images: add a crop, such as "
            "CenterCrop, to the data set's transforms"
        )
    return height, width


def _labels(dataset: Any, part: str, workers: int) -> NDArray[np.int64]:
    """Return the (N,) labels of a data set, without reading its items if they are known otherwise."""
    known = _known_labels(dataset)
    items: Any = _LabelsOf(dataset, part)
    if known is None or not _agrees(known, items):
        try:
            known = list(DataLoader(items, batch_size=None, num_workers=workers, generator=torch.Generator()))
        except RuntimeError as error:  # those of items are returned
            raise worker_died(error) from error
    if (bad := next((label for label in known if isinstance(label, DataError)), None)) is not None:
        raise bad
    try:
        return np.array([_as_label(label) for label in known], np.int64)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"labels of the {part} data set: {error}") from error


def _agrees(known: Sequence[Any], items: "_LabelsOf") -> bool:
    """Return whether these are the labels of the first and the last item."""
    for place in (0, len(items) - 1):
        label = items[place]
        try:
            if not isinstance(label, DataError) and _as_label(known[place]) != _as_label(label):
                return False
        except ValueError:
            return False  # such as names of classes
    return True


class _LabelsOf:
    """A data set of another's labels, or of the DataErrors of items that cannot be read."""

    def __init__(self, dataset: Any, part: str) -> None:
        self._dataset, self._part = dataset, part

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, row: int) -> Any:
        try:
            return _read(self._dataset, row, f"item {row} of the {self._part} data set", 0)[1]
        except DataError as error:
            return error


def _known_labels(dataset: Any) -> Sequence[Any] | None:
    if isinstance(dataset, Subset):
        inner = _known_labels(dataset.dataset)
        return None if inner is None else [inner[place] for place in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [_known_labels(each) for each in dataset.datasets]
        return None if any(part is None for part in parts) else [label for part in parts for label in part or ()]
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1].tolist() if len(dataset.tensors) > 1 else None
    if columns := getattr(dataset, "column_names", None):  # of a Hugging Face data set
        key = next((key for key in _LABEL_KEYS if key in columns), None)
        return None if key is None else list(dataset[key])
    found = next((getattr(dataset, name) for name in _LABEL_ATTRIBUTES if hasattr(dataset, name)), None)
    if not isinstance(found, Sequence | Tensor | np.ndarray) or len(found) != len(dataset):
        return None
    transform = getattr(dataset, "target_transform", None)
    labels = found.tolist() if isinstance(found, Tensor | np.ndarray) else list(found)
    return labels if transform is None else [transform(label) for label in labels]


def _as_label(label: Any) -> int:
    """Return a label as a number.

    Raises:
        ValueError: it is not a whole number.
    """
    if isinstance(label, Tensor | np.ndarray | np.generic) and label.ndim == 0:
        label = label.item()
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if not isinstance(label, int):
        shape = f" {tuple(label.shape)}" if isinstance(label, Tensor | np.ndarray) else ""
        shown = f"a {type(label).__name__}{shape}" if shape else repr(label)
        raise ValueError(f"a label is {shown}; it must be one whole number a sample, 0 to K - 1 for K classes")
    return int(label)


def _class_names(dataset: Any, num_classes: int) -> tuple[str, ...] | None:
    base = _base(dataset)
    names = getattr(base, "classes", None)
    if names is None and (features := getattr(base, "features", None)) is not None:
        names = next((getattr(features[key], "names", None) for key in _LABEL_KEYS if key in features), None)
    if not isinstance(names, Sequence) or len(names) != num_classes or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names)

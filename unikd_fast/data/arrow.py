"""Image data sets that Hugging Face `datasets` has on disk: memory-mapped Arrow files, read by index.

What `unikd data pack` and `save_to_disk` wrote is read where it lies. Parquet files, WebDataset tars and `imagefolder`
layouts are converted by `datasets` when they are first opened, into its cache (`$HF_HOME`, else ~/.cache/huggingface).
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from unikd_fast.data.images import StoredImage
from unikd_fast.data.splits import IMAGENET_MEAN, IMAGENET_STD, ArrowImages, DataSplits
from unikd_fast.errors import DataError

UNFINISHED = ".unikd-packing"
"""File in a store that `unikd data pack` has begun and not finished."""

_SPLITS = {"train": ("train",), "val": ("validation", "val", "valid", "dev"), "test": ("test",)}
_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp")
_LABELS = ("label", "labels", "fine_label", "cls", "class", "json")


def load_arrow(root: Path, image_size: int, num_classes: int | None = None) -> DataSplits:
    """Open a data set that `datasets` reads; no image is read yet.

    The splits are train, validation and test by the names that `datasets` knows for them; of the last two one is
    enough, and a test split without labels (-1) is left out. Images are in the column of type Image, or in one of the
    usual name that holds encoded images or (H, W, 3) arrays of uint8; labels in that of type ClassLabel, which names
    the classes, or in one of the usual name that holds whole numbers or strings, or a field of that name, as in
    WebDataset's json. A sample's row is its id. Mean and deviation are those of ImageNet.

    Args:
        root: folder written by `unikd data pack` or `save_to_disk`, or one with Parquet files, with WebDataset tars,
            or in the layout of `imagefolder`.
        image_size: height and width in pixels of the images a loader delivers.
        num_classes: number of classes K if labels are plain numbers. If None, one more than the largest of train.

    Raises:
        ValueError: the folder cannot be opened, is a store that is not finished, or lacks a split, a column or a label.

    Example:
        >>> load_arrow(Path("/data/imagenet-arrow"), 224).num_classes
        1000
    """
    found = _open(root)
    parts = {
        part: next(found[name] for name in names if name in found)
        for part, names in _SPLITS.items()
        if not found.keys().isdisjoint(names)
    }
    if "train" not in parts or len(parts) < 2:
        raise ValueError(
            f"load_arrow: {root} has the splits {', '.join(found)}, and train with validation or test is needed; "
            "rename them, or divide one by Dataset.train_test_split"
        )
    labels = {part: _read_labels(dataset, f"split {part} of {root}") for part, dataset in parts.items()}
    if len(parts) == 3 and labels["test"].values.dtype.kind == "i" and labels["test"].values.min(initial=0) < 0:
        del parts["test"]  # published benchmarks keep these labels back
    names = labels["train"].names
    opened = {
        part: _open_split(dataset, _numbers(labels[part], names, f"split {part} of {root}"), root)
        for part, dataset in parts.items()
    }
    if names is not None:
        num_classes = len(names)
    elif num_classes is None:
        num_classes = int(labels["train"].values.max(initial=0)) + 1
    held_out = [opened[part] for part in ("val", "test") if part in opened]
    return DataSplits(
        train=opened["train"],
        val=held_out[0],
        test=held_out[-1],
        num_classes=num_classes,
        class_names=names,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        image_size=image_size,
    )


def read_row(stored: StoredImage) -> bytes | NDArray[np.uint8]:
    """Return the encoded image or the (H, W, 3) pixels in a row of an Arrow file; see `StoredImage.read`."""
    value = _table(stored.path).column(stored.column)[stored.row]
    if isinstance(value, pa.ExtensionScalar):  # Array3D and its like
        value = value.value
    if value.is_valid and pa.types.is_struct(value.type):
        path = value["path"].as_py()
        value = value["bytes"]
        if not value.is_valid and path is not None:
            return StoredImage(path).read()
    if not value.is_valid:
        raise DataError(f"cannot decode {stored.name}: it holds no image; restore it or remove the row")
    if _is_array(value.type):
        return _pixels(value, stored)
    content: bytes = value.as_py()
    return content


def name_row(stored: StoredImage) -> str:
    """Return the name of the image in a row of an Arrow file, where it has one, and the row."""
    table = _table(stored.path)
    images, name = table.column(stored.column), None
    if pa.types.is_struct(images.type):
        name = images[stored.row]["path"].as_py()
    elif "path" in table.column_names:
        name = table.column("path")[stored.row].as_py()
    place = f"row {stored.row} of {stored.path}"
    return f"{name}, {place}" if name else place


def describe_rows(path: str, column: str) -> list[tuple[str, Any]]:
    """Return, for each row of an Arrow file, its image's name and what distinguishes it from others of that name.

    That is the size in bytes of an encoded image, the height of pixels with a name, or a checksum of those without one.
    """
    table = _table(path)
    images = table.column(column)
    if _is_array(images.type):
        if "path" in table.column_names:
            stored = [getattr(chunk, "storage", chunk) for chunk in images.chunks]  # of an extension type, as Array3D
            heights = [height for chunk in stored for height in pc.list_value_length(chunk).to_pylist()]
            return [(name or "", height) for name, height in zip(table["path"].to_pylist(), heights, strict=True)]
        return [("", _checksum(StoredImage(path, row, column))) for row in range(len(images))]
    if not pa.types.is_struct(images.type):
        return [("", size) for size in pc.binary_length(images).to_pylist()]
    names = pc.struct_field(images, "path").to_pylist()
    sizes = pc.binary_length(pc.struct_field(images, "bytes")).to_pylist()
    return [
        (name or "", Path(name).stat().st_size if size is None and name else size)
        for name, size in zip(names, sizes, strict=True)
    ]


def _checksum(stored: StoredImage) -> list[int] | None:
    try:
        pixels = read_row(stored)
    except DataError:
        return None
    assert isinstance(pixels, np.ndarray)
    return [*pixels.shape, crc32(pixels.tobytes())]


@cache
def _table(path: str) -> pa.Table:
    """Return the content of an Arrow file, memory-mapped."""
    try:
        return pa.ipc.open_stream(pa.memory_map(path)).read_all()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}; restore the file or write the store again") from error


def _is_array(kind: pa.DataType) -> bool:
    """Return whether this is a type of images as nested lists of uint8."""
    kind, depth = getattr(kind, "storage_type", kind), 0
    while pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        kind, depth = kind.value_type, depth + 1
    return depth in (2, 3) and bool(pa.types.is_uint8(kind))


def _pixels(value: Any, stored: StoredImage) -> NDArray[np.uint8]:
    """Return (H, W, 3) pixels of nested lists, without a copy where they have three channels."""
    nested = value.values
    shape = [len(nested)]
    while not pa.types.is_uint8(nested.type):
        if pa.types.is_fixed_size_list(nested.type):
            shape.append(nested.type.list_size)
        else:
            lengths = np.diff(nested.offsets)
            shape.append(int(lengths[0]) if len(lengths) and lengths.min() == lengths.max() else -len(lengths))
        nested = nested.flatten()
    if min(shape) < 1 or shape[2:] not in ([], [1], [3]):
        found = " x ".join(str(length) if length >= 0 else "varying" for length in shape)
        raise DataError(
            f"cannot decode {stored.name}: it holds an array of {found}, and height x width x 3 is needed; convert it, "
            "or store encoded images"
        )
    levels: NDArray[np.uint8] = nested.to_numpy().reshape(shape)
    return levels if shape[2:] == [3] else np.repeat(levels.reshape(*shape[:2], 1), 3, axis=2)


def _open(root: Path) -> Mapping[str, Any]:
    """Return the splits of a data set, each a `datasets.Dataset`."""
    import datasets

    saved = any((root / name).is_file() for name in ("dataset_dict.json", "state.json"))
    if not saved and (root / UNFINISHED).exists():
        raise ValueError(f"load_arrow: {root} is a store that is not finished; run the same `unikd data pack` again")
    load = datasets.load_from_disk if saved else datasets.load_dataset
    try:
        with _bars_on_terminals():
            found = load(str(root), keep_in_memory=False)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise ValueError(
            f"load_arrow: {root} cannot be opened by datasets {datasets.__version__}: {cause}; it must hold what "
            "`unikd data pack` or save_to_disk wrote, Parquet files, WebDataset tars or an imagefolder"
        ) from error
    return found if isinstance(found, dict) else {str(found.split or "train"): found}


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Show the progress bars of `datasets` only where stderr is a terminal."""
    import datasets

    hide = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()


def _open_split(dataset: Any, labels: NDArray[np.int64], root: Path) -> ArrowImages:
    column = _find(dataset.features, "Image", _IMAGES, f"load_arrow: {root}", "image")
    kind = dataset.data.schema.field(column).type
    if not (pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or _is_array(kind)):
        raise ValueError(
            f"load_arrow: column {column} of {root} must hold encoded images or (height, width, 3) arrays of uint8, "
            f"got {dataset.features[column]}; convert it by Dataset.cast_column"
        )
    files = tuple(file["filename"] for file in dataset.cache_files)
    counts = [_table(file).num_rows for file in files]
    rows = [np.column_stack((np.full(count, number), np.arange(count))) for number, count in enumerate(counts)]
    return ArrowImages(files, column, np.concatenate([np.empty((0, 2), np.int64), *rows]), labels)


def _find(features: Mapping[str, Any], kind: str, usual: Sequence[str], where: str, called: str) -> str:
    """Return the one column of this type, else the first that has a usual name."""
    typed = [name for name, feature in features.items() if type(feature).__name__ == kind]
    if len(typed) == 1:
        return typed[0]
    for name in usual:
        if name in (typed or features):
            return name
    columns = ", ".join(f"{name} ({getattr(feature, 'dtype', feature)})" for name, feature in features.items())
    raise ValueError(f"{where} has no {called} column, it holds {columns}; rename the right one to {called}")


class _Labels(NamedTuple):
    """The labels of a split as they are stored."""

    values: NDArray[Any]  # (N,) whole numbers or strings
    names: tuple[str, ...] | None  # of the classes; None: labels are plain numbers


def _read_labels(dataset: Any, where: str) -> _Labels:
    name = _find(dataset.features, "ClassLabel", _LABELS, f"load_arrow: {where}", "label")
    feature, column = dataset.features[name], dataset.data.column(name)
    if isinstance(feature, dict):
        field = _find(feature, "ClassLabel", _LABELS, f"load_arrow: column {name} of {where}", "label")
        feature, column = feature[field], pc.struct_field(column, field)
    is_string = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    if not (is_string or pa.types.is_integer(column.type)):
        raise ValueError(
            f"load_arrow: column {name} of {where} must hold the class of a sample as a number or a name, got "
            f"{feature}; add a column label that does"
        )
    if column.null_count:
        row = column.is_null().index(True).as_py()
        raise ValueError(f"load_arrow: row {row} of {where} has no {name}; add it or remove the row")
    values = column.to_numpy()
    if is_string:
        return _Labels(values, tuple(sorted(set(values))))
    return _Labels(values.astype(np.int64), tuple(feature.names) if hasattr(feature, "names") else None)


def _numbers(labels: _Labels, names: tuple[str, ...] | None, where: str) -> NDArray[np.int64]:
    """Return labels as numbers of these classes, those of train."""
    if labels.values.dtype.kind == "O" and names is not None and set(labels.names or ()) <= set(names):
        number = {name: i for i, name in enumerate(names)}
        return np.array([number[value] for value in labels.values], np.int64)
    if labels.names != names:
        first = next(iter(set(labels.names or ()) ^ set(names or ())), None)
        raise ValueError(
            f"load_arrow: {where} has {len(labels.names or ())} named classes and train {len(names or ())}, {first!r} "
            "is in one of them; give all splits the same ClassLabel"
        )
    return labels.values

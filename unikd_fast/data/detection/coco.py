"""Data sets in COCO's format: one JSON file of annotations for each split, and a folder of images."""

import logging
import math
import os
import reprlib
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from unikd_fast.data.detection.scenes import LARGEST_SIDE, BoxedImages, DetectionSplits, named_few
from unikd_fast.data.images import StoredImage
from unikd_fast.errors import DataError, FileError
from unikd_fast.io import read_json

LAYOUT = (
    "annotations/instances_train<year>.json and train<year>/, train.json and train/, or train/_annotations.coco.json "
    "beside its images, and the same for val"
)

_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}

_logger = logging.getLogger("unikd_fast")


def load_coco(root: Path) -> DetectionSplits:
    """Load a data set in COCO's format; see `LAYOUT`. Of val and test one is enough.

    Annotations of images that are not listed, and boxes with a number that is infinite or none, are left out and
    counted in the log.

    Args:
        root: folder of the data set.

    Raises:
        DataError: an annotation file is not what it should be; the message names it and the place in it.
        FileNotFoundError: an annotation file or the folder of its images is missing.

    Example:
        >>> splits = load_coco(Path("/data/coco"))
        >>> len(splits.train), len(splits.val), splits.num_classes
        (118287, 5000, 80)
    """
    found = find_annotations(root)
    files = {part: _read(place) for part, place in found.items()}
    categories = files["train"].categories
    for part, file in files.items():
        if other := {item for item in file.categories.items() if categories.get(item[0]) != item[1]}:
            category, name = min(other)
            theirs = f"is {categories[category]!r}" if category in categories else "is missing"
            raise DataError(
                f"load_coco: category {category} of {found[part]} is {name!r}, and in the annotations of train it "
                f"{theirs}; give all splits the same categories"
            )
    ids = np.array(sorted(categories), np.int64)
    splits = {part: file.split(ids) for part, file in files.items()}
    val = splits["val"] if "val" in splits else splits["test"]
    names = tuple(categories[category] for category in ids.tolist())
    return DetectionSplits(splits["train"], val, splits.get("test", val), names, ids)


class Place(NamedTuple):
    """Where a split lies."""

    file: Path
    folders: tuple[Path, ...]  # in one of which its images are

    def __str__(self) -> str:
        return str(self.file)


def find_annotations(root: Path) -> dict[str, Place]:
    """Return where train, val and test lie, as far as they are there.

    Raises:
        FileNotFoundError: train is missing, or both of the others.
        DataError: a split has several annotation files.
    """
    found = {part: place for part in _FOLDERS if (place := _find(root, part)) is not None}
    if "train" not in found or not {"val", "test"} & found.keys():
        missing = "val" if "train" in found else "train"
        raise FileNotFoundError(f"load_coco: {root} has no annotations of {missing}; it must hold {LAYOUT}")
    return found


def _find(root: Path, part: str) -> Place | None:
    """Return where the annotations of a split are, and where its images may be.

    Raises:
        DataError: there are several.
    """
    found = []
    for name in _FOLDERS[part]:
        usual = (root / name, root / "images" / name, root / "images", root)
        found += [Place(root / each, usual) for each in (f"{name}.json", f"annotations/{name}.json")]
        found.append(Place(root / name / "_annotations.coco.json", (root / name,)))
        for path in sorted((root / "annotations").glob(f"instances_{name}*.json")):
            folder = path.stem.removeprefix("instances_")
            found.append(Place(path, (root / folder, root / "images" / folder, root / "images", root)))
    found = [place for place in found if place.file.is_file()]
    if len(found) > 1:
        raise DataError(
            f"load_coco: {root} has several annotation files of {part}: {found[0]} and {found[1]}; leave one of them"
        )
    return found[0] if found else None


class _File(NamedTuple):
    """What an annotation file holds: N images and M boxes."""

    place: Place
    paths: list[str]
    sizes: NDArray[np.int64]  # (N, 2) height, width
    image_ids: NDArray[np.int64]  # (N,)
    categories: dict[int, str]
    image_of: NDArray[np.int64]  # (M,) position of each box's image
    category_of: NDArray[np.int64]  # (M,)
    boxes: NDArray[np.float64]  # (M, 4) x1, y1, x2, y2
    areas: NDArray[np.float64]  # (M,)
    is_crowd: NDArray[np.bool_]  # (M,)

    def split(self, category_ids: NDArray[np.int64]) -> BoxedImages:
        """Return the split; label k is the k-th of these ids."""
        order = self.image_of.argsort(kind="stable")
        return BoxedImages(
            images=[StoredImage(path) for path in self.paths],
            sizes=self.sizes,
            boxes=self.boxes[order],
            labels=np.searchsorted(category_ids, self.category_of[order]),
            is_crowd=self.is_crowd[order],
            areas=self.areas[order],
            offsets=np.concatenate(([0], np.bincount(self.image_of, minlength=len(self.paths)).cumsum())),
            ids=np.arange(len(self.paths)),
            image_ids=self.image_ids,
        )


def _read(place: Place) -> _File:
    try:
        content = read_json(place.file, without="segmentation")  # polygons are most of such a file
    except FileError as error:
        raise DataError(f"load_coco: {error}; restore the annotations") from error
    images, annotations, categories = (
        _Records(place.file, key, content) for key in ("images", "annotations", "categories")
    )
    image_ids = images.ids()
    category_ids = categories.ids()
    sizes = np.column_stack([images.whole(side) for side in ("height", "width")])
    wrong = ((sizes < 1) | (sizes > LARGEST_SIDE)).any(axis=1)
    if wrong.any():
        height, width = sizes[wrong][0].tolist()
        images.refuse(int(wrong.argmax()), f"has height {height} and width {width}; correct them to those of its file")
    names = categories.values("name", {str}, "text")
    if twice := [row for row, name in enumerate(names) if name in names[:row]]:
        categories.refuse(twice[0], f"has the name {names[twice[0]]!r} of another; rename it, or make them one")
    annotations.ids(optional=True)
    category_of = annotations.whole("category_id")
    known = np.isin(category_of, category_ids)
    if not known.all():
        row = int((~known).argmax())
        annotations.refuse(row, f"is of category {category_of[row]}, which is not among the categories; add it there")
    boxes = annotations.boxes()
    finite = np.asarray((abs(boxes) <= LARGEST_SIDE).all(axis=1))
    areas = annotations.numbers("area", math.nan)
    listed, image_of = _positions(annotations.whole("image_id"), image_ids)
    for good, why in ((listed, "their image is not listed"), (finite, "a number of the box is infinite or none")):
        if not good.all():
            rows = np.flatnonzero(~good)
            few = named_few(map(annotations.name, rows.tolist()))
            _logger.warning(
                "load_coco: %d of %d annotations in %s are left out, %s: %s", len(rows), len(good), place, why, few
            )
    kept = listed & finite
    boxes, areas = boxes[kept], areas[kept]
    areas = np.where(np.isfinite(areas), areas, boxes[:, 2:].prod(axis=1))
    boxes[:, 2:] += boxes[:, :2]
    return _File(
        place,
        _paths(place, images.values("file_name", {str}, "text")),
        sizes,
        image_ids,
        dict(zip(category_ids.tolist(), names, strict=True)),
        image_of[kept],
        category_of[kept],
        boxes,
        areas,
        annotations.numbers("iscrowd", 0)[kept] != 0,
    )


def _positions(wanted: NDArray[np.int64], ids: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Return which of the wanted ids there are, and the position of each."""
    if not len(ids):
        return np.zeros(len(wanted), np.bool_), np.zeros(len(wanted), np.int64)
    order = ids.argsort(kind="stable")
    places = order[np.searchsorted(ids, wanted, sorter=order).clip(max=len(ids) - 1)]
    return ids[places] == wanted, places


def _paths(place: Place, names: list[str]) -> list[str]:
    """Return the paths of images, in the first folder that has one of the first of them."""
    if not names:
        return []
    for folder in place.folders:
        if any((folder / name).is_file() for name in names[:9]):
            start = str(folder)
            return [os.path.join(start, name) for name in names]  # noqa: PTH118  a Path of each would take a second
    raise FileNotFoundError(
        f"load_coco: none of {named_few(names)}, the images of {place.file}, is in "
        f"{' or '.join(map(str, place.folders))}; put the images there"
    )


class _Records:
    """A list of objects in an annotation file, read key by key; each error names the file and the place in it."""

    def __init__(self, file: Path, key: str, content: dict[str, Any]) -> None:
        self._file, self._key = file, key
        records = content.get(key)
        if not isinstance(records, list):
            found = f"it is {_shown(records)}" if key in content else "it is missing"
            raise DataError(f"load_coco: {key} in {file} must be a list, and {found}; correct it")
        self._records: list[Any] = records
        for row, record in enumerate(records):
            if type(record) is not dict:
                raise DataError(
                    f"load_coco: {key}[{row}] in {file} must be an object, got {_shown(record)}; correct it"
                )

    def name(self, row: int) -> str:
        """Return what messages call a record: its place, and its id if it has one."""
        own = self._records[row].get("id")
        return f"{self._key}[{row}]" + (f" (id {reprlib.repr(own)})" if type(own) is int else "")

    def refuse(self, row: int, problem: str) -> NoReturn:
        raise DataError(f"load_coco: {self.name(row)} in {self._file} {problem}")

    def values(self, key: str, types: set[type], what: str, default: Any = ...) -> list[Any]:
        """Return a value of each record; without a default each must have one.

        Args:
            key: key of the value.
            types: types that it may have.
            what: them in words.
            default: value of records without this key.
        """
        values = [record.get(key, default) for record in self._records]
        if not types.issuperset(map(type, values)):
            row = next(row for row, value in enumerate(values) if type(value) not in types)
            if values[row] is ...:
                self.refuse(row, f"has no {key}; add it")
            self.refuse(row, f"must have {what} as {key}, got {_shown(values[row])}; correct it")
        return values

    def whole(self, key: str) -> NDArray[np.int64]:
        """Return a whole number of each record, (N,)."""
        return self._array(key, self.values(key, {int}, "a whole number"), np.int64)

    def numbers(self, key: str, default: float) -> NDArray[np.float64]:
        """Return a number or a truth value of each record, (N,)."""
        return self._array(key, self.values(key, {int, float, bool}, "a number", default), np.float64)

    def boxes(self) -> NDArray[np.float64]:
        """Return the bbox of each record, (N, 4)."""
        values = self.values("bbox", {list}, "four numbers")
        if not {4}.issuperset(map(len, values)) or not {int, float}.issuperset(map(type, chain.from_iterable(values))):
            row = next(
                row for row, box in enumerate(values) if len(box) != 4 or not {int, float} >= set(map(type, box))
            )
            self.refuse(row, f"must have four numbers as bbox, got {_shown(values[row])}; correct it")
        return self._array("bbox", values, np.float64).reshape(-1, 4)

    def ids(self, *, optional: bool = False) -> NDArray[np.int64]:
        """Return the (N,) ids, all different; none if they are optional and missing everywhere."""
        if optional and not any("id" in record for record in self._records):
            return np.empty(0, np.int64)
        ids = self.whole("id")
        first = np.zeros(len(ids), np.bool_)
        first[np.unique(ids, return_index=True)[1]] = True
        if not first.all():
            self.refuse(int((~first).argmax()), "has the id of another; give each its own")
        return ids

    def _array(self, key: str, values: list[Any], dtype: type) -> NDArray[Any]:
        try:
            return np.array(values, dtype)
        except OverflowError:  # digits without end are a number to JSON
            for row, value in enumerate(values):
                with suppress(OverflowError):
                    np.array(value, dtype)
                    continue
                self.refuse(row, f"has a {key} of {_shown(value)}, which fits no {dtype.__name__}; correct it")
            raise


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {reprlib.repr(value)}"

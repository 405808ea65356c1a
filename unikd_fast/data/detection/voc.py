"""Data sets in Pascal VOC's layout: an XML file for each image, and lists of the images of each split."""

import logging
import os
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from unikd_fast.data.detection.scenes import LARGEST_SIDE, BoxedImages, DetectionSplits, named_few
from unikd_fast.data.images import StoredImage
from unikd_fast.errors import DataError

LAYOUT = "JPEGImages/<name>.jpg, Annotations/<name>.xml, and names in ImageSets/Main/train.txt and val.txt"

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")

_logger = logging.getLogger("unikd_fast")


def load_voc(root: Path) -> DetectionSplits:
    """Load a data set in Pascal VOC's layout; see `LAYOUT`. Of val.txt and test.txt one is enough.

    Corners count pixels from 1, both included, as VOC's do: a box covers xmin - 1 to xmax. Boxes with a corner that is
    infinite or no number are left out and counted in the log. Objects marked as difficult
    are neither trained on nor asked for by an evaluation, as in the VOC challenge. Category ids are 1 to K; image ids
    count from 1 in each split.

    Args:
        root: folder of the data set. Its classes are the lines of classes.txt, or else those that occur, sorted.

    Raises:
        DataError: a list or an annotation is not what it should be; the message names it.
        FileNotFoundError: a list, an annotation or all images are missing.

    Example:
        >>> load_voc(Path("/data/VOCdevkit/VOC2012")).num_classes
        20
    """
    lists = {part: root / "ImageSets" / "Main" / f"{part}.txt" for part in ("train", "val", "test")}
    if not lists["train"].is_file() or not (lists["val"].is_file() or lists["test"].is_file()):
        missing = lists["val" if lists["train"].is_file() else "train"]
        raise FileNotFoundError(f"load_voc: {missing} is missing; {root} must hold {LAYOUT}")
    images = _images(root / "JPEGImages")
    annotated = {
        part: [_read(root / "Annotations" / f"{name}.xml") for name in _lines(path)]
        for part, path in lists.items()
        if path.is_file()
    }
    class_names = _class_names(root, annotated)
    splits = {part: _split(scenes, class_names, images, lists[part]) for part, scenes in annotated.items()}
    val = splits["val"] if "val" in splits else splits["test"]
    ids = np.arange(1, len(class_names) + 1)
    return DetectionSplits(splits["train"], val, splits.get("test", val), class_names, ids)


class _Object(NamedTuple):
    name: str
    corners: tuple[float, ...]  # as in the file
    is_difficult: bool


class _Annotation(NamedTuple):
    path: Path
    size: tuple[int, int]  # height, width
    objects: list[_Object]


def _lines(path: Path) -> list[str]:
    """Return the names in a list, all different."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"load_voc: cannot read {path}: {error}; restore it as text") from error
    names = [line for line in lines if line]
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise DataError(f"load_voc: {path} has {twice} twice; remove one of them")
    return names


def _images(folder: Path) -> dict[str, str]:
    """Return the path of each image by its name without extension."""
    with os.scandir(folder) as entries:
        paths = sorted(entry.path for entry in entries)
    found = (os.path.splitext(os.path.basename(path)) for path in paths)  # noqa: PTH122, PTH119
    return {
        stem: path for (stem, extension), path in zip(found, paths, strict=True) if extension.lower() in _EXTENSIONS
    }


def _read(path: Path) -> _Annotation:
    try:
        content = path.read_bytes()
        tree = ElementTree.fromstring(content)
    except FileNotFoundError:
        raise FileNotFoundError(f"load_voc: {path} is missing; restore it, or take its name off the list") from None
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataError(f"load_voc: cannot read {path}: {error}; restore it") from error
    height, width = (_number(path, tree, f"size/{side}") for side in ("height", "width"))
    if not all(1 <= side <= LARGEST_SIDE and side % 1 == 0 for side in (height, width)):
        raise DataError(
            f"load_voc: {path} has size/height {height:g} and size/width {width:g}; correct them to those of the image"
        )
    objects = [
        _Object(
            _text(path, each, "name"),
            tuple(_number(path, each, f"bndbox/{corner}") for corner in _CORNERS),
            (each.findtext("difficult") or "").strip() == "1",
        )
        for each in tree.iterfind("object")
    ]
    return _Annotation(path, (int(height), int(width)), objects)


def _text(path: Path, element: ElementTree.Element, tag: str) -> str:
    text = (element.findtext(tag) or "").strip()
    if not text:
        raise DataError(f"load_voc: <{element.tag}> in {path} has no {tag}; add it")
    return text


def _number(path: Path, element: ElementTree.Element, tag: str) -> float:
    text = _text(path, element, tag)
    try:
        return float(text)
    except ValueError:
        raise DataError(f"load_voc: {tag} in {path} must be a number, got {text!r:.60}; correct it") from None


def _class_names(root: Path, annotated: dict[str, list[_Annotation]]) -> tuple[str, ...]:
    """Return the lines of classes.txt, or the sorted names that occur.

    Raises:
        DataError: classes.txt lacks a name that occurs.
    """
    first = {each.name: scene.path for scenes in annotated.values() for scene in scenes for each in scene.objects}
    listed = root / "classes.txt"
    if not listed.is_file():
        return tuple(sorted(first))
    names = _lines(listed)
    if unknown := sorted(first.keys() - set(names)):
        raise DataError(
            f"load_voc: {first[unknown[0]]} has an object of class {unknown[0]!r}, which {listed} does not have; add "
            "it, or correct the object"
        )
    return tuple(names)


def _split(
    scenes: list[_Annotation], class_names: tuple[str, ...], images: dict[str, str], listed: Path
) -> BoxedImages:
    label_of = {name: label for label, name in enumerate(class_names)}
    objects = [each for scene in scenes for each in scene.objects]
    boxes = np.array([each.corners for each in objects], np.float64).reshape(-1, 4)
    image_of = np.repeat(np.arange(len(scenes)), [len(scene.objects) for scene in scenes])
    finite = (abs(boxes) <= LARGEST_SIDE).all(axis=1)
    if not finite.all():
        files = [scenes[i].path.name for i in image_of[~finite].tolist()]
        _logger.warning(
            "load_voc: %d of %d boxes of %s are left out, a corner is infinite or no number: %s",
            len(files),
            len(objects),
            listed.name,
            named_few(files),
        )
    low, high = boxes[:, :2], boxes[:, 2:]
    low -= high > low  # a box from a pixel to the same one is an annotator's slip, and stays without an area
    ids = np.arange(len(scenes))
    return BoxedImages(
        images=[
            StoredImage(images.get(scene.path.stem, str(listed.parents[2] / "JPEGImages" / f"{scene.path.stem}.jpg")))
            for scene in scenes
        ],
        sizes=np.array([scene.size for scene in scenes], np.int64).reshape(-1, 2),
        boxes=boxes[finite],
        labels=np.array([label_of[each.name] for each in objects], np.int64)[finite],
        is_crowd=np.array([each.is_difficult for each in objects], np.bool_)[finite],
        areas=(high - low).prod(axis=1)[finite],
        offsets=np.concatenate(([0], np.bincount(image_of[finite], minlength=len(scenes)).cumsum())),
        ids=ids,
        image_ids=ids + 1,
    )

"""Scenes as files, in COCO's format and in Pascal VOC's layout."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from PIL import Image

from unikd_fast.data.detection.scenes import BoxedImages, DetectionSplits

PARTS = ("train", "val", "test")


def image_of(split: BoxedImages, i: int) -> Image.Image:
    pixels = split.images[i]
    assert isinstance(pixels, torch.Tensor)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def write_coco(root: Path, splits: DetectionSplits, parts: Sequence[str] = PARTS, kind: str = "png") -> None:
    """Write the splits as `<part>.json` with images of a kind in `<part>/`."""
    for part in parts:
        split: BoxedImages = getattr(splits, part)
        content = splits.ground_truth(part)  # type: ignore[arg-type]
        (root / part).mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(content["images"]):
            image["file_name"] = f"{image['id']:06}.{kind}"
            image_of(split, i).save(root / part / image["file_name"])
        write_json(root / f"{part}.json", content)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_voc(root: Path, splits: DetectionSplits, parts: Sequence[str] = PARTS) -> None:
    """Write the splits with PNG files; boxes are rounded to whole pixels, crowds are marked as difficult."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for part in parts:
        split: BoxedImages = getattr(splits, part)
        names = [f"{part}_{i:03}" for i in range(len(split))]
        (root / "ImageSets" / "Main" / f"{part}.txt").write_text("\n".join(names) + "\n")
        for i, name in enumerate(names):
            image_of(split, i).save(root / "JPEGImages" / f"{name}.png")
            tree = ElementTree.Element("annotation")
            height, width = split.sizes[i].tolist()
            size = ElementTree.SubElement(tree, "size")
            _texts(size, width=width, height=height, depth=3)
            rows = split.rows(i)
            for box, label, crowd in zip(split.boxes[rows], split.labels[rows], split.is_crowd[rows], strict=True):
                each = ElementTree.SubElement(tree, "object")
                _texts(each, name=splits.class_names[label], difficult=int(crowd))
                x1, y1, x2, y2 = box.round().astype(int).tolist()
                corners = ElementTree.SubElement(each, "bndbox")
                _texts(corners, xmin=x1 + 1, ymin=y1 + 1, xmax=x2, ymax=y2)
            ElementTree.ElementTree(tree).write(root / "Annotations" / f"{name}.xml")


def _texts(element: ElementTree.Element, **texts: object) -> None:
    for tag, text in texts.items():
        ElementTree.SubElement(element, tag).text = str(text)

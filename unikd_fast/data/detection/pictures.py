"""Pictures of images with boxes."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from unikd_fast.data.detection.loader import read_scene
from unikd_fast.data.detection.scenes import BoxedImages

_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6", "#bcf60c")
_SMALLEST = 240  # pixels of a picture's short side, so that boxes and words can be seen
_SHOWN = 6  # images of a sheet
_LEAST_SCORE = 0.5


def draw_boxes(image: Image.Image, boxes: Sequence[Sequence[float]], words: Sequence[str]) -> Image.Image:
    """Return a picture of an image with boxes x1, y1, x2, y2 and a few words at each; small images are enlarged.

    Equal first words have equal colours.
    """
    scale = max(1, -(-_SMALLEST // min(image.size)))
    picture = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    pen, width = ImageDraw.Draw(picture), max(1, min(picture.size) // 150)
    for box, said in zip(boxes, words, strict=True):
        colour = _COLOURS[sum(map(ord, said.partition(" ")[0])) % len(_COLOURS)]
        corners = [scale * number for number in box]
        pen.rectangle(corners, outline=colour, width=width)
        pen.text((corners[0] + width + 1, corners[1] + width), said, fill=colour)
    return picture


def sheet(
    split: BoxedImages,
    class_names: Sequence[str],
    category_ids: NDArray[np.int64],
    detections: Sequence[Mapping[str, Any]],
) -> bytes:
    """Return a PNG of the first images with boxes: above as annotated, below as detected with a score of 0.5 or more.

    Args:
        split: images and their annotations.
        class_names: K names.
        category_ids: (K,) ids of the classes in the detections.
        detections: detections in COCO's format.

    Raises:
        DataError: an image cannot be read.
    """
    names = dict(zip(category_ids.tolist(), class_names, strict=True))
    columns = []
    for place in np.unique(split.image_of[split.is_trainable])[:_SHOWN].tolist():
        image, rows = read_scene(split.images[place], split.sizes[place]), split.rows(place)
        asked = split.boxes[rows].tolist(), [class_names[label] for label in split.labels[rows].tolist()]
        found = [each for each in detections if each["image_id"] == int(split.image_ids[place])]
        found = [each for each in found if each["score"] >= _LEAST_SCORE]
        corners = [(x, y, x + wide, y + high) for x, y, wide, high in (each["bbox"] for each in found)]
        said = [f"{names[each['category_id']]} {100 * each['score']:.0f}" for each in found]
        columns.append((draw_boxes(image, *asked), draw_boxes(image, corners, said)))
    high = max(picture.height for picture, _ in columns)
    page = Image.new("RGB", (sum(picture.width + 4 for picture, _ in columns), 2 * high + 4), "white")
    left = 0
    for asked_picture, found_picture in columns:
        page.paste(asked_picture, (left, 0))
        page.paste(found_picture, (left, high + 4))
        left += asked_picture.width + 4
    content = io.BytesIO()
    page.save(content, "PNG")
    return content.getvalue()

"""Pictures of images with boxes."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from unikd_fast.data.detection.loader import read_scene
from unikd_fast.data.detection.scenes import BoxedImages

_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6", "#bcf60c")
_SMALLEST = 240  # pixels of a picture's short side, so that boxes and words can be seen
_LONGEST = 2000  # of an enlarged picture's long side: a strip of two rows would become gigabytes
_LARGEST = 320  # the same of a sheet, which is to fit on a page
_SHOWN, _ABREAST = 6, 3  # images of a sheet
_GAP = 4
_LEAST_SCORE = 0.5


def draw_boxes(
    image: Image.Image, boxes: Sequence[Sequence[float]], words: Sequence[str], *, largest: int | None = None
) -> Image.Image:
    """Return a picture of an image with boxes x1, y1, x2, y2 and a few words at each; small images are enlarged.

    Equal first words have equal colours.

    Args:
        image: the image.
        boxes, words: corners in its pixels, and what is written there.
        largest: length of the short side in pixels to which larger images are reduced. If None, they are not.
    """
    short = min(image.size)
    scale: float = max(1, min(-(-_SMALLEST // short), _LONGEST // max(image.size)))
    if largest is not None and short > largest:
        scale = largest / short
    sampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BILINEAR
    picture = image.resize((round(image.width * scale), round(image.height * scale)), sampling)
    pen, width = ImageDraw.Draw(picture), max(2, min(picture.size) // 150)
    font = ImageFont.load_default(max(11, min(picture.size) // 24))
    for box, said in zip(boxes, words, strict=True):
        colour = _COLOURS[sum(map(ord, said.partition(" ")[0])) % len(_COLOURS)]
        corners = [scale * number for number in box]
        pen.rectangle(corners, outline=colour, width=width)
        place = corners[0] + width + 1, corners[1] + width
        pen.text(place, said, fill="white", font=font, stroke_width=1, stroke_fill="black")
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
    pairs = []
    for place in np.unique(split.image_of[split.is_trainable])[:_SHOWN].tolist():
        image, rows = read_scene(split.images[place], split.sizes[place]), split.rows(place)
        asked = split.boxes[rows].tolist(), [class_names[label] for label in split.labels[rows].tolist()]
        found = [each for each in detections if each["image_id"] == int(split.image_ids[place])]
        found = [each for each in found if each["score"] >= _LEAST_SCORE]
        corners = [(x, y, x + wide, y + high) for x, y, wide, high in (each["bbox"] for each in found)]
        said = [f"{names[each['category_id']]} {100 * each['score']:.0f}" for each in found]
        both = (asked, (corners, said))
        pairs.append([draw_boxes(image, *each, largest=_LARGEST) for each in both])
    content = io.BytesIO()
    _arranged(pairs).save(content, "PNG")
    return content.getvalue()


def _arranged(pairs: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Return the pairs side by side, each one above the other, in as many rows as they need."""
    rows = [pairs[first : first + _ABREAST] for first in range(0, len(pairs), _ABREAST)]
    width = max(sum(first.width + _GAP for first, _ in row) for row in rows)
    heights = [max(first.height for first, _ in row) + _GAP for row in rows]
    page, top = Image.new("RGB", (width - _GAP, 2 * sum(heights) - _GAP), "white"), 0
    for row, height in zip(rows, heights, strict=True):
        left = 0
        for pair in row:
            for below, picture in enumerate(pair):
                page.paste(picture, (left, top + below * height))
            left += pair[0].width + _GAP
        top += 2 * height
    return page

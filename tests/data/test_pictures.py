"""A sheet of images as annotated and as detected: what is drawn where."""

import io

import numpy as np
import torch
from PIL import Image

from unikd_fast.data.detection.pictures import draw_boxes, sheet
from unikd_fast.data.detection.scenes import BoxedImages

ORANGE, BLACK = (245, 130, 49), (0, 0, 0)  # the colour of "disc", and the images


def black_images(count: int, height: int, width: int) -> BoxedImages:
    """Each with a box from (150, 90) to (300, 240)."""
    return BoxedImages(
        images=[torch.zeros(3, height, width, dtype=torch.uint8)] * count,
        sizes=np.array([[height, width]] * count),
        boxes=np.array([[150.0, 90.0, 300.0, 240.0]] * count),
        labels=np.zeros(count, np.int64),
        is_crowd=np.zeros(count, bool),
        areas=np.full(count, 22500.0),
        offsets=np.arange(count + 1),
        ids=np.arange(count),
        image_ids=np.arange(count) + 10,
    )


def test_a_sheet_has_both_above_each_other() -> None:
    """Four images of 640 x 480, reduced to 427 x 320: three abreast, then one."""
    detections = [
        {"image_id": 10, "category_id": 7, "bbox": [300.0, 150.0, 90.0, 60.0], "score": 0.9},
        {"image_id": 10, "category_id": 7, "bbox": [30.0, 30.0, 60.0, 60.0], "score": 0.4},  # too low
        {"image_id": 13, "category_id": 7, "bbox": [300.0, 150.0, 90.0, 60.0], "score": 0.9},
    ]
    page = Image.open(io.BytesIO(sheet(black_images(4, 480, 640), ("disc",), np.array([7]), detections)))
    assert page.size == (3 * 427 + 2 * 4, 4 * 320 + 3 * 4)
    for top in (0, 648):  # of image 10, and of image 13 in the second row
        assert page.getpixel((100, top + 120)) == ORANGE  # the left side of the annotation
        assert page.getpixel((200, top + 324 + 120)) == ORANGE  # the left side of the detection
        assert page.getpixel((100, top + 324 + 120)) == page.getpixel((20, top + 324 + 40)) == BLACK
    assert page.getpixel((431 + 200, 324 + 120)) == BLACK  # image 11, in which nothing is found
    assert page.getpixel((431 + 100, 120)) == ORANGE
    assert page.getpixel((600, 900)) == (255, 255, 255)


def test_a_strip_is_not_enlarged_without_end() -> None:
    """Two rows of 900 pixels: at a height of 240 they would be 108,000 wide."""
    assert draw_boxes(Image.new("RGB", (900, 2)), [(0, 0, 9, 2)], ["disc"]).size == (1800, 4)
    assert draw_boxes(Image.new("RGB", (90, 60)), [], []).size == (360, 240)

"""How views of images with boxes are made: their size, part, flip and colours, and where the boxes are in them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unikd_fast.data.augmentation import Augmentation, ViewParameters, view_parameters
from unikd_fast.data.philox import uniforms
from unikd_fast.data.views import Box, ViewWindow
from unikd_fast.settings import ImageSize, Positive, settings

SIZE_VIEWS = 0x200
"""What the stream of a view's size is above that of its flip and colours."""

_USUAL_SIDES: dict[str, tuple[tuple[int, ...], int]] = {"toy_scenes": ((64, 72, 80), 128)}
_USUAL_SIDES_OF_FILES: tuple[tuple[int, ...], int] = ((640, 672, 704, 736, 768, 800), 1333)


@settings
class DetectionSettings:
    """How images with boxes are resized. Flip and colours are those of data.augmentation.

    Raises:
        ValueError: a field is outside its range.

    Example:
        >>> DetectionSettings().for_data("coco").eval_short_side
        800
    """

    short_sides: tuple[ImageSize, ...] | None = None
    """Lengths in pixels of which each training view draws one for its short side. If null, 640, 672, 704, 736, 768 and
    800, as published for COCO; 64, 72 and 80 for toy_scenes."""
    long_side: ImageSize | None = None
    """Largest length of the long side in pixels; where the image would be longer, it is made smaller. If null, 1333;
    128 for toy_scenes."""
    eval_short_side: ImageSize | None = None
    """Length of the short side in pixels for evaluation. If null, the largest of short_sides."""
    scale_jitter: tuple[Positive, Positive] = (1.0, 1.0)
    """Range of a random factor of the size of a training view. Below 1 the view is smaller; above 1 it shows a random
    part of the image at the size that all of it would have. Boxes without a part in the view are left out. (0.5, 2.0)
    is usual in long trainings from scratch."""

    def __post_init__(self) -> None:
        if self.short_sides is not None and not self.short_sides:
            raise ValueError("DetectionSettings: short_sides is empty; give at least one length in pixels, or null")
        if not 0 < self.scale_jitter[0] <= self.scale_jitter[1]:
            raise ValueError(
                f"DetectionSettings: scale_jitter must be an ascending range of positive numbers, got "
                f"{self.scale_jitter}; (1, 1) turns it off"
            )

    def for_data(self, name: str) -> "DetectionSettings":
        """Return a copy in which what is None has the data set's usual value."""
        usual_sides, long_side = _USUAL_SIDES.get(name, _USUAL_SIDES_OF_FILES)
        short_sides = self.short_sides or usual_sides
        return replace(
            self,
            short_sides=short_sides,
            long_side=self.long_side or long_side,
            eval_short_side=self.eval_short_side or max(short_sides),
        )


@dataclass(frozen=True)
class SceneViews:
    """The random numbers behind the views of N samples."""

    usual: ViewParameters  # flip and colours
    short_sides: NDArray[np.int64]  # (N,)
    factors: NDArray[np.float64]  # (N,) of the scale jitter
    places: NDArray[np.float64]  # (N, 2) uniforms for top and left of the part that is shown
    seeds: NDArray[np.int64]  # (N,) of the random choices that a step makes in each image


class SceneWindows:
    """The windows of a data set's views, whoever decodes.

    Args:
        detection: sizes, with the data set's usual values.
        augmentation: flip and colours, with the data set's usual values.

    Example:
        >>> SceneWindows(DetectionSettings().for_data("coco"), Augmentation()).central(427, 640).size
        (800, 1199)
    """

    def __init__(self, detection: DetectionSettings, augmentation: Augmentation) -> None:
        assert detection.short_sides and detection.long_side and detection.eval_short_side
        self._short_sides = np.array(detection.short_sides)
        self._long_side, self._eval_short_side = detection.long_side, detection.eval_short_side
        self._jitter = detection.scale_jitter
        self._augmentation = augmentation

    def views(self, *, seed: int, epoch: int, sample_ids: ArrayLike, stream: int = 0) -> SceneViews:
        """Draw the views of some samples; arguments and errors as for `view_parameters`."""
        usual = view_parameters(self._augmentation, seed=seed, epoch=epoch, sample_ids=sample_ids, stream=stream)
        draws = uniforms(seed, epoch, usual.sample_ids, 5, stream=stream + SIZE_VIEWS)
        low, high = self._jitter
        return SceneViews(
            usual,
            self._short_sides[(draws[:, 0] * len(self._short_sides)).astype(np.int64)],
            low + draws[:, 1] * (high - low),
            draws[:, 2:4],
            (draws[:, 4] * 2**32).astype(np.int64),
        )

    def training(self, views: SceneViews, i: int, height: int, width: int) -> ViewWindow:
        """Return the window of view i of an image of this size."""
        factor, box = float(views.factors[i]), Box(0, 0, height, width)
        high, wide = resized(height, width, int(views.short_sides[i]), self._long_side)
        if factor < 1:
            high, wide = max(1, round(high * factor)), max(1, round(wide * factor))
        elif factor > 1:
            part = max(1, round(height / factor)), max(1, round(width / factor))
            down, right = views.places[i].tolist()
            box = Box(int(down * (height - part[0] + 1)), int(right * (width - part[1] + 1)), *part)
        return ViewWindow(box, (high, wide), (0, 0), (0, 0), bool(views.usual.flip[i]))

    def central(self, height: int, width: int) -> ViewWindow:
        """Return the window of the view for evaluation of an image of this size."""
        size = resized(height, width, self._eval_short_side, self._long_side)
        return ViewWindow(Box(0, 0, height, width), size, (0, 0), (0, 0), False)


def resized(height: int, width: int, short_side: int, long_side: int) -> tuple[int, int]:
    """Return the height and width of an image whose short side is resized to one length, the long one to at most
    another, rounded as in Detectron2.

    Example:
        >>> resized(480, 640, 800, 1333), resized(100, 1000, 800, 1333)
        ((800, 1067), (133, 1333))
    """
    scale = min(short_side / min(height, width), long_side / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def shown_boxes(
    boxes: NDArray[np.float64], labels: NDArray[np.int64], window: ViewWindow
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the boxes of an image as they are in a view, clipped to it, and their labels; without those that have no
    area in it.

    Args:
        boxes: (n, 4) x1, y1, x2, y2 in pixels of the image.
        labels: (n,).
        window: how the view comes out of the image.
    """
    top, left, height, width = window.box
    high, wide = window.size
    scale = np.array((wide / width, high / height) * 2)
    moved = (boxes - np.array((left, top, left, top))) * scale
    moved = moved.clip(0, np.array((wide, high, wide, high)))
    if window.flip:
        moved[:, [0, 2]] = wide - moved[:, [2, 0]]
    inside = moved.astype(np.float32)
    kept = (inside[:, 2] > inside[:, 0]) & (inside[:, 3] > inside[:, 1])
    return inside[kept], labels[kept]


def padded_size(sizes: Sequence[tuple[int, int]], multiple: int = 32) -> tuple[int, int]:
    """Return the height and width that hold images of these sizes, rounded up to a multiple.

    Example:
        >>> padded_size([(800, 1067), (736, 1111)])
        (800, 1120)
    """
    high, wide = (max(side) for side in zip(*sizes, strict=True))
    # Of numbers above 0, since ONNX divides towards 0.
    return (high + multiple - 1) // multiple * multiple, (wide + multiple - 1) // multiple * multiple

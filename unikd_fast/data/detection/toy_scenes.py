"""Made-up scenes of coloured shapes, on which a small detector learns something in minutes.

The shape alone tells the class: colours, sizes and places are random, and the background has grain and bars that are
nothing. As in published sets, category ids have gaps, some images are empty, and some hold a crowd: many small shapes
in one box.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from unikd_fast.data.detection.scenes import BoxedImages, DetectionSplits
from unikd_fast.data.philox import check_below

CLASS_NAMES = ("disc", "square", "triangle", "cross")
CATEGORY_IDS = (1, 3, 7, 90)

_SHORT_SIDES, _RATIO = (64, 80), 1.5  # pixels, and the largest ratio of the sides
_MOST_OBJECTS, _SIZES = 5, (14, 34)  # of an image; pixels
_EMPTY_SHARE, _CROWD_SHARE = 0.06, 0.1  # of the images
_CROWD_SIZES, _CROWD_OBJECTS = (24, 36), 12
_ATTEMPTS = 20
_MOST_COVERED = 0.1  # of either of two boxes by the other
_GRAIN, _CONTRAST = 32, 45  # grey levels to either side, and between a shape and the backdrop
_MOST_BARS, _BAR_LENGTHS, _BAR_WIDTH = 3, (12, 30), 4  # pixels
# Each has random numbers of its own.
_TRAIN, _VAL, _TEST = range(3)

# Where a shape is, in a square from -1 to 1.
_SHAPES: tuple[Callable[[NDArray, NDArray], NDArray], ...] = (
    lambda x, y: x * x + y * y <= 1,
    lambda x, y: np.maximum(abs(x), abs(y)) <= 1,
    lambda x, y: (abs(x) <= (y + 1) / 2) & (y <= 1),
    lambda x, y: (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 1),
)

_BAR = CLASS_NAMES.index("square")


def load_toy_scenes(num_samples: int = 200, *, seed: int = 0) -> DetectionSplits:
    """Make `num_samples` scenes to train on and three tenths as many each for val and test.

    A scene does not depend on the number of scenes.

    Args:
        num_samples: number of images in the train split.
        seed: seed of the scenes, in [0, 2^32).

    Raises:
        ValueError: the number is below 1, or the seed is out of range.

    Example:
        >>> splits = load_toy_scenes(200)
        >>> len(splits.val), splits.class_names
        (60, ('disc', 'square', 'triangle', 'cross'))
    """
    if num_samples < 1:
        raise ValueError(f"load_toy_scenes: num_samples must be at least 1, got {num_samples}")
    check_below("seed", seed, 2**32)
    held_out = max(1, num_samples * 3 // 10)
    train, val, test = (
        _split([_scene(_Numbers(seed, purpose, i)) for i in range(count)])
        for purpose, count in ((_TRAIN, num_samples), (_VAL, held_out), (_TEST, held_out))
    )
    return DetectionSplits(train, val, test, CLASS_NAMES, np.array(CATEGORY_IDS))


class _Object(NamedTuple):
    box: tuple[float, float, float, float]  # x1, y1, x2, y2
    label: int
    area: float
    is_crowd: bool = False


class _Scene(NamedTuple):
    pixels: NDArray[np.uint8]  # (3, H, W)
    objects: list[_Object]


def _split(scenes: list[_Scene]) -> BoxedImages:
    objects = [each for scene in scenes for each in scene.objects]
    ids = np.arange(len(scenes))
    return BoxedImages(
        images=[torch.from_numpy(scene.pixels) for scene in scenes],
        sizes=np.array([scene.pixels.shape[1:] for scene in scenes]),
        boxes=np.array([each.box for each in objects]).reshape(-1, 4),
        labels=np.array([each.label for each in objects], np.int64),
        is_crowd=np.array([each.is_crowd for each in objects], np.bool_),
        areas=np.array([each.area for each in objects], np.float64),
        offsets=np.cumsum([0, *(len(scene.objects) for scene in scenes)]),
        ids=ids,
        image_ids=ids + 1,
    )


class _Numbers:
    """Random numbers of a scene, from the raw words, which numpy promises to keep."""

    def __init__(self, seed: int, purpose: int, index: int) -> None:
        self._source = np.random.Philox(key=np.array((seed << 32 | purpose, index), np.uint64))

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * int(self._source.random_raw() >> 11) * 2.0**-53

    def below(self, limit: int) -> int:
        return int(self.uniform(0, limit))

    def colour(self) -> NDArray[np.float64]:
        return np.array([self.uniform(0, 255) for _ in range(3)])

    def grain(self, count: int) -> NDArray[np.float64]:
        """Return numbers in [-1, 1)."""
        levels = self._source.random_raw(-(-count // 8)).view(np.uint8)[:count]
        return levels / 128.0 - 1


def _scene(numbers: _Numbers) -> _Scene:
    short = round(numbers.uniform(*_SHORT_SIDES))
    long = round(short * numbers.uniform(1, _RATIO))
    height, width = (short, long) if numbers.below(2) else (long, short)
    backdrop = numbers.colour()
    slope = np.outer(np.linspace(-1, 1, height), (numbers.uniform(-40, 40),)) + np.linspace(-20, 20, width)
    pixels = backdrop[:, None, None] + slope
    for _ in range(numbers.below(_MOST_BARS + 1)):
        sides = (_BAR_WIDTH, numbers.uniform(*_BAR_LENGTHS))
        wide, high = sides if numbers.below(2) else sides[::-1]
        left, top = numbers.uniform(0, width - wide), numbers.uniform(0, height - high)
        _draw(pixels, (left, top, left + wide, top + high), _BAR, backdrop, numbers)
    kind = numbers.uniform(0, 1)
    objects: list[_Object] = []
    if kind >= _EMPTY_SHARE:
        if kind < _EMPTY_SHARE + _CROWD_SHARE:
            objects.append(_crowd(pixels, backdrop, numbers))
        taken = [each.box for each in objects]
        objects += [
            _draw(pixels, box, numbers.below(len(_SHAPES)), backdrop, numbers)
            for box in _places(height, width, taken, numbers)
        ]
    grain = numbers.grain(pixels.size).reshape(pixels.shape)
    return _Scene((pixels + _GRAIN * grain).clip(0, 255).astype(np.uint8), objects)


def _places(
    height: int, width: int, taken: list[tuple[float, float, float, float]], numbers: _Numbers
) -> Iterator[tuple[float, float, float, float]]:
    """Yield boxes that hardly cover each other."""
    for _ in range(1 + numbers.below(_MOST_OBJECTS)):
        for _ in range(_ATTEMPTS):
            size = math.exp(numbers.uniform(*map(math.log, _SIZES)))
            stretch = math.sqrt(numbers.uniform(0.8, 1.25))
            wide, high = size * stretch, size / stretch
            left, top = numbers.uniform(0, width - wide), numbers.uniform(0, height - high)
            box = (left, top, left + wide, top + high)
            if all(_covered(box, other) <= _MOST_COVERED for other in taken):
                taken.append(box)
                yield box
                break


def _covered(one: tuple[float, ...], two: tuple[float, ...]) -> float:
    """Return the largest share of either box that the other covers."""
    wide, high = min(one[2], two[2]) - max(one[0], two[0]), min(one[3], two[3]) - max(one[1], two[1])
    smallest = min((box[2] - box[0]) * (box[3] - box[1]) for box in (one, two))
    return max(wide, 0) * max(high, 0) / smallest


def _draw(
    pixels: NDArray[np.float64],
    box: tuple[float, float, float, float],
    label: int,
    backdrop: NDArray[np.float64],
    numbers: _Numbers,
) -> _Object:
    """Draw a shape that fills a box, in a colour that stands out from the backdrop."""
    x1, y1, x2, y2 = box
    rows, columns = (np.arange(side) + 0.5 for side in pixels.shape[1:])
    x, y = (2 * columns - x1 - x2) / (x2 - x1), (2 * rows - y1 - y2) / (y2 - y1)
    shape = _SHAPES[label](x[None, :], y[:, None])
    colour = numbers.colour()
    while abs(colour - backdrop).mean() < _CONTRAST:
        colour = numbers.colour()
    pixels[:, shape] = colour[:, None]
    return _Object(box, label, float(shape.sum()))


def _crowd(pixels: NDArray[np.float64], backdrop: NDArray[np.float64], numbers: _Numbers) -> _Object:
    """Draw many small shapes of one class, and return them as one object."""
    height, width = pixels.shape[1:]
    wide, high = numbers.uniform(*_CROWD_SIZES), numbers.uniform(*_CROWD_SIZES)
    left, top = numbers.uniform(0, width - wide), numbers.uniform(0, height - high)
    label, area = numbers.below(len(_SHAPES)), 0.0
    for _ in range(_CROWD_OBJECTS):
        size = numbers.uniform(6, 10)
        x, y = numbers.uniform(left, left + wide - size), numbers.uniform(top, top + high - size)
        area += _draw(pixels, (x, y, x + size, y + size), label, backdrop, numbers).area
    return _Object((left, top, left + wide, top + high), label, min(area, wide * high), is_crowd=True)

"""Which part of a stored image a view is made from, for loaders that decode no more than that part."""

from typing import NamedTuple

from unikd_fast.data.augmentation import Augmentation, ViewParameters
from unikd_fast.data.images import MAX_PIXELS, StoredImage
from unikd_fast.data.splits import DataSplits
from unikd_fast.errors import DataError


class Box(NamedTuple):
    """Part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def within(self, other: "Box") -> "Box":
        """Return this box in the coordinates of another, which holds it.

        Example:
            >>> Box(10, 20, 5, 5).within(Box(8, 20, 50, 50))
            Box(top=2, left=0, height=5, width=5)
        """
        return self._replace(top=self.top - other.top, left=self.left - other.left)


class ViewWindow(NamedTuple):
    """How a view comes out of an image, step by step; all in pixels."""

    box: Box  # cut out of the image
    size: tuple[int, int]  # height, width it is resized to
    cut: tuple[int, int]  # top, left of the square of the view's size that is cut out of that
    shift: tuple[int, int]  # where in this square the view begins, black outside; other than 0 where views are padded
    flip: bool  # left to right


class Windows:
    """The windows of a loader's views, whoever decodes.

    Args:
        image_size: height and width of the views in pixels.
        short_side: length in pixels the short side is resized to before the centre is cut out.
        squash: whether the long side is resized to that length too.

    Example:
        >>> Windows(image_size=224, short_side=256).central(400, 500).cut
        (16, 48)
    """

    def __init__(self, image_size: int, short_side: int, *, squash: bool = False) -> None:
        self.image_size = image_size
        self.short_side = short_side
        self.squash = squash

    @classmethod
    def of(cls, splits: DataSplits, augmentation: Augmentation) -> "Windows":
        """Return the windows of a data set's views: `eval_resize` of the augmentation, else that of the data set.

        Raises:
            ValueError: `eval_resize` is too small to cut out the image size.
        """
        if augmentation.eval_resize is None and splits.eval_resize is not None:
            return cls(splits.image_size, splits.eval_resize, squash=splits.squash)
        return cls(splits.image_size, augmentation.short_side(splits.image_size))

    def training(self, views: ViewParameters, i: int, height: int, width: int) -> ViewWindow:
        """Return the window of view i of an image of this size."""
        flip = bool(views.flip[i])
        if views.augmentation.crop == "resized":
            box = Box(*views.crop_box(i, height, width))
            return ViewWindow(box, (self.image_size, self.image_size), (0, 0), (0, 0), flip)
        central = self.central(height, width)
        if views.augmentation.crop in (None, "none"):
            return central._replace(flip=flip)
        padding = views.augmentation.padding or 0
        top, left, _, _ = views.crop_box(i, self.image_size, self.image_size)
        return central._replace(shift=(top - padding, left - padding), flip=flip)

    def central(self, height: int, width: int) -> ViewWindow:
        """Return the window of the view for evaluation of an image of this size."""
        short, long = sorted((height, width))
        long_side = self.short_side if self.squash else int(self.short_side * long / short)
        size = (self.short_side, long_side) if height <= width else (long_side, self.short_side)
        top, left = (round((length - self.image_size) / 2) for length in size)
        return ViewWindow(Box(0, 0, height, width), size, (top, left), (0, 0), False)

    def check(self, stored: StoredImage, height: int, width: int) -> None:
        """Refuse an image, of this size, that would fill the memory when its short side is resized.

        Raises:
            DataError: it becomes larger than `MAX_PIXELS`.
        """
        high, wide = self.central(height, width).size
        if high * wide > MAX_PIXELS:
            raise DataError(
                f"cannot decode {stored.name}: {width} x {height} pixels become {wide} x {high} when the short side is "
                f"resized, {MAX_PIXELS} are allowed; crop the image or remove it"
            )


def enclosing(boxes: list[Box]) -> Box:
    """Return the smallest box that holds all of these.

    Example:
        >>> enclosing([Box(0, 5, 10, 10), Box(8, 0, 10, 10)])
        Box(top=0, left=0, height=18, width=15)
    """
    top, left = min(box.top for box in boxes), min(box.left for box in boxes)
    bottom, right = max(box.top + box.height for box in boxes), max(box.left + box.width for box in boxes)
    return Box(top, left, bottom - top, right - left)

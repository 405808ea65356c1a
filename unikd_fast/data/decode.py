"""What a worker process does: image files to uint8 batches, under views it is told."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from unikd_fast.data.augmentation import ViewParameters
from unikd_fast.data.bad_images import BadImage, stand_ins
from unikd_fast.data.images import StoredImage, read_rgb
from unikd_fast.data.strong import strong_views
from unikd_fast.data.view_windows import ViewWindow, Windows
from unikd_fast.errors import DataError
from unikd_fast.values import Interpolation

OnBad = Literal["raise", "replace", "leave_out"]

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class DecodeRequest:
    """One micro-batch to decode."""

    images: tuple[StoredImage, ...]
    labels: NDArray[np.int64]  # (N,)
    sample_ids: NDArray[np.int64]  # (N,)
    views: ViewParameters | None  # None: the view for evaluation
    second: ViewParameters | None = None  # of another view of the same images
    on_bad: OnBad = "raise"  # where an image cannot be decoded


class DecodedBatch(NamedTuple):
    """What became of a request: M images, of which M = N unless bad ones are left out."""

    images: Tensor  # (M, 3, image_size, image_size) uint8, channels_last
    labels: Tensor  # (M,) int64
    sample_ids: Tensor  # (M,) int64
    second: Tensor | None  # as images, another view of them
    bad: Sequence[BadImage]  # those replaced or left out


@dataclass(frozen=True)
class Decoder:
    """Decode requests; indexed by them, as a torch DataLoader wants its data set.

    Args:
        windows: of the views.
        interpolation: of every resize.

    Example:
        >>> images, labels, sample_ids, second, bad = Decoder(Windows(image_size=224, short_side=256))[request]
    """

    windows: Windows
    interpolation: Interpolation = "bilinear"

    def __getitem__(self, request: DecodeRequest) -> DecodedBatch:
        """Decode a batch; the request says whether a bad file is an error, is left out, or is replaced.

        In its place is then the next good sample of the batch, with its image, label and id.

        Raises:
            DataError: a file cannot be decoded, or none of a batch; the message names it.
        """
        bad: dict[int, BadImage] = {}
        size = self.windows.image_size
        shown = [request.views] if request.second is None else [request.views, request.second]
        pixels = np.empty((len(shown), len(request.images), size, size, 3), np.uint8)
        for i, stored in enumerate(request.images):
            try:
                image = self._read(stored)
            except DataError as error:
                if request.on_bad == "raise":
                    raise
                bad[i] = BadImage(stored.name, int(request.sample_ids[i]), str(error))
                continue
            for levels, views in zip(pixels, shown, strict=True):
                view = self.central_view(image) if views is None else self.training_view(image, views, i)
                levels[i] = np.asarray(view)
        images, *second = (
            batch if views is None else strong_views(batch, views)
            for batch, views in zip(torch.from_numpy(pixels).permute(0, 1, 4, 2, 3), shown, strict=True)
        )
        labels, sample_ids = torch.from_numpy(request.labels), torch.from_numpy(request.sample_ids)
        batch = DecodedBatch(images, labels, sample_ids, second[0] if second else None, list(bad.values()))
        return _without_bad(batch, list(bad), request.on_bad) if bad else batch

    def _read(self, stored: StoredImage) -> Image.Image:
        image = read_rgb(stored)
        self.windows.check(stored, image.height, image.width)
        return image

    def central_view(self, image: Image.Image) -> Image.Image:
        """Resize the short side, then cut out the centre, as torchvision's Resize and CenterCrop do."""
        return self._cut(image, self.windows.central(image.height, image.width))

    def training_view(self, image: Image.Image, views: ViewParameters, i: int) -> Image.Image:
        """Apply view i: crop, resize where the crop asks for it, flip."""
        return self._cut(image, self.windows.training(views, i, image.height, image.width))

    def _cut(self, image: Image.Image, window: ViewWindow) -> Image.Image:
        # Crop first: given as `box`, PIL would let the filter reach outside the window.
        top, left, height, width = window.box
        image = _crop(image, top, left, height, width)
        if window.size != (height, width):
            image = image.resize(window.size[::-1], _RESAMPLING[self.interpolation])
        for top, left in (window.cut, window.shift):
            image = _crop(image, top, left, self.windows.image_size, self.windows.image_size)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if window.flip else image


def _crop(image: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image:
    """Cut a window out, black outside of the image; the image itself if it is all of it, without a copy."""
    if (top, left, height, width) == (0, 0, image.height, image.width):
        return image
    return image.crop((left, top, left + width, top + height))


def _without_bad(batch: DecodedBatch, places: Sequence[int], on_bad: OnBad) -> DecodedBatch:
    """Return a batch in which the samples at these places are replaced or left out."""
    good = np.ones(len(batch.labels), np.bool_)
    good[places] = False
    if on_bad == "replace" and not good.any():
        raise DataError(
            f"Decoder: none of the {len(good)} images of a batch can be decoded, so none can stand in for the others; "
            f"the first: {batch.bad[0].reason}"
        )
    taken = torch.from_numpy(stand_ins(good) if on_bad == "replace" else np.flatnonzero(good))
    images, labels, sample_ids, second, bad = batch
    return DecodedBatch(images[taken], labels[taken], sample_ids[taken], None if second is None else second[taken], bad)

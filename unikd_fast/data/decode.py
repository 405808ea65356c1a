"""What a worker process does: image files to uint8 batches, under views it is told."""

import io
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from unikd_fast.data.augmentation import ViewParameters
from unikd_fast.data.stored_image import StoredImage


@dataclass(frozen=True)
class DecodeRequest:
    """One micro-batch to decode."""

    images: tuple[StoredImage, ...]
    labels: NDArray[np.int64]  # (N,)
    sample_ids: NDArray[np.int64]  # (N,)
    views: ViewParameters | None  # None: the view for evaluation


@dataclass(frozen=True)
class Decoder:
    """Decode requests; indexed by them, as a torch DataLoader wants its data set.

    Args:
        image_size: height and width of the images in pixels.
        short_side: length in pixels the short side is resized to before the centre is cut out.

    Example:
        >>> images, labels, sample_ids = Decoder(image_size=224, short_side=256)[request]
    """

    image_size: int
    short_side: int

    def __getitem__(self, request: DecodeRequest) -> tuple[Tensor, Tensor, Tensor]:
        """Return images (N, 3, image_size, image_size) uint8 in channels_last layout, labels (N,) and ids (N,).

        Raises:
            ValueError: a file cannot be decoded; the message names it.
        """
        pixels = np.empty((len(request.images), self.image_size, self.image_size, 3), np.uint8)
        for i, stored in enumerate(request.images):
            image = read_rgb(stored)
            view = self.central_view(image) if request.views is None else self.training_view(image, request.views, i)
            pixels[i] = np.asarray(view)
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        return images, torch.from_numpy(request.labels), torch.from_numpy(request.sample_ids)

    def central_view(self, image: Image.Image) -> Image.Image:
        """Resize the short side, then cut out the centre, as torchvision's Resize and CenterCrop do."""
        short, long = sorted(image.size)
        long_side = int(self.short_side * long / short)
        width, height = (self.short_side, long_side) if image.width <= image.height else (long_side, self.short_side)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - self.image_size) / 2), round((height - self.image_size) / 2)
        return image.crop((left, top, left + self.image_size, top + self.image_size))

    def training_view(self, image: Image.Image, views: ViewParameters, i: int) -> Image.Image:
        """Apply view i: crop, resize where the crop asks for it, flip."""
        if views.augmentation.crop != "resized":
            image = self.central_view(image)
        if views.augmentation.crop == "pad":
            image = ImageOps.expand(image, border=views.augmentation.padding)
            top, left, height, width = views.crop_box(i, self.image_size, self.image_size)
        else:
            top, left, height, width = views.crop_box(i, image.height, image.width)
        image = image.crop((left, top, left + width, top + height))
        if image.size != (self.image_size, self.image_size):
            # Crop first: given as `box`, PIL would let the filter reach outside the window.
            image = image.resize((self.image_size, self.image_size), Image.Resampling.BILINEAR)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if views.flip[i] else image


def read_rgb(stored: StoredImage) -> Image.Image:
    """Decode an image to RGB, as stored: an EXIF orientation is not applied, as in the published recipes.

    Raises:
        ValueError: it cannot be read or decoded; the message names it.

    Example:
        >>> read_rgb(StoredImage("n01440764_10026.JPEG")).mode
        'RGB'
    """
    content = stored.read()
    try:
        if stored.shape is not None:
            height, width = stored.shape
            return Image.frombuffer("RGB", (width, height), content, "raw", "RGB", 0, 1)
        with Image.open(io.BytesIO(content)) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # PIL reports broken files by any of these; SyntaxError comes from its PNG reader.
        raise ValueError(f"read_rgb: cannot decode {stored.name}: {error}; repair the file or remove it") from error

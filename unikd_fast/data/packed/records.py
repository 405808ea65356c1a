"""What becomes of one image in a packed store."""

import io
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import PIL
from PIL import Image, features

from unikd_fast.data.decode import read_rgb
from unikd_fast.data.stored_image import StoredImage

Format = Literal["jpeg", "raw"]

DEFAULT_QUALITY = 90
DEFAULT_SHARD_BYTES = 2**28


class BadImageError(ValueError):
    """A file that can be read and not decoded."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message, reason)  # both, or it could not travel between processes
        self.message = message
        self.reason = reason  # without paths or addresses: the same whenever it is packed

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class PackSettings:
    """How images are packed; together with the images it decides every byte of a store.

    Args:
        format: "jpeg", or "raw": rows of uint8 RGB, which need no decoding and 5 to 20 times the room.
        size: pixels the short side is brought to by antialiased bilinear interpolation; images that are smaller keep
            their size. 0, for "jpeg" only: the files are copied untouched, whatever their format.
        quality: of JPEG in [1, 100]; None is 90. Only where images are encoded, which is for "jpeg" with a size.
        shard_bytes: about the size of a file. One that was not finished is begun anew after an interruption.

    Raises:
        ValueError: a value out of range, or raw without a size, or a quality where nothing is encoded.

    Example:
        >>> PackSettings("raw", size=256).record["quality"] is None
        True
    """

    format: Format = "jpeg"
    size: int = 0
    quality: int | None = None
    shard_bytes: int = DEFAULT_SHARD_BYTES

    def __post_init__(self) -> None:
        if self.format not in get_args(Format):
            raise ValueError(f"PackSettings: format must be one of {get_args(Format)}, got {self.format!r}")
        if self.size < 0 or (self.format == "raw" and self.size == 0):
            raise ValueError(
                f"PackSettings: format {self.format!r} needs a size of at least {int(self.format == 'raw')} pixels for "
                f"the short side, got {self.size}; 256 is usual for images of 224"
            )
        if self.quality is not None and not (self.encodes and 1 <= self.quality <= 100):
            raise ValueError(
                "PackSettings: quality is for format 'jpeg' with a size, in [1, 100]; got "
                f"{self.quality} with format {self.format!r} and size {self.size}"
            )
        if self.shard_bytes < 1:
            raise ValueError(f"PackSettings: shard_bytes must be at least 1, got {self.shard_bytes}")

    @property
    def copies(self) -> bool:
        """Whether files are packed as they are."""
        return self.size == 0

    @property
    def encodes(self) -> bool:
        """Whether JPEGs are made."""
        return self.format == "jpeg" and not self.copies

    @property
    def record(self) -> dict[str, Any]:
        """The settings as a manifest holds them, with the libraries whose versions decide pixels."""
        quality = (self.quality or DEFAULT_QUALITY) if self.encodes else None
        turbo = features.version("libjpeg_turbo")
        jpeg = f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {features.version('jpg')}"
        library = None if self.copies else f"pillow {PIL.__version__}, {jpeg}"
        settings = {"format": self.format, "size": self.size, "quality": quality, "shard_bytes": self.shard_bytes}
        return {**settings, "library": library}


class Record(NamedTuple):
    """The bytes to store; of raw rows also the size in pixels, otherwise 0."""

    content: bytes
    height: int = 0
    width: int = 0


def make_record(path: str, settings: PackSettings) -> Record:
    """Read, decode and bring an image to the form in which it is stored.

    It is decoded in any case, by what the loader decodes it with: what is packed can be loaded.

    Raises:
        BadImageError: it cannot be decoded, or not be stored as JPEG.
        ValueError: the file cannot be read.

    Example:
        >>> make_record("n01440764_10026.JPEG", PackSettings("raw", size=256)).height
        256
    """
    stored = StoredImage(path)
    original = stored.read()
    try:
        image = read_rgb(stored)
    except ValueError as error:
        raise BadImageError(str(error), str(error.__cause__ or error)) from error
    if settings.copies:
        return Record(original)
    image = shrink(image, settings.size)
    if settings.format == "raw":
        return Record(image.tobytes(), image.height, image.width)
    image.info = {}  # a comment of the original would be written again
    content = io.BytesIO()
    try:
        image.save(content, "JPEG", quality=settings.quality or DEFAULT_QUALITY, subsampling="4:2:0")
    except (OSError, ValueError) as error:
        size = f"{image.width} x {image.height}"
        raise BadImageError(
            f"make_record: cannot store {path} as a JPEG of {size} pixels: {error}; remove it or pack as raw",
            f"cannot be stored as a JPEG of {size} pixels",
        ) from error
    return Record(content.getvalue())


def shrink(image: Image.Image, size: int) -> Image.Image:
    """Bring the short side to `size` pixels; a smaller image stays as it is.

    Example:
        >>> shrink(Image.new("RGB", (500, 375)), 256).size
        (341, 256)
    """
    short, long = sorted(image.size)
    if short <= size:
        return image
    long_side = int(size * long / short)  # as the loader's central view
    return image.resize(
        (size, long_side) if image.width <= image.height else (long_side, size), Image.Resampling.BILINEAR
    )

"""Images on disk: where one lies, its pixels by Pillow, and what becomes of those that cannot be decoded."""

import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin
from PIL.JpegImagePlugin import JpegImageFile

from unikd_fast.errors import DataError

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
"""What is decoded, as Pillow names it; JPEG covers MPO. For other formats Pillow starts programs (Ghostscript for
EPS)."""

MAX_PIXELS = 89_478_485
"""More pixels are taken for a decompression bomb: a small file that would fill the memory. Pillow warns from there
on."""


END_OF_JPEG = b"\xff\xd9"
# What begins the pixels of a whole file, and what ends them.
_DELIMITERS = {
    "JPEG": (b"\xff\xda", END_OF_JPEG),
    "MPO": (b"\xff\xda", END_OF_JPEG),
    "PNG": (b"IDAT", b"IEND"),
}

_NAMED_IN_ERRORS = 3

_logger = logging.getLogger("unikd_fast")


class StoredImage(NamedTuple):
    """One image of a data set on disk; what a decoding process is told to read.

    It holds its own path, so that decoding processes keep no list of a million files.
    """

    path: str  # of the image, or of the Arrow file that holds it
    row: int = -1  # of the Arrow file; -1 for an image file
    column: str = ""  # of the Arrow file

    @property
    def name(self) -> str:
        """Return what messages call it; bytes of the path that are not UTF-8 are escaped, so that any stream can show
        it."""
        name = self.path
        if self.row >= 0:
            from unikd_fast.data.arrow import name_row

            name = name_row(self)
        return name.encode("utf-8", "backslashreplace").decode()

    def read(self) -> bytes | NDArray[np.uint8]:
        """Return the encoded image, or (H, W, 3) pixels where these are stored.

        Raises:
            DataError: the file is missing or unreadable, or the row holds no image.

        Example:
            >>> StoredImage("n01440764_10026.JPEG").read()[:2].hex()
            'ffd8'
        """
        if self.row >= 0:
            from unikd_fast.data.arrow import read_row

            return read_row(self)
        try:
            with open(self.path, "rb") as file:  # noqa: PTH123  half the time of Path.open, for every image
                return file.read()
        except OSError as error:
            raise DataError(f"cannot read {self.name}: {error.strerror}; restore the file or remove it") from error
        except ValueError as error:
            raise DataError(f"cannot read {self.name}: no file can have this name; correct it") from error


def read_rgb(stored: StoredImage) -> Image.Image:
    """Decode an image to RGB, as stored: an EXIF orientation is not applied, as in the published recipes.

    What the file holds decides how it is read, not its name. Of 16-bit levels the upper 8 bits are kept; CMYK is
    converted without a colour profile; transparency is dropped, and the colours below it show; of an animation the
    first frame is taken.

    Raises:
        DataError: it cannot be read or decoded, or is too large (`MAX_PIXELS`); the message names it.

    Example:
        >>> read_rgb(StoredImage("n01440764_10026.JPEG")).mode
        'RGB'
    """
    content = stored.read()
    if isinstance(content, np.ndarray):
        return Image.fromarray(content)
    return to_rgb(open_image(content, stored), stored)


def open_image(content: bytes, stored: StoredImage) -> Image.Image:
    """Open an encoded image, which is in general not decoded yet.

    Pillow notices a file that ends too early, but not one whose rest is zeros, as an interrupted copy leaves it: to its
    decoders zeros are codes of some colour. For JPEG and PNG this is checked here.

    Args:
        content: bytes of the file.
        stored: image that they are read from, for messages.

    Raises:
        DataError: it is empty, not an image, too large, or cut off and filled up with zeros.
    """
    with naming_bad_file(stored):
        if not content:
            raise ValueError("the file is empty")
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        except Image.UnidentifiedImageError:  # its words name an object in memory
            known = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
            raise ValueError(
                f"not a {known} file; its {len(content)} bytes begin with {bytes(content[:8])!r}"
            ) from None
        except Image.DecompressionBombError:  # its words name a limit of its own
            raise ValueError(f"its header claims more pixels than the {MAX_PIXELS} that are allowed") from None
        for width, height in (image.size, _tile(image)):
            if width * height > MAX_PIXELS:
                claim = f"{width} x {height} pixels"
                raise ValueError(f"its header claims {claim}, more than the {MAX_PIXELS} that are allowed")
        start, end = _DELIMITERS.get(str(image.format), (b"", b""))
        if content.endswith(b"\0") and content.rfind(end) < content.rfind(start):
            raise ValueError(f"the {image.format} file is truncated: its pixels have no end and zeros follow")
        return image


def is_plain_jpeg(image: Image.Image, content: bytes) -> bool:
    """Return whether any decoder gives Pillow's pixels, up to the rounding of its arithmetic.

    That is the case for a JPEG of grey or of the usual colours that ends in its end marker, apart from zeros behind it.

    Args:
        image: image that `open_image` opened.
        content: bytes of the file.
    """
    if not isinstance(image, JpegImageFile) or image.format != "JPEG" or not image.tile:
        return False
    components, transform = bytes(layer[0] for layer in image.layer), image.info.get("adobe_transform")
    # As libjpeg tells RGB from YCbCr. Decoders that trust the number of components get the former wrong.
    is_rgb = "jfif" not in image.info and (transform == 0 or (transform is None and components == b"RGB"))
    ends = content.endswith(END_OF_JPEG) or content.rstrip(b"\0").endswith(END_OF_JPEG)
    return ends and (len(components) == 1 or (len(components) == 3 and not is_rgb))


def to_rgb(image: Image.Image, stored: StoredImage) -> Image.Image:
    """Decode an opened image as `read_rgb` does, which lists the errors."""
    with naming_bad_file(stored):
        return as_rgb(image)


@contextmanager
def naming_bad_file(stored: StoredImage) -> Iterator[None]:
    """Turn what is raised over a broken file into a DataError that names it.

    Pillow has no errors of its own for this; its readers raise whatever their code meets. What is not the file's fault
    passes: a lack of memory, and the RuntimeError by which torch tells, at any place, that a process died.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or "DataLoader worker" in str(error):
            raise
        raise DataError(f"cannot decode {stored.name}: {error}; repair the file or remove it") from error


def _tile(image: Image.Image) -> tuple[int, int]:
    """Return the width and height of the tiles of a TIFF, which may be larger than the image and are decoded whole."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 0, 0
    return image.tag_v2.get(TiffImagePlugin.TILEWIDTH, 0), image.tag_v2.get(TiffImagePlugin.TILELENGTH, 0)


def as_rgb(image: Image.Image) -> Image.Image:
    """Return an image as RGB, decoded; of 16-bit levels the upper 8 bits are kept.

    Raises:
        ValueError: its levels have no known range; other errors are Pillow's.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        # PIL would clip: all above 255 of 65535 would be white. Of 16-bit RGB it takes the upper byte as well.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"its levels have 32 bits (mode {image.mode}) and no known range; store it with 8 or 16")
    return image.convert("RGB")


class BadImage(NamedTuple):
    """A sample whose image cannot be decoded."""

    name: str
    sample_id: int
    reason: str  # the error, which names the image and the remedy


class BadImageTally:
    """Count the bad images of one pass over a split, as one process meets them, and log each file once.

    Args:
        purpose: name of the pass in messages: "training", "val", ...
        samples: number of samples of the whole pass, over all processes.
        max_share: largest share of them that may be bad.
        logged: names of files already logged; this adds its own.

    Example:
        >>> tally = BadImageTally("training", samples=50_000, max_share=0.001, logged=set())
        >>> tally.add([BadImage("n01440764_10026.JPEG", 7, "cannot decode n01440764_10026.JPEG: the file is empty")])
        >>> len(tally.images)
        1
    """

    def __init__(self, purpose: str, *, samples: int, max_share: float, logged: set[str]) -> None:
        self._purpose, self._samples, self._max_share, self._logged = purpose, samples, max_share, logged
        self._images: list[BadImage] = []

    @property
    def images(self) -> tuple[BadImage, ...]:
        """Return the bad images met so far, in order."""
        return tuple(self._images)

    def add(self, images: Sequence[BadImage]) -> None:
        """Count the bad images of a batch.

        Raises:
            DataError: there are too many; see `check_bad_share`.
        """
        for image in images:
            if image.name not in self._logged:
                self._logged.add(image.name)
                _logger.warning("%s: skipped a sample: %s", self._purpose, image.reason)
        self._images += images
        names = [image.name for image in self._images[:_NAMED_IN_ERRORS]]
        check_bad_share(len(self._images), names, self._purpose, samples=self._samples, max_share=self._max_share)

    def log_missing(self) -> None:
        """Log how many samples an evaluation went without, if any."""
        if self._images:
            _logger.warning("%s: evaluated without %d of %d samples", self._purpose, len(self._images), self._samples)


def check_bad_share(count: int, names: Sequence[str], purpose: str, *, samples: int, max_share: float) -> None:
    """Check the share of bad samples of a pass against what is allowed.

    Args:
        count: number of bad samples.
        names: names of the first of their files.
        purpose: name of the pass in the message.
        samples: number of samples of the whole pass.
        max_share: largest share that is allowed.

    Raises:
        DataError: the share is larger; the message has both shares and the first names.

    Example:
        >>> check_bad_share(1, ["a.jpeg"], "training", samples=50_000, max_share=0.001)
    """
    if not count or count / samples <= max_share:
        return
    first = ", ".join(names[:_NAMED_IN_ERRORS]) + (", ..." if count > _NAMED_IN_ERRORS else "")
    raise DataError(
        f"{purpose}: {count} of {samples} samples cannot be decoded, a share of {count / samples:.3g}, and "
        f"data.max_bad_share allows {max_share:.3g}: {first}; repair the files or remove them, or raise "
        "data.max_bad_share"
    )


def stand_ins(good: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return which sample stands at each place of a batch: itself, or for a bad one the next good one, wrapping around.

    Args:
        good: (N,) whether each sample could be decoded; at least one could.

    Returns:
        (N,) places in the batch.

    Example:
        >>> stand_ins(np.array([True, False, False, True, False])).tolist()
        [0, 3, 3, 3, 0]
    """
    places = np.flatnonzero(good)
    return places[np.searchsorted(places, np.arange(len(good))) % len(places)]

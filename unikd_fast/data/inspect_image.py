"""What the header of an encoded image says, and whether the image is all there, before anything is decoded."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from PIL import Image, TiffImagePlugin

from unikd_fast.data.truncation import is_whole
from unikd_fast.errors import DataError

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
"""What is decoded, as PIL names it; JPEG covers MPO. For other formats PIL starts programs (Ghostscript for EPS)."""

MAX_PIXELS = 89_478_485
"""More pixels are taken for a decompression bomb: a small file that would fill the memory. PIL warns from there on."""

_START_OF_SCAN = 0xDA
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BASELINE, _PROGRESSIVE = 0xC0, 0xC2


class ImageInfo(NamedTuple):
    """What a header says of an image."""

    format: str  # as PIL names it: "JPEG", "PNG", ...
    mode: str  # PIL's, of the stored pixels: "RGB", "L", "P", "CMYK", "I;16", ...
    width: int  # in pixels, as stored
    height: int
    plain: bool
    """Whether any decoder gives PIL's pixels, up to the rounding of its JPEG arithmetic: 8-bit grey or RGB, in a PNG
    without transparency or a baseline or progressive JPEG with the usual colours, that ends as it should. An EXIF
    orientation is left alone."""


def inspect(content: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> ImageInfo:
    """Read the header of an image and check that the image is all there.

    A JPEG is whole if it ends in an end marker, a PNG if it has its last chunk; zeros behind are padding. Otherwise
    `truncation.is_whole` says so, or PIL, which then decodes it. Damage in between is not looked for.

    Args:
        content: the bytes of the file.
        name: what messages call it.
        max_pixels: width times height above which it is refused; `MAX_PIXELS` at most.

    Raises:
        DataError: it is empty, no image, too large or truncated; names it.

    Example:
        >>> inspect(Path("n01440764_10026.JPEG").read_bytes(), "n01440764_10026.JPEG")
        ImageInfo(format='JPEG', mode='RGB', width=500, height=375, plain=True)
    """
    return open_image(content, name, max_pixels=max_pixels)[1]


def open_image(content: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, ImageInfo]:
    """Do as `inspect`, and return PIL's image with it, in general not decoded yet."""
    with naming_broken(name):
        if not content:
            raise ValueError("the file is empty")
        file = io.BytesIO(content)
        try:
            image = Image.open(file, formats=FORMATS)
        except Image.UnidentifiedImageError:  # its words name an object in memory
            start = bytes(content[:8])
            known = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
            raise ValueError(f"not a {known} file; its {len(content)} bytes begin with {start!r}") from None
        except Image.DecompressionBombError:  # its words name a limit of its own
            raise ValueError(f"its header claims more pixels than the {max_pixels} that are allowed") from None
        width, height = image.size
        for wide, high in (image.size, _tile(image)):
            if wide * high > max_pixels:
                claim = f"{wide} x {high} pixels"
                raise ValueError(f"its header claims {claim}, more than the {max_pixels} that are allowed")
        plain, whole = _is_plain(image, content), is_whole(image, content)
        if whole is False:
            raise ValueError(f"the {image.format} file is truncated, its {len(content)} bytes do not hold all of it")
        if whole is None:
            plain = False
            image.load()
        return image, ImageInfo(str(image.format), image.mode, width, height, plain)


def _tile(image: Image.Image) -> tuple[int, int]:
    """Return the width and height of the tiles of a TIFF, which may be larger than the image and are decoded whole."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 0, 0
    return image.tag_v2.get(TiffImagePlugin.TILEWIDTH, 0), image.tag_v2.get(TiffImagePlugin.TILELENGTH, 0)


@contextmanager
def naming_broken(name: str) -> Iterator[None]:
    """Turn what is raised over a broken file into a DataError that names it.

    PIL has no errors of its own for this; its readers raise whatever their code meets. What is not the file's fault
    passes: a lack of memory, and the RuntimeError by which torch tells, at any place, that a process died.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or "DataLoader worker" in str(error):
            raise
        raise DataError(f"cannot decode {name}: {error}; repair the file or remove it") from error


def _is_plain(image: Image.Image, content: bytes) -> bool:
    if image.format == "JPEG":
        return _is_plain_jpeg(content)
    if image.format == "PNG":
        # Bit depth and colour type, 0 grey and 2 RGB.
        plain = content[12:16] == b"IHDR" and content[24] == 8 and content[25] in (0, 2)
        return plain and not ("transparency" in image.info or getattr(image, "is_animated", False))
    return False


def _is_plain_jpeg(content: bytes) -> bool:
    place, frame, components = 2, 0, b""
    jfif, transform = False, None
    while place + 4 <= len(content) and content[place] == 0xFF:
        marker = content[place + 1]
        if marker == 0xFF:  # padding
            place += 1
            continue
        if marker == _START_OF_SCAN:
            # As libjpeg tells RGB from YCbCr. Decoders that trust the number of components get the former wrong.
            is_rgb = not jfif and (transform == 0 or (transform is None and components == b"RGB"))
            usual = len(components) == 1 or (len(components) == 3 and not is_rgb)
            return frame in (_BASELINE, _PROGRESSIVE) and usual
        length = int.from_bytes(content[place + 2 : place + 4], "big")
        segment = content[place + 4 : place + 2 + length]
        if marker in _FRAMES:
            if frame:
                return False  # of two sizes decoders take either
            frame, components = marker, segment[6::3]
        elif marker == 0xE0 and segment.startswith(b"JFIF\0"):
            jfif = True
        elif marker == 0xEE and segment.startswith(b"Adobe") and len(segment) >= 12:
            transform = segment[11]
        place += 2 + length
    return False  # something odd between the segments, which PIL jumps over: it is the one to decode this

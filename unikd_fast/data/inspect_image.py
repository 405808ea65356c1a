"""What the header of an encoded image says, and whether the image is all there, before anything is decoded."""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from PIL import Image

from unikd_fast.errors import DataError

MAX_PIXELS = 2 * 89_478_485
"""More pixels are taken for a decompression bomb: a small file that would fill the memory. PIL's limit as well."""

_END_OF_JPEG = b"\xff\xd9"
_END_OF_PNG = b"\0\0\0\0IEND\xaeB`\x82"
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

    A JPEG is whole if it ends in an end marker, a PNG if it has its last chunk; zeros behind are padding. A JPEG that
    has no end marker and goes on in zeros is truncated, and so is a PNG that lacks part of a chunk. All others that do
    not end so are decoded, and PIL's word is taken. Damage in between is not looked for, and formats other than these
    two are not checked: they are PIL's to decode in any case.

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
            image = Image.open(file)
        except Image.UnidentifiedImageError:  # its words name an object in memory
            start = bytes(content[:8])
            raise ValueError(f"no image that PIL knows; its {len(content)} bytes begin with {start!r}") from None
        width, height = image.size
        if width * height > max_pixels:
            raise ValueError(f"its header claims {width} x {height} pixels, {max_pixels} are allowed")
        plain, whole = _look_closer(image, content)
        if whole is False:
            raise ValueError(f"the {image.format} file is truncated, its {len(content)} bytes do not hold all of it")
        if whole is None:
            plain = False
            image.load()
        return image, ImageInfo(str(image.format), image.mode, width, height, plain)


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


def _look_closer(image: Image.Image, content: bytes) -> tuple[bool, bool | None]:
    """Return whether an image is plain, and whether it is whole, None if decoding must tell."""
    if image.format == "JPEG":
        plain, scan = _read_jpeg_header(content)
        return plain, _jpeg_is_whole(content, scan)
    if image.format == "PNG":
        # Bit depth and colour type, 0 grey and 2 RGB.
        plain = content[12:16] == b"IHDR" and content[24] == 8 and content[25] in (0, 2)
        odd = "transparency" in image.info or getattr(image, "is_animated", False)
        return plain and not odd, _png_is_whole(content)
    return False, True


def _read_jpeg_header(content: bytes) -> tuple[bool, int]:
    """Return whether a JPEG is plain, and where its first scan starts; without one, its length."""
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
            return frame in (_BASELINE, _PROGRESSIVE) and usual, place
        length = int.from_bytes(content[place + 2 : place + 4], "big")
        segment = content[place + 4 : place + 2 + length]
        if marker in _FRAMES:
            frame, components = marker, segment[6::3]
        elif marker == 0xE0 and segment.startswith(b"JFIF\0"):
            jfif = True
        elif marker == 0xEE and segment.startswith(b"Adobe") and len(segment) >= 12:
            transform = segment[11]
        place += 2 + length
    # Something odd between the segments, which PIL jumps over: it is the one to decode this.
    scan = content.find(bytes((0xFF, _START_OF_SCAN)), place)
    return False, len(content) if scan < 0 else scan


def _jpeg_is_whole(content: bytes, scan: int) -> bool | None:
    """Return whether the image is all there, None if decoding must tell.

    The coded pixels never hold the bytes of the end marker, the thumbnail in the header does. PIL does notice a file
    that ends too early, but not if it goes on in zeros, as what remains of an interrupted copy often does.
    """
    if scan == len(content):
        return False
    if content.endswith(_END_OF_JPEG):
        return True
    if content.rfind(_END_OF_JPEG, scan) < 0:
        return False if content.endswith(b"\0") else None
    return True if content.rstrip(b"\0").endswith(_END_OF_JPEG) else None


def _png_is_whole(content: bytes) -> bool | None:
    """Return whether the image is all there, None if decoding must tell."""
    if content.endswith(_END_OF_PNG):
        return True
    place = 8
    while place + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        end = place + 8 + length
        if kind == b"IEND":
            return True
        if end + 4 > len(content) or zlib.crc32(content[place + 4 : end]) != struct.unpack_from(">I", content, end)[0]:
            return False
        place = end + 4
    # All chunks but the last, which says no more than that it is the last; or the file was cut between two.
    return None

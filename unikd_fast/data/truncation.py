"""Whether the first picture of an encoded file is all there, told by the structure of its format.

Pillow notices a file that ends too early. It does not notice one that goes on in zeros, as what remains of an
interrupted copy often does: to most decoders zeros are codes of some colour, and the rows below the cut are made up.
Where pixels are stored as they are (BMP, PPM, TIFF without compression) zeros are black, and nothing tells such a file
from a picture that is black there; it passes.
"""

import io
import re
import struct
import zlib
from collections.abc import Iterator

from PIL import Image, TiffImagePlugin

_START_OF_JPEG, _END_OF_JPEG = 0xD8, 0xD9
_START_OF_SCAN = 0xDA
# Among coded pixels 0xFF is followed by a zero or by a restart marker.
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)
_END_OF_PNG = b"\0\0\0\0IEND\xaeB`\x82"
_GIF_EXTENSION, _GIF_IMAGE = 0x21, 0x2C
_WEBP_SPARE = 8  # bytes: more than an encoder leaves unread at the end
_RUN_LENGTH_BMP = (1, 2)
_END_OF_BITMAP = b"\0\1"
_JPEG_IN_TIFF, _JPEG_TABLES = 7, 347


def is_whole(image: Image.Image, content: bytes) -> bool | None:
    """Tell whether the first picture of a file is all there; None if Pillow has to tell, by decoding it.

    Args:
        image: opened by Pillow.
        content: the bytes of the file.

    Raises:
        struct.error: a directory of a TIFF goes beyond the end.
    """
    match image.format:
        case "JPEG" | "MPO":
            return _is_whole_jpeg(content)
        case "PNG":
            return _is_whole_png(content)
        case "GIF":
            return _is_whole_gif(content)
        case "WEBP":
            return _is_whole_webp(content)
        case "BMP":
            return _is_whole_bmp(content)
        case "TIFF":
            assert isinstance(image, TiffImagePlugin.TiffImageFile)
            return _is_whole_tiff(image, content)
    return None


def _is_whole_jpeg(content: bytes) -> bool | None:
    """Look for the end marker behind the pixels; a thumbnail in the header has one too, and so have later pictures."""
    place, scanned = 2, False
    while (marker := _JPEG_MARKER.search(content, place)) is not None:
        kind, place = marker[1][0], marker.end()
        if kind in (_START_OF_JPEG, _END_OF_JPEG):
            break
        scanned = scanned or kind == _START_OF_SCAN
        if scanned and content.endswith(bytes((0xFF, _END_OF_JPEG))):
            return True  # without a walk through the pixels
        place += int.from_bytes(content[place : place + 2], "big")
    if not scanned:
        return False
    if marker is None or marker[1][0] == _START_OF_JPEG:
        return False if content.endswith(b"\0") else None
    return None if content[place:].strip(b"\0") else True


def _is_whole_png(content: bytes) -> bool | None:
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


def _is_whole_gif(content: bytes) -> bool | None:
    """Look for what follows the first picture: the next one or the end, and not zeros alone."""
    place = 13 + _colour_table(content[10])
    while content[place : place + 1] == bytes((_GIF_EXTENSION,)):
        place = _behind_blocks(content, place + 2)
    if content[place : place + 1] != bytes((_GIF_IMAGE,)):
        return None
    rest = content[_behind_blocks(content, place + 11 + _colour_table(content[place + 9])) :]
    return False if rest and not rest.strip(b"\0") else None


def _colour_table(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _behind_blocks(content: bytes, place: int) -> int:
    while place < len(content) and content[place]:
        place += 1 + content[place]
    return place + 1


def _is_whole_webp(content: bytes) -> bool | None:
    """Hold zeros at the end of a picture against its decoder.

    A picture that is flat below may well end in zeros, and needs them all. Behind a cut the decoder seldom gets to the
    last of them; it may within some dozen bytes, which are a few rows of blocks at most.
    """
    place = 12
    while place + 8 <= len(content):
        kind, length = struct.unpack_from("<4sI", content, place)
        if kind in (b"VP8 ", b"VP8L"):
            pixels = content[place + 8 : place + 8 + length]
            return False if pixels.endswith(bytes(_WEBP_SPARE)) and _is_webp(kind, pixels[:-_WEBP_SPARE]) else None
        place += 24 if kind == b"ANMF" else 8 + length + length % 2  # a frame holds chunks
    return None


def _is_webp(kind: bytes, pixels: bytes) -> bool:
    padded = pixels + bytes(len(pixels) % 2)
    chunk = b"WEBP" + kind + struct.pack("<I", len(pixels)) + padded
    try:
        Image.open(io.BytesIO(b"RIFF" + struct.pack("<I", len(chunk)) + chunk), formats=("WEBP",)).load()
    except (OSError, EOFError):
        return False
    return True


def _is_whole_bmp(content: bytes) -> bool | None:
    """Look for the code that ends run lengths."""
    if int.from_bytes(content[30:34], "little") not in _RUN_LENGTH_BMP or not content.endswith(b"\0"):
        return None
    return None if content.rstrip(b"\0").endswith(_END_OF_BITMAP) else False


def _is_whole_tiff(image: TiffImagePlugin.TiffImageFile, content: bytes) -> bool | None:
    """Look for zeros in the directory, which may stand behind the pixels, and for the ends of JPEGs inside."""
    if 0 in _directory(content):
        return False
    tags = image.tag_v2
    if _JPEG_TABLES in tags and not _ends_as_jpeg(tags[_JPEG_TABLES]):
        return False
    for offsets, lengths in (
        (TiffImagePlugin.STRIPOFFSETS, TiffImagePlugin.STRIPBYTECOUNTS),
        (TiffImagePlugin.TILEOFFSETS, TiffImagePlugin.TILEBYTECOUNTS),
    ):
        for offset, length in zip(_values(tags.get(offsets)), _values(tags.get(lengths)), strict=False):
            if not offset or not length:
                return False
            is_jpeg = tags.get(TiffImagePlugin.COMPRESSION) == _JPEG_IN_TIFF
            if is_jpeg and not _ends_as_jpeg(content[offset : offset + length]):
                return False
    return None


def _ends_as_jpeg(content: bytes) -> bool:
    return content.rstrip(b"\0").endswith(bytes((0xFF, _END_OF_JPEG)))


def _directory(content: bytes) -> Iterator[int]:
    """Yield the tags of the first directory."""
    order = "<" if content.startswith(b"II") else ">"
    big = struct.unpack_from(f"{order}H", content, 2)[0] == 43
    (start,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", content, 8 if big else 4)
    (count,) = struct.unpack_from(f"{order}{'Q' if big else 'H'}", content, start)
    first, size = (start + 8, 20) if big else (start + 2, 12)
    for i in range(count):
        yield struct.unpack_from(f"{order}H", content, first + i * size)[0]


def _values(tag: object) -> tuple[int, ...]:
    return tag if isinstance(tag, tuple) else () if tag is None else (tag,)

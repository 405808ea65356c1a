"""Encoded images of every kind that a folder may hold, odd but good ones and broken ones, made at test time."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 40, 30


def picture() -> Image.Image:
    """Draw coarse blobs, (HEIGHT, WIDTH) RGB, which no two decoders should see differently."""
    coarse = np.random.default_rng(5).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def encoded(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    (picture() if image is None else image).save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, bits: int, colour_type: int, rows: bytes) -> bytes:
    """Put a PNG together by hand; `rows` are as they go into zlib, with a filter byte before each."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    )


def bomb() -> bytes:
    """Claim 3.6 billion pixels in 100 bytes."""
    return png(60_000, 60_000, 8, 2, b"\0")


def undecodable_png() -> bytes:
    """Hold all chunks and their checksums, but pixels that zlib cannot unpack."""
    whole = png(4, 4, 8, 0, bytes(20))
    start = whole.index(b"IDAT") + 4
    length = struct.unpack_from(">I", whole, start - 8)[0]
    data = b"IDAT" + b"\xff" * length
    return whole[: start - 4] + data + struct.pack(">I", zlib.crc32(data)) + whole[start + length + 4 :]


def with_thumbnail() -> bytes:
    """A JPEG in whose header lies another, end marker and all."""
    exif = b"Exif\0\0" + encoded("JPEG", picture().resize((16, 12)))
    whole = encoded("JPEG")
    return whole[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + whole[2:]


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    return encoded("JPEG", exif=exif)


def transparent_palette() -> bytes:
    image = picture().quantize(16)
    return encoded("PNG", image, transparency=int(np.asarray(image)[0, 0]))


def animation() -> bytes:
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("red", "blue")]
    return encoded("GIF", frames[0], save_all=True, append_images=frames[1:])


def odd() -> dict[str, bytes]:
    """Images that are whole, whatever their kind."""
    # Of the grey JPEG, PIL does not miss the end marker.
    jpeg, whole_png = encoded("JPEG"), encoded("PNG")
    rgba = picture()
    rgba.putalpha(7)
    levels = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
    return {
        "jpeg": jpeg,
        "jpeg progressive": encoded("JPEG", progressive=True),
        "jpeg grey": encoded("JPEG", picture().convert("L")),
        "jpeg cmyk": encoded("JPEG", picture().convert("CMYK")),
        "jpeg rgb": encoded("JPEG", keep_rgb=True),
        "jpeg rotated": rotated(),
        "jpeg thumbnail": with_thumbnail(),
        "jpeg and zeros": jpeg + bytes(3000),
        "jpeg and text": jpeg + b"some camera's notes",
        "jpeg grey without end": encoded("JPEG", picture().convert("L"))[:-2],
        "jpeg and jpeg": jpeg + encoded("JPEG", picture().resize((16, 12))) + b"\1",
        "png": whole_png,
        "png grey": encoded("PNG", picture().convert("L")),
        "png grey 4": png(4, 2, 4, 0, b"\0\x01\x23\0\x45\x67"),
        "png grey 16": encoded("PNG", Image.fromarray(levels)),
        "png rgb 16": png(2, 1, 16, 2, b"\0" + bytes(range(12))),
        "png palette": encoded("PNG", picture().quantize(16)),
        "png transparent palette": transparent_palette(),
        "png rgba": encoded("PNG", rgba),
        "png key colour": encoded("PNG", transparency=(1, 2, 3)),
        "png animated": encoded("PNG", save_all=True, append_images=[picture().transpose(0)]),
        "png black and white": encoded("PNG", picture().convert("1")),
        "png and zeros": whole_png + bytes(3000),
        "png and text": whole_png + b"text",
        "png without end": whole_png[:-12],
        "gif": animation(),
        "bmp": encoded("BMP"),
        "webp": encoded("WEBP", lossless=True),
        "tiff": encoded("TIFF"),
        "tiff grey 16": encoded("TIFF", Image.fromarray(levels)),
        "pgm grey 16": encoded("PPM", Image.fromarray(levels)),
    }


def cut(content: bytes) -> dict[str, bytes]:
    """Leave off the ends of a file, some of them filled up with zeros."""
    ends = (1, 2, 3, 10, 50, len(content) // 4, len(content) // 2, len(content) - 200)
    return {f"without {n}": content[:-n] for n in ends} | {f"zeros for {n}": content[:-n] + bytes(n) for n in ends[3:]}


def broken() -> dict[str, bytes]:
    """Contents that are no image, or not all of one."""
    cuts = {
        f"{name} {how}": content
        for name in ("jpeg", "jpeg progressive", "jpeg thumbnail")
        for how, content in cut(odd()[name]).items()
    }
    header = odd()["jpeg"][: odd()["jpeg"].index(b"\xff\xda")]
    # Without its last chunk a PNG still has all its pixels.
    cuts |= {f"png {how}": c for how, c in cut(encoded("PNG")[:-12]).items()}
    return {
        "empty": b"",
        "text": b"<html>404 not found</html>",
        "zeros": bytes(4096),
        "bomb": bomb(),
        "jpeg without pixels": header,
        "jpeg without pixels but an end": header + b"\xff\xd9",
        "jpeg half a thumbnail": with_thumbnail()[:300],
        **cuts,
    }

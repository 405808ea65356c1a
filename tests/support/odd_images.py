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


def bombs(side: int) -> dict[str, bytes]:
    """Files of every format whose headers claim a square of this side in pixels, and that hold next to nothing."""

    def changed(kind: str, form: str, *places: int, **options: Any) -> bytes:
        content = bytearray(encoded(kind, **options))
        for place in places:
            struct.pack_into(form, content, place, side)
        return bytes(content)

    jpeg, tiff = encoded("JPEG"), bytearray(encoded("TIFF"))
    frame = jpeg.index(b"\xff\xc0")
    for place in range(10, 10 + 12 * tiff[8], 12):
        if int.from_bytes(tiff[place : place + 2], "little") in (256, 257, 278):  # width, height, rows in a strip
            struct.pack_into("<HII", tiff, place + 2, 4, 1, side)
    canvas, frame_size = 2 * (side - 1).to_bytes(3, "little"), bytes((WIDTH - 1, 0, 0, HEIGHT - 1, 0, 0))
    picture_chunk = encoded("WEBP")[12:]
    chunks = b"WEBPVP8X" + struct.pack("<II", 10, 2) + canvas + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    chunks += b"ANMF" + struct.pack("<I", 16 + len(picture_chunk)) + bytes(6) + frame_size + bytes(4) + picture_chunk
    return {
        "JPEG": changed("JPEG", ">H", frame + 5, frame + 7),
        "PNG": png(side, side, 8, 2, b"\0"),
        "PPM": b"P6 %d %d 255\n" % (side, side) + bytes(100),
        "BMP": changed("BMP", "<I", 18, 22),
        "TIFF": bytes(tiff),
        "WEBP": b"RIFF" + struct.pack("<I", len(chunks)) + chunks,
        "GIF": changed("GIF", "<H", 6, 8),
    }


def tiff_of_a_large_tile(side: int) -> bytes:
    """Hold 16 x 16 pixels in the corner of a tile that size in pixels, which is deflated to nothing."""
    packer = zlib.compressobj()
    tile = b"".join(packer.compress(bytes(side)) for _ in range(side)) + packer.flush()
    tile += bytes(len(tile) % 2)
    values = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8, 325: len(tile)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    directory = struct.pack("<H", len(values)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(tile)) + tile + directory


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


def two_pictures() -> bytes:
    """A JPEG of two pictures, as phones write it (MPO)."""
    return encoded("MPO", save_all=True, append_images=[picture().transpose(0)])


def run_length_bmp() -> bytes:
    """A BMP of 16 colours in run lengths."""
    image = picture().quantize(16)
    runs = bytearray()
    for row in np.asarray(image)[::-1]:
        for colours in np.split(row, np.flatnonzero(np.diff(row)) + 1):
            runs += bytes((len(colours), colours[0]))
        runs += b"\0\0"
    plain = encoded("BMP", image)
    start = struct.unpack_from("<I", plain, 10)[0]
    size, compression = struct.pack("<I", start + len(runs) + 2), struct.pack("<I", 1)
    return plain[:2] + size + plain[6:30] + compression + plain[34:start] + runs + b"\0\1"


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
        "mpo": two_pictures(),
        "gif": animation(),
        "bmp": encoded("BMP"),
        "bmp run lengths": run_length_bmp(),
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
    # Without its last chunk and the checksums before it a PNG still has all its pixels.
    cuts |= {f"png {how}": c for how, c in cut(encoded("PNG")[:-22]).items()}
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

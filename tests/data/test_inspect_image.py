"""What a header tells, and that files which are not all there are found: no more and no fewer."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

import unikd_fast
from support.odd_images import (
    HEIGHT,
    WIDTH,
    bomb,
    bombs,
    broken,
    encoded,
    odd,
    png,
    tiff_of_a_large_tile,
    undecodable_png,
)
from support.processes import peak_of_memory
from unikd_fast.data.decode import read_rgb
from unikd_fast.data.image_feed import read_image
from unikd_fast.data.inspect_image import FORMATS, MAX_PIXELS, inspect, naming_broken, open_image
from unikd_fast.data.stored_image import StoredImage
from unikd_fast.errors import DataError

ODD, BROKEN = odd(), broken()
EXPECTED = {
    "jpeg": ("JPEG", "RGB", WIDTH, HEIGHT, True),
    "jpeg progressive": ("JPEG", "RGB", WIDTH, HEIGHT, True),
    "jpeg grey": ("JPEG", "L", WIDTH, HEIGHT, True),
    "jpeg cmyk": ("JPEG", "CMYK", WIDTH, HEIGHT, False),
    "jpeg rgb": ("JPEG", "RGB", WIDTH, HEIGHT, False),
    "jpeg rotated": ("JPEG", "RGB", WIDTH, HEIGHT, True),
    "jpeg thumbnail": ("JPEG", "RGB", WIDTH, HEIGHT, True),
    "jpeg and zeros": ("JPEG", "RGB", WIDTH, HEIGHT, True),
    "jpeg and text": ("JPEG", "RGB", WIDTH, HEIGHT, False),
    "jpeg and jpeg": ("JPEG", "RGB", WIDTH, HEIGHT, False),
    "jpeg grey without end": ("JPEG", "L", WIDTH, HEIGHT, False),
    "png": ("PNG", "RGB", WIDTH, HEIGHT, True),
    "png grey": ("PNG", "L", WIDTH, HEIGHT, True),
    "png grey 4": ("PNG", "L", 4, 2, False),
    "png grey 16": ("PNG", "I;16", WIDTH, HEIGHT, False),
    "png rgb 16": ("PNG", "RGB", 2, 1, False),
    "png palette": ("PNG", "P", WIDTH, HEIGHT, False),
    "png transparent palette": ("PNG", "P", WIDTH, HEIGHT, False),
    "png rgba": ("PNG", "RGBA", WIDTH, HEIGHT, False),
    "png key colour": ("PNG", "RGB", WIDTH, HEIGHT, False),
    "png animated": ("PNG", "RGB", WIDTH, HEIGHT, False),
    "png black and white": ("PNG", "1", WIDTH, HEIGHT, False),
    "png and zeros": ("PNG", "RGB", WIDTH, HEIGHT, True),
    "png and text": ("PNG", "RGB", WIDTH, HEIGHT, True),
    "png without end": ("PNG", "RGB", WIDTH, HEIGHT, False),
    "mpo": ("MPO", "RGB", WIDTH, HEIGHT, False),
    "gif": ("GIF", "P", WIDTH, HEIGHT, False),
    "bmp": ("BMP", "RGB", WIDTH, HEIGHT, False),
    "bmp run lengths": ("BMP", "P", WIDTH, HEIGHT, False),
    "webp": ("WEBP", "RGB", WIDTH, HEIGHT, False),
    "tiff": ("TIFF", "RGB", WIDTH, HEIGHT, False),
    "tiff grey 16": ("TIFF", "I;16", WIDTH, HEIGHT, False),
    "pgm grey 16": ("PPM", "I", WIDTH, HEIGHT, False),
}


@pytest.mark.parametrize("kind", ODD)
def test_tells_what_the_header_says(kind: str) -> None:
    assert inspect(ODD[kind], kind) == EXPECTED[kind]


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named(kind: str) -> None:
    with pytest.raises(ValueError, match=r"^cannot decode some/file\.jpg: .+; repair the file or remove it$"):
        inspect(BROKEN[kind], "some/file.jpg")


@pytest.mark.parametrize("name", ["jpeg", "jpeg progressive", "jpeg thumbnail"])
def test_a_jpeg_is_truncated_wherever_it_is_cut(name: str) -> None:
    """Every length, with nothing and with zeros after it; the whole of it is none of these."""
    content = ODD[name]
    for length in range(len(content)):
        for rest in (b"", bytes(2000)):
            with pytest.raises(ValueError, match="cannot decode f: "):
                inspect(content[:length] + rest, "f")
    inspect(content, "f")


def test_a_png_is_truncated_wherever_its_pixels_are_cut() -> None:
    content = ODD["png"]
    for length in range(len(content) - 12):
        for rest in (b"", bytes(2000)):
            with pytest.raises(ValueError, match="cannot decode f: "):
                inspect(content[:length] + rest, "f")
    for length in range(len(content) - 12, len(content) + 1):
        inspect(content[:length], "f")


@pytest.mark.parametrize("rest", [b"\0", bytes(10_000), b"\n", b"\xff" * 9, b"\xff\xd9" * 3, b"PK\3\4 a zip \0\0"])
@pytest.mark.parametrize("name", ["jpeg", "jpeg progressive", "jpeg grey", "jpeg thumbnail", "png", "png grey"])
def test_what_follows_a_whole_image_does_no_harm(name: str, rest: bytes) -> None:
    assert inspect(ODD[name] + rest, "f")[:-1] == EXPECTED[name][:-1]


def test_a_jpeg_cut_between_the_scans_is_found() -> None:
    """It shows a picture, though a coarse one, so that only the missing end marker gives it away."""
    content = ODD["jpeg progressive"]
    scans = [i for i in range(len(content)) if content[i : i + 2] == b"\xff\xda"]
    assert len(scans) > 3
    for rest in (b"", bytes(64)):
        with pytest.raises(ValueError, match="truncated"):
            inspect(content[: scans[2]] + rest, "f")


def test_a_bomb_is_refused_by_its_header() -> None:
    with pytest.raises(ValueError, match="f: its header claims more pixels than the 89478485 that are allowed; re"):
        inspect(bomb(), "f")
    assert MAX_PIXELS == 89478485
    small = encoded("PNG")
    with pytest.raises(ValueError, match=r"f: its header claims 40 x 30 pixels, more than the 1199 that are allowed"):
        inspect(small, "f", max_pixels=1199)
    assert inspect(small, "f", max_pixels=1200).width == 40


@pytest.mark.parametrize("side", [9_460, 60_000])
def test_a_bomb_of_any_format_takes_no_memory(side: int, tmp_path: Path) -> None:
    """In both loaders of files; the smaller is just over the limit, and Pillow alone would decode it."""
    files = bombs(side)
    assert set(files) == set(FORMATS)
    for kind, content in files.items():
        (tmp_path / kind).write_bytes(content)
        for read in (read_rgb, read_image):
            with (
                peak_of_memory() as peak,
                pytest.raises(DataError, match=f"{kind}: its header claims .* 89478485 that"),
            ):
                read(StoredImage(str(tmp_path / kind)))
            assert peak.bytes < 2**25


def test_a_tile_of_a_tiff_is_no_larger_than_an_image() -> None:
    """It is decoded whole, however little of it is shown."""
    assert inspect(tiff_of_a_large_tile(256), "f").width == 16
    content = tiff_of_a_large_tile(9_472)
    with peak_of_memory() as peak, pytest.raises(DataError, match="f: its header claims 9472 x 9472 pixels, more than"):
        inspect(content, "f")
    assert peak.bytes < 2**25


def test_all_images_are_opened_as_these_formats_alone() -> None:
    """Pillow starts Ghostscript for an EPS, whatever its name."""
    calls = 0
    for path in Path(unikd_fast.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open"):
                calls += 1
                assert "formats" in {keyword.arg for keyword in node.keywords}, (path, node.lineno)
    assert calls


def test_an_image_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot decode f: "):
        inspect(png(0, 5, 8, 0, b"\0" * 5), "f")


def test_nothing_is_decoded() -> None:
    content = undecodable_png()
    assert inspect(content, "f") == ("PNG", "L", 4, 4, True)
    image, _ = open_image(content, "f")
    with pytest.raises(OSError, match="broken data stream"):
        image.load()


@pytest.mark.parametrize("kind", [kind for kind, info in EXPECTED.items() if info[-1]])
def test_another_decoder_sees_a_plain_image_alike(kind: str) -> None:
    image, _ = open_image(ODD[kind], kind)
    encoded_bytes = torch.frombuffer(bytearray(ODD[kind]), dtype=torch.uint8)
    other = torchvision.io.decode_image(encoded_bytes, torchvision.io.ImageReadMode.RGB).permute(1, 2, 0).numpy()
    difference = np.abs(np.asarray(image.convert("RGB")).astype(int) - other)
    # PNGs have one decoding. JPEG decoders may round each of Y, Cb and Cr by one level, and blue is Y + 1.772 Cb.
    assert difference.max() <= (3 if kind.startswith("jpeg") else 0)


def test_a_lack_of_memory_and_a_dead_process_are_not_the_files_fault() -> None:
    for error in (MemoryError("no memory"), RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")):
        with pytest.raises(type(error), match=str(error)[:9]), naming_broken("f"):
            raise error
    with pytest.raises(ValueError, match="cannot decode f: anything else"), naming_broken("f"):
        raise RuntimeError("anything else")

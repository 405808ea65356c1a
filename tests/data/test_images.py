"""What Pillow opens for the loaders: files that are whole, whatever their kind, and no others."""

import ast
from pathlib import Path
from typing import Any

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
    picture,
    png,
    run_length_bmp,
    tiff_of_a_large_tile,
    two_pictures,
)
from support.processes import peak_of_memory
from unikd_fast.data.dali_views import read_image
from unikd_fast.data.images import (
    FORMATS,
    MAX_PIXELS,
    StoredImage,
    is_plain_jpeg,
    naming_bad_file,
    open_image,
    read_rgb,
    to_rgb,
)
from unikd_fast.errors import DataError

ODD, BROKEN = odd(), broken()
FILE = StoredImage("some/file.jpg")
PLAIN = {f"jpeg{which}" for which in ("", " progressive", " grey", " rotated", " thumbnail", " and zeros")}
CUT_IN_ZEROS = ("webp", "tiff", "bmp", "ppm")
"""Where zeros in place of the rest are colours, and nothing tells."""


def of_two() -> dict[str, Any]:
    return {"save_all": True, "append_images": [picture().transpose(0)]}


CODED = {
    "jpeg": ODD["jpeg"],
    "png": ODD["png"],
    "png grey": ODD["png grey"],
    "mpo": two_pictures(),
    "mpo progressive": encoded("MPO", **of_two(), progressive=True),
    "gif": encoded("GIF"),
    "gif animated": encoded("GIF", **of_two()),
    "gif interlaced": encoded("GIF", interlace=1),
    "webp": encoded("WEBP"),
    "webp lossless": encoded("WEBP", lossless=True),
    "webp animated": encoded("WEBP", **of_two()),
    "bmp run lengths": run_length_bmp(),
    **{
        f"tiff {name}": encoded("TIFF", compression=name, strip_size=WIDTH * 3 * 8)
        for name in ("tiff_deflate", "tiff_lzw", "packbits", "jpeg")
    },
    **{f"tiff {name}": encoded("TIFF", picture().convert("1"), compression=name) for name in ("group3", "group4")},
    "tiff": encoded("TIFF"),
    "bmp": encoded("BMP"),
    "ppm": encoded("PPM"),
}


def pixels(content: bytes) -> np.ndarray | None:
    """Decode an image as the loaders do; None if it is refused."""
    try:
        image = open_image(content, FILE)
        return np.asarray(to_rgb(image, FILE))
    except DataError:
        return None


@pytest.mark.parametrize("kind", ODD)
def test_a_whole_image_is_opened_and_plain_jpegs_are_told(kind: str) -> None:
    image = open_image(ODD[kind], FILE)
    assert image.size == ((4, 2) if kind == "png grey 4" else (2, 1) if kind == "png rgb 16" else (WIDTH, HEIGHT))
    assert is_plain_jpeg(image, ODD[kind]) == (kind in PLAIN)


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named_by_both_loaders(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file.jpg"
    path.write_bytes(BROKEN[kind])
    for read in (read_rgb, read_image):
        with pytest.raises(DataError, match=rf"^cannot decode {path}: .+; repair the file or remove it$"):
            read(StoredImage(str(path)))


@pytest.mark.parametrize("kind", CODED)
def test_a_cut_file_is_refused_or_decoded_to_its_pixels(kind: str) -> None:
    """As it is and, where that can be told, with zeros in place of the rest."""
    whole = CODED[kind]
    expected = pixels(whole)
    assert expected is not None
    for length in [*range(40, len(whole) - 1, max(1, len(whole) // 40)), *range(len(whole) - 15, len(whole))]:
        for zeros in (False,) if kind.startswith(CUT_IN_ZEROS) else (False, True):
            found = pixels(whole[:length] + bytes(len(whole) - length) * zeros)
            assert found is None or np.array_equal(found, expected), (length, zeros)
            # What has two pictures may be right behind its middle.
            assert found is None or length > len(whole) // 4, (length, zeros)


@pytest.mark.parametrize("name", ["jpeg", "jpeg progressive", "jpeg thumbnail", "png"])
def test_an_image_is_refused_wherever_its_pixels_are_cut(name: str) -> None:
    """With nothing and with zeros after it; of a PNG the last chunk and the checksums before it may be missing."""
    content = ODD[name]
    end = len(content) - 22 * (name == "png")
    for length in [*range(0, end, 7), *range(end - 40, end)]:
        for rest in (b"", bytes(2000)):
            assert pixels(content[:length] + rest) is None, length


@pytest.mark.parametrize("rest", [b"\0", bytes(10_000), b"\n", b"\xff" * 9, b"\xff\xd9" * 3, b"PK\3\4 a zip \0\0"])
@pytest.mark.parametrize("name", ["jpeg", "jpeg progressive", "jpeg grey", "jpeg thumbnail", "png", "png grey"])
def test_what_follows_a_whole_image_does_no_harm(name: str, rest: bytes) -> None:
    found, expected = pixels(ODD[name] + rest), pixels(ODD[name])
    assert found is not None and expected is not None
    assert np.array_equal(found, expected)


def test_a_bomb_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="its header claims more pixels than the 89478485 that are allowed; re"):
        open_image(bomb(), FILE)
    assert MAX_PIXELS == 89478485
    monkeypatch.setattr("unikd_fast.data.images.MAX_PIXELS", 1199)
    with pytest.raises(DataError, match=r"jpg: its header claims 40 x 30 pixels, more than the 1199 that are allowed"):
        open_image(encoded("PNG"), FILE)
    monkeypatch.setattr("unikd_fast.data.images.MAX_PIXELS", 1200)
    assert open_image(encoded("PNG"), FILE).width == 40


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
    assert open_image(tiff_of_a_large_tile(256), FILE).width == 16
    content = tiff_of_a_large_tile(9_472)
    with peak_of_memory() as peak, pytest.raises(DataError, match="its header claims 9472 x 9472 pixels, more than"):
        open_image(content, FILE)
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
    with pytest.raises(DataError, match="cannot decode some/file"):
        open_image(png(0, 5, 8, 0, b"\0" * 5), FILE)


@pytest.mark.parametrize("kind", sorted(PLAIN))
def test_another_decoder_sees_a_plain_jpeg_alike(kind: str) -> None:
    encoded_bytes = torch.frombuffer(bytearray(ODD[kind]), dtype=torch.uint8)
    other = torchvision.io.decode_image(encoded_bytes, torchvision.io.ImageReadMode.RGB).permute(1, 2, 0).numpy()
    difference = np.abs(np.asarray(open_image(ODD[kind], FILE).convert("RGB")).astype(int) - other)
    # Decoders may round each of Y, Cb and Cr by one level, and blue is Y + 1.772 Cb.
    assert difference.max() <= 3


def test_out_of_memory_and_dead_processes_do_not_blame_a_file() -> None:
    for error in (MemoryError("no memory"), RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")):
        with pytest.raises(type(error), match=str(error)[:9]), naming_bad_file(FILE):
            raise error
    with pytest.raises(ValueError, match=r"cannot decode some/file\.jpg: anything else"), naming_bad_file(FILE):
        raise RuntimeError("anything else")

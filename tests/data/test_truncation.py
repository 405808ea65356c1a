"""Files cut at many places, as they are and with zeros in place of the rest: refused, or decoded to their pixels."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from support.odd_images import HEIGHT, WIDTH, encoded, odd, picture, run_length_bmp, two_pictures
from unikd_fast.data.decode import read_rgb
from unikd_fast.data.image_feed import read_image
from unikd_fast.data.stored_image import StoredImage
from unikd_fast.data.truncation import is_whole
from unikd_fast.errors import DataError

# A few blocks at most below the cut: what an encoder of WebP puts into the last bytes.
LAST_BYTES_OF_WEBP = 64


def of_two() -> dict[str, Any]:
    return {"save_all": True, "append_images": [picture().transpose(0)]}


CODED = {
    "mpo": two_pictures(),
    "mpo progressive": encoded("MPO", **of_two(), progressive=True),
    "gif": encoded("GIF"),
    "gif animated": encoded("GIF", **of_two()),
    "gif interlaced": encoded("GIF", interlace=1),
    "webp": encoded("WEBP"),
    "webp lossless": encoded("WEBP", lossless=True),
    "webp animated": encoded("WEBP", **of_two()),
    "webp exif": encoded("WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"),
    "bmp run lengths": run_length_bmp(),
    **{
        f"tiff {name}": encoded("TIFF", compression=name, strip_size=WIDTH * 3 * 8)
        for name in ("tiff_deflate", "tiff_lzw", "packbits", "jpeg")
    },
    **{f"tiff {name}": encoded("TIFF", picture().convert("1"), compression=name) for name in ("group3", "group4")},
}
# Zeros are black here, and nothing tells.
STORED = {
    "tiff": encoded("TIFF"),
    "tiff of two": encoded("TIFF", **of_two()),
    "tiff cmyk": encoded("TIFF", picture().convert("CMYK")),
    "bmp": encoded("BMP"),
    "bmp palette": encoded("BMP", picture().quantize(16)),
    "ppm": encoded("PPM"),
    "pgm": encoded("PPM", picture().convert("L")),
}


def pixels(path: Path, content: bytes) -> np.ndarray | None:
    """Decode as both loaders of files do; None if they refuse it."""
    path.write_bytes(content)
    stored = StoredImage(str(path))
    try:
        decoded = np.asarray(read_rgb(stored))
    except DataError:
        with pytest.raises(DataError, match="cannot decode"):
            read_image(stored)
        return None
    assert np.array_equal(read_image(stored).content, decoded)
    return decoded


def assert_never_wrong(path: Path, whole: bytes, tails: tuple[bool, ...], lengths: range) -> None:
    expected = pixels(path, whole)
    assert expected is not None
    assert expected.shape == (HEIGHT, WIDTH, 3)
    for length in lengths:
        for zeros in tails:
            found = pixels(path, whole[:length] + bytes(len(whole) - length) * zeros)
            assert found is None or np.array_equal(found, expected), (length, zeros)
            # What has two pictures, or all planes of colour in one, may be right behind its middle.
            assert found is None or length > len(whole) // 4, (length, zeros)


@pytest.mark.parametrize("kind", CODED)
def test_coded_pixels_are_right_or_refused(kind: str, tmp_path: Path) -> None:
    whole = CODED[kind]
    end = len(whole) - (LAST_BYTES_OF_WEBP if "webp" in kind else 1)
    assert_never_wrong(tmp_path / "x.jpg", whole, (False, True), range(40, end, max(1, end // 60)))
    assert_never_wrong(tmp_path / "x.jpg", whole, (False,), range(len(whole) - 20, len(whole)))


@pytest.mark.parametrize("kind", STORED)
def test_stored_pixels_are_right_or_refused(kind: str, tmp_path: Path) -> None:
    whole = STORED[kind]
    assert_never_wrong(tmp_path / "x.jpg", whole, (False,), range(0, len(whole), len(whole) // 60))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("options", [{"quality": 100}, {"lossless": True, "quality": 0}], ids=str)
def test_a_flat_end_of_a_webp_is_no_cut(share: float, options: dict[str, int], tmp_path: Path) -> None:
    """It may well be coded in zeros alone."""
    levels = np.random.default_rng(0).integers(0, 256, (400, 500, 3), np.uint8)
    levels[int(400 * share) :] = 200
    whole = encoded("WEBP", Image.fromarray(levels), method=0, **options)
    assert whole.endswith(bytes(40))
    assert is_whole(Image.open(io.BytesIO(whole)), whole) is None
    found = pixels(tmp_path / "x.jpg", whole)
    assert np.array_equal(found, np.asarray(Image.open(io.BytesIO(whole)).convert("RGB")))


def test_a_tiff_without_part_of_its_directory_is_cut() -> None:
    """Zeros over the last tags, of a file whose directory stands behind the pixels."""
    whole = bytearray(odd()["tiff"])
    start = int.from_bytes(whole[4:8], "little")
    count = int.from_bytes(whole[start : start + 2], "little")
    for tags in (1, 3):
        content = bytearray(whole)
        end = start + 2 + 12 * count
        content[end - 12 * tags : end] = bytes(12 * tags)
        assert is_whole(Image.open(io.BytesIO(bytes(whole))), bytes(content)) is False

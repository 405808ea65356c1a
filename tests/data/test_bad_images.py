"""Images that are odd or broken: read as they are stored, or an error that names the file and says what to do."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.odd_images import HEIGHT, WIDTH, animation, broken, encoded, odd, png
from unikd_fast.data.files import Decoder, DecodeRequest
from unikd_fast.data.images import StoredImage, read_rgb
from unikd_fast.data.views import Windows


def read(content: bytes, folder: Path, name: str = "image.jpg") -> np.ndarray:
    (folder / name).write_bytes(content)
    return np.asarray(read_rgb(StoredImage(str(folder / name))))


@pytest.mark.parametrize("kind", odd())
def test_odd_but_whole_images_are_read(tmp_path: Path, kind: str) -> None:
    """Under a name that says JPEG, whatever they are, and in their stored orientation."""
    pixels = read(odd()[kind], tmp_path, "image.JPEG")
    size = {"png grey 4": (2, 4), "png rgb 16": (1, 2)}.get(kind, (HEIGHT, WIDTH))
    assert pixels.shape == (*size, 3)


@pytest.mark.parametrize("kind", broken())
def test_broken_images_are_named(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"cannot decode {tmp_path}/image\.jpg: .*; repair the file or remove it"):
        read(broken()[kind], tmp_path)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "WEBP", "TIFF", "PPM"])
def test_other_formats_are_pils_to_find_cut(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"cannot decode {tmp_path}/image\.jpg: "):
        read(encoded(kind)[:-300], tmp_path)


@pytest.mark.parametrize("how", ["png", "tiff", "tiff big-endian", "pgm"])
def test_sixteen_bits_of_grey_are_scaled(tmp_path: Path, how: str) -> None:
    levels = np.array([[0, 255, 256, 1000], [32767, 32768, 65279, 65535]], np.uint16)
    big_endian = levels.astype(">u2")
    if how == "tiff big-endian":
        file = io.BytesIO()
        Image.frombytes("I;16B", (4, 2), big_endian.tobytes()).save(file, "TIFF")
        content = file.getvalue()
    elif how == "pgm":
        content = b"P5 4 2 65535\n" + big_endian.tobytes()
    else:
        content = encoded(how, Image.fromarray(levels))
    pixels = read(content, tmp_path)
    assert pixels[..., 0].tolist() == [[0, 0, 1, 3], [127, 128, 254, 255]]
    assert (pixels == pixels[..., :1]).all()
    # RGB is scaled alike.
    rows = b"".join(b"\0" + np.repeat(row, 3).tobytes() for row in big_endian)
    assert np.array_equal(read(png(4, 2, 16, 2, rows), tmp_path), pixels)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_levels_of_unknown_range_are_refused(tmp_path: Path, mode: str) -> None:
    with pytest.raises(ValueError, match=rf"image\.jpg: its levels have 32 bits \(mode {mode}\)"):
        read(encoded("TIFF", Image.new(mode, (4, 4))), tmp_path)


def test_colours_are_as_stored(tmp_path: Path) -> None:
    red = np.array((255, 0, 0))
    cmyk = Image.new("CMYK", (WIDTH, HEIGHT), (0, 255, 255, 0))
    assert np.abs(read(encoded("JPEG", cmyk), tmp_path).astype(int) - red).max() <= 1  # one level of JPEG's rounding
    transparent = Image.new("RGBA", (WIDTH, HEIGHT), (255, 0, 0, 7))
    assert (read(encoded("PNG", transparent), tmp_path) == red).all()
    palette = Image.new("RGB", (WIDTH, HEIGHT), (255, 0, 0)).quantize(4)
    index = int(np.asarray(palette)[0, 0])
    assert (read(encoded("PNG", palette, transparency=index), tmp_path) == red).all()
    assert (read(animation(), tmp_path) == red).all()  # the second frame is blue


def test_an_image_that_would_grow_beyond_all_bounds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "line.png"
    Image.new("RGB", (1, 3000)).save(path)
    request = DecodeRequest((StoredImage(str(path)),), np.zeros(1, np.int64), np.zeros(1, np.int64), None)
    with pytest.raises(ValueError, match=r"cannot decode .*line\.png: 1 x 3000 pixels become 256 x 768000 when"):
        Decoder(Windows(224, 256))[request]
    assert Decoder(Windows(16, 20))[request].images.shape == (1, 3, 16, 16)


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(encoded("PNG"))
    path.chmod(0)
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(65534)  # nobody: the superuser may read everything
    try:
        with pytest.raises(ValueError, match=r"cannot read .*secret\.png: Permission denied; restore"):
            read_rgb(StoredImage(str(path)))
    finally:
        os.seteuid(mine)

"""Small folders of drawn images with awkward names, packed in a few ways."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.generated_images import draw_image
from unikd_fast.data.packed import PackSettings, pack_folder, shard
from unikd_fast.data.splits import DataSplits, ImageFiles, PackedImages

CLASSES = ("Fuchs 狐", "w" * 255, "wolf.jpg", "é\"'\n")
SETTINGS = PackSettings("jpeg", size=24, shard_bytes=6000)
ARGUMENTS = ("--size", "24", "--shard-bytes", "6000")
ROOT = Path(__file__).parents[2]
SIDES = ((37, 55), (64, 30), (20, 90), (33, 33), (16, 18))
LONG = "x" * 250 + ".jpg"


def write_folder(root: Path, counts: tuple[int, int] = (48, 12)) -> Path:
    """Write train and val in turn as JPEG, greyscale JPEG, PNG and CMYK JPEG, with comments and EXIF orientations."""
    generator = np.random.default_rng(0)
    for part, count in zip(("train", "val"), counts, strict=True):
        for i in range(count):
            folder = root / part / CLASSES[i % len(CLASSES)]
            folder.mkdir(parents=True, exist_ok=True)
            image = draw_image(generator, *SIDES[i % len(SIDES)])
            name = LONG if i == 5 else f"狼 {i:03}.{'png' if i % 3 == 2 else 'JPEG'}"
            exif = Image.Exif()
            exif[0x0112] = 6
            mode = ("RGB", "RGB", "L", "CMYK")[i % 4] if i % 3 != 2 else "RGB"
            image.convert(mode).save(folder / name, quality=85, comment=b"a comment", exif=exif)
        (root / part / CLASSES[0] / "folder.jpg").mkdir()
    return root


def packed(source: Path, target: Path, settings: PackSettings, **options: bool) -> Path:
    pack_folder(source, target, settings, workers=0, **options)
    return target


def files_of(splits: DataSplits) -> tuple[ImageFiles, ImageFiles]:
    assert isinstance(splits.train, ImageFiles)
    assert isinstance(splits.val, ImageFiles)
    return splits.train, splits.val


def packs_of(splits: DataSplits) -> tuple[PackedImages, PackedImages]:
    assert isinstance(splits.train, PackedImages)
    assert isinstance(splits.val, PackedImages)
    return splits.train, splits.val


def content(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(*arguments: object, before: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    """Starts the command, as the leader of a process group."""
    return subprocess.Popen(
        [*before, sys.executable, "-m", "unikd_fast.data.pack_command", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finished_shards(store: Path) -> int:
    return len(list(store.glob(".unikd-packing/*.bin.json")))


class Killed(Exception):
    pass


def interrupt(monkeypatch: pytest.MonkeyPatch, source: Path, store: Path, images: int, **options: bool) -> None:
    """Packs so many images and stops."""
    make, made = shard.make_record, 0

    def make_some(path: str, settings: PackSettings) -> object:
        nonlocal made
        made += 1
        if made > images:
            raise Killed
        return make(path, settings)

    with monkeypatch.context() as patch:
        patch.setattr(shard, "make_record", make_some)
        with pytest.raises(Killed):
            packed(source, store, SETTINGS, **options)

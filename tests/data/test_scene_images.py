"""Scenes from files: Pillow's pixels whatever the workers, and what becomes of images that cannot be used."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from support.scene_files import image_of, write_coco
from support.scene_loaders import assert_same, by_sample, scene_loader
from unikd_fast.data.detection.loader import DetectionLoader
from unikd_fast.data.detection.scenes import DetectionSplits
from unikd_fast.data.detection.sets import open_scenes
from unikd_fast.data.detection.toy_scenes import load_toy_scenes
from unikd_fast.data.detection.views import DetectionSettings
from unikd_fast.data.images import StoredImage
from unikd_fast.data.settings import DataSettings
from unikd_fast.errors import DataError

SMALL = DetectionSettings(short_sides=(64, 72, 80), long_side=128)
FILES = {"loader": "torchvision", "workers": 0, "global_batch_size": 4, "detection": SMALL}
EXIF_ORIENTATION = 0x0112
needs_dali = pytest.mark.skipif(find_spec("nvidia.dali") is None, reason="needs nvidia-dali")
kinds = pytest.mark.parametrize("kind", ["torchvision", pytest.param("dali", marks=needs_dali)])


@pytest.fixture(scope="module")
def toy() -> DetectionSplits:
    return open_scenes(DataSettings(name="toy_scenes", synthetic_samples=20))


@pytest.fixture
def root(toy: DetectionSplits, tmp_path: Path) -> Path:
    write_coco(tmp_path, load_toy_scenes(20))
    return tmp_path


def opened(root: Path, **options: Any) -> DetectionSplits:
    return open_scenes(DataSettings(name="coco", root=str(root), **options))


def file_loader(splits: DetectionSplits, **options: Any) -> DetectionLoader:
    return scene_loader(splits, "coco", **{**FILES, **options})


def test_files_give_what_memory_gives(root: Path, toy: DetectionSplits) -> None:
    files, memory = file_loader(opened(root)), scene_loader(toy, global_batch_size=4)
    assert_same(files.train(1), memory.train(1))
    assert_same(files.evaluate("val"), memory.evaluate("val"))


def test_pixels_are_pillows(root: Path, toy: DetectionSplits) -> None:
    """Resized whole, bilinear and antialiased, then flipped."""
    splits = opened(root)
    seen = by_sample(file_loader(splits).train(0))
    for sample, (image, _, _) in seen.items():
        (position,) = np.flatnonzero(splits.train.ids == sample)
        original = image_of(toy.train, int(position))
        expected = original.resize((image.shape[2], image.shape[1]), Image.Resampling.BILINEAR)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (splits.mean, splits.std))
        levels = ((image * std + mean) * 255).round().to(torch.uint8)
        pixels = torch.from_numpy(np.array(expected)).permute(2, 0, 1)
        assert torch.equal(levels, pixels) or torch.equal(levels, pixels.flip(2))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(root: Path, workers: int) -> None:
    splits = opened(root)
    alone, helped = file_loader(splits), file_loader(splits, workers=workers)
    for epoch in (0, 1):  # the second epoch reuses the workers
        assert_same(helped.train(epoch), alone.train(epoch))
    resumed = helped.train(0, 2)
    assert_same([next(resumed)], list(alone.train(0))[2:3])
    assert_same(helped.evaluate("val"), alone.evaluate("val"))


@kinds
@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(root: Path, mode: str, kind: str) -> None:
    splits = opened(root)
    stored = splits.val.images[0]
    assert isinstance(stored, StoredImage)
    height, width = splits.val.sizes[0].tolist()
    image = Image.new("RGB", (width, height), (255, 255, 255))
    image = Image.fromarray(np.full((height, width), 65535, np.uint16)) if mode == "I;16" else image.convert(mode)
    image.save(stored.path, format="TIFF" if mode == "CMYK" else "PNG")
    batch = next(file_loader(splits, loader=kind).evaluate("val"))
    high, wide = batch.sizes[0].tolist()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (splits.mean, splits.std))
    assert ((batch.images[0, :, :high, :wide] * std + mean) * 255 > 254).all()


def break_size(path: Path) -> None:
    Image.new("RGB", (33, 44)).save(path)


def turn(path: Path) -> None:
    """As a phone does: the pixels lie on their side, and the file says so."""
    image = Image.open(path).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    image.save(path, exif=exif)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "size": (break_size, r"has 33 x 44 pixels, its annotations say \d+ x \d+; correct the annotations, or restore"),
    "turned": (turn, r"its annotations say \d+ x \d+; its EXIF orientation, 6, is not applied: store it upright"),
    "text": (lambda path: path.write_text("text"), r"cannot decode .*png: not a JPEG.*; repair the file or remove it"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-500]), r"cannot decode .*png: .*repair the file"),
    "gone": (Path.unlink, r"cannot read .*png: No such file or directory; restore the file or remove it"),
}


def not_square(splits: DetectionSplits) -> int:
    """Return the position of a training image that is not square, so that turning it shows."""
    return int(np.flatnonzero(np.abs(np.subtract(*splits.train.sizes.T)) > 8)[0])


@kinds
@pytest.mark.parametrize("case", BROKEN)
def test_images_that_cannot_be_used_are_named(root: Path, case: str, kind: str) -> None:
    splits = opened(root)
    position = not_square(splits)
    stored = splits.train.images[position]
    assert isinstance(stored, StoredImage)
    change, message = BROKEN[case]
    change(Path(stored.path))
    loader = file_loader(splits, global_batch_size=len(splits.train), loader=kind)
    with pytest.raises(DataError, match=message) as raised:
        list(loader.train(0))
    assert splits.train.name(position) in str(raised.value)


@kinds
@pytest.mark.parametrize("case", BROKEN)
def test_skipped_images_have_a_stand_in(root: Path, case: str, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """The next good sample of the batch: its pixels, boxes and id. An evaluation goes without it."""
    splits = opened(root)
    whole = by_sample(file_loader(splits, loader=kind).train(0))
    position = next(p for p in range(not_square(splits), len(splits.train)) if int(splits.train.ids[p]) in whole)
    for split, place in ((splits.train, position), (splits.val, 2)):
        stored = split.images[place]
        assert isinstance(stored, StoredImage)
        BROKEN["size" if case == "turned" else case][0](Path(stored.path))
    skipping = file_loader(splits, bad_images="skip", max_bad_share=0.5, loader=kind)
    batches = list(skipping.train(0))
    bad = int(splits.train.ids[position])
    assert [image.sample_id for image in skipping.bad_samples] == [bad]
    seen = torch.cat([batch.sample_ids for batch in batches])
    assert bad not in seen and len(seen) == len(whole)
    for batch in batches:
        ids = batch.sample_ids.tolist()
        for sample, values in by_sample([batch]).items():
            assert all(map(torch.equal, values, whole[sample]))
        assert len(ids) - len(set(ids)) == (1 if len(set(ids)) < 4 else 0)
    evaluated = [int(batch.sample_ids) for batch in skipping.evaluate("val")]
    assert evaluated == [i for i in range(len(splits.val)) if i != 2]
    assert f"val: evaluated without 1 of {len(splits.val)} samples" in caplog.text
    strict = file_loader(splits, bad_images="skip", max_bad_share=0.01, loader=kind)
    with pytest.raises(DataError, match=r"training: 1 of \d+ samples cannot be decoded"):
        list(strict.train(0))


@kinds
def test_a_batch_without_a_good_image_is_refused(root: Path, kind: str) -> None:
    splits = opened(root)
    for stored in splits.train.images:
        assert isinstance(stored, StoredImage)
        os.truncate(stored.path, 0)
    loader = file_loader(splits, bad_images="skip", max_bad_share=1.0, loader=kind)
    with pytest.raises(DataError, match=r"none of the 4 images of a batch can be decoded.*the file is empty"):
        list(loader.train(0))

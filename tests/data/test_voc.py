"""Data sets in Pascal VOC's layout: what is read, what is left out and said, and what is refused."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.scene_files import PARTS, image_of, write_voc
from unikd_fast.data.detection.scenes import DetectionSplits
from unikd_fast.data.detection.sets import open_scenes
from unikd_fast.data.detection.toy_scenes import load_toy_scenes
from unikd_fast.data.images import read_rgb
from unikd_fast.data.settings import DataSettings
from unikd_fast.errors import DataError


@pytest.fixture(scope="module")
def toy() -> DetectionSplits:
    return load_toy_scenes(20)


@pytest.fixture(scope="module")
def written(toy: DetectionSplits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("voc")
    write_voc(root, toy)
    return root


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def opened(root: Path, **options: Any) -> DetectionSplits:
    return open_scenes(DataSettings(name="voc", root=str(root), **options))


def test_what_was_written_is_read(written: Path, toy: DetectionSplits) -> None:
    """Corners count from 1 and are part of the box; difficult objects are as crowds; classes are sorted by name."""
    splits = opened(written)
    assert splits.class_names == ("cross", "disc", "square", "triangle")
    assert splits.category_ids.tolist() == [1, 2, 3, 4]
    assert not splits.test_is_val
    for part in PARTS:
        split, expected = getattr(splits, part), getattr(toy, part)
        expected = expected.select(split.ids)
        assert split.image_ids.tolist() == (split.ids + 1).tolist()
        assert np.array_equal(split.sizes, expected.sizes)
        assert np.array_equal(split.boxes, expected.boxes.round())
        assert np.array_equal(split.is_crowd, expected.is_crowd)
        assert np.array_equal(split.offsets, expected.offsets)
        assert [splits.class_names[i] for i in split.labels] == [toy.class_names[i] for i in expected.labels]
        sides = split.boxes[:, 2:] - split.boxes[:, :2]
        assert np.array_equal(split.areas, sides.prod(1))
        for i, stored in enumerate(split.images):
            assert read_rgb(stored).tobytes() == image_of(expected, i).tobytes()
    assert splits.ground_truth("val")["images"][2]["file_name"] == "val_002.png"


@pytest.mark.parametrize("missing", ["val", "test"])
def test_val_or_test_is_enough(copy: Path, missing: str) -> None:
    (copy / "ImageSets" / "Main" / f"{missing}.txt").unlink()
    splits = opened(copy)
    assert splits.test_is_val
    other = "test" if missing == "val" else "val"
    assert splits.val.name(0) == f"{other}_000.png"


def test_classes_may_be_listed(copy: Path) -> None:
    (copy / "classes.txt").write_text("triangle\ndisc\n\nstar\ncross\nsquare\n")
    splits = opened(copy)
    assert splits.class_names == ("triangle", "disc", "star", "cross", "square")
    (copy / "classes.txt").write_text("triangle\ndisc\ncross\n")
    with pytest.raises(DataError, match=r"\.xml has an object of class 'square', which .*classes\.txt does not"):
        opened(copy)


Change = Callable[[str], str]


def before(tag: str, text: str) -> Change:
    """Put text before the first of these tags: of two of a name the first counts."""

    def change(annotation: str) -> str:
        assert f"<{tag}>" in annotation
        return annotation.replace(f"<{tag}>", f"{text}<{tag}>", 1)

    return change


# The first training image: its size and first object.
REFUSED: dict[str, tuple[Change, str]] = {
    "cut off": (lambda text: text[:-20], r"cannot read .*train_000\.xml: .*; restore it"),
    "empty": (lambda text: "", r"cannot read .*train_000\.xml: no element found.*; restore it"),
    "no XML": (lambda text: "width: 5", r"cannot read .*train_000\.xml: syntax error"),
    "encoding": (lambda text: '<?xml version="1.0" encoding="x-none"?>' + text, r"cannot read .*train_000\.xml: "),
    "width of 0": (
        before("width", "<width>0</width>"),
        r"train_000\.xml has size/height \d+ and size/width 0;",
    ),
    "half width": (before("width", "<width>0.5</width>"), r"has size/height .* and size/width 0\.5; correct"),
    "NaN as width": (before("width", "<width>nan</width>"), "and size/width nan; correct"),
    "huge width": (before("width", "<width>1e300</width>"), r"and size/width 1e\+300; correct"),
    "text as height": (
        before("height", "<height>high</height>"),
        "size/height in .* must be a number, got 'high'",
    ),
    "blank height": (
        before("height", "<height> </height>"),
        r"<annotation> in .*train_000\.xml has no size/height",
    ),
    "no size": (
        lambda text: text.replace("size>", "extent>"),
        r"<annotation> in .* has no size/height; add it",
    ),
    "blank name": (before("name", "<name> </name>"), r"<object> in .*train_000\.xml has no name; add it"),
    "text in box": (before("xmax", "<xmax>wide</xmax>"), "bndbox/xmax in .* must be a number, got 'wide'; correct"),
    "no ymin": (before("ymin", "<ymin/>"), r"<object> in .*train_000\.xml has no bndbox/ymin; add it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_broken_annotations_are_refused(copy: Path, toy: DetectionSplits, case: str) -> None:
    change, message = REFUSED[case]
    path = copy / "Annotations" / "train_000.xml"
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=message):
        opened(copy)


def test_missing_files_are_named(copy: Path) -> None:
    annotation = copy / "Annotations" / "train_003.xml"
    annotation.rename(copy / "aside.xml")
    with pytest.raises(FileNotFoundError, match=r"train_003\.xml is missing; restore it, or take its name off"):
        opened(copy)
    (copy / "aside.xml").rename(annotation)
    (copy / "JPEGImages" / "val_001.png").unlink()
    with pytest.raises(DataError, match=r"1 of the 6 images of val are missing: .*Images/val_001\.jpg; restore"):
        opened(copy)
    assert len(opened(copy, bad_images="skip").val) == 6
    lists = copy / "ImageSets" / "Main"
    (lists / "val.txt").unlink()
    (lists / "test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"Main/val\.txt is missing; .* must hold JPEGImages/<name>"):
        opened(copy)
    (lists / "train.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"Main/train\.txt is missing"):
        opened(copy)
    shutil.rmtree(copy / "Annotations")
    with pytest.raises(FileNotFoundError, match=r"Annotations is missing; the root of data set voc must hold JPEG"):
        opened(copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train_000\ntrain_001\ntrain_000\n", r"train\.txt has train_000 twice; remove one of them"),
        (b"\xff\xfe\xff", r"cannot read .*train\.txt: .*; restore it as text"),
        (b"", "no training image has a box"),
    ],
    ids=["twice", "bytes", "empty"],
)
def test_broken_lists_are_refused(copy: Path, content: bytes, message: str) -> None:
    (copy / "ImageSets" / "Main" / "train.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        opened(copy)


def test_what_is_left_out_is_counted_and_named(
    copy: Path, toy: DetectionSplits, caplog: pytest.LogCaptureFixture
) -> None:
    """Boxes that are not finite are gone; those without an area are not trained on."""
    (odd, slip, *_) = [i for i in range(20) if len(toy.train.boxes[toy.train.rows(i)]) > 2]
    path = copy / "Annotations" / f"train_{odd:03}.xml"
    path.write_text(before("ymax", "<ymax>NaN</ymax>")(path.read_text()))
    path = copy / "Annotations" / f"train_{slip:03}.xml"
    same = "<xmin>9</xmin><xmax>9</xmax><ymin>7</ymin><ymax>7</ymax>"
    path.write_text(before("xmin", same)(path.read_text()))
    with caplog.at_level(logging.INFO, "unikd_fast"):
        train = opened(copy).train
    count = len(toy.train.boxes)
    assert f"1 of {count} boxes of train.txt are left out, a corner is infinite or no number: train_{odd:03}.xml" in (
        caplog.text
    )
    assert (
        f"1 of {count - 1} boxes of train have no area within their image, and are not trained on: train_{slip:03}"
        in (caplog.text)
    )
    (row,) = np.flatnonzero(~train.has_area)
    assert train.boxes[row].tolist() == [9, 7, 9, 7]

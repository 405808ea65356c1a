"""Folders in the layout of ImageNet: listed in a fixed order, or refused with the folder that is wrong."""

from pathlib import Path

import numpy as np
import pytest

from unikd_fast.data.image_folder import load_image_folder
from unikd_fast.data.splits import ImageFiles


def populate(root: Path, files: dict[str, list[str]]) -> Path:
    for folder, names in files.items():
        (root / folder).mkdir(parents=True)
        for name in names:
            (root / folder / name).touch()
    return root


def listed(split: object, root: Path) -> list[str]:
    assert isinstance(split, ImageFiles)
    return [str(Path(path).relative_to(root)) for path in split.paths]


def test_lists_sorted_classes_and_sorted_files(tmp_path: Path) -> None:
    populate(
        tmp_path,
        {
            "train/wolf": ["b.jpg", "a.JPEG", "c.Png", "notes.txt", "._a.jpg", "noextension"],
            "train/fox": ["z.webp", "y.BMP"],
            "train/.cache": ["x.jpg"],
            "val/fox": ["1.jpg"],
            "val/wolf": ["0.jpg", "2.jpg"],
        },
    )
    (tmp_path / "train" / "readme.jpg").touch()
    splits = load_image_folder(tmp_path, 224)
    assert listed(splits.train, tmp_path) == [
        "train/fox/y.BMP",
        "train/fox/z.webp",
        "train/wolf/a.JPEG",
        "train/wolf/b.jpg",
        "train/wolf/c.Png",
    ]
    assert splits.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert splits.train.labels.dtype == np.int64
    assert splits.val.labels.tolist() == [0, 1, 1]
    assert splits.class_names == ("fox", "wolf")
    assert (splits.num_classes, splits.image_size, splits.test_is_val) == (2, 224, True)
    assert splits.mean == (0.485, 0.456, 0.406)


def test_follows_links_to_folders_and_files(tmp_path: Path) -> None:
    elsewhere = populate(tmp_path / "elsewhere", {"wolf": ["a.jpg"], "images": ["b.jpg"]})
    root = populate(tmp_path / "root", {"train": [], "val/wolf": ["c.jpg"], "val/fox": ["d.jpg"]})
    (root / "train" / "wolf").symlink_to(elsewhere / "wolf")
    (root / "train" / "fox").mkdir()
    (root / "train" / "fox" / "e.jpg").symlink_to(elsewhere / "images" / "b.jpg")
    (root / "train" / "fox" / "dangling.jpg").symlink_to(elsewhere / "gone.jpg")
    assert listed(load_image_folder(root, 32).train, root) == [
        "train/fox/dangling.jpg",
        "train/fox/e.jpg",
        "train/wolf/a.jpg",
    ]


def test_a_folder_named_like_an_image_is_no_image(tmp_path: Path) -> None:
    populate(tmp_path, {"train/a": ["1.jpg"], "train/a/2.jpg": [], "val/a": ["1.jpg"]})
    assert len(load_image_folder(tmp_path, 32).train) == 1


@pytest.mark.parametrize("missing", ["", "train", "val"])
def test_names_the_missing_folder(tmp_path: Path, missing: str) -> None:
    root = tmp_path / "set"
    populate(root, {f"{part}/a": ["1.jpg"] for part in ("train", "val") if part != missing} if missing else {})
    with pytest.raises(FileNotFoundError, match=f"{root / missing} is missing; .*train/<class>/<image>"):
        load_image_folder(root, 32)


@pytest.mark.parametrize(("extra_in", "lacking"), [("train", "val"), ("val", "train")])
def test_names_the_first_class_that_differs(tmp_path: Path, extra_in: str, lacking: str) -> None:
    populate(tmp_path, {f"{part}/{name}": ["1.jpg"] for part in ("train", "val") for name in ("a", "b")})
    populate(tmp_path, {f"{extra_in}/{name}": ["1.jpg"] for name in ("d", "c")})
    with pytest.raises(ValueError, match=f"first that differs is 'c', in {extra_in} but not in {lacking}"):
        load_image_folder(tmp_path, 32)


def test_names_empty_class_folders(tmp_path: Path) -> None:
    populate(tmp_path, {f"train/c{i}": [] if i in (1, 3) else ["1.jpg"] for i in range(4)})
    populate(tmp_path, {f"val/c{i}": ["1.jpg"] for i in range(4)})
    with pytest.raises(ValueError, match=rf"2 of 4 class folders in {tmp_path / 'train'} hold no images: c1, c3;"):
        load_image_folder(tmp_path, 32)


def test_a_long_list_of_empty_folders_is_cut(tmp_path: Path) -> None:
    populate(tmp_path, {f"{part}/c{i}": [] for part in ("train", "val") for i in range(9)})
    with pytest.raises(ValueError, match=r"9 of 9 class folders .* c0, c1, c2, c3, c4, \.\.\.;"):
        load_image_folder(tmp_path, 32)


def test_images_without_class_folders_are_refused(tmp_path: Path) -> None:
    populate(tmp_path, {"train": ["1.jpg"], "val": ["1.jpg"]})
    with pytest.raises(ValueError, match=r"has no class folders; images belong in .*/train/<class>/"):
        load_image_folder(tmp_path, 32)

"""Folders in the layout of ImageNet: listed in a fixed order, or refused with the folder that is wrong."""

from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from unikd_fast.data.sets.image_folder import load_image_folder
from unikd_fast.data.splits import ImageFiles, hash_split


def populate(root: Path, files: dict[str, list[str]]) -> Path:
    for folder, names in files.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
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


def test_sub_folders_are_read_as_torchvision_does(tmp_path: Path) -> None:
    """Sorted by folder, then by name, where a space comes before what separates folders."""
    deep = {
        "wolf": ["b.jpg", "a.png"],
        "wolf/den": ["a.jpg"],
        "wolf/den/inner/most": ["0.JPG"],
        "wolf/den a": ["c.tif"],
        "wolf/x.jpg": ["in it.bmp"],
        "fox/2024": ["z.webp", "y.pgm"],
    }
    populate(tmp_path, {f"{part}/{folder}": names for part in ("train", "val") for folder, names in deep.items()})
    splits = load_image_folder(tmp_path, 32)
    expected = datasets.ImageFolder(tmp_path / "train")
    assert isinstance(splits.train, ImageFiles)
    assert list(zip(splits.train.paths, splits.train.labels, strict=True)) == expected.samples
    assert listed(splits.train, tmp_path / "train") == [
        "fox/2024/y.pgm",
        "fox/2024/z.webp",
        "wolf/a.png",
        "wolf/b.jpg",
        "wolf/den/a.jpg",
        "wolf/den a/c.tif",
        "wolf/den/inner/most/0.JPG",
        "wolf/x.jpg/in it.bmp",
    ]
    assert splits.class_names == tuple(expected.classes)


def test_what_is_left_out_is_counted_and_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    others = ["a.jfif", "b.gif", "noextension", "._c.jpg", ".DS_Store"]
    populate(tmp_path, {"train/a": ["1.jpg", *others[:3]], "train/a/b": ["2.jpg", *others[3:]], "val/a": ["1.jpg"]})
    (tmp_path / "train" / "beside.png").touch()
    (tmp_path / "train" / "readme.txt").touch()
    populate(tmp_path, {"train/.cache": ["x.jpg"]})
    for _ in range(2):
        assert len(load_image_folder(tmp_path, 32).train) == 2
    (record,) = caplog.records
    start, _, rest = record.getMessage().partition(" are left out: ")
    assert start == f"load_image_folder: 6 files and folders in {tmp_path / 'train'}"
    names, _, remedy = rest.partition("; ")
    assert {*names.split(", ")} < {"a/a.jfif", "a/b.gif", "a/noextension", "a/b/._c.jpg", "beside.png", ".cache", "..."}
    assert names.count(", ") == 5
    assert remedy == "names of images end in .jpg .jpeg .png .ppm .bmp .pgm .tif .tiff .webp"


def test_nothing_is_said_of_a_folder_that_is_read_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    populate(tmp_path, {"train/a/b": ["1.jpg"], "train/a": [".DS_Store"], "val/a": ["1.jpg"]})
    load_image_folder(tmp_path, 32)
    assert not caplog.records


def test_a_link_to_a_folder_around_it_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """torchvision would go round until the path is too long."""
    populate(tmp_path, {"train/a/b": ["1.jpg"], "val/a": ["1.jpg"], "elsewhere": ["2.jpg"]})
    (tmp_path / "train" / "a" / "b" / "up").symlink_to("..")
    (tmp_path / "train" / "a" / "aside").symlink_to(tmp_path / "elsewhere")
    splits = load_image_folder(tmp_path, 32)
    assert listed(splits.train, tmp_path / "train") == ["a/aside/2.jpg", "a/b/1.jpg"]
    assert "1 files and folders" in caplog.text
    assert "a/b/up" in caplog.text


def test_a_folder_without_sub_folders_keeps_its_hash(tmp_path: Path) -> None:
    """From the version that did not look into them, so that caches stay valid."""
    populate(tmp_path, {f"{part}/{name}": ["b.jpg", "a.png", "._c.jpg"] for part in ("train", "val") for name in "xy"})
    expected = ImageFiles(
        [str(tmp_path / "train" / name) for name in ("x/a.png", "x/b.jpg", "y/a.png", "y/b.jpg")], np.arange(4)
    )
    assert hash_split(load_image_folder(tmp_path, 32).train) == hash_split(expected)


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
    with pytest.raises(ValueError, match=r"has no class folders; images belong in .*/val/<class>/"):
        load_image_folder(tmp_path, 32)


def test_a_folder_of_classes_alone_is_split(tmp_path: Path) -> None:
    populate(tmp_path, {name: [f"{i:02}.png" for i in range(count)] for name, count in (("a", 20), ("b", 10))})
    splits = load_image_folder(tmp_path, 8, val_samples=6)
    assert (splits.class_names, splits.test_is_val) == (("a", "b"), True)
    assert np.bincount(splits.train.labels).tolist() == [16, 8] and np.bincount(splits.val.labels).tolist() == [4, 2]
    paths = [*listed(splits.train, tmp_path), *listed(splits.val, tmp_path)]
    assert sorted(paths) == sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
    again = load_image_folder(tmp_path, 8, val_samples=6)
    assert listed(again.val, tmp_path) == listed(splits.val, tmp_path)
    for wrong in (1, 29):
        with pytest.raises(ValueError, match=rf"between 2, one a class, and 28 of the 30 images .* got {wrong}"):
            load_image_folder(tmp_path, 8, val_samples=wrong)
    populate(tmp_path, {"train": ["x.png"], "val": ["x.png"]})
    with pytest.raises(ValueError, match="has train and val, and val_samples = 6"):
        load_image_folder(tmp_path, 8, val_samples=6)

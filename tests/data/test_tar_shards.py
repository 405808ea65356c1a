"""Tar files as WebDataset lays them out: the samples of the archive where they lie."""

import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from support.tar_sets import SIZE, contents, image, open_tars, sample, write_set, write_tar
from unikd_fast.data.augmentation import Augmentation
from unikd_fast.data.datasets import open_data
from unikd_fast.data.loader import build_loader
from unikd_fast.data.manifest import hash_split
from unikd_fast.data.splits import DataSplits, ImageFiles, PackedImages

pytestmark = pytest.mark.usefixtures("own_cache")

LONG = "ordner/" * 30 + "狼" * 60


@pytest.mark.parametrize(
    "names",
    [
        ("train-000.tar", "train-001.tar", "val-000.tar"),
        ("train/a.tar", "train/b.tar", "val/a.tar"),
        ("imagenet-train-0.tar", "imagenet-train-1.tar", "imagenet-validation-0.tar"),
    ],
)
def test_samples_are_those_of_the_archives_in_order(tmp_path: Path, names: tuple[str, ...]) -> None:
    splits, train, val = open_tars(write_set(tmp_path / "set", names))
    assert contents(train) == [image(i) for i in range(16)]
    assert contents(val) == [image(i) for i in range(16, 24)]
    assert train.labels.tolist() == [i % 3 for i in range(16)]
    assert train.sample_ids.tolist() == list(range(16))
    assert train.shards == tuple(str(tmp_path / "set" / name) for name in names[:2])
    assert (splits.num_classes, splits.class_names, splits.mean) == (3, None, (0.485, 0.456, 0.406))
    assert splits.test_is_val
    assert not train.checked


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "workers"), [("torchvision", 0), ("torchvision", 2), ("dali", 0)])
def test_batches_are_those_of_the_same_images_in_files(tmp_path: Path, kind: str, workers: int) -> None:
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    splits, train, val = open_tars(write_set(tmp_path / "set"))
    expected = []
    for split in (train, val):
        paths = [tmp_path / f"{len(split)}-{i}.jpg" for i in range(len(split))]
        for path, content in zip(paths, contents(split), strict=True):
            path.write_bytes(content)
        expected.append(ImageFiles([str(path) for path in paths], split.labels))
    files = DataSplits(expected[0], expected[1], expected[1], 3, None, splits.mean, splits.std, SIZE)
    settings = {
        "augmentation": Augmentation(crop="resized"),
        "seed": 1,
        "global_batch_size": 8,
        "device": "cpu",
        "kind": kind,
    }
    one, other = (build_loader(data, workers=count, **settings) for data, count in ((splits, workers), (files, 0)))  # type: ignore[arg-type]
    for found, wanted in ((one.train(1), other.train(1)), (one.evaluate("val"), other.evaluate("val"))):
        for batch, other_batch in zip(found, wanted, strict=True):
            assert torch.equal(batch.images, other_batch.images)
            assert torch.equal(batch.labels, other_batch.labels)
            assert torch.equal(batch.sample_ids, other_batch.sample_ids)


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["PAX", "GNU"])
def test_long_names_and_other_members(tmp_path: Path, tar_format: int) -> None:
    members = [
        ("LICENSE", b"text"),
        ("./folder/.hidden.jpg", b"no image"),
        ("./folder/.jpg", b"no image"),
        ("./folder.jpg/", b""),
        *sample(1, " 1\n", key=LONG),
        ("0002.json", b'{"label": 7}'),
        *reversed(sample(2, 0, key="0002", extension="JPEG")),
        ("0002.left.png", b"another part"),
        *sample(3, 2, key="../../escape", extension="png"),
        *sample(4, 2, key="./folder.v2/0002", extension="webp"),
        *sample(5, 1, key="/absolute/0002"),
        ("empty.txt", b""),
    ]
    root = write_set(tmp_path / "set")
    write_tar(root / "train-002.tar", members, tar_format)
    _, train, _ = open_tars(root)
    few = train.select(np.arange(16, 21))
    assert contents(few) == [image(1), image(2, "JPEG"), image(3, "png"), image(4, "webp"), image(5)]
    assert few.labels.tolist() == [1, 0, 2, 2, 1]
    written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {
        *("train-000.tar", "train-001.tar", "train-002.tar", "val-000.tar"),
        *("unikd-index-train.npz", "unikd-index-val.npz"),
    }, "nothing is unpacked"


@pytest.mark.parametrize("tar_format", ["gnu", "posix"])
def test_archives_of_the_tar_command(tmp_path: Path, tar_format: str) -> None:
    """With a member full of holes among the images, which has a header of its own kind."""
    folder = tmp_path / "images" / ("d" * 120)
    folder.mkdir(parents=True)
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(image(i))
        (folder / f"{i}.cls").write_text(f"{i}\n")
    for size, name in ((4_000_000, "0.bin"), (9_000_000, "2.bin")):
        with (folder / name).open("wb") as file:
            for place in range(0, size, 500_000):
                file.seek(place)
                file.write(b"x")
            file.truncate(size)
    root = write_set(tmp_path / "set")
    command = ["tar", "--sparse", f"--format={tar_format}", "--sort=name", "-cf", root / "train-000.tar", "images"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert (root / "train-000.tar").stat().st_size < 4_000_000, "the holes were left out"
    _, train, _ = open_tars(root)
    assert contents(train)[:3] == [image(i) for i in range(3)]
    assert train.labels[:3].tolist() == [0, 1, 2]


def test_classes_are_counted_in_train_or_given(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set")
    assert open_tars(root, 5)[0].num_classes == 5
    with pytest.raises(
        ValueError, match=r"at byte \d+ of .*train-000\.tar has label 2, and there are 2 classes, counted"
    ):
        open_tars(root, 2)
    write_tar(root / "val-000.tar", [*sample(1, 0), *sample(2, 3)])
    with pytest.raises(
        ValueError, match=r"at byte (\d+) of .*val-000\.tar has label 3, and there are 3 classes"
    ) as error:
        open_tars(root)
    with tarfile.open(root / "val-000.tar") as archive:
        assert f"at byte {archive.getmember('0002.jpg').offset_data} of" in str(error.value)
    assert open_tars(root, 4)[0].num_classes == 4


def test_no_shards_and_shards_without_images(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set")
    (root / "val-000.tar").rename(root / "val-000.tar.gz")
    with pytest.raises(FileNotFoundError, match=r"has no tar files of val: .*; val-000\.tar\.gz is compressed, unpack"):
        open_tars(root)
    (root / "val-000.tar.gz").unlink()
    (root / "val-000.tar").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no tar files of val: neither val-\*\.tar nor val/\*\.tar$"):
        open_tars(root)
    write_tar(root / "val" / "0.tar", [("a.v2.jpg", image(0)), ("a.v2.cls", b"0")])
    with pytest.raises(ValueError, match=r"none of the 1 tar files of val in .* holds an image; name .* no other dot"):
        open_tars(root)
    with pytest.raises(FileNotFoundError, match=r"gone, is missing; it must hold train-\*\.tar and val-\*\.tar, or"):
        open_data("webdataset", root=tmp_path / "gone", image_size=SIZE)


def test_a_subset_keeps_its_ids_and_the_hash_goes_by_names_and_sizes(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set")
    train = open_tars(root)[1]
    few = open_data("webdataset", root=root, image_size=SIZE, train_samples=6, seed=1).train
    assert isinstance(few, PackedImages)
    assert contents(few) == [image(i) for i in few.sample_ids]
    expected = hash_split(train)
    moved = root.rename(tmp_path / "moved")
    assert hash_split(open_tars(moved)[1]) == expected
    hashes = {expected, hash_split(few)}
    for members in (sample(8, 2, key="other"), [("0008.jpg", image(8) + b"\0"), ("0008.cls", b"2")]):
        others = [m for i in range(9, 16) for m in sample(i, i % 3)]
        write_tar(moved / "train-001.tar", [*members, *others])
        hashes.add(hash_split(open_tars(moved)[1]))
    assert len(hashes) == 4

"""Tar files as WebDataset lays them out: the samples of the archive where they lie, or an error that names them."""

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from generated_images import draw_image
from PIL import Image

from unikd_fast.data import tar_index
from unikd_fast.data.augmentation import Augmentation
from unikd_fast.data.datasets import open_data
from unikd_fast.data.loader import build_loader
from unikd_fast.data.manifest import hash_split
from unikd_fast.data.splits import DataSplits, ImageFiles, PackedImages

SIZE = 16
LONG = "ordner/" * 30 + "狼" * 60
Member = tuple[str, bytes]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def image(number: int, extension: str = "jpg") -> bytes:
    file = io.BytesIO()
    kind = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension.lower()]
    draw_image(np.random.default_rng(number), 20 + number % 7, 30).save(file, kind)
    return file.getvalue()


def sample(number: int, label: int | str, key: str | None = None, extension: str = "jpg") -> list[Member]:
    key = f"{number:04}" if key is None else key
    return [(f"{key}.{extension}", image(number, extension)), (f"{key}.cls", str(label).encode())]


def write_tar(path: Path, members: Iterable[Member], tar_format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            archive.addfile(member, io.BytesIO(content))
    return path


def write_set(root: Path, names: tuple[str, ...] = ("train-000.tar", "train-001.tar", "val-000.tar")) -> Path:
    """Eight samples a file, of classes 0 to 2."""
    for file, name in enumerate(names):
        write_tar(root / name, [m for i in range(8 * file, 8 * file + 8) for m in sample(i, i % 3)])
    return root


def open_tars(root: Path, num_classes: int | None = None) -> tuple[DataSplits, PackedImages, PackedImages]:
    splits = open_data("webdataset", root=root, image_size=SIZE, num_classes=num_classes)
    assert isinstance(splits.train, PackedImages)
    assert isinstance(splits.val, PackedImages)
    return splits, splits.train, splits.val


def contents(split: PackedImages) -> list[bytes]:
    return [stored.read() for stored in split.images(range(len(split)))]


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


def test_an_image_with_holes_is_refused(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set")
    with (tmp_path / "0.jpg").open("wb") as file:
        file.write(image(0))
        file.truncate(1_000_000)
    (tmp_path / "0.cls").write_text("0")
    subprocess.run(["tar", "--sparse", "-cf", root / "train-000.tar", "0.jpg", "0.cls"], cwd=tmp_path, check=True)
    with pytest.raises(ValueError, match=r"train-000\.tar: 0\.jpg is stored with holes; make the archive without"):
        open_tars(root)


def test_the_index_is_made_once_and_anew_when_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scanned: list[str] = []
    scan = tar_index.scan_tar

    def counted(path: Path, number: int) -> tar_index.TarIndex:
        scanned.append(path.name)
        return scan(path, number)

    monkeypatch.setattr(tar_index, "scan_tar", counted)
    root = write_set(tmp_path / "set")
    _, train, val = open_tars(root)
    assert scanned == ["train-000.tar", "train-001.tar", "val-000.tar"]
    _, again, val_again = open_tars(root)
    assert len(scanned) == 3
    assert np.array_equal(again.index, train.index)
    assert np.array_equal(val_again.labels, val.labels)
    moved = root.rename(tmp_path / "moved")
    open_tars(moved)
    assert len(scanned) == 3
    path = moved / "train-001.tar"
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    open_tars(moved)
    assert scanned[3:] == ["train-000.tar", "train-001.tar"]
    write_tar(moved / "train-002.tar", sample(9, 0))
    assert len(open_tars(moved)[1]) == 17
    assert len(scanned) == 8
    (moved / "train-002.tar").rename(moved / "train-003.tar")
    open_tars(moved)
    assert len(scanned) == 11
    kept = moved / "unikd-index-train.npz"
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes(content)
    assert contents(open_tars(moved)[1]) == [image(i) for i in (*range(16), 9)]
    assert len(scanned) == 14
    kept.write_bytes(b"")
    open_tars(moved)
    open_tars(moved)
    assert len(scanned) == 17


def test_where_the_root_cannot_be_written_the_index_goes_to_the_cache(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set")
    for name in ("train", "val"):  # nobody can replace a folder by a file, not even root
        (root / f"unikd-index-{name}.npz").mkdir()
    expected = contents(open_tars(root)[1])
    kept = sorted((tmp_path / "cache" / "unikd_fast").glob("tar-index-*/*"))
    assert [path.name for path in kept] == ["train.npz", "val.npz"]
    time = kept[0].stat().st_mtime_ns
    assert contents(open_tars(root)[1]) == expected
    assert kept[0].stat().st_mtime_ns == time
    assert not list(root.glob("*.tmp"))
    other = write_set(tmp_path / "other")
    (other / "unikd-index-train.npz").mkdir()
    open_tars(other)
    assert len(list((tmp_path / "cache" / "unikd_fast").glob("tar-index-*"))) == 2


def test_an_index_that_can_be_kept_nowhere_is_told(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set")
    for name in ("train", "val"):
        (root / f"unikd-index-{name}.npz").mkdir()
    (tmp_path / "cache").touch()
    with pytest.warns(UserWarning, match=r"index of tar files could not be kept \(.*; .*\); every start makes it anew"):
        assert len(open_tars(root)[1]) == 16


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def spoil(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place : place + 100] = b"\x07" * 100
    path.write_bytes(content)


def compress(path: Path, program: str) -> None:
    subprocess.run([program, "-c", path], stdout=path.with_name("compressed").open("wb"), check=True)
    path.with_name("compressed").replace(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b""), "is no whole tar file: empty file; it is truncated or damaged"),
        (lambda path: path.write_bytes(b"text" * 500), "is no whole tar file: "),
        (lambda path: cut(path, 700), "is no whole tar file: unexpected end of data"),
        (lambda path: cut(path, 512 * 3), "is no whole tar file: "),
        (
            lambda path: cut(path, path.stat().st_size // 2),
            ": 0013.cls goes beyond the end of the file; it is truncated",
        ),
        (
            lambda path: cut(path, last_member_end(path)),
            "is no whole tar file: there is neither a member nor the mark of the end at",
        ),
        (lambda path: cut(path, last_member_end(path) - 600), "is no whole tar file: "),
        (lambda path: spoil(path, last_member_end(path) - 1024), "is no whole .* neither a member nor the mark"),
        (lambda path: compress(path, "gzip"), "is compressed by gzip, .*; unpack it to a plain tar file"),
        (lambda path: compress(path, "bzip2"), "is compressed by bzip2"),
        (lambda path: compress(path, "xz"), "is compressed by xz"),
    ],
    ids=["empty", "text", "header", "boundary", "half", "no end", "last cut", "bad header", "gzip", "bzip2", "xz"],
)
def test_a_file_that_is_no_whole_tar_is_named(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    root = write_set(tmp_path / "set")
    damage(root / "train-001.tar")
    with pytest.raises(ValueError, match=f"index_tars: {root / 'train-001.tar'} ?{message}"):
        open_tars(root)


def last_member_end(path: Path) -> int:
    """Byte at which the last member, its padding included, ends."""
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    return last.offset_data + -(-last.size // 512) * 512


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "whole.tar", sample(0, 0))
    end = last_member_end(path)
    content = path.read_bytes()
    unnoticed = []
    for length in range(0, end + 1, 61):
        path.write_bytes(content[:length])
        try:
            tar_index.scan_tar(path, 0)
            unnoticed.append(length)
        except ValueError:
            pass
    assert unnoticed == []
    path.write_bytes(content[: end + 512])  # one block of zeros marks the end as well as two
    assert len(tar_index.scan_tar(path, 0).labels) == 1


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (sample(1, 0)[:1], r"sample 0001 in .*train-001\.tar has no \.cls with its label; add it or remove the sample"),
        (sample(1, 0)[1:], r"sample 0001 in .*train-001\.tar has no image; add"),
        (sample(1, 0, key="a/b")[1:], r"sample a/b in .* has no image"),
        (sample(1, "fox"), r"train-001\.tar: 0001\.cls must hold a class as a whole number from 0 on, got b'fox'"),
        (sample(1, -1), r"0001\.cls must hold a class .* got b'-1'"),
        (sample(1, ""), r"0001\.cls must hold a class .* got b''"),
        (sample(1, "1_0"), r"0001\.cls must hold a class .* got b'1_0'"),
        (sample(1, "1 2"), r"0001\.cls must hold a class .* got b'1 2'"),
        (sample(1, 2**31), r"0001\.cls must hold a class .* got b'2147483648'"),
        ([*sample(1, 0), *sample(1, 0)], r"train-001\.tar: 0001\.jpg is a second \.jpg of one sample"),
        ([*sample(1, 0), ("0001.png", image(1, "png"))], r"0001\.png is a second \.png of one sample"),
        ([*sample(1, 0), ("0001.CLS", b"0")], r"0001\.CLS is a second \.cls of one sample"),
    ],
)
def test_a_sample_that_is_not_whole_is_named(tmp_path: Path, members: list[Member], message: str) -> None:
    root = write_set(tmp_path / "set")
    write_tar(root / "train-001.tar", members)
    with pytest.raises(ValueError, match=message):
        open_tars(root)
    assert not (root / "unikd-index-train.npz").exists()


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


def test_a_file_cut_after_it_was_indexed_is_named(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set")
    splits, train, _ = open_tars(root)
    assert isinstance(splits, DataSplits)
    cut(root / "train-001.tar", 4000)
    with pytest.raises(ValueError, match=r"cannot read .*train-001\.tar at byte \d+: \d+ bytes are expected, \d+ are"):
        contents(train)
    shutil.rmtree(root)
    with pytest.raises(ValueError, match=r"cannot read .*train-000\.tar at byte 512: No such file"):
        contents(train)


def test_an_image_that_cannot_be_decoded_is_named_with_its_place(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set")
    write_tar(root / "train-000.tar", [("a.jpg", b"text"), ("a.cls", b"0")])
    splits, train, _ = open_tars(root)
    assert Image.open(io.BytesIO(contents(train)[1])).size[0] == 30
    loader = build_loader(
        splits, augmentation=Augmentation(), kind="torchvision", seed=0, global_batch_size=9, device="cpu", workers=0
    )
    with pytest.raises(ValueError, match=r"cannot decode .*train-000\.tar at byte 512"):
        list(loader.train(0))

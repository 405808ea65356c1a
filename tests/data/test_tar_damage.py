"""Tar files that are damaged, and samples that are not whole: an error that names them."""

import io
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from support.tar_sets import Member, contents, cut, image, open_tars, sample, write_set, write_tar
from unikd_fast.data import tar_index
from unikd_fast.data.augmentation import Augmentation
from unikd_fast.data.loader import build_loader
from unikd_fast.data.splits import DataSplits

pytestmark = pytest.mark.usefixtures("own_cache")


def test_an_image_with_holes_is_refused(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set")
    with (tmp_path / "0.jpg").open("wb") as file:
        file.write(image(0))
        file.truncate(1_000_000)
    (tmp_path / "0.cls").write_text("0")
    subprocess.run(["tar", "--sparse", "-cf", root / "train-000.tar", "0.jpg", "0.cls"], cwd=tmp_path, check=True)
    with pytest.raises(ValueError, match=r"train-000\.tar: 0\.jpg is stored with holes; make the archive without"):
        open_tars(root)


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

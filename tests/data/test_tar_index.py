"""The index of tar files: made once, kept beside them or in the user's cache, and made anew when a file changes."""

import os
from pathlib import Path

import numpy as np
import pytest

from support.tar_sets import contents, image, open_tars, sample, write_set, write_tar
from unikd_fast.data import tar_index

pytestmark = pytest.mark.usefixtures("own_cache")


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

"""A disk without room: said at once, with both numbers, and nothing lost."""

import errno
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.cache_inputs import (
    KEY,
    build_shard,
    make,
    payloads,
)
from support.small_disks import small_disk
from unikd_fast.errors import CacheError
from unikd_fast.teacher.cache import CacheFolder, Codec


def test_a_shard_is_allocated_before_its_first_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = make(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", full)
        with pytest.raises(
            CacheError,
            match=r"shard-00002\.partial cannot be written: No space left.* MiB are free .*240 bytes are",
        ):
            folder.claim(2)
    assert list(tmp_path.glob("shard-*")) == []
    build_shard(folder, 2)


def test_a_disk_full_while_writing_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated: copy-on-write file systems and compression break the promise of fallocate, and none is at hand."""
    write, calls = os.pwrite, 0

    def half_then_full(descriptor: int, content: Any, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, content[: 60 if calls == 2 else None], offset)

    folder = make(tmp_path)
    with folder.claim(0) as writer:  # type: ignore[union-attr]
        monkeypatch.setattr("os.pwrite", half_then_full)
        writer.write([0], payloads([0]))
        with pytest.raises(
            CacheError, match=r"shard-00000\.partial cannot be .*20 bytes are needed; what is written is kept"
        ):
            writer.write([1, 2], payloads([1, 2]))
    monkeypatch.setattr("os.pwrite", write)
    with folder.claim(0) as writer:  # type: ignore[union-attr]
        assert writer.todo.tolist() == [2, 3, 4, 5], "60 bytes are one record and a half"


def test_a_build_that_does_not_fit_on_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path)
    build_shard(folder, 0)
    folder.require_room()
    monkeypatch.setattr("unikd_fast.teacher.cache.folder.free_bytes", lambda _: 559)
    with pytest.raises(CacheError, match=r"still to build need 560 bytes and 559 are free; free some space"):
        folder.require_room()


def test_other_disk_errors_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("os.posix_fallocate", broken)
    with pytest.raises(CacheError, match=r"shard-00000\.partial cannot be written: Input/output error, and build"):
        make(tmp_path).claim(0)


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path) -> None:
    """It has room for two of four shards."""
    codec, shard = Codec("fp16", 1000), 50 * 2016
    values = torch.arange(200.0)[:, None].expand(200, 1000)
    with small_disk(tmp_path / "disk", kib=256):
        folder = CacheFolder.create_or_open(tmp_path / "disk" / "cache", KEY, codec, np.arange(200), 1, 50)
        with pytest.raises(CacheError) as refused:
            folder.require_room()
        with pytest.raises(CacheError) as full:
            while (writer := folder.claim_any(wait=False)) is not None:
                with writer:
                    writer.write(writer.todo, codec.encode(values[writer.todo]))
                    writer.commit()
        assert sorted(path.name for path in folder.path.glob("shard-*")) == ["shard-00000.bin", "shard-00001.bin"]
        found, _ = codec.decode(folder.read(np.arange(100)))
        assert isinstance(found, torch.Tensor) and torch.equal(found.float(), values[:100])
        del found
    needed = f"{folder.path}: the shards still to build need {4 * shard} bytes and "
    assert str(refused.value).startswith(needed)
    said = str(full.value)
    assert "shard-00002.partial cannot be written: No space left on device, 0.0 MiB are free on its file sys" in said
    assert f"; make room, and build again ({shard} bytes are needed; what is written is kept)" in said


def test_a_file_size_limit(tmp_path: Path) -> None:
    folder = make(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        with pytest.raises(CacheError) as refused:
            folder.claim(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = str(refused.value)
    assert "shard-00000.partial cannot be written: File too large, " in said and "240 bytes are needed" in said
    assert list(tmp_path.glob("shard-*")) == []

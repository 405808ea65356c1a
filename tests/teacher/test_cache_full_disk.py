"""A disk without room: said at once, with both numbers, and nothing lost."""

import errno
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from support.cache_inputs import (
    build_shard,
    make,
    payloads,
    start,
)
from unikd_fast.errors import CacheError


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


# A file system of 256 KiB, in a mount name space of its own: room for two of four shards.
ON_A_SMALL_DISK = """
import numpy as np, os, subprocess, sys, torch
from pathlib import Path
disk = Path(sys.argv[1])
if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True).returncode:
    print("no mount"); sys.exit()
from support.cache_inputs import KEY
from unikd_fast.errors import CacheError
from unikd_fast.teacher.cache import CacheFolder, Codec
codec = Codec("fp16", 1000)
folder = CacheFolder.create_or_open(disk / "cache", KEY, codec, np.arange(200), 1, 50)
try:
    folder.require_room()
except CacheError as error:
    print(error)
values = torch.arange(200.0)[:, None].expand(200, 1000)
try:
    while (writer := folder.claim_any(wait=False)) is not None:
        with writer:
            writer.write(writer.todo, codec.encode(values[writer.todo]))
            writer.commit()
except CacheError as error:
    print(error)
print(sorted(path.name for path in folder.path.glob("shard-*")))
found, _ = codec.decode(folder.read(np.arange(100)))
print(torch.equal(found.float(), values[:100]))
"""


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path) -> None:
    before = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*before, "true"], capture_output=True).returncode:
        pytest.skip("mount name spaces are not allowed here; the test with a limit on file sizes stands in")
    output = start(ON_A_SMALL_DISK, tmp_path, before=before).communicate(timeout=300)[0].splitlines()
    if output == ["no mount"]:
        pytest.skip("mounting a tmpfs is not allowed here; the test with a limit on file sizes stands in")
    refused, full, files, same = output
    shard = 50 * 2016
    assert refused.startswith(f"{tmp_path}/cache: the shards still to build need {4 * shard} bytes and ")
    assert "shard-00002.partial cannot be written: No space left on device, 0.0 MiB are free on its file sys" in full
    assert f"; make room, and build again ({shard} bytes are needed; what is written is kept)" in full
    assert files == "['shard-00000.bin', 'shard-00001.bin']"
    assert same == "True"


@pytest.mark.slow
def test_a_file_size_limit(tmp_path: Path) -> None:
    program = """
import resource, sys
from support.cache_inputs import make
from unikd_fast.errors import CacheError
folder = make(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
try:
    folder.claim(0)
except CacheError as error:
    print(error)
"""
    output = start(program, tmp_path).communicate(timeout=300)[0]
    assert "shard-00000.partial cannot be written: File too large, " in output and "240 bytes are needed" in output
    assert list(tmp_path.glob("shard-*")) == []

"""A disk without room for a pack: said at once, with the bytes that are free, and nothing lost."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.packed_images import ARGUMENTS, ROOT, SETTINGS, content, finished_shards, packed, start, write_folder
from unikd_fast.data.packed import PackError, PackSettings


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return content(packed(source, tmp_path_factory.mktemp("undisturbed"), SETTINGS))


def test_a_pack_that_cannot_end_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = PackSettings()
    total = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    monkeypatch.setattr("unikd_fast.data.packed.plan.free_bytes", lambda _: total - 1)
    with pytest.raises(
        PackError, match=rf"still to pack need about (\d+) bytes and {total - 1} are free; make room"
    ) as error:
        packed(source, tmp_path / "store", settings)
    assert total <= int(re.findall(r"about (\d+)", str(error.value))[0]) < total + 60
    monkeypatch.setattr("unikd_fast.data.packed.plan.free_bytes", lambda _: total + 60)
    packed(source, tmp_path / "store", settings)


def test_a_disk_that_fills_up_is_named_and_nothing_is_lost(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, bytes]
) -> None:
    store, sync, calls = tmp_path / "store", os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(
            PackError, match=r"cannot be written \(No space left on device\): \d+ bytes are free on its"
        ):
            packed(source, store, SETTINGS)
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, os.strerror(errno.EIO))))
        with pytest.raises(OSError, match="Input/output error"):
            packed(source, store, SETTINGS)
    assert finished_shards(store) > 2
    assert content(packed(source, store, SETTINGS)) == undisturbed


# A file system of 64 KiB, in a mount name space of its own.
ON_A_SMALL_DISK = """
import subprocess, sys
from pathlib import Path
source, disk = map(Path, sys.argv[1:])
if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
    print("no mount"); sys.exit()
from unikd_fast.data.pack_command import main
arguments = ["pack", str(source), str(disk / "store"), "--format", "raw", "--size", "24", "--shard-bytes", "6000"]
print(main(arguments))
import unikd_fast.data.packed.plan as plan
plan.free_bytes = lambda _: 10**9
print(main([*arguments, "--workers", "0"]))
print(len(list((disk / "store").glob("*.bin"))))
print(list((disk / "store" / ".unikd-packing").glob("*.tmp")))
subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
print(main([*arguments, "--workers", "0"]), main(["verify", str(disk / "store")]))
"""


@pytest.mark.slow
def test_a_disk_that_is_full(source: Path, tmp_path: Path) -> None:
    before = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*before, "true"], capture_output=True).returncode:
        pytest.skip("mount name spaces are not allowed here; the test with a limit on file sizes stands in")
    run = subprocess.run(
        [*before, sys.executable, "-c", ON_A_SMALL_DISK, str(source), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if run.stdout == "no mount\n":
        pytest.skip("mounting a tmpfs is not allowed here; the test with a limit on file sizes stands in")
    refused, full = run.stderr.splitlines()
    needed, free = map(int, re.findall(r"\d+", refused.partition("need about")[2]))
    assert needed > free > 0
    assert re.search(
        rf"{tmp_path}/store/\S*\.tmp cannot be written \(No space left on device\): \d+ bytes are free on its file",
        full,
    )
    first, second, shards, temporary, *_, last = run.stdout.splitlines()
    assert (first, second, temporary, last) == ("1", "1", "[]", "0 0")
    assert 2 <= int(shards) < 20


@pytest.mark.slow
def test_a_limit_on_file_sizes(source: Path, tmp_path: Path) -> None:
    command = start("pack", source, tmp_path, *ARGUMENTS, "--workers", "0", before=("prlimit", "--fsize=4000"))
    _, errors = command.communicate(timeout=300)
    assert command.returncode == 1
    assert re.search(r"train-00000\.bin\.\d+\.tmp cannot be written \(File too large\): \d+ bytes are free", errors)

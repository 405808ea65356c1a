"""Packs that end the same, bit for bit, whatever happens on the way."""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from support.generated_images import draw_image
from support.packed_images import (
    ARGUMENTS,
    CLASSES,
    ROOT,
    SETTINGS,
    content,
    finished_shards,
    interrupt,
    packed,
    start,
    write_folder,
)
from unikd_fast.data.packed import PackError, PackSettings, pack_folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return content(packed(source, tmp_path_factory.mktemp("undisturbed"), SETTINGS))


def test_what_was_begun_goes_on_with_the_same_settings_and_files_alone(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, bytes]
) -> None:
    own, store = tmp_path / "own", tmp_path / "store"
    shutil.copytree(source, own)
    interrupt(monkeypatch, own, store, 30)
    with pytest.raises(ValueError, match=r"another pack, begun: settings\.format: 'jpeg' there, 'raw' now"):
        packed(own, store, PackSettings("raw", size=24, shard_bytes=6000))
    path = own / "val" / CLASSES[0] / "狼 000.JPEG"
    original = path.read_bytes()
    path.write_bytes(original + b"\0")
    with pytest.raises(ValueError, match=r"begun: sources\.val: '[0-9a-f]{64}' there, '[0-9a-f]{64}' now; pack into"):
        packed(own, store, SETTINGS)
    path.write_bytes(original)
    moved = own.rename(tmp_path / "elsewhere")
    finished = finished_shards(store)
    assert finished > 0
    interrupt(monkeypatch, moved, store, 0)
    assert finished_shards(store) == finished
    assert content(packed(moved, store, SETTINGS)) == undisturbed


def test_finished_shards_are_kept_and_harmed_ones_are_not(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, bytes]
) -> None:
    store = tmp_path / "store"
    interrupt(monkeypatch, source, store, 30)
    first, second, *_ = sorted(store.glob("train-*.bin"))
    second.write_bytes(second.read_bytes()[:-1])
    kept = first.stat()
    left = store / ".unikd-packing" / "train-00009.bin.4711.tmp"  # as by a process that was killed
    left.touch()
    interrupt(monkeypatch, source, store, 0)
    assert not left.exists()
    assert content(packed(source, store, SETTINGS)) == undisturbed
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)


def test_one_packer_at_a_time(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, bytes]
) -> None:
    store = tmp_path / "store"
    interrupt(monkeypatch, source, store, 20)
    with (store / ".unikd-packing" / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        with pytest.raises(PackError, match=f"another process is packing into {store}; wait for it"):
            packed(source, store, SETTINGS)
    assert content(packed(source, store, SETTINGS)) == undisturbed


# Each child is killed at a later one of the steps by which files come to be; the one after it goes on.
KILLED_AT_EVERY_STEP = """
import os, pathlib, shutil, signal, sys
from unikd_fast.data.packed import PackSettings, pack_folder
source, root = map(pathlib.Path, sys.argv[1:])
settings = PackSettings("jpeg", size=24, shard_bytes=5000)
os.fsync = lambda descriptor: None  # slow, and a kill leaves what was written in any case

def pack(store, die_at=0):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    steps = 0
    def counted(step):
        def act(*arguments, **options):
            nonlocal steps
            steps += 1
            if steps == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*arguments, **options)
        return act
    for owner, name in ((os, "fsync"), (os, "unlink"), (os, "rmdir"), (pathlib.Path, "replace"),
                        (pathlib.Path, "write_text"), (pathlib.Path, "write_bytes"), (pathlib.Path, "mkdir")):
        setattr(owner, name, counted(getattr(owner, name)))
    pack_folder(source, store, settings, workers=0)
    os._exit(0)

def content(store):
    return {path.name: path.read_bytes() for path in store.rglob("*") if path.is_file()}

assert pack(root / "whole") == 0
expected, step = content(root / "whole"), 0
while True:
    step += 1
    store = root / f"killed-{step}"
    died = pack(store, step)
    if not died:
        break
    assert died == signal.SIGKILL, died
    assert pack(store) == 0, step
    assert content(store) == expected, step
    shutil.rmtree(store)
print("steps", step - 1, "files", len(expected))
"""


@pytest.mark.slow
def test_killed_at_every_step_and_resumed_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", (8, 4))
    run = subprocess.run(
        [sys.executable, "-c", KILLED_AT_EVERY_STEP, str(source), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    steps, files = map(int, re.findall(r"\d+", run.stdout))
    assert files >= 3 * 2 + 1 + 3, "arrays, manifest and shards"
    assert steps > 5 * files


@pytest.mark.slow
def test_processes_killed_and_begun_again_make_the_same_bit_for_bit(
    source: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    store, kills = tmp_path / "store", 0
    for wanted in (1, 5):
        command = start("pack", source, store, *ARGUMENTS, "--workers", "2")
        while finished_shards(store) < wanted and command.poll() is None:
            time.sleep(0.001)
        command.kill()
        kills += command.wait() == -signal.SIGKILL
    assert kills == 2
    assert not (store / "manifest.json").exists()
    command = start("pack", source, store, *ARGUMENTS, "--workers", "2")
    assert command.wait(timeout=300) == 0, command.communicate()[1]
    assert content(store) == undisturbed


@pytest.mark.slow
def test_processes_make_what_one_makes(source: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    pack_folder(source, tmp_path / "store", SETTINGS, workers=3)
    assert content(tmp_path / "store") == undisturbed
    spoiled = write_folder(tmp_path / "spoiled", (24, 8))
    (spoiled / "train" / CLASSES[0] / "狼 000.JPEG").write_bytes(b"")
    with pytest.raises(ValueError, match=r"000\.JPEG: the file is empty; repair .* remove it, or pack with --bad skip"):
        pack_folder(spoiled, tmp_path / "other", SETTINGS, workers=2)


def members(group: int) -> list[int]:
    """Processes of a group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, own_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(own_group) == group and state != "Z":
                found.append(int(entry.name))
    return found


@pytest.fixture
def large_source(tmp_path: Path) -> Path:
    """Enough for packing to take a while: links to a large image."""
    root = tmp_path / "large"
    generator = np.random.default_rng(0)
    (root / "train" / "a").mkdir(parents=True)
    (root / "val" / "a").mkdir(parents=True)
    draw_image(generator, 1000, 1500).save(root / "val" / "a" / "0.jpg")
    for i in range(400):
        (root / "train" / "a" / f"{i:03}.jpg").symlink_to(root / "val" / "a" / "0.jpg")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_packing_processes_end_with_the_first_one(tmp_path: Path, large_source: Path, number: int) -> None:
    store = tmp_path / "store"
    command = start("pack", large_source, store, "--size", "256", "--shard-bytes", "100000", "--workers", "2")
    while finished_shards(store) < 2 and command.poll() is None:
        time.sleep(0.01)
    assert len(members(command.pid)) >= 4, "the first one, two that pack, and the server they come from"
    if number == signal.SIGINT:
        os.killpg(command.pid, number)
    else:
        command.kill()
    _, errors = command.communicate(timeout=60)
    if number == signal.SIGINT:
        assert (command.returncode, errors) == (
            130,
            "unikd-data: error: stopped; run the same again, finished shards are kept\n",
        )
    deadline = time.monotonic() + 30
    while members(command.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert members(command.pid) == []
    assert finished_shards(store) >= 2


@pytest.mark.slow
def test_a_packing_process_that_dies_is_told(tmp_path: Path, large_source: Path) -> None:
    store = tmp_path / "store"
    command = start("pack", large_source, store, "--size", "256", "--shard-bytes", "100000", "--workers", "2")
    while finished_shards(store) < 2 and command.poll() is None:
        time.sleep(0.01)
    # The ones that pack have the temporary files open, which bear their numbers.
    deadline = time.monotonic() + 60
    while not (open_files := list(store.glob(".unikd-packing/*.tmp"))) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(int(open_files[0].name.split(".")[-2]), signal.SIGKILL)
    _, errors = command.communicate(timeout=60)
    assert command.returncode == 1
    assert "unikd-data: error: a packing process died; short of memory, use fewer workers; run the same" in errors

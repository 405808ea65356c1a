"""Runs that build one cache at the same time, wait for each other, are killed and stopped."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from support.ranks import Ranks
from support.real_runs import (
    ALONE,
    cached_config,
    opened,
    run,
    start,
)
from support.small_shards import (
    SHARD_BYTES,
    files,
    in_small_shards,
    payloads,
    ready,
    same_student,
)
from unikd_fast.engine.cache import fill_cache
from unikd_fast.engine.distributed import StopSignal
from unikd_fast.errors import Interrupted
from unikd_fast.teacher.cache import CacheFolder
from unikd_fast.teacher.cache.files import LOCK, folder_lock

# Building takes seconds: long enough to be struck in the middle.
SLOW: dict[str, Any] = {"data": {"train_samples": 200}, "cache": {"batch_size": 1}}
SLOW_SHARDS = 30


def wait_until(happened: Callable[[], bool], *processes: Ranks) -> None:
    """While these processes run."""
    deadline = time.monotonic() + 120
    while not happened():
        for process in processes:
            assert process.poll() is None, process.said()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def begun(folder: CacheFolder) -> bool:
    """Whether a shard holds some of its records."""
    for partial in folder.path.glob("*.partial"):
        try:
            return any(partial.read_bytes()[: SHARD_BYTES // 4])
        except FileNotFoundError:
            return False  # finished
    return False


class Together(NamedTuple):
    """Two runs that built one cache at the same time, side by side."""

    folder: CacheFolder
    runs: tuple[Path, Path]
    outputs: tuple[str, str]
    codes: tuple[int, int]
    side_by_side: bool
    rewritten: list[str]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Together:
    if not Path("/proc/self/fd").exists():
        pytest.skip("looks at the files that a process holds open")
    home = tmp_path_factory.mktemp("together")
    configs = [cached_config(home, weights, name=name, **SLOW) for name in ("left", "right")]
    folder = in_small_shards(configs[0])
    assert len(folder.missing_shards()) == SLOW_SHARDS
    with folder_lock(folder.path):  # at which both wait with the head they fitted, however fast they start
        processes = [start(config) for config in configs]
        wait_until(lambda: all(waits_for(folder.path / LOCK, process) for process in processes), *processes)
    seen: dict[str, tuple[int, int]] = {}
    rewritten, side_by_side = [], False
    while any(process.poll() is None for process in processes):
        now = files(folder)
        rewritten += [name for name in seen if now.get(name) != seen[name]]
        seen = now
        building = [{file for file in open_files(process) if file.suffix == ".partial"} for process in processes]
        side_by_side |= all(building) and building[0].isdisjoint(building[1])
        time.sleep(0.005)
    outputs = tuple(process.said() for process in processes)
    codes = tuple(process.returncode for process in processes)
    return Together(folder, (home / "left", home / "right"), outputs, codes, side_by_side, rewritten)  # type: ignore[arg-type]


def open_files(process: Ranks) -> set[Path]:
    """Of a process that may end meanwhile."""
    found: set[Path] = set()
    with suppress(OSError):
        found.update(file.readlink() for file in Path(f"/proc/{process.pids[0]}/fd").iterdir())
    return found


def waits_for(lock: Path, process: Ranks) -> bool:
    if lock not in open_files(process):
        return False
    time.sleep(0.01)
    return lock in open_files(process)


@pytest.mark.long
def test_concurrent_runs_build_every_shard_once(together: Together) -> None:
    assert together.codes == (0, 0), together.outputs
    assert together.side_by_side  # both built
    assert together.rewritten == []
    assert together.folder.verify().ok
    assert list(together.folder.path.glob("*.partial")) == []
    assert same_student(*together.runs)


@pytest.mark.long
def test_a_killed_or_stopped_build_continues(tmp_path: Path, weights: Path, together: Together) -> None:
    config = cached_config(tmp_path, weights, name="struck", **SLOW)
    folder = in_small_shards(config)
    process = start(config)
    wait_until(lambda: len(files(folder)) >= 4, process)
    while not begun(folder):  # the next shard, but not finished it before it was stopped
        process.send_signal(signal.SIGCONT)
        wait_until(lambda: begun(folder), process)
        process.send_signal(signal.SIGSTOP)
    process.kill()
    finished = files(folder)
    assert 4 <= len(finished) < SLOW_SHARDS - 5
    (partial,) = folder.path.glob("*.partial")
    inode = partial.stat().st_ino

    process = start(config, "--resume", "auto")
    wait_until(lambda: len(files(folder)) >= len(finished) + 4, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143, process.said()
    output = process.said()
    assert f"stopped while teacher.cache.dir = {folder.path} was built; what is written is kept" in output
    assert "Traceback" not in output
    more = files(folder)
    assert len(finished) + 4 <= len(more) < SLOW_SHARDS
    assert finished.items() <= more.items()
    assert more[partial.with_suffix(".bin").name][0] == inode  # with what the killed process had written

    done = run(config, "--resume", "auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert more.items() <= files(folder).items()
    assert len(files(folder)) == SLOW_SHARDS
    assert json.loads((tmp_path / "struck" / "teacher.json").read_text())["built_shards"] == SLOW_SHARDS - len(more)
    assert np.array_equal(payloads(folder), payloads(together.folder))
    assert same_student(tmp_path / "struck", together.runs[0])


def test_a_run_waiting_for_a_build_can_be_stopped(tmp_path: Path, weights: Path) -> None:
    config = cached_config(tmp_path, weights)
    folder = in_small_shards(config)
    ready(config)
    folder.discard(14)
    experiment = opened(config)
    claim = folder.claim(14)
    assert claim is not None
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    with claim, StopSignal(ALONE) as stop:
        timer.start()
        try:
            with pytest.raises(Interrupted, match="what is written is kept") as stopped:
                fill_cache(experiment, stop, "test")
        finally:
            timer.cancel()
            timer.join()
    assert stopped.value.exit_code == 143
    assert folder.missing_shards() == [14]

"""What may happen to a cache of a teacher's outputs while runs build it and train from it."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from real_runs import (
    ALONE,
    ROOT,
    cached_config,
    command,
    kill_group,
    opened,
    run,
    save_teacher,
    start,
    train_here,
)
from safetensors.torch import load_file

from unikd_fast.config import load_config
from unikd_fast.engine.build import Experiment
from unikd_fast.engine.fill_cache import fill_cache, ready_cache
from unikd_fast.engine.stop import StopSignal
from unikd_fast.engine.trainer import Trainer
from unikd_fast.errors import CacheError, Interrupted
from unikd_fast.teacher.cache import CacheFolder, layout
from unikd_fast.teacher.cache.disk import LOCK, folder_lock

RECORDS = 20  # of a shard
SHARD_BYTES = RECORDS * 80  # header, logits and Gaussian of ten classes
# Building takes seconds: long enough to be struck in the middle.
SLOW: dict[str, Any] = {"data": {"train_samples": 200}, "cache": {"batch_size": 1}}
SLOW_SHARDS = 30
# Batches that a shard holds whole, so that one that is built alone is built of the same.
FOUR: dict[str, Any] = {"cache": {"batch_size": 4}}


def ready(config: Path) -> Experiment:
    experiment = opened(config)
    assert experiment.cache is not None
    ready_cache(experiment.cache, experiment.side, StopSignal(ALONE), "test", epochs=experiment.epochs)
    return experiment


def in_small_shards(config: Path) -> CacheFolder:
    """Makes the folder of a run, which keeps the size of its shards whoever builds them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "TARGET_SHARD_BYTES", SHARD_BYTES)
        cache = opened(config).cache
    assert cache is not None
    return cache.folder


def files(folder: CacheFolder) -> dict[str, tuple[int, int]]:
    """The finished shards, each with what changes when it is written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.path.glob("shard-*.bin")}


def payloads(folder: CacheFolder) -> NDArray[np.uint8]:
    assert folder.verify().ok
    return folder.read(range(folder.samples * folder.views))


def same_student(left: Path, right: Path) -> bool:
    a, b = load_file(left / "student.safetensors"), load_file(right / "student.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def wait_until(happened: Callable[[], bool], *processes: "subprocess.Popen[str]") -> None:
    """While these processes run."""
    deadline = time.monotonic() + 120
    while not happened():
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
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
    outputs = tuple(process.communicate()[0] for process in processes)
    codes = tuple(process.returncode for process in processes)
    return Together(folder, (home / "left", home / "right"), outputs, codes, side_by_side, rewritten)  # type: ignore[arg-type]


def open_files(process: "subprocess.Popen[str]") -> set[Path]:
    """Of a process that may end meanwhile."""
    found: set[Path] = set()
    with suppress(OSError):
        found.update(file.readlink() for file in Path(f"/proc/{process.pid}/fd").iterdir())
    return found


def waits_for(lock: Path, process: "subprocess.Popen[str]") -> bool:
    if lock not in open_files(process):
        return False
    time.sleep(0.01)
    return lock in open_files(process)


@pytest.mark.slow
def test_two_runs_at_once_build_every_shard_once_and_train_the_same_student(together: Together) -> None:
    assert together.codes == (0, 0), together.outputs
    assert together.side_by_side  # both built
    assert together.rewritten == []
    assert together.folder.verify().ok
    assert list(together.folder.path.glob("*.partial")) == []
    assert same_student(*together.runs)


@pytest.mark.slow
def test_a_build_that_is_killed_and_then_stopped_goes_on_where_it_was(
    tmp_path: Path, weights: Path, together: Together
) -> None:
    config = cached_config(tmp_path, weights, name="struck", **SLOW)
    folder = in_small_shards(config)
    process = start(config)
    wait_until(lambda: len(files(folder)) >= 4, process)
    while not begun(folder):  # the next shard, but not finished it before it was stopped
        kill_group(process, signal.SIGCONT)
        wait_until(lambda: begun(folder), process)
        kill_group(process, signal.SIGSTOP)
    kill_group(process, signal.SIGKILL)
    process.wait()
    finished = files(folder)
    assert 4 <= len(finished) < SLOW_SHARDS - 5
    (partial,) = folder.path.glob("*.partial")
    inode = partial.stat().st_ino

    process = start(config, "--resume", "auto")
    wait_until(lambda: len(files(folder)) >= len(finished) + 4, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
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


@pytest.mark.slow
def test_a_flipped_bit_ends_a_run_with_its_own_exit_code(tmp_path: Path, weights: Path) -> None:
    folder = in_small_shards(cached_config(tmp_path, weights))
    ready(cached_config(tmp_path, weights))
    path = folder.path / "shard-00003.bin"
    flip(path)
    done = run(cached_config(tmp_path, weights, name="real"))
    assert done.returncode == CacheError.exit_code == 4, done.stderr
    assert f"launch_distill: error: {path}: record " in done.stderr
    assert "delete this file and build the cache again, only this shard is redone" in done.stderr
    assert not (tmp_path / "real" / "student.safetensors").exists()


@pytest.mark.slow
def test_a_disk_that_is_too_small_is_refused_before_training(tmp_path: Path, weights: Path) -> None:
    before = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    disk = tmp_path / "disk"
    disk.mkdir()
    mounting = ["sh", "-c", 'mount -t tmpfs -o size=128k tmpfs "$0" 2>/dev/null || exit 77; exec "$@"', str(disk)]
    if subprocess.run([*before, *mounting, "true"], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs in a name space of its own is not allowed here")
    sections: dict[str, Any] = {"data": {"train_samples": None}, "cache": {"dir": str(disk / "cache")}}
    config = cached_config(tmp_path, weights, name="full", **sections)
    done = subprocess.run([*before, *mounting, *command(config)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 4, done.stdout + done.stderr
    needed = 3 * 1000 * 80
    said = f"launch_distill: error: {disk}/cache: the shards still to build need {needed} bytes and "
    assert said in done.stderr
    free = int(done.stderr.partition(said)[2].split()[0])
    assert 0 < free <= 128 * 1024 < needed
    assert not (tmp_path / "full" / "metrics.jsonl").exists()


def flip(path: Path, at: int = -30) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 9)


def delete(path: Path) -> None:
    path.unlink()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, weights: Path, group: None) -> Path:
    """The home of a run whose cache has 15 shards; to be copied."""
    home = tmp_path_factory.mktemp("trained")
    config = cached_config(home, weights, name="first", **FOUR)
    in_small_shards(config)
    train_here(load_config(config))
    return home


@pytest.mark.parametrize(
    ("damage", "recheck", "said"),
    [
        pytest.param(flip, 0.0, "is not what was written, its checksum is", id="flipped, found in training"),
        pytest.param(flip, 1.0, "is not what was written, its checksum is", id="flipped, found before"),
        pytest.param(truncate, 0.0, "has 1591 bytes and must have 1600", id="truncated, found in training"),
        pytest.param(truncate, 1.0, "has 1591 bytes and must have 1600", id="truncated, found before"),
        pytest.param(delete, 0.0, None, id="deleted"),
    ],
)
def test_a_damaged_shard_is_refused_and_built_again_without_the_others(
    tmp_path: Path, weights: Path, trained: Path, damage: Callable[[Path], None], recheck: float, said: str | None
) -> None:
    def config(name: str, **cache: Any) -> Path:
        return cached_config(tmp_path, weights, name=name, cache={**FOUR["cache"], **cache})

    shutil.copytree(trained / "outputs", tmp_path / "outputs")
    folder = CacheFolder.open(tmp_path / "outputs")
    path, before, content = folder.path / "shard-00007.bin", files(folder), payloads(folder)
    assert len(before) == 15
    damage(path)
    if said is not None:
        with pytest.raises(CacheError, match="delete this file and build the cache again") as refused:
            train_here(load_config(config("refused", recheck=recheck)))
        assert str(path) in str(refused.value)
        assert said in str(refused.value)
        assert not (tmp_path / "refused" / "student.safetensors").exists()
        assert (tmp_path / "refused" / "metrics.jsonl").exists() == (recheck == 0)
        path.unlink()  # as it says
    with pytest.raises(CacheError, match=r"1 of 15 shards are not built, and teacher.cache.mode = 'read' builds none"):
        ready(config("reading", mode="read"))
    again = train_here(load_config(config("again")))
    assert json.loads((again / "teacher.json").read_text())["built_shards"] == 1
    after = files(folder)
    assert after.pop(path.name) != before.pop(path.name)
    assert after == before
    assert np.array_equal(payloads(folder), content)
    assert same_student(trained / "first", again)


@pytest.mark.parametrize("damage", [flip, truncate, delete])
@pytest.mark.parametrize("name", ["manifest.json", "sample_ids.npy", "teacher.safetensors"])
def test_a_damaged_description_is_refused(
    tmp_path: Path, weights: Path, name: str, damage: Callable[[Path], None]
) -> None:
    config = cached_config(tmp_path, weights)
    folder = ready(config).cache.folder  # type: ignore[union-attr]
    damage(folder.path / name)
    with pytest.raises(CacheError, match=name.replace(".", r"\.")) as refused:
        ready(config)
    assert "delete" in str(refused.value)  # what to do about it


def overwrite(folder: CacheFolder, content: NDArray[np.uint8]) -> None:
    """As a build would, with checksums that are right."""
    shards = range(folder.info().shards)
    for shard in shards:
        folder.discard(shard)
        writer = folder.claim(shard)
        assert writer is not None
        with writer:
            writer.write(writer.todo, content[writer.todo])
            writer.commit()


def test_outputs_that_changed_behind_the_keys_back_are_not_trained_on(tmp_path: Path, weights: Path) -> None:
    folder = in_small_shards(cached_config(tmp_path, weights))
    own = payloads(ready(cached_config(tmp_path, weights)).cache.folder)  # type: ignore[union-attr]
    other = save_teacher(tmp_path / "other.pth", seed=1)
    elsewhere = cached_config(tmp_path, other, cache={"dir": str(tmp_path / "other")})
    foreign = payloads(ready(elsewhere).cache.folder)  # type: ignore[union-attr]

    def checked(share: float) -> None:
        ready(cached_config(tmp_path, weights, cache={"recheck": share}))

    checked(1.0)
    overwrite(folder, foreign)  # all of it: any share finds it
    with pytest.raises(CacheError, match=r"does not hold what the teacher says: 64 of 64 outputs .* differ"):
        checked(0.001)
    one = own.copy()
    one[100] = foreign[100]
    overwrite(folder, one)
    with pytest.raises(CacheError, match=r"1 of 288 outputs computed again differ, sample \d+ in view 1 by"):
        checked(1.0)
    overwrite(folder, np.roll(own, folder.samples, axis=0))  # the views exchanged
    with pytest.raises(CacheError, match=r"64 of 64|6\d of 64"):
        checked(0.001)
    overwrite(folder, own)
    checked(1.0)


def test_a_run_that_waits_for_another_one_to_build_can_be_stopped(tmp_path: Path, weights: Path) -> None:
    config = cached_config(tmp_path, weights)
    folder = in_small_shards(config)
    ready(config)
    folder.discard(14)
    cache = opened(config).cache
    assert cache is not None
    claim = folder.claim(14)
    assert claim is not None
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    with claim, StopSignal(ALONE) as stop:
        timer.start()
        try:
            with pytest.raises(Interrupted, match="what is written is kept") as stopped:
                fill_cache(cache, stop, "test")
        finally:
            timer.cancel()
            timer.join()
    assert stopped.value.exit_code == 143
    assert folder.missing_shards() == [14]


class StopsAfter(StopSignal):
    """As if SIGTERM came after some questions: one for each batch the head is fitted to, one a step."""

    def __init__(self, questions: int) -> None:
        super().__init__(ALONE)
        self._left = questions

    def agreed(self) -> int:
        self._left -= 1
        return signal.SIGTERM if self._left < 0 else 0


def interrupt(config: Path, questions: int = 12) -> None:
    single = load_config(config)
    with pytest.raises(Interrupted, match="stopped at step"):
        Trainer(single, Path(single.run.dir), ALONE, StopsAfter(questions), label="student", resume=False).run()


def test_a_run_does_not_go_on_against_another_head(tmp_path: Path, weights: Path, group: None) -> None:
    config = cached_config(tmp_path, weights)
    interrupt(config)
    shutil.rmtree(tmp_path / "outputs")
    experiment = opened(config)  # the same cache, to whose head something happened
    assert experiment.cache is not None
    head = experiment.method.fitted_head
    assert head is not None
    record = {"precision": "fp32"}
    experiment.cache.folder.attach({name: value + 0.01 for name, value in head.state_dict().items()}, record)
    with pytest.raises(CacheError, match=r"another head than the checkpoint was trained with .* start a new run"):
        train_here(load_config(config), resume=True)


def test_a_run_goes_on_with_a_cache_that_is_built_again(tmp_path: Path, weights: Path, group: None) -> None:
    whole = train_here(load_config(cached_config(tmp_path, weights, name="whole")))
    config = cached_config(tmp_path, weights, name="cut", cache={"dir": str(tmp_path / "its")})
    interrupt(config)
    shutil.rmtree(tmp_path / "its")
    assert same_student(train_here(load_config(config), resume=True), whole)

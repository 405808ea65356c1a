"""A cache of a teacher's outputs that is damaged, changed or built again: what a run says, and what it goes on with."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from support.real_runs import (
    ALONE,
    cached_config,
    opened,
    run,
    save_teacher,
    train_here,
)
from support.small_disks import small_disk
from support.small_shards import (
    FOUR,
    delete,
    files,
    flip,
    in_small_shards,
    payloads,
    ready,
    same_student,
    truncate,
)
from unikd_fast.config import load_config
from unikd_fast.engine.build import build_experiment
from unikd_fast.engine.cache import fill_cache
from unikd_fast.engine.distributed import StopSignal
from unikd_fast.engine.trainer import Trainer
from unikd_fast.errors import CacheError, Interrupted
from unikd_fast.teacher.cache import CacheFolder


@pytest.mark.slow
def test_a_flipped_bit_ends_a_run_with_exit_code_4(tmp_path: Path, weights: Path) -> None:
    folder = in_small_shards(cached_config(tmp_path, weights))
    ready(cached_config(tmp_path, weights))
    path = folder.path / "shard-00003.bin"
    flip(path)
    done = run(cached_config(tmp_path, weights, name="real"))
    assert done.returncode == CacheError.exit_code == 4, done.stderr
    assert f"unikd train: error: {path}: record " in done.stderr
    assert "delete this file and build the cache again, only this shard is redone" in done.stderr
    assert not (tmp_path / "real" / "student.safetensors").exists()


@pytest.mark.slow
def test_a_disk_too_small_is_refused_before_training(tmp_path: Path, weights: Path) -> None:
    disk = tmp_path / "disk"
    sections: dict[str, Any] = {"data": {"train_samples": None}, "cache": {"dir": str(disk / "cache")}}
    with small_disk(disk, kib=128):
        done = run(cached_config(tmp_path, weights, name="full", **sections))
    assert done.returncode == 4, done.stdout + done.stderr
    needed = 3 * 1000 * 80
    said = f"unikd train: error: {disk}/cache: the shards still to build need {needed} bytes and "
    assert said in done.stderr
    free = int(done.stderr.partition(said)[2].split()[0])
    assert 0 < free <= 128 * 1024 < needed
    assert not (tmp_path / "full" / "metrics.jsonl").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Path:
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
        pytest.param(truncate, 0.0, "has 1591 bytes but must have 1600", id="truncated, found in training"),
        pytest.param(truncate, 1.0, "has 1591 bytes but must have 1600", id="truncated, found before"),
        pytest.param(delete, 0.0, None, id="deleted"),
    ],
)
def test_only_a_damaged_shard_is_rebuilt(
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
def test_damaged_metadata_is_refused(tmp_path: Path, weights: Path, name: str, damage: Callable[[Path], None]) -> None:
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


@pytest.mark.long
def test_recheck_finds_outputs_of_another_teacher(tmp_path: Path, weights: Path) -> None:
    folder = in_small_shards(cached_config(tmp_path, weights))
    own = payloads(ready(cached_config(tmp_path, weights)).cache.folder)  # type: ignore[union-attr]
    other = save_teacher(tmp_path / "other.pth", seed=1)
    elsewhere = cached_config(tmp_path, other, cache={"dir": str(tmp_path / "other")})
    foreign = payloads(ready(elsewhere).cache.folder)  # type: ignore[union-attr]

    def checked(share: float) -> None:
        ready(cached_config(tmp_path, weights, cache={"recheck": share}))

    checked(1.0)
    overwrite(folder, foreign)  # all of it: any share finds it
    with pytest.raises(CacheError, match=r"does not match the teacher: 64 of 64 recomputed outputs differ"):
        checked(0.001)
    one = own.copy()
    one[100] = foreign[100]
    overwrite(folder, one)
    with pytest.raises(CacheError, match=r"1 of 288 recomputed outputs differ, sample \d+ in view 1 by"):
        checked(1.0)
    overwrite(folder, np.roll(own, folder.samples, axis=0))  # the views exchanged
    with pytest.raises(CacheError, match=r"64 of 64|6\d of 64"):
        checked(0.001)
    overwrite(folder, own)
    checked(1.0)


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
        experiment = build_experiment(single, ALONE)
        Trainer(experiment, Path(single.run.dir), StopsAfter(questions), label="student", resume=False).run()


def test_resuming_with_another_head_is_refused(tmp_path: Path, weights: Path) -> None:
    config = cached_config(tmp_path, weights)
    interrupt(config)
    shutil.rmtree(tmp_path / "outputs")
    experiment = opened(config)  # the same cache, to whose head something happened
    assert experiment.cache is not None
    head = experiment.method.fixed_head
    assert head is not None
    record = {"precision": "fp32"}
    experiment.cache.folder.attach({name: value + 0.01 for name, value in head.module.state_dict().items()}, record)
    with pytest.raises(CacheError, match=r"another head than the checkpoint was trained with .* start a new run"):
        train_here(load_config(config), resume=True)


def test_another_precision_of_a_run_that_was_faster(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison with fp32 is on other images in another number of processes, and may have come out otherwise."""
    experiment = opened(cached_config(tmp_path, weights))
    attach = CacheFolder.attach

    def after_another(folder: CacheFolder, tensors: Any, record: dict[str, Any]) -> Any:
        attach(folder, tensors, {**record, "precision": "bf16"})
        return attach(folder, tensors, record)

    monkeypatch.setattr(CacheFolder, "attach", after_another)
    with pytest.raises(CacheError, match=r"came to fp32 here, and to bf16 in another run .*; start this run again"):
        fill_cache(experiment, StopSignal(ALONE), "student")
    assert experiment.cache is not None
    assert not list(experiment.cache.folder.path.glob("shard-*"))  # nothing was mixed


@pytest.mark.long
def test_a_run_resumes_with_a_rebuilt_cache(tmp_path: Path, weights: Path) -> None:
    whole = train_here(load_config(cached_config(tmp_path, weights, name="whole")))
    config = cached_config(tmp_path, weights, name="cut", cache={"dir": str(tmp_path / "its")})
    interrupt(config)
    shutil.rmtree(tmp_path / "its")
    assert same_student(train_here(load_config(config), resume=True), whole)

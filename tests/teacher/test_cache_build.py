"""Filling a cache from whatever computes the outputs."""

import itertools
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from unikd_fast.errors import CacheError
from unikd_fast.teacher.cache import CacheFolder, CacheKey, Codec, ShardWriter
from unikd_fast.teacher.cache.folder import Request, build_cache
from unikd_fast.values import Gaussian

SAMPLES, VIEWS, CLASSES = 23, 3, 5
IDS = np.arange(SAMPLES) * 7 + 1


class FakeTeacher:
    """Outputs that say which view of which sample they are of; counts what it is asked for."""

    def __init__(self, *, fails_after: int | None = None, spoilt: float = 0.0) -> None:
        self.asked: list[tuple[int, int]] = []
        self.fails_after, self.spoilt = fails_after, spoilt

    def __call__(self, requests: Iterable[Request]) -> Iterator[tuple[Tensor, Gaussian | None]]:
        for positions, view in requests:
            if self.fails_after is not None and len(self.asked) >= self.fails_after:
                raise RuntimeError("killed")
            self.asked += [(int(p), view) for p in positions]
            yield expected(positions, view) + self.spoilt, None


def expected(positions: np.ndarray, view: int) -> Tensor:
    first = torch.from_numpy(positions).float()[:, None] + 100 * view
    return first + torch.arange(CLASSES) / 8


def folder_in(path: Path) -> CacheFolder:
    return CacheFolder.create_or_open(
        path, CacheKey({"a": 1}), Codec("fp16", CLASSES), IDS, VIEWS, records_per_shard=10
    )


def assert_complete(folder: CacheFolder) -> None:
    for view in range(VIEWS):
        positions = np.arange(SAMPLES)[::-1]
        logits, _ = folder.codec.decode(folder.read(folder.records(positions, view)))
        assert torch.equal(logits, expected(positions.copy(), view).half())


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_every_view_of_every_sample_once(tmp_path: Path, batch_size: int) -> None:
    folder, teacher, counts = folder_in(tmp_path / "cache"), FakeTeacher(), []
    assert build_cache(folder, teacher, batch_size=batch_size, progress=counts.append) == SAMPLES * VIEWS
    assert sorted(teacher.asked) == [(p, v) for p in range(SAMPLES) for v in range(VIEWS)]
    assert sum(counts) == SAMPLES * VIEWS
    assert max(counts) <= batch_size
    assert_complete(folder)
    assert build_cache(folder, teacher, batch_size=batch_size) == 0


def test_a_build_resumes_where_it_ended(tmp_path: Path) -> None:
    folder, first, second = folder_in(tmp_path / "cache"), FakeTeacher(fails_after=14), FakeTeacher()
    with pytest.raises(RuntimeError, match="killed"):
        build_cache(folder, first, batch_size=4)
    build_cache(folder, second, batch_size=4)
    assert not set(first.asked) & set(second.asked)
    assert_complete(folder)


def test_only_a_discarded_shard_is_rebuilt(tmp_path: Path) -> None:
    folder, teacher = folder_in(tmp_path / "cache"), FakeTeacher()
    build_cache(folder, teacher, batch_size=4)
    folder.discard(2)  # records 20 to 29: three samples of view 0, seven of view 1
    teacher.asked.clear()
    assert build_cache(folder, teacher, batch_size=4) == 10
    assert sorted(teacher.asked, key=lambda x: x[::-1]) == [(p, 0) for p in (20, 21, 22)] + [(p, 1) for p in range(7)]
    assert_complete(folder)


def test_only_the_shards_of_the_first_views_are_built(tmp_path: Path) -> None:
    """View 0 is records 0 to 22: three shards of ten."""
    folder, teacher = folder_in(tmp_path / "cache"), FakeTeacher()
    assert build_cache(folder, teacher, batch_size=4, views=1) == 30
    assert sorted(teacher.asked, key=lambda x: x[::-1]) == [(p, 0) for p in range(SAMPLES)] + [(p, 1) for p in range(7)]
    assert (folder.missing_shards(1), folder.missing_shards()) == ([], [3, 4, 5, 6])
    logits, _ = folder.codec.decode(folder.read(folder.records(range(SAMPLES), 0)))
    assert isinstance(logits, Tensor) and torch.equal(logits, expected(np.arange(SAMPLES), 0).half())
    teacher.asked.clear()
    assert build_cache(folder, teacher, batch_size=4, views=1) == 0 and not teacher.asked
    assert build_cache(folder, teacher, batch_size=4) == SAMPLES * VIEWS - 30
    assert_complete(folder)


def held_shard(folder: CacheFolder, shard: int) -> ShardWriter:
    """As by another process: a lock does not ask who has it."""
    writer = folder.claim(shard)
    assert writer is not None and folder.claim(shard) is None
    return writer


def finish(folder: CacheFolder, writer: ShardWriter) -> None:
    outputs = [expected(np.array([record % SAMPLES]), int(record) // SAMPLES) for record in writer.todo]
    writer.write(writer.todo, folder.codec.encode(torch.cat(outputs)))
    writer.commit()


def test_progress_reports_zero_while_waiting_for_others(tmp_path: Path) -> None:
    folder, teacher, counts = folder_in(tmp_path / "cache"), FakeTeacher(), []
    held = held_shard(folder, 3)

    def progress(count: int) -> None:
        counts.append(count)
        if counts[-3:] == [0, 0, 0]:
            finish(folder, held)

    assert build_cache(folder, teacher, batch_size=4, progress=progress) == SAMPLES * VIEWS - 10
    assert counts[-3:] == [0, 0, 0] and 0 not in counts[:-3], "at the end, and until the other one was done"
    assert sum(counts) == SAMPLES * VIEWS - 10
    assert_complete(folder)


def test_shards_left_by_another_process_are_built_after_waiting(tmp_path: Path) -> None:
    folder, teacher, counts = folder_in(tmp_path / "cache"), FakeTeacher(), []
    held = held_shard(folder, 3)
    held.write([30], folder.codec.encode(expected(np.array([7]), 1)))

    def progress(count: int) -> None:
        counts.append(count)
        if counts[-2:] == [0, 0]:
            held.close()  # as a process that dies

    assert build_cache(folder, teacher, batch_size=4, progress=progress) == SAMPLES * VIEWS - 1
    assert (7, 1) not in teacher.asked
    assert counts.count(0) == 2
    assert_complete(folder)


@pytest.mark.parametrize("waits", ["claim", "claim_any", "build_cache"])
def test_idle_can_end_the_wait(tmp_path: Path, waits: str) -> None:
    """Nothing is left of the wait: the shard stays with who has it, and can be claimed after that."""
    folder = folder_in(tmp_path / "cache")
    for shard in range(6):
        with held_shard(folder, shard) as writer:
            finish(folder, writer)
    calls = itertools.count(1)

    def idle(count: int = 0) -> None:
        assert count == 0
        if next(calls) == 4:
            raise KeyboardInterrupt

    def wait() -> object:
        if waits == "claim":
            return folder.claim(6, wait=True, idle=idle)
        if waits == "claim_any":
            return folder.claim_any(wait=True, idle=idle)
        return build_cache(folder, FakeTeacher(), batch_size=4, progress=idle)

    before = open_files()
    held = held_shard(folder, 6)
    with pytest.raises(KeyboardInterrupt):
        wait()
    assert next(calls) == 5
    assert folder.claim(6) is None, "still the other's"
    assert open_files() == before + 1
    finish(folder, held)
    assert_complete(folder)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_claim_waits_without_idle_too(tmp_path: Path) -> None:
    folder = folder_in(tmp_path / "cache")
    held = held_shard(folder, 6)
    timer = threading.Timer(0.2, held.close)
    timer.start()
    with folder.claim(6, wait=True) as writer:  # type: ignore[union-attr]
        finish(folder, writer)
    timer.join()
    assert folder.claim(6, wait=True) is None
    assert folder.covers([SAMPLES * VIEWS - 1])


def test_idle_is_not_called_without_waiting(tmp_path: Path) -> None:
    def idle() -> None:
        raise AssertionError

    folder = folder_in(tmp_path / "cache")
    with folder.claim(0, wait=True, idle=idle) as writer:  # type: ignore[union-attr]
        finish(folder, writer)
    assert folder.claim(0, wait=True, idle=idle) is None
    held = held_shard(folder, 1)
    assert folder.claim(1, idle=idle) is None, "it was not asked to wait"
    with folder.claim_any(wait=True, idle=idle) as writer:  # type: ignore[union-attr]
        assert writer.shard == 2
    held.close()


def test_outputs_that_cannot_be_stored_leave_no_shard(tmp_path: Path) -> None:
    folder = folder_in(tmp_path / "cache")
    with pytest.raises(CacheError, match="fp16 ends at 65504; store them as uint8"):
        build_cache(folder, FakeTeacher(spoilt=1e5), batch_size=4)
    assert folder.missing_shards() == list(range(7))


def test_too_few_outputs_are_noticed(tmp_path: Path) -> None:
    folder = folder_in(tmp_path / "cache")
    with pytest.raises(ValueError, match="zip"):
        build_cache(folder, lambda requests: iter(()), batch_size=4)

"""Filling a cache from whatever computes the outputs."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from unikd_fast.errors import CacheError
from unikd_fast.teacher.cache import CacheFolder, CacheKey, Codec
from unikd_fast.teacher.cache.build import Request, build_cache
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


def test_goes_on_where_a_build_ended(tmp_path: Path) -> None:
    folder, first, second = folder_in(tmp_path / "cache"), FakeTeacher(fails_after=14), FakeTeacher()
    with pytest.raises(RuntimeError, match="killed"):
        build_cache(folder, first, batch_size=4)
    build_cache(folder, second, batch_size=4)
    assert not set(first.asked) & set(second.asked)
    assert_complete(folder)


def test_only_a_discarded_shard_is_built_again(tmp_path: Path) -> None:
    folder, teacher = folder_in(tmp_path / "cache"), FakeTeacher()
    build_cache(folder, teacher, batch_size=4)
    folder.discard(2)  # records 20 to 29: three samples of view 0, seven of view 1
    teacher.asked.clear()
    assert build_cache(folder, teacher, batch_size=4) == 10
    assert sorted(teacher.asked, key=lambda x: x[::-1]) == [(p, 0) for p in (20, 21, 22)] + [(p, 1) for p in range(7)]
    assert_complete(folder)


def test_outputs_that_do_not_fit_leave_no_shard(tmp_path: Path) -> None:
    folder = folder_in(tmp_path / "cache")
    with pytest.raises(CacheError, match="fp16 ends at 65504; store them as uint8"):
        build_cache(folder, FakeTeacher(spoilt=1e5), batch_size=4)
    assert folder.missing_shards() == list(range(7))


def test_too_few_outputs_are_noticed(tmp_path: Path) -> None:
    folder = folder_in(tmp_path / "cache")
    with pytest.raises(ValueError, match="zip"):
        build_cache(folder, lambda requests: iter(()), batch_size=4)

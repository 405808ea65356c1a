"""The bytes of a cache that is not there, begun, built, damaged, or another's."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from unikd_fast.engine import cache_plan
from unikd_fast.engine.cache_plan import CacheSizes, cache_sizes
from unikd_fast.errors import CacheError
from unikd_fast.teacher.cache import CacheFolder, CacheKey, Codec

CODEC = Codec("fp16", 100)  # 200 bytes, and 16 of a header


def test_sizes_of_a_missing_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(cache_plan, "free_bytes", lambda folder: asked.append(folder) or 12345)
    found = cache_sizes(tmp_path / "deep" / "down", CODEC, samples=30, views=4)
    assert found == CacheSizes(30, 4, view_bytes=30 * 216, missing_bytes=4 * 30 * 216, free_bytes=12345)
    assert found.total_bytes == 25_920
    assert asked == [tmp_path], "the nearest folder that is there"
    assert not list(tmp_path.iterdir())


def test_sizes_of_a_partial_cache(tmp_path: Path) -> None:
    """It has 4 views, one of its six shards of 20 records is done, and of the sixth only view 3 is made."""
    folder = CacheFolder.create_or_open(tmp_path, CacheKey({}), CODEC, np.arange(30), 4, 20)
    with folder.claim(2) as writer:  # type: ignore[union-attr]
        writer.write(writer.todo, CODEC.encode(torch.zeros(20, 100)))
        writer.commit()
    for views, missing in ((1, 40), (2, 40), (3, 80), (4, 100)):  # a view begins or ends within a shard
        found = cache_sizes(tmp_path, CODEC, samples=30, views=views)
        assert (found.samples, found.views, found.view_bytes) == (30, views, 30 * 216)
        assert found.missing_bytes == missing * 216
        assert found.total_bytes == views * 30 * 216
        assert found.free_bytes > 0


def test_built_views_cost_nothing(tmp_path: Path) -> None:
    folder = CacheFolder.create_or_open(tmp_path, CacheKey({}), CODEC, np.arange(30), 2, 20)
    for shard in (0, 1):
        with folder.claim(shard) as writer:  # type: ignore[union-attr]
            writer.write(writer.todo, CODEC.encode(torch.zeros(20, 100)))
            writer.commit()
    assert [cache_sizes(tmp_path, CODEC, 30, views).missing_bytes for views in (1, 2)] == [0, 20 * 216]


@pytest.mark.parametrize("file", ["manifest.json", "sample_ids.npy"])
def test_a_damaged_cache_has_no_sizes(tmp_path: Path, file: str) -> None:
    """It would be built into otherwise, or taken for one that is not there."""
    CacheFolder.create_or_open(tmp_path, CacheKey({}), CODEC, np.arange(30), 4, 20)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CacheError, match=rf"{re.escape(file)} is damaged"):
        cache_sizes(tmp_path, CODEC, samples=30, views=4)


@pytest.mark.parametrize(
    "asked", [(Codec("uint8", 100), 30, 4), (CODEC, 29, 4), (CODEC, 30, 5)], ids=["codec", "samples", "views"]
)
def test_sizes_where_the_folder_holds_another_cache(tmp_path: Path, asked: tuple[Codec, int, int]) -> None:
    CacheFolder.create_or_open(tmp_path, CacheKey({}), CODEC, np.arange(30), 4, 20)
    elsewhere = cache_sizes(tmp_path / "elsewhere", *asked)
    assert replace(cache_sizes(tmp_path, *asked), free_bytes=0) == replace(elsewhere, free_bytes=0)
    assert elsewhere.missing_bytes == elsewhere.total_bytes

"""What a run builds of its cache: the views it needs, in room for these; nothing in mode read, nothing too large."""

from pathlib import Path

import pytest
import torch

from support.outputs_runs import SAMPLES, Settings, experiment, of, save_random_teacher
from support.real_runs import ALONE
from unikd_fast.config import ConfigError
from unikd_fast.engine import cache as fill_cache
from unikd_fast.engine import cache as output_cache
from unikd_fast.engine.build import Experiment
from unikd_fast.engine.cache import OutputCache
from unikd_fast.engine.distributed import StopSignal
from unikd_fast.errors import CacheError
from unikd_fast.teacher.cache import folder as info


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_teacher(tmp_path_factory.mktemp("weights") / "teacher.pth")


@pytest.mark.parametrize("head", ["anchored", "literal"])
def test_a_jointly_trained_head_cannot_be_cached(tmp_path: Path, weights: Path, head: str) -> None:
    with pytest.raises(ConfigError) as caught:
        experiment(tmp_path, weights, changes={"distill.unikd.teacher_head": head})
    # Levels of 16 x 32 x 32, 32 x 16 x 16 and 64 x 8 x 8, of 96 samples, two bytes each.
    assert f"distill.unikd.teacher_head = '{head}'" in str(caught.value)
    assert "in half precision the levels are 5.25 MiB a view of all samples" in str(caught.value)
    assert "with 'prefit' it does not; in half" in str(caught.value)
    assert "; set teacher.cache.mode = 'off'" in str(caught.value)
    assert not (tmp_path / "unikd").exists()


def test_more_logits_than_classes_are_refused(tmp_path: Path, weights: Path) -> None:
    changes = {"teacher.cache.logits": "top_k", "teacher.cache.top_k": 11, "distill.kd.temperature": 1}
    with pytest.raises(ConfigError, match=r"top_k must lie in \[1, 10\], got 11"):
        experiment(tmp_path, weights, "kd", changes)
    assert not (tmp_path / "kd").exists()


def ready(built: Experiment) -> OutputCache:
    fill_cache.ready_cache(built, StopSignal(ALONE), "test")
    return of(built)


def test_a_larger_cache_serves_a_shorter_run(tmp_path: Path, weights: Path) -> None:
    settings: Settings = {"teacher.cache.views": 2, "train.total_epochs": 2, "teacher.cache.recheck": 0}
    ready(experiment(tmp_path, weights, "kd", settings))
    built = experiment(tmp_path, weights, "kd", {**settings, "teacher.cache.views": 1, "teacher.cache.mode": "read"})
    cache = ready(built)
    assert (cache.views, cache.folder.views) == (1, 2)
    for epoch in (0, 1):  # both show view 0, each in an order of its own
        batches = list(built.micro_batches(epoch))
        order = list(built.loader.schedule.order(epoch))
        assert len(batches) == len(order) == SAMPLES // 8
        shown = built.loader.train(epoch, view_epoch=0)
        for (batch, target), positions, expected in zip(batches, order, shown, strict=True):
            stored, _ = cache.folder.codec.decode(cache.folder.read(cache.folder.records(positions, view=0)))
            assert isinstance(stored, torch.Tensor) and target is not None
            assert torch.equal(target.logits, stored)  # type: ignore[arg-type]
            assert torch.equal(batch.images, expected.images)
            assert batch.sample_ids.tolist() == positions.tolist()


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> int:
    """Two for each view."""
    monkeypatch.setattr(output_cache, "default_records_per_shard", lambda payload_bytes: SAMPLES // 2)
    return SAMPLES // 2


def test_the_views_that_a_run_needs_are_enough(tmp_path: Path, weights: Path, small_shards: int) -> None:
    two_views: Settings = {"teacher.cache.views": 2, "train.total_epochs": 2, "teacher.cache.recheck": 0}
    one_view: Settings = {**two_views, "teacher.cache.views": 1}
    assert of(experiment(tmp_path, weights, "kd", two_views)).missing == 4
    first = experiment(tmp_path, weights, "kd", one_view)
    assert of(first).missing == 2
    cache = ready(first)
    assert (cache.missing, cache.folder.views, cache.folder.missing_shards()) == (0, 2, [2, 3])
    again = experiment(tmp_path, weights, "kd", {**one_view, "teacher.cache.mode": "read"})
    assert of(again).missing == 0
    network = of(again).network
    cache = ready(again)
    assert network is not None and cache.network is None
    assert cache.folder.missing_shards() == [2, 3] and not list(cache.folder.path.glob("*.partial"))
    assert len(list(again.micro_batches(1))) == SAMPLES // 8
    more = experiment(tmp_path, weights, "kd", {**two_views, "teacher.cache.mode": "read"})
    assert of(more).missing == 2
    with pytest.raises(CacheError, match=r"2 of 4 shards are not built, and teacher\.cache\.mode = 'read' builds none"):
        ready(more)
    more = experiment(tmp_path, weights, "kd", two_views)
    assert ready(more).folder.missing_shards() == []


def test_only_the_needed_views_take_space(
    tmp_path: Path, weights: Path, small_shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: Settings = {"teacher.cache.views": 2, "train.total_epochs": 2, "teacher.cache.recheck": 0}
    folder = of(experiment(tmp_path, weights, "kd", settings)).folder
    monkeypatch.setattr(info, "free_bytes", lambda path: folder.missing_bytes(1))
    with pytest.raises(CacheError, match=rf"need {folder.missing_bytes()} bytes and {folder.missing_bytes(1)} are"):
        ready(experiment(tmp_path, weights, "kd", settings))
    ready(experiment(tmp_path, weights, "kd", {**settings, "teacher.cache.views": 1}))
    assert folder.missing_shards() == [2, 3]


def test_read_mode_creates_no_cache(tmp_path: Path, weights: Path) -> None:
    with pytest.raises(CacheError) as caught:
        experiment(tmp_path, weights, "kd", {"teacher.cache.mode": "read"})
    assert str(caught.value).startswith(f"teacher.cache.dir = {tmp_path / 'kd'} does not exist, and teacher.cache.mode")
    assert "--set teacher.cache.mode=read_write" in str(caught.value)
    assert not (tmp_path / "kd").exists()
    (tmp_path / "kd").mkdir()
    with pytest.raises(CacheError, match=r"kd is not a cache, manifest\.json is missing"):
        experiment(tmp_path, weights, "kd", {"teacher.cache.mode": "read"})
    assert not list((tmp_path / "kd").iterdir())


def test_read_mode_builds_no_shards(tmp_path: Path, weights: Path) -> None:
    experiment(tmp_path, weights, "kd")
    built = experiment(tmp_path, weights, "kd", {"teacher.cache.mode": "read"})
    with pytest.raises(CacheError, match=r"1 of 1 shards are not built, and teacher\.cache\.mode = 'read' builds none"):
        ready(built)
    assert of(built).folder.missing_shards() == [0]
    assert not list((tmp_path / "kd").glob("*.partial"))

"""What the loader that decodes with DALI leaves behind: nothing, however an iterator comes to its end."""

import gc
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.dali_images import RESIZED, make, spoilt, undecodable_jpeg
from support.generated_images import write_jpegs

pytest.importorskip("nvidia.dali")

from unikd_fast.data import dali
from unikd_fast.data.augmentation import view_parameters
from unikd_fast.data.dali import decoding_pipeline
from unikd_fast.data.dali_views import ImageFeed, decoded, windows_by
from unikd_fast.data.files import DecodeRequest
from unikd_fast.data.sets.image_folder import load_image_folder
from unikd_fast.data.splits import DataSplits, ImageFiles
from unikd_fast.data.views import Windows


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> DataSplits:
    return load_image_folder(write_jpegs(tmp_path_factory.mktemp("jpegs"), {"train": 48, "val": 8}), 64)


def test_a_failure_that_is_no_images_fault_passes(jpegs: DataSplits) -> None:
    assert isinstance(jpegs.train, ImageFiles)
    ids = np.arange(8)
    views = view_parameters(RESIZED, seed=0, epoch=0, sample_ids=ids)
    request = DecodeRequest(jpegs.train.images(ids), jpegs.train.labels[ids], ids, views)
    with ThreadPoolExecutor(1) as threads:
        feed = ImageFeed(iter([request]), windows_by(Windows(64, 73)), threads, ahead=1, for_pil=set())
        # DALI refuses batches that are larger than it was told; halves of this one it takes.
        made = decoded(
            feed, lambda source: decoding_pipeline(source, batch_size=7, threads=1, prefetch=1), encoded_only=True
        )
        with pytest.raises(RuntimeError, match="batch size"):
            list(made)


def tasks() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def settled(most: int) -> bool:
    """Whether there are at most so many threads; those that end need a moment to be gone."""
    for _ in range(100):
        if tasks() <= most:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def idle(jpegs: DataSplits) -> Iterator[int]:
    """Number of threads when no iterator is open; torch keeps those of its first use."""
    list(make(jpegs).train(0))
    gc.collect()
    time.sleep(0.5)
    gc.disable()  # what ends must end by itself
    yield tasks()
    gc.enable()


def test_iterators_leave_no_threads_however_they_end(jpegs: DataSplits, idle: int) -> None:
    one = make(jpegs, dali_threads=3)
    list(one.train(0))
    assert settled(idle)
    iterator = one.train(0)
    next(iterator)
    assert tasks() >= idle + 3
    iterator.close()  # type: ignore[attr-defined]
    assert settled(idle)
    iterator = one.train(1)
    next(iterator)
    del iterator
    assert settled(idle)
    one.train(1), one.evaluate("val")
    assert settled(idle)


def test_no_threads_are_left_by_an_error_that_is_held(jpegs: DataSplits, idle: int, tmp_path: Path) -> None:
    for content in (b"", undecodable_jpeg()):
        (tmp_path / str(len(content))).mkdir()
        data = spoilt(jpegs, tmp_path / str(len(content)), {"train": {20: content}})
        with pytest.raises(ValueError, match="cannot decode") as held:
            list(make(data).train(0))
        assert settled(idle)
        assert held.traceback
        # Raised where the batches are handed out, with the pipeline still at work.
        with pytest.raises(ValueError, match=r"data\.max_bad_share"):
            list(make(data, bad_images="skip").train(0))
        assert settled(idle)


def test_after_a_failure_of_dali_the_next_iterator_works(
    jpegs: DataSplits, idle: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline that takes smaller batches than it is given fails at its first, and is not waited for."""
    one = make(jpegs)
    expected = list(one.train(0))

    def too_small(source: Any, *, batch_size: int, **settings: int) -> Any:
        return decoding_pipeline(source, batch_size=batch_size - 1, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(dali, "decoding_pipeline", too_small)
        failing = one.train(0)
        with pytest.raises(RuntimeError, match="batch size"):
            next(failing)
    assert settled(idle)
    assert list(failing) == []
    for batch, other in zip(one.train(0), expected, strict=True):
        assert torch.equal(batch.images, other.images)

"""Reading outputs ahead of training."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from support.cache_inputs import SAMPLES, build_all, logits
from unikd_fast.errors import CacheError
from unikd_fast.teacher.cache.outputs import read_ahead

BATCHES = [np.array([4, 0, 9]), np.array([7]), np.array([1, 2]), np.array([3, 5, 6, 8])]


@pytest.mark.parametrize("ahead", [1, 2, 10])
@pytest.mark.parametrize("view", [0, 1])
def test_outputs_of_a_view_come_batch_by_batch(tmp_path: Path, ahead: int, view: int) -> None:
    folder = build_all(tmp_path / "cache")
    found = list(read_ahead(folder, BATCHES, view, ahead=ahead))
    assert len(found) == len(BATCHES)
    for positions, (values, gaussian) in zip(BATCHES, found, strict=True):
        assert isinstance(values, Tensor)
        assert gaussian is None
        assert torch.equal(values.float(), logits(positions + SAMPLES * view))


def test_read_ahead_stays_within_its_limit(tmp_path: Path) -> None:
    folder, taken = build_all(tmp_path / "cache"), []

    def positions() -> Iterator[np.ndarray]:
        for batch in BATCHES:
            taken.append(len(batch))
            yield batch

    reading = read_ahead(folder, positions(), 0, ahead=2)
    next(reading)
    assert len(taken) == 3
    reading.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("teacher-cache")]


def test_damage_is_raised_when_its_batch_is_due(tmp_path: Path) -> None:
    folder = build_all(tmp_path / "cache")
    last = max(folder.path.glob("shard-*.bin"))
    last.unlink()
    reading = read_ahead(folder, [np.arange(4), np.array([SAMPLES - 1])], view=1)
    next(reading)
    with pytest.raises(CacheError, match="is missing"):
        next(reading)

"""Runs whose caches have shards of a few records, and what may happen to a file of theirs."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from support.real_runs import (
    ALONE,
    opened,
)
from unikd_fast.engine.build import Experiment
from unikd_fast.engine.cache import ready_cache
from unikd_fast.engine.distributed import StopSignal
from unikd_fast.teacher.cache import CacheFolder
from unikd_fast.teacher.cache import files as layout

RECORDS = 20  # of a shard
SHARD_BYTES = RECORDS * 80  # header, logits and Gaussian of ten classes
# Batches that a shard holds whole, so that one that is built alone is built of the same.
FOUR: dict[str, Any] = {"cache": {"batch_size": 4}}


def ready(config: Path) -> Experiment:
    experiment = opened(config)
    ready_cache(experiment, StopSignal(ALONE), "test")
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


def flip(path: Path, at: int = -30) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 9)


def delete(path: Path) -> None:
    path.unlink()

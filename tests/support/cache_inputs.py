"""Small caches with known content."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unikd_fast.teacher.cache import CacheFolder, CacheKey, Codec

KEY = CacheKey({"teacher": {"weights": "sha256:1f0c", "precision": "fp16"}, "augmentation": {"crop": [224, 224]}})
CODEC = Codec("fp16", 10)
SAMPLES, VIEWS, PER_SHARD = 10, 2, 6
IDS = np.arange(SAMPLES) * 7 + 2**40  # beyond int32, and never a position
RECORDS, SHARDS = SAMPLES * VIEWS, 4  # of 6, 6, 6 and 2 records


def make(path: Path, *, key: CacheKey = KEY, codec: Codec = CODEC, views: int = VIEWS) -> CacheFolder:
    return CacheFolder.create_or_open(path, key, codec, IDS, views, PER_SHARD)


def logits(records: Iterable[int], build: int = 0) -> Tensor:
    """What the teacher says about records (N, 10); exact in fp16 below 128, and different in every build."""
    rows = torch.tensor(list(records), dtype=torch.float32)
    return rows[:, None] + torch.arange(10) / 16 + 64 * build


def payloads(records: Iterable[int], build: int = 0) -> NDArray[np.uint8]:
    return CODEC.encode(logits(records, build))


def build_shard(folder: CacheFolder, shard: int, build: int = 0) -> None:
    writer = folder.claim(shard)
    assert writer is not None
    with writer:
        writer.write(writer.todo, payloads(writer.todo, build))
        writer.commit()


def build_all(path: Path, build: int = 0) -> CacheFolder:
    folder = make(path)
    for shard in folder.missing_shards():
        build_shard(folder, shard, build)
    return folder


def decoded(folder: CacheFolder, records: Iterable[int]) -> Tensor:
    """Reads logits as fp32."""
    values, _ = folder.codec.decode(folder.read(list(records)))
    assert isinstance(values, Tensor)
    return values.float()

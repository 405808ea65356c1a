"""`unikd cache` in this process and in others, and small caches for it."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from support.ranks import Done, Ranks
from support.real_runs import call, write_config
from unikd_fast.cli import main
from unikd_fast.config import load_config
from unikd_fast.config.load import cache_dir
from unikd_fast.engine.build import build_experiment
from unikd_fast.engine.distributed import Processes
from unikd_fast.teacher.cache import CacheFolder

ALONE = Processes(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
PREFIT = {"method": "unikd", "teacher_head": "prefit", "head_steps": 3}
VIEWS, SAMPLES, PER_SHARD, SHARDS = 3, 96, 80, 4  # shards of 80, 80, 80 and 48 records


def command(*arguments: object) -> Done:
    """Run `unikd cache` in this process."""
    return call("cache", *arguments)


def start(folder: Path, *arguments: object, processes: int = 1) -> Ranks:
    """Start `unikd cache` in processes that can be killed; what they say is kept in ``folder``."""
    return Ranks(partial(main, ["cache", *map(str, arguments)]), folder, processes=processes)


def cached_config(folder: Path, *, distill: dict[str, Any] = PREFIT, **cache: Any) -> Path:
    """The tiny experiment, with its cache in ``folder / cache``; mode stays off."""
    return write_config(folder, distill=distill, teacher={"cache": {"dir": str(folder / "cache"), **cache}})


def make_folder(config: Path, records_per_shard: int) -> CacheFolder:
    """The folder of a configuration's cache with small shards, none of them built."""
    elsewhere = config.with_name("cache-that-only-knows-the-key")
    read = load_config(config, ["teacher.cache.mode=read_write", f"teacher.cache.dir={elsewhere}"])
    cache = build_experiment(read, ALONE).cache
    assert cache is not None
    found = cache.folder
    return CacheFolder.create_or_open(
        cache_dir(load_config(config)), found.key, found.codec, found.sample_ids, found.views, records_per_shard
    )


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """What tells whether a shard's file was touched: inode and time."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(folder.glob("shard-*"))}

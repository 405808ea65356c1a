"""Packing an image folder: shards by any number of processes, then the index, then the manifest."""

import io
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from hashlib import sha256
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from tqdm import tqdm

from unikd_fast.data.image_folder import load_image_folder
from unikd_fast.data.packed.disk import PackError, complete_or_absent, only_packer
from unikd_fast.data.packed.layout import (
    ARRAYS,
    MANIFEST,
    PACKING,
    SplitManifest,
    StoreManifest,
    array_name,
    read_manifest,
)
from unikd_fast.data.packed.plan import PackPlan, begun_mean_bytes, check_target, require_room, require_same_store
from unikd_fast.data.packed.records import PackSettings
from unikd_fast.data.packed.shard import FinishedShard, ShardJob, pack_shard, read_finished
from unikd_fast.data.splits import INDEX_DTYPE

_LOOK_S = 0.2


def pack_folder(
    source: Path, target: Path, settings: PackSettings, *, workers: int = 2, skip_bad: bool = False
) -> StoreManifest:
    """Pack an image folder; go on with a pack of the same images and settings that was interrupted.

    The store does not depend on the number of processes or on interruptions, byte for byte. A finished store is left
    as it is.

    Args:
        source: a folder as `load_image_folder` reads it; it must not change meanwhile.
        target: a new or empty folder, or one that was begun.
        settings: how images are packed.
        workers: processes; 0 packs in this one.
        skip_bad: leave out images that cannot be decoded; the manifest lists them.

    Raises:
        ValueError: the source is no image folder, the target holds something else, or an image cannot be read or
            decoded.
        PackError: the disk is or will be full, another process packs into the folder, or a packing process died.

    Example:
        >>> pack_folder(Path("/data/imagenet"), Path("/data/imagenet-256"), PackSettings("jpeg", size=256), workers=16)
    """
    if workers < 0:
        raise ValueError(f"pack_folder: workers must be at least 0, got {workers}")
    check_target(source, target)
    plan = PackPlan.of(load_image_folder(source, max(1, settings.size)), settings)
    packing = target / PACKING
    if not (target / MANIFEST).exists():
        packing.mkdir(parents=True, exist_ok=True)
        with only_packer(packing / "lock"):
            for left in packing.glob("*.tmp"):
                left.unlink()
            mean_bytes = begun_mean_bytes(target, plan)
            jobs = plan.jobs(mean_bytes)
            _make_shards(plan, jobs, mean_bytes, target, workers, skip_bad)
            _finish(plan, jobs, target)
    manifest = read_manifest(target)
    require_same_store(manifest, plan, target)
    # Nobody reads it beside a manifest: what cannot be removed does no harm.
    shutil.rmtree(packing, ignore_errors=True)
    return manifest


def _make_shards(
    plan: PackPlan, jobs: list[ShardJob], mean_bytes: int, target: Path, workers: int, skip_bad: bool
) -> None:
    missing = [job for job in jobs if read_finished(target, job) is None]
    require_room(target, missing, mean_bytes)
    total, left = (sum(len(job.paths) for job in some) for some in (jobs, missing))
    # disable=None: no bar where stderr is no terminal.
    with tqdm(total=total, initial=total - left, desc="pack", unit="image", smoothing=0.05, disable=None) as bar:
        if workers == 0:
            for job in missing:
                pack_shard(job, target, plan.settings, skip_bad=skip_bad, tick=bar.update)
        elif missing:
            _in_processes(missing, (target, plan.settings, skip_bad), min(workers, len(missing)), bar.update)


def _in_processes(jobs: list[ShardJob], arguments: tuple[Any, ...], workers: int, advance: Callable) -> None:
    # Each process comes from a server that has imported all this; a fork of this one would inherit its threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    packed, stop = context.Value("q", 0), context.Event()
    shown = 0
    with ProcessPoolExecutor(workers, context, _start_worker, (packed, stop)) as pool:
        try:
            pending = {pool.submit(_work, job, *arguments) for job in jobs}
            while pending:
                finished, pending = wait(pending, _LOOK_S, FIRST_EXCEPTION)
                for future in finished:
                    future.result()
                now = packed.value
                advance(now - shown)
                shown = now
        except BrokenProcessPool as error:
            raise PackError(
                "a packing process died; short of memory, use fewer workers; run the same again, finished shards are "
                "kept"
            ) from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


class _Stopped(Exception):
    """The pack ends early."""


_shared: dict[str, Any] = {}


def _start_worker(packed: Any, stop: Any) -> None:
    """In a packing process: leave Ctrl-C to the first process, and end with it, however it ends."""
    _shared.update(packed=packed, stop=stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    Thread(target=end_with_parent, daemon=True).start()


def _work(job: ShardJob, target: Path, settings: PackSettings, skip_bad: bool) -> None:
    def tick() -> None:
        with _shared["packed"].get_lock():
            _shared["packed"].value += 1
        if _shared["stop"].is_set():
            raise _Stopped

    pack_shard(job, target, settings, skip_bad=skip_bad, tick=tick)


def _finish(plan: PackPlan, jobs: list[ShardJob], target: Path) -> None:
    """Write the arrays, and then the manifest, by which a store is finished."""
    shards: dict[str, list[FinishedShard]] = {name: [] for name in plan.splits}
    for job in jobs:
        shard = read_finished(target, job)
        assert shard is not None, "every shard was made"
        shards[job.split].append(shard)
    splits = {name: _finish_split(plan, name, shards[name], target) for name in plan.splits}
    manifest = StoreManifest(plan.class_names, plan.settings.record, splits)
    _write(target, MANIFEST, manifest.to_json())


def _finish_split(plan: PackPlan, name: str, shards: list[FinishedShard], target: Path) -> SplitManifest:
    split, count = plan.splits[name], sum(len(shard.records) for shard in shards)
    skipped = [(split.paths[i], reason) for shard in shards for i, reason in shard.skipped]
    if count == 0:
        raise ValueError(
            f"pack: none of the {len(split)} images of {name} can be decoded, the first is {skipped[0][0]}: "
            f"{skipped[0][1]}; repair them"
        )
    index, ids = np.zeros(count, INDEX_DTYPE), np.zeros(count, np.int64)
    row = 0
    for number, shard in enumerate(shards):
        offset = 0
        for sample_id, length, crc, height, width in shard.records:
            index[row] = (offset, length, crc, number, height, width)
            ids[row] = sample_id
            row, offset = row + 1, offset + length
    arrays = {"index": index, "labels": split.labels[ids], "ids": ids}
    hashes = {array: _write_array(target, array_name(name, array), arrays[array]) for array in ARRAYS}
    return SplitManifest(
        count=count,
        source_count=len(split),
        source_hash=plan.hashes[name],
        shard_bytes=tuple(shard.total_bytes for shard in shards),
        array_hashes=hashes,
        # The class folder and the file's name, as there is nothing between them.
        skipped=tuple(("/".join(path.rsplit("/", 2)[1:]), reason) for path, reason in skipped),
    )


def _write_array(target: Path, name: str, array: np.ndarray) -> str:
    content = io.BytesIO()
    np.save(content, array)
    _write(target, name, content.getvalue())
    return sha256(content.getvalue()).hexdigest()


def _write(target: Path, name: str, content: bytes) -> None:
    with complete_or_absent(target / name, target / PACKING) as path:
        path.write_bytes(content)

"""Building and reading shards in one process."""

import fcntl
import json
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.cache_inputs import (
    CODEC,
    IDS,
    KEY,
    RECORDS,
    SAMPLES,
    SHARDS,
    VIEWS,
    build_all,
    build_shard,
    decoded,
    logits,
    make,
    payloads,
)
from unikd_fast.errors import CacheError
from unikd_fast.teacher.cache import CacheFolder, Codec
from unikd_fast.teacher.cache.files import default_records_per_shard
from unikd_fast.values import QuantizedLogits


def test_records_are_read_in_any_order_and_repeatedly(tmp_path: Path) -> None:
    folder = build_all(tmp_path / "cache")
    assert folder.missing_shards() == []
    records = [19, 0, 5, 6, 0, 12, 11, 18]
    assert torch.equal(decoded(folder, records), logits(records))
    assert torch.equal(decoded(CacheFolder.open(tmp_path / "cache"), range(RECORDS)), logits(range(RECORDS)))
    assert folder.read([]).shape == (0, CODEC.record_bytes)
    assert folder.verify().ok


def test_record_indices(tmp_path: Path) -> None:
    folder = make(tmp_path)
    assert folder.records([3, 0], view=1).tolist() == [13, 10]
    assert folder.samples == SAMPLES and folder.views == VIEWS and folder.sample_ids.tolist() == IDS.tolist()
    with pytest.raises(ValueError, match=r"positions must lie in \[0, 10\), got 3 to 10; .* not sample ids"):
        folder.records([3, 10], view=0)
    with pytest.raises(ValueError, match=r"view must lie in \[0, 2\), got 2"):
        folder.records([3], view=2)
    with pytest.raises(ValueError, match=r"records must lie in \[0, 20\) \(2 views of 10 samples\), got 0 to 20"):
        folder.read([0, 20])


def test_covers_only_finished_shards(tmp_path: Path) -> None:
    folder = make(tmp_path)
    build_shard(folder, 1)
    assert folder.missing_shards() == [0, 2, 3]
    assert folder.covers([6, 11]) and folder.covers([])
    assert not folder.covers([6, 12]) and not folder.covers([0])
    with pytest.raises(
        CacheError, match=rf"shard-00002\.bin is missing: record 12 \(sample id {IDS[2]}, view 1\) was n"
    ):
        folder.read([6, 12])
    info = folder.info()
    size = CODEC.record_bytes + 16
    assert info == (6 * size, 20 * size, SAMPLES, VIEWS, RECORDS, SHARDS, 1, KEY.fields)
    on_disk = sum(path.stat().st_size for path in tmp_path.glob("shard-*.bin"))
    assert on_disk == info.bytes_done


def test_a_shard_is_about_64_mib_by_default(tmp_path: Path) -> None:
    assert default_records_per_shard(2000) * (2000 + 16) == pytest.approx(2**26, rel=1e-3)
    assert default_records_per_shard(2**30) == 1
    folder = CacheFolder.create_or_open(tmp_path, KEY, CODEC, IDS, VIEWS)
    assert json.loads((tmp_path / "manifest.json").read_text())["records_per_shard"] == 2**26 // (24 + 16)
    assert folder.missing_shards() == [0]


def test_records_may_be_written_in_any_order_and_pieces(tmp_path: Path) -> None:
    folder = make(tmp_path)
    with folder.claim(0) as writer:  # type: ignore[union-attr]
        assert writer.todo.tolist() == [0, 1, 2, 3, 4, 5]
        writer.write([4, 1, 0], payloads([4, 1, 0]))
        writer.write([], payloads([]))
        assert writer.todo.tolist() == [2, 3, 5]
        with pytest.raises(
            ValueError, match=r"shard 0 lacks 3 of 6 records, the first is record 2 \(sample id .* first"
        ):
            writer.commit()
        with pytest.raises(ValueError, match="record 4 is already written"):
            writer.write([5, 4], payloads([5, 4]))
        with pytest.raises(ValueError, match="record 3 is already written"):
            writer.write([3, 3], payloads([3, 3]))
        with pytest.raises(ValueError, match=r"shard 0 holds records \[0, 6\), got 6"):
            writer.write([5, 6], payloads([5, 6]))
        with pytest.raises(ValueError, match=r"payloads must be \(1, 24\) uint8, got \(1, 25\) uint8"):
            writer.write([5], np.zeros((1, 25), np.uint8))
        assert writer.todo.tolist() == [2, 3, 5], "a refused call writes nothing"
        writer.write([5, 2, 3], payloads([5, 2, 3]))
        writer.commit()
        with pytest.raises(ValueError, match="claim on shard 0 was released"):
            writer.write([5], payloads([5]))
    assert torch.equal(decoded(folder, range(6)), logits(range(6)))
    assert folder.claim(0) is None


def test_an_abandoned_build_resumes(tmp_path: Path) -> None:
    folder = make(tmp_path)
    with folder.claim(1) as writer:  # type: ignore[union-attr]
        writer.write([7, 9], payloads([7, 9]))
    partial = tmp_path / "shard-00001.partial"
    assert partial.stat().st_size == 6 * 40, "its room is taken from the start"
    # A record torn in the middle, as a killed write leaves it: the first half new, the rest as it was.
    content = bytearray(partial.read_bytes())
    torn = content[40:80]  # record 7
    torn[30:] = bytes(10)
    content[80:120] = torn  # in the place of record 8
    partial.write_bytes(content[:200])  # and the end of the file lost
    with make(tmp_path).claim(1) as writer:  # type: ignore[union-attr]
        assert writer.todo.tolist() == [6, 8, 10, 11]
        writer.write(writer.todo, payloads(writer.todo, build=1))
        writer.commit()
    assert torch.equal(decoded(folder, [7, 9]), logits([7, 9])), "not written again"
    assert torch.equal(decoded(folder, [6, 8, 10, 11]), logits([6, 8, 10, 11], build=1))
    assert folder.verify().shards[1].status == "ok"


def test_an_overlong_partial_is_truncated(tmp_path: Path) -> None:
    folder = make(tmp_path)
    (tmp_path / "shard-00003.partial").write_bytes(bytes(1000))
    build_shard(folder, 3)
    assert (tmp_path / "shard-00003.bin").stat().st_size == 2 * 40


def test_a_claim_is_exclusive(tmp_path: Path) -> None:
    folder, other = make(tmp_path), make(tmp_path)
    writers = [folder.claim_any(wait=False) for _ in range(SHARDS)]
    assert [writer.shard for writer in writers if writer is not None] == [0, 1, 2, 3]
    assert other.claim(2) is None
    with pytest.raises(CacheError, match=r"other processes are building the last 4 of 4 shards \(the first is 0\)"):
        other.claim_any(wait=False)
    with pytest.raises(CacheError, match=r"shard-00002\.partial is being built by another process; wait"):
        other.discard(2)
    taken = writers[2]
    assert taken is not None
    copy = os.dup(taken._descriptor)  # type: ignore[arg-type]  # as a forked loader process holds one
    taken.close()
    taken.close()
    again = other.claim_any(wait=False)
    assert again is not None and again.shard == 2
    os.close(copy)
    for writer in (*writers, again):
        if writer is not None:
            writer.close()


def test_a_waiter_gets_the_shard_when_it_is_released(tmp_path: Path) -> None:
    folder = make(tmp_path)
    for shard in range(SHARDS - 1):
        build_shard(folder, shard)
    holder = folder.claim(3)
    assert holder is not None
    holder.write([18], payloads([18]))
    got: list[Any] = []
    waiting = threading.Thread(target=lambda: got.append(make(tmp_path).claim_any(wait=True)))
    waiting.start()
    holder.close()
    waiting.join(60)
    assert got[0].shard == 3 and got[0].todo.tolist() == [19]
    got[0].close()


def test_a_waiter_returns_when_everything_is_built(tmp_path: Path) -> None:
    folder = make(tmp_path)
    for shard in range(SHARDS - 1):
        build_shard(folder, shard)
    holder = folder.claim(3)
    assert holder is not None
    got: list[Any] = []
    waiting = threading.Thread(target=lambda: got.append(make(tmp_path).claim_any(wait=True)))
    waiting.start()
    holder.write([18, 19], payloads([18, 19]))
    holder.commit()
    waiting.join(60)
    assert got == [None]
    assert list(tmp_path.glob("*.partial")) == []


def test_a_shard_committed_between_open_and_lock_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path)
    holder = folder.claim(0)
    assert holder is not None
    holder.write(holder.todo, payloads(holder.todo))
    lock = fcntl.flock

    def commit_first(descriptor: int, how: int) -> None:
        monkeypatch.setattr("fcntl.flock", lock)
        holder.commit()
        lock(descriptor, how)

    monkeypatch.setattr("fcntl.flock", commit_first)
    assert make(tmp_path).claim(0) is None
    assert torch.equal(decoded(folder, range(6)), logits(range(6)))
    assert list(tmp_path.glob("*.partial")) == []


def test_reading_more_shards_than_stay_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unikd_fast.teacher.cache.shard._MAPPED_SHARDS", 2)
    folder = build_all(tmp_path)
    generator = np.random.default_rng(0)
    for _ in range(5):
        records = generator.integers(0, RECORDS, 50)
        assert torch.equal(decoded(folder, records), logits(records))
    assert len(folder._reader._mappings) == 2


def test_threads_read_concurrently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unikd_fast.teacher.cache.shard._MAPPED_SHARDS", 1)
    folder = build_all(tmp_path)
    wrong: list[int] = []

    def read(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(50):
            records = generator.integers(0, RECORDS, 8)
            if not torch.equal(decoded(folder, records), logits(records)):
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_folder_is_pickled_by_its_path(tmp_path: Path) -> None:
    folder = build_all(tmp_path)
    folder.read([0])
    assert torch.equal(decoded(pickle.loads(pickle.dumps(folder)), [3]), logits([3]))


def test_large_shards_of_imagenet_21k_logits(tmp_path: Path) -> None:
    codec = Codec("uint8", 21841)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300, 21841, generator=generator)
    folder = CacheFolder.create_or_open(tmp_path, KEY, codec, np.arange(100), 3, 128)
    while (writer := folder.claim_any(wait=False)) is not None:
        with writer:
            for records in np.array_split(writer.todo, 3):
                writer.write(records, codec.encode(values[records]))
            writer.commit()
    order = torch.randperm(300, generator=generator)
    found, _ = codec.decode(folder.read(order.numpy()))
    assert isinstance(found, QuantizedLogits)
    stored = found.values.float() * found.scale[:, None] + found.offset[:, None]
    assert (stored - values[order]).abs().max() <= found.scale.max() * 0.501


def test_thousands_of_records_at_once(tmp_path: Path) -> None:
    codec = Codec("fp16", 1000)
    folder = CacheFolder.create_or_open(tmp_path, KEY, codec, np.arange(8000), 1)
    values = torch.arange(8000)[:, None] * torch.ones(1000, dtype=torch.float16)
    with folder.claim(0) as writer:  # type: ignore[union-attr]
        writer.write(writer.todo, codec.encode(values))
        writer.commit()
    records = np.random.default_rng(0).permutation(8000)
    found, _ = codec.decode(folder.read(records))
    assert isinstance(found, torch.Tensor) and torch.equal(found, values[torch.from_numpy(records)])

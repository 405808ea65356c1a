"""Files that were damaged, cut or removed: never a wrong value, always the file, the record and the remedy."""

import hashlib
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.cache_inputs import (
    CODEC,
    IDS,
    KEY,
    RECORDS,
    SHARDS,
    VIEWS,
    build_all,
    build_shard,
    decoded,
    logits,
    make,
    payloads,
)
from support.forged_json import places
from support.kills import killed_at_each_operation
from unikd_fast.errors import CacheError
from unikd_fast.teacher.cache import CacheFolder, CacheKey, Codec
from unikd_fast.teacher.cache.manifest import MANIFEST

SIZE = CODEC.record_bytes + 16
SHARD_1 = "shard-00001.bin"


def flip(path: Path, byte: int, bits: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= bits
    path.write_bytes(content)


@given(st.integers(0, 6 * SIZE - 1), st.integers(1, 255))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_byte_costs_only_its_record(tmp_path: Path, byte: int, bits: int) -> None:
    folder = build_all(tmp_path)
    bad = 6 + byte // SIZE
    flip(tmp_path / SHARD_1, byte, bits)
    try:
        others = [record for record in range(RECORDS) if record != bad]
        assert torch.equal(decoded(folder, others), logits(others))
        with pytest.raises(CacheError) as caught:
            folder.read([0, bad, 1])
        message = str(caught.value)
        view, position = divmod(bad, len(IDS))
        assert message.startswith(
            f"{tmp_path / SHARD_1}: record {bad} (sample id {IDS[position]}, view {view}) is not "
        )
        assert message.endswith("delete this file and build the cache again, only this shard is redone")
        check = folder.verify()
        assert not check.ok
        assert [shard.status for shard in check.shards] == ["ok", "bad records", "ok", "ok"]
        assert check.shards[1].bad_records == (bad,)
    finally:
        flip(tmp_path / SHARD_1, byte, bits)
    assert folder.verify().ok


@pytest.mark.parametrize("length", [0, 1, SIZE, 6 * SIZE - 1])
@pytest.mark.parametrize("mapped", [False, True], ids=["not yet mapped", "mapped"])
def test_a_truncated_shard(tmp_path: Path, length: int, mapped: bool) -> None:
    """Reading a map beyond the end of its file would kill the process."""
    folder = build_all(tmp_path)
    if mapped:
        folder.read([6])
    os.truncate(tmp_path / SHARD_1, length)
    with pytest.raises(
        CacheError, match=rf"{SHARD_1} has {length} bytes but must have {6 * SIZE}: record 11 .*delete th"
    ):
        folder.read([11])
    assert folder.verify().shards[1].status == "truncated"
    assert torch.equal(decoded(folder, [0, 19]), logits([0, 19]))


def test_an_overlong_shard(tmp_path: Path) -> None:
    folder = build_all(tmp_path)
    os.truncate(tmp_path / SHARD_1, 6 * SIZE + 1)
    with pytest.raises(CacheError, match=rf"{SHARD_1} has 241 bytes but must have 240"):
        folder.read([6])
    assert folder.verify().shards[1].status == "too long"


@pytest.mark.parametrize("mapped", [False, True], ids=["not yet mapped", "mapped"])
def test_only_a_deleted_shard_is_named_and_rebuilt(tmp_path: Path, mapped: bool) -> None:
    folder = build_all(tmp_path)
    if mapped:
        folder.read([6])
    (tmp_path / SHARD_1).unlink()
    assert not folder.covers([6])
    with pytest.raises(
        CacheError, match=rf"{SHARD_1} is missing: record 6 .* or the file was deleted; build the cache"
    ):
        folder.read([0, 6])
    assert folder.missing_shards() == [1]
    build_shard(folder, 1, build=1)
    assert torch.equal(decoded(folder, range(6, 12)), logits(range(6, 12), build=1))


def test_only_the_discarded_shard_is_rebuilt(tmp_path: Path) -> None:
    folder = build_all(tmp_path)
    folder.read(range(RECORDS))
    others = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.bin") if path.name != SHARD_1}
    flip(tmp_path / SHARD_1, 100)
    folder.discard(1)
    assert not list(tmp_path.glob("shard-00001.*"))
    build_shard(folder, 1, build=1)
    assert torch.equal(decoded(folder, [6, 5]), torch.cat([logits([6], build=1), logits([5])])), "and read anew"
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in others} == others
    assert folder.verify().ok


def test_partial_and_missing_shards_can_be_discarded(tmp_path: Path) -> None:
    folder = make(tmp_path)
    with folder.claim(0) as writer:  # type: ignore[union-attr]
        writer.write([2], CODEC.encode(logits([2])))
    folder.discard(0)
    folder.discard(1)
    with folder.claim(0) as writer:  # type: ignore[union-attr]
        assert len(writer.todo) == 6
    with pytest.raises(ValueError, match=r"shard must lie in \[0, 4\), got 4"):
        folder.discard(4)


def test_a_shard_renamed_to_another_is_refused(tmp_path: Path) -> None:
    folder = build_all(tmp_path)
    shutil.copy(tmp_path / SHARD_1, tmp_path / "shard-00000.bin")
    with pytest.raises(
        CacheError, match=rf"record 3 .* it holds sample id {IDS[9]}, view 0: the file is another shard"
    ):
        folder.read([3])
    assert folder.verify().shards[0].bad_records == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("other", ["key", "codec"])
def test_a_shard_of_another_cache_is_refused(tmp_path: Path, other: str) -> None:
    """Of the same samples and the same size, so that only its content could tell."""
    folder = build_all(tmp_path / "cache")
    key = CacheKey({"teacher": "another"}) if other == "key" else KEY
    codec = Codec("fp16", 12) if other == "codec" else CODEC
    assert codec.record_bytes == CODEC.record_bytes
    stranger = CacheFolder.create_or_open(tmp_path / "other", key, codec, IDS, VIEWS, 6)
    with stranger.claim(1) as writer:  # type: ignore[union-attr]
        writer.write(writer.todo, np.zeros((6, codec.record_bytes), np.uint8))
        writer.commit()
    shutil.copy(stranger.path / SHARD_1, folder.path / SHARD_1)
    with pytest.raises(
        CacheError, match=r"its checksum is \w{8} but its bytes give \w{8}: damaged, or of another cache"
    ):
        folder.read([6])


def test_verify_reports_remedies_and_progress(tmp_path: Path) -> None:
    folder = build_all(tmp_path)
    flip(tmp_path / "shard-00000.bin", 3 * SIZE + 20)
    flip(tmp_path / "shard-00000.bin", 5 * SIZE + 20)
    os.truncate(tmp_path / SHARD_1, 7)
    (tmp_path / "shard-00003.bin").unlink()
    seen: list[tuple[int, int]] = []
    check = folder.verify(lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert str(check).splitlines() == [
        "1 of 4 shards are ok",
        "shard 0: bad records, 2 of them, the first is 3; discard this shard and build again",
        "shard 1: truncated; discard this shard and build again",
        "shard 3: missing; build again",
    ]
    for shard in check.faulty:
        folder.discard(shard.shard)
        build_shard(folder, shard.shard)
    assert folder.verify().ok and len(folder.verify().shards) == SHARDS


def test_malformed_manifests_raise_errors_that_name_them(tmp_path: Path) -> None:
    """The checksum fits, the content is odd: refused by name, or opened and then read like any other cache."""
    build_all(tmp_path)
    pristine = (tmp_path / MANIFEST).read_text()
    refused = tried = 0
    for way, odd in itertools.product(
        places(json.loads(pristine)), (None, -1, 0.5, 2**70, "", "../x", [], {}, True, float("nan"))
    ):
        content = json.loads(pristine)
        del content["sha256"]
        inner = content
        for key in way[:-1]:
            inner = inner[key]
        inner[way[-1]] = odd
        digest = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        (tmp_path / MANIFEST).write_text(json.dumps({**content, "sha256": digest}))
        tried += 1
        try:
            CacheFolder.open(tmp_path).read([0])
        except CacheError as error:
            assert str(tmp_path) in str(error)
            refused += 1
    assert tried > 100 and refused > 0.9 * tried


@pytest.mark.parametrize("begun", [False, True], ids=["anew", "over a begun one"])
@pytest.mark.long
def test_a_build_killed_at_any_operation_resumes(tmp_path: Path, begun: bool) -> None:
    """What is there never shows a wrong value, and the same build again completes it and leaves nothing beside."""
    path, kills = tmp_path / "cache", 0

    def before() -> None:
        shutil.rmtree(path, ignore_errors=True)
        if begun:
            with make(path).claim(1) as writer:  # type: ignore[union-attr]
                writer.write([6, 8], payloads([6, 8]))

    for number in killed_at_each_operation(lambda: build_all(path), path, before):
        copy = tmp_path / f"copy-{number}"
        if path.exists():
            shutil.copytree(path, copy)
            if (path / MANIFEST).exists():
                folder = CacheFolder.open(path)
                whole = [record for record in range(RECORDS) if folder.covers([record])]
                assert torch.equal(decoded(folder, whole), logits(whole))
        folder = build_all(copy)
        assert folder.verify().ok
        assert torch.equal(decoded(folder, range(RECORDS)), logits(range(RECORDS)))
        assert {entry.name for entry in copy.iterdir()} == {
            *(MANIFEST, "sample_ids.npy", "create.lock"),
            *(f"shard-{shard:05}.bin" for shard in range(SHARDS)),
        }
        shutil.rmtree(copy)
        kills = number
    assert kills > 10

"""What a folder says it is, and what it is compared with when it is opened."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.cache_inputs import (
    CODEC,
    IDS,
    KEY,
    PER_SHARD,
    RECORDS,
    VIEWS,
    build_all,
    build_shard,
    decoded,
    logits,
    make,
    payloads,
)
from unikd_fast.errors import CacheError
from unikd_fast.teacher.cache import CacheFolder, CacheKey, Codec


def test_every_difference_to_the_manifest_is_named(tmp_path: Path) -> None:
    build_all(tmp_path)
    fields = KEY.fields
    fields["augmentation"]["crop"] = [192, 192]
    ids = IDS.copy()
    ids[4:6] += 1
    with pytest.raises(CacheError) as caught:
        CacheFolder.create_or_open(tmp_path, CacheKey(fields), Codec("uint8", 10), ids, 3)
    assert str(caught.value).splitlines() == [
        f"the cache in {tmp_path} was built from something else:",
        "  augmentation.crop: [224,224] in the cache, [192,192] now",
        '  codec.kind: "fp16" in the cache, "uint8" now',
        "  views: 2 in the cache, 3 now",
        f"  sample ids: 2 of 10 positions, the first is 4: {IDS[4]} in the cache, {IDS[4] + 1} now",
        "build into another folder or delete this one",
    ]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"key": CacheKey({**KEY.fields, "temperature": 4})}, "temperature: absent in the cache, 4 now"),
        ({"codec": Codec("fp16", 10, gaussian=True)}, r"codec\.gaussian: false in the cache, true now"),
        ({"views": 3}, "views: 2 in the cache, 3 now"),
        ({"sample_ids": IDS[:7]}, "samples: 10 in the cache, 7 now"),
        ({"sample_ids": IDS[::-1]}, "sample ids: 10 of 10 positions, the first is 0"),
    ],
    ids=["key", "codec", "more views", "fewer samples", "another order"],
)
def test_a_mismatch_is_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    make(tmp_path)
    asked: dict[str, Any] = {"key": KEY, "codec": CODEC, "sample_ids": IDS, "views": VIEWS}
    with pytest.raises(CacheError, match=named):
        CacheFolder.create_or_open(tmp_path, **{**asked, **change})
    make(tmp_path)


def test_a_folder_with_more_views_is_accepted(tmp_path: Path) -> None:
    build_all(tmp_path)
    folder = CacheFolder.create_or_open(tmp_path, KEY, CODEC, IDS, VIEWS - 1)
    assert (folder.views, folder.missing_shards()) == (VIEWS, [])
    assert torch.equal(decoded(folder, range(RECORDS)), logits(range(RECORDS)))
    with pytest.raises(CacheError) as caught:  # and it hides no other difference
        CacheFolder.create_or_open(tmp_path, KEY, Codec("uint8", 10), IDS, VIEWS - 1)
    assert [line for line in str(caught.value).splitlines() if " in the cache, " in line] == [
        '  codec.kind: "fp16" in the cache, "uint8" now'
    ]


def test_first_views_need_shards_up_to_their_last_record(tmp_path: Path) -> None:
    """View 0 is records 0 to 9, shards have 6: two shards, and the second has the first of view 1 too."""
    folder = make(tmp_path)
    size = 16 + 24  # of the header, and of ten logits filled up to a multiple of eight bytes
    assert [folder.missing_shards(views) for views in (1, 2, 3, None)] == [[0, 1], *[[0, 1, 2, 3]] * 3]
    assert [folder.missing_bytes(views) for views in (1, 2, 3, None)] == [12 * size, *[20 * size] * 3]
    build_shard(folder, 2)
    assert (folder.missing_shards(1), folder.missing_shards()) == ([0, 1], [0, 1, 3])
    assert (folder.missing_bytes(1), folder.missing_bytes()) == (12 * size, 14 * size)
    build_shard(folder, 0)
    assert (folder.missing_shards(1), folder.missing_bytes(1)) == ([1], 6 * size)
    build_shard(folder, 1)
    assert (folder.missing_shards(1), folder.missing_bytes(1)) == ([], 0)
    assert (folder.missing_shards(2), folder.missing_bytes(2)) == ([3], 2 * size)
    assert torch.equal(decoded(folder, folder.records(range(10), 0)), logits(range(10)))


def test_views_that_end_with_a_shard_do_not_need_the_next(tmp_path: Path) -> None:
    folder = CacheFolder.create_or_open(tmp_path, KEY, CODEC, IDS, 3, 5)
    assert [folder.missing_shards(views) for views in (1, 2, 3)] == [[0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]


def test_claims_for_the_first_views_stop_after_them(tmp_path: Path) -> None:
    folder = make(tmp_path)
    claimed = []
    while (writer := folder.claim_any(wait=True, views=1)) is not None:
        with writer:
            claimed.append(writer.shard)
            writer.write(writer.todo, payloads(writer.todo))
            writer.commit()
    assert (claimed, folder.missing_shards()) == ([0, 1], [2, 3])
    assert not list(tmp_path.glob("*.partial"))


def test_shards_of_other_views_are_not_waited_for(tmp_path: Path) -> None:
    folder = make(tmp_path)
    with folder.claim(2), folder.claim(3):  # type: ignore[union-attr]
        for shard in (0, 1):
            build_shard(folder, shard)
        assert folder.claim_any(wait=True, views=1) is None
        with pytest.raises(CacheError, match=r"building the last 2 of 4 shards \(the first is 2\)"):
            folder.claim_any(wait=False)


def test_another_shard_size_is_accepted(tmp_path: Path) -> None:
    build_all(tmp_path)
    folder = CacheFolder.create_or_open(tmp_path, KEY, CODEC, IDS, VIEWS, PER_SHARD + 1)
    assert torch.equal(decoded(folder, range(RECORDS)), logits(range(RECORDS)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((IDS, 0, 6), r"views must lie in \[1, 2147483647\], got 0"),
        ((IDS, 2**31, 6), r"views must lie in .* got 2147483648; views are int32"),
        ((IDS, 1, 0), r"records_per_shard must lie in \[1, 2\^63\), got 0"),
        (([], 1, 6), r"sample_ids must be a vector of one or more int64, got shape \(0,\)"),
        ((IDS.astype(np.float32), 1, 6), "of float32"),
        ((np.array([2**63], np.uint64), 1, 6), "of uint64"),
    ],
)
def test_invalid_numbers_are_refused_before_writing(tmp_path: Path, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CacheFolder.create_or_open(tmp_path / "cache", KEY, CODEC, *arguments)
    assert not (tmp_path / "cache").exists()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("…")
    with pytest.raises(CacheError, match=r"holds thesis\.tex \(1 such in all\) but no manifest\.json"):
        make(tmp_path)
    with pytest.raises(CacheError, match=r"is not a cache, manifest\.json is missing"):
        CacheFolder.open(tmp_path)
    assert make(tmp_path / "another").missing_shards() == [0, 1, 2, 3]


def test_a_killed_creation_is_repeated(tmp_path: Path) -> None:
    left = [f".{name}.0123456789abcdef.tmp" for name in ("sample_ids.npy", "manifest.json")]
    for name in ("create.lock", "sample_ids.npy", *left):
        (tmp_path / name).write_bytes(b"half")
    assert torch.equal(decoded(build_all(tmp_path), [7]), logits([7]))
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"], ids=["empty", "cut", "list", "bytes"])
def test_a_file_that_is_not_a_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    make(tmp_path)
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(CacheError, match=r"manifest\.json (is damaged|has format None, but this version reads 1)"):
        CacheFolder.open(tmp_path)


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / "manifest.json"
    text = path.read_text()
    for old, new in (('"views": 2', '"views": 3'), ("sha256:1f0c", "sha256:2f0c"), ("224", "225")):
        assert old in text
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(CacheError, match=r"is damaged or was edited: its checksum is \w{64} but .* delete"):
            make(tmp_path)
    path.write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(CacheError, match="has format 2, but this version reads 1; build into another folder"):
        make(tmp_path)
    path.write_text(json.dumps(json.loads(text), sort_keys=True))
    assert make(tmp_path).key.digest == KEY.digest == json.loads(text)["key_digest"]


def test_sample_ids_are_checked_against_the_manifest(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / "sample_ids.npy"
    content = path.read_bytes()
    for damaged in (content[:-8] + bytes(8), content[:-3], content[:20], b""):
        path.write_bytes(damaged)
        with pytest.raises(CacheError, match=r"sample_ids\.npy is damaged.*; restore it, or delete .* build the cache"):
            CacheFolder.open(tmp_path)
    path.unlink()
    with pytest.raises(CacheError, match=r"sample_ids\.npy is missing; restore it"):
        CacheFolder.open(tmp_path)
    path.write_bytes(content)
    assert CacheFolder.open(tmp_path).sample_ids.tolist() == IDS.tolist()

"""What belongs to all records of a cache: it comes back as it was, is written once, and damage to it is found."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from support.cache_inputs import CODEC, IDS, SHARDS, VIEWS, build_all, build_shard, make, payloads
from support.ranks import Program
from unikd_fast.errors import CacheError
from unikd_fast.teacher.cache import Attachment, CacheFolder, CacheKey
from unikd_fast.teacher.cache import folder as shards

NAME = "teacher.safetensors"
TENSORS = {
    "fusion.weight": torch.arange(12.0).reshape(3, 4).t(),  # not contiguous
    "norm.weight": torch.nn.Parameter(torch.tensor([1.0, -0.0], dtype=torch.bfloat16)),
    "norm.count": torch.tensor(7),
    "mask": torch.tensor([True, False]),
    "empty": torch.empty(0, 4),
}
RECORD = {"precision": "bf16", "fidelity": {"error": 0.001, "images": None}, "levels": ["a", "ü"], "folded": 9}


def same(found: Attachment | None, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> bool:
    return (
        found is not None
        and found.record == record
        and found.tensors.keys() == tensors.keys()
        and all(t.dtype == tensors[n].dtype and torch.equal(t, tensors[n]) for n, t in found.tensors.items())
    )


def claim_and_leave(folder: CacheFolder, shard: int) -> None:
    writer = folder.claim(shard)
    assert writer is not None
    writer.close()


def test_tensors_and_record_round_trip(tmp_path: Path) -> None:
    folder = make(tmp_path)
    assert folder.attachment() is None
    attached = folder.attach(TENSORS, RECORD)
    assert same(attached, TENSORS, RECORD)
    assert same(CacheFolder.open(tmp_path).attachment(), TENSORS, RECORD)
    assert str(attached.tensors["norm.weight"].float().tolist()) == "[1.0, -0.0]"
    assert not any(tensor.requires_grad for tensor in attached.tensors.values())
    assert (folder.missing_shards(), folder.info().bytes_done) == (list(range(SHARDS)), 0), "it is no shard"


def test_the_attachment_read_is_a_copy(tmp_path: Path) -> None:
    head, record = torch.zeros(3), {"precision": "bf16"}
    folder = make(tmp_path)
    attached = folder.attach({"head": head, "tied": head}, record)
    head += 1
    record["precision"] = "fp32"
    for found in (attached, folder.attachment()):
        assert same(found, {"head": torch.zeros(3), "tied": torch.zeros(3)}, {"precision": "bf16"})


def test_a_cache_without_a_head_has_only_a_record(tmp_path: Path) -> None:
    folder = make(tmp_path)
    assert same(folder.attach({}, RECORD), {}, RECORD)
    assert same(folder.attachment(), {}, RECORD)


def test_the_first_writer_wins(tmp_path: Path) -> None:
    make(tmp_path).attach({"head": torch.tensor([1.0])}, {"by": 1})
    content = (tmp_path / NAME).read_bytes()
    second = make(tmp_path).attach({"another": torch.tensor([2.0])}, {"by": 2})
    assert same(second, {"head": torch.tensor([1.0])}, {"by": 1})
    assert (tmp_path / NAME).read_bytes() == content


def test_threads_that_attach_at_once_agree(tmp_path: Path) -> None:
    ready = threading.Barrier(8)
    found: dict[int, Attachment] = {}

    def attach(number: int) -> None:
        folder = make(tmp_path)
        ready.wait()
        found[number] = folder.attach({"head": torch.full((1000,), float(number))}, {"by": number})

    threads = [threading.Thread(target=attach, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winner = found[0].record["by"]
    assert len(found) == 8
    assert all(same(each, {"head": torch.full((1000,), float(winner))}, {"by": winner}) for each in found.values())


@pytest.mark.slow
def test_processes_that_attach_at_once_agree(tmp_path: Path) -> None:
    program = """
import torch
from support.cache_inputs import make
folder = make(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
found = folder.attach({"head": torch.full((1000,), 1.0)}, {"by": 1})
print(found.record["by"], found.tensors["head"].unique().tolist())
"""
    folder = make(tmp_path)
    other = Program(program, tmp_path)
    assert other.stdout.readline() == "ready\n"
    other.tell("go")
    found = folder.attach({"head": torch.full((1000,), 0.0)}, {"by": 0})
    winner = found.record["by"]
    assert same(found, {"head": torch.full((1000,), float(winner))}, {"by": winner})
    assert other.ended() == f"{winner} [{float(winner)}]\n"


def test_a_writer_stopped_before_the_rename_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(old: Path, new: Path) -> None:
        raise KeyboardInterrupt

    folder = make(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", stop)
        folder.attach({"head": torch.ones(1000)}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["create.lock", "manifest.json", "sample_ids.npy"]
    assert folder.attachment() is None
    assert same(folder.attach(TENSORS, RECORD), TENSORS, RECORD)


@pytest.mark.parametrize("left", [b"", b"half", bytes(100_000)], ids=["empty", "half", "longer"])
def test_a_leftover_temporary_file_is_ignored(tmp_path: Path, left: bytes) -> None:
    folder = make(tmp_path)
    temporary = tmp_path / f".{NAME}.0123456789abcdef.tmp"
    temporary.write_bytes(left)
    assert folder.attachment() is None
    assert same(folder.attach(TENSORS, RECORD), TENSORS, RECORD)
    assert not temporary.exists()
    assert same(make(tmp_path).attachment(), TENSORS, RECORD)


@pytest.mark.parametrize("bits", [0x01, 0x20, 0xFF], ids=hex)
def test_every_flipped_byte_is_found(tmp_path: Path, bits: int) -> None:
    folder = make(tmp_path)
    folder.attach({"head": torch.arange(4.0), "count": torch.tensor(3)}, {"precision": "bf16"})
    path = tmp_path / NAME
    content = path.read_bytes()
    for byte in range(len(content)):
        path.write_bytes(content[:byte] + bytes([content[byte] ^ bits]) + content[byte + 1 :])
        with pytest.raises(CacheError) as caught:
            folder.attachment()
        message = str(caught.value)
        assert message.startswith(f"{path} is damaged"), f"byte {byte}"
        assert message.endswith(f"delete {tmp_path} and build the cache again"), f"byte {byte}"
    path.write_bytes(content)
    assert folder.attachment() is not None


def test_every_truncation_is_found(tmp_path: Path) -> None:
    folder = make(tmp_path)
    folder.attach({"head": torch.arange(4.0)}, {"precision": "bf16"})
    path = tmp_path / NAME
    content = path.read_bytes()
    for cut in [*(content[:length] for length in range(len(content))), content + b"\0"]:
        path.write_bytes(cut)
        with pytest.raises(CacheError, match=rf"{NAME} is damaged.*; delete .* and build the cache again"):
            folder.attachment()


def test_the_next_writer_refuses_a_damaged_attachment(tmp_path: Path) -> None:
    folder = make(tmp_path)
    (tmp_path / NAME).write_bytes(b"")
    with pytest.raises(CacheError, match=rf"{NAME} is damaged"):
        folder.attach(TENSORS, RECORD)
    assert (tmp_path / NAME).read_bytes() == b""


def test_an_attachment_of_another_cache_is_refused(tmp_path: Path) -> None:
    """Of the same head and the same record, so that only the key could tell."""
    key = CacheKey({"teacher": "another"})
    other = CacheFolder.create_or_open(tmp_path / "other", key, CODEC, IDS, VIEWS)
    folder = make(tmp_path / "cache")
    for each in (other, folder):
        each.attach(TENSORS, RECORD)
    shutil.copy(other.path / NAME, folder.path / NAME)
    with pytest.raises(CacheError) as caught:
        folder.attachment()
    assert str(caught.value) == (
        f"{folder.path / NAME} belongs to another cache: its key is {key.digest}, the folder's is {folder.key.digest}; "
        f"delete {folder.path} and build the cache again"
    )


def test_a_missing_attachment_is_noticed_if_shards_exist(tmp_path: Path) -> None:
    folder = make(tmp_path)
    folder.attach(TENSORS, RECORD)
    build_shard(folder, 2)
    assert same(folder.attachment(), TENSORS, RECORD)
    (tmp_path / NAME).unlink()
    with pytest.raises(CacheError, match=rf"{NAME} is missing, but the shards were made with it; restore it"):
        folder.attachment()


def test_a_missing_attachment_is_noticed_if_a_shard_is_begun(tmp_path: Path) -> None:
    """What a build left behind would be completed with another head."""
    folder = make(tmp_path)
    folder.attach(TENSORS, RECORD)
    with folder.claim(2) as writer:  # type: ignore[union-attr]
        writer.write(writer.todo[:1], payloads(writer.todo[:1]))
        assert same(folder.attachment(), TENSORS, RECORD)
    (tmp_path / NAME).unlink()
    assert [path.name for path in tmp_path.glob("shard-*")] == ["shard-00002.partial"]
    with pytest.raises(CacheError, match=rf"{NAME} is missing, but the shards were made with it; restore it"):
        folder.attachment()
    folder.discard(2)
    assert folder.attachment() is None


@pytest.mark.parametrize("begins", [claim_and_leave, build_shard], ids=["begins", "builds"])
def test_an_attachment_written_meanwhile_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begins: Callable[[CacheFolder, int], None]
) -> None:
    """It attaches and goes on to its first shard while we look; that is no loss."""
    folder, look = make(tmp_path), shards.read_attachment

    def look_and_be_overtaken(*arguments: Any) -> Attachment | None:
        found = look(*arguments)
        if found is None:
            make(tmp_path).attach(TENSORS, RECORD)
            begins(folder, 0)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(shards, "read_attachment", look_and_be_overtaken)
        first = folder.attachment()
    assert first is None or same(first, TENSORS, RECORD)
    assert same(folder.attachment(), TENSORS, RECORD)


def test_shards_are_not_read_without_their_attachment(tmp_path: Path) -> None:
    folder = build_all(tmp_path)
    with pytest.raises(CacheError, match=rf"{NAME} is missing"):
        folder.attachment()


def test_a_record_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path)
    for record in ({"path": tmp_path}, {"error": float("nan")}):
        with pytest.raises((TypeError, ValueError)):
            folder.attach(TENSORS, record)
    assert folder.attachment() is None and not list(tmp_path.glob(".*.tmp"))


def test_a_folder_that_lost_its_manifest_is_refused(tmp_path: Path) -> None:
    make(tmp_path).attach(TENSORS, RECORD)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(CacheError, match=rf"holds {NAME} .* lost its manifest"):
        make(tmp_path)

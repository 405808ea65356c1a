"""Builders that are killed, builders at once, and a reader beside them: real processes on one folder."""

import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from support.cache_inputs import CODEC, IDS, KEY, RECORDS, SHARDS, build_shard, decoded, logits, make, payloads
from support.ranks import Program
from unikd_fast.errors import CacheError
from unikd_fast.teacher.cache import CacheFolder

pytestmark = pytest.mark.slow

# Every handshake is a line on a pipe, so that no test depends on how fast a process is.

ONE_RECORD_AT_A_TIME = """
from support.cache_inputs import make, payloads
writer = make(sys.argv[1]).claim(1)
for record in writer.todo:
    writer.write([record], payloads([record]))
    print(record, flush=True)
    if record == int(sys.argv[2]):
        sys.stdin.readline()
writer.commit()
"""


@pytest.mark.parametrize("last", [6, 8, 11], ids=["one record", "half", "all but the commit"])
def test_a_killed_build_resumes_without_rewriting(tmp_path: Path, last: int) -> None:
    process = Program(ONE_RECORD_AT_A_TIME, tmp_path, last)
    written = [int(process.stdout.readline()) for _ in range(6, last + 1)]
    folder = CacheFolder.open(tmp_path)
    assert folder.claim(1) is None, "it is alive"
    process.kill()
    process.ended()
    assert not folder.covers([6])
    with folder.claim(1) as writer:  # type: ignore[union-attr]
        todo = writer.todo.tolist()
        assert todo == [record for record in range(6, 12) if record not in written]
        writer.write(todo, payloads(todo, build=1))
        writer.commit()
    assert torch.equal(decoded(folder, written), logits(written)), "as the killed process wrote them"
    assert torch.equal(decoded(folder, todo), logits(todo, build=1))
    assert folder.verify().shards[1].status == "ok"


def test_a_kill_leaves_whole_records_or_none(tmp_path: Path) -> None:
    """Records of 44 KB, so that the signal may strike inside of a write."""
    program = """
import numpy as np
from support.cache_inputs import KEY
from unikd_fast.teacher.cache import CacheFolder, Codec
folder = CacheFolder.create_or_open(sys.argv[1], KEY, Codec("fp16", 21841), np.arange(2000), 1, 2000)
writer = folder.claim(0)
for record in writer.todo[:900]:
    writer.write([record], np.full((1, folder.codec.record_bytes), record % 251, np.uint8))
    print(record, flush=True)
sys.stdin.readline()
"""
    written: set[int] = set()
    for _ in range(2):
        process = Program(program, tmp_path)
        written.update(int(process.stdout.readline()) for _ in range(20))
        process.kill()
        written.update(int(line) for line in process.ended().splitlines(keepends=True) if line.endswith("\n"))
    folder = CacheFolder.open(tmp_path)
    with folder.claim(0) as writer:  # type: ignore[union-attr]
        todo = set(writer.todo.tolist())
        assert todo.isdisjoint(written), "what was announced is kept"
        assert len(written) >= 40, "the second process did not begin anew"
        for record in todo:
            writer.write([record], np.full((1, folder.codec.record_bytes), record % 251, np.uint8))
        writer.commit()
    rows = folder.read(range(2000))
    assert all((rows[record] == record % 251).all() for record in range(2000))


BUILD_WHAT_IS_FREE = """
from support.cache_inputs import make, payloads
from unikd_fast.errors import CacheError
folder = make(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
def build(wait):
    while (writer := folder.claim_any(wait=wait)) is not None:
        with writer:
            todo = writer.todo.tolist()
            print("claimed", writer.shard, len(todo), flush=True)
            for record in todo:
                writer.write([record], payloads([record], build=int(sys.argv[2])))
            writer.commit()
try:
    build(wait=False)
except CacheError as error:
    print(error, flush=True)
    build(wait=True)
print("complete", folder.missing_shards())
"""


def test_two_builders_share_the_shards(tmp_path: Path) -> None:
    builders = [Program(BUILD_WHAT_IS_FREE, tmp_path, build) for build in range(2)]
    for builder in builders:  # both have made or opened the folder, at the same time
        assert builder.stdout.readline() == "ready\n"
    for builder in builders:
        builder.tell("go")
    outputs = [builder.ended().splitlines() for builder in builders]
    claimed = [[int(line.split()[1]) for line in output if line.startswith("claimed")] for output in outputs]
    assert sorted(claimed[0] + claimed[1]) == list(range(SHARDS)), "each shard once"
    assert all(output[-1] == "complete []" for output in outputs)
    folder = make(tmp_path)
    assert folder.verify().ok
    for build, shards in enumerate(claimed):
        records = [record for shard in shards for record in range(6 * shard, min(6 * shard + 6, RECORDS))]
        assert torch.equal(decoded(folder, records), logits(records, build))
    assert not list(tmp_path.glob("*.partial"))


def test_a_waiting_builder_takes_over_from_a_dead_one(tmp_path: Path) -> None:
    dying = Program(ONE_RECORD_AT_A_TIME, tmp_path, 8)
    assert [int(dying.stdout.readline()) for _ in range(3)] == [6, 7, 8]
    other = Program(BUILD_WHAT_IS_FREE, tmp_path, 1)
    other.tell("go")
    lines = [other.stdout.readline() for _ in range(5)]
    assert lines[:4] == ["ready\n", "claimed 0 6\n", "claimed 2 6\n", "claimed 3 2\n"]
    assert "other processes are building the last 1 of 4 shards (the first is 1)" in lines[4]
    assert other.poll() is None
    dying.kill()
    dying.ended()
    assert other.ended() == "claimed 1 3\ncomplete []\n"
    folder = make(tmp_path)
    assert folder.verify().ok
    assert torch.equal(decoded(folder, [6, 7, 8]), logits([6, 7, 8]))
    assert torch.equal(decoded(folder, [9, 10, 11]), logits([9, 10, 11], build=1))


WAIT_UNTIL_A_SIGNAL = """
import signal
from support.cache_inputs import make
from unikd_fast.teacher.cache import build_cache
asked = []
signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
def progress(count):
    print("idle", flush=True)
    if asked:
        raise SystemExit("asked to end")
build_cache(make(sys.argv[1]), None, batch_size=4, progress=progress)
"""


def test_a_waiting_builder_handles_signals(tmp_path: Path) -> None:
    """Its handler only takes note, as that of a run does; the process it waits for lives on."""
    folder = make(tmp_path)
    for shard in (0, 2, 3):
        build_shard(folder, shard)
    other = Program(ONE_RECORD_AT_A_TIME, tmp_path, 8)
    assert [int(other.stdout.readline()) for _ in range(3)] == [6, 7, 8]
    waiting = Program(WAIT_UNTIL_A_SIGNAL, tmp_path)
    assert [waiting.stdout.readline() for _ in range(3)] == ["idle\n"] * 3
    waiting.send_signal(signal.SIGTERM)
    waiting.ended()
    assert waiting.returncode == 1, "it raised what its progress raised"
    other.tell("go")
    assert other.ended() == "9\n10\n11\n"
    assert folder.verify().ok


def test_a_concurrent_reader_sees_finished_records_only(tmp_path: Path) -> None:
    program = """
from support.cache_inputs import CODEC, KEY, payloads
from unikd_fast.teacher.cache import CacheFolder
folder = CacheFolder.open(sys.argv[1])
print("ready", flush=True)
while (writer := folder.claim_any(wait=False)) is not None:
    with writer:
        for record in writer.todo:
            writer.write([record], payloads([record % 20]))
        writer.commit()
    if writer.shard == 49:
        sys.stdin.readline()
"""
    folder = CacheFolder.create_or_open(tmp_path, KEY, CODEC, IDS, 100, 10)
    process = Program(program, tmp_path)
    assert process.stdout.readline() == "ready\n"
    told = False
    seen: set[int] = set()
    while len(seen) < 100:
        ended = process.poll() is not None
        for view in set(range(100)) - seen:
            records = folder.records(range(10), view)
            if folder.covers(records):
                assert torch.equal(decoded(folder, records), logits(records % 20))
                seen.add(view)
            elif ended:
                raise AssertionError(f"the writer ended with {process.returncode} and left view {view}")
        if not told and len(seen) >= 25:
            told = True
            process.tell("go")
    process.ended()


def test_concurrent_creation_with_different_keys_has_one_winner(tmp_path: Path) -> None:
    program = """
from support.cache_inputs import CODEC, IDS
from unikd_fast.errors import CacheError
from unikd_fast.teacher.cache import CacheFolder, CacheKey
print("ready", flush=True)
sys.stdin.readline()
try:
    CacheFolder.create_or_open(sys.argv[1], CacheKey({"teacher": sys.argv[2]}), CODEC, IDS + int(sys.argv[2]), 1)
    print("made", sys.argv[2])
except CacheError as error:
    print(error)
"""
    processes = [Program(program, tmp_path / "cache", number) for number in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.tell("go")
    outputs = [process.ended() for process in processes]
    (winner,) = [number for number in range(2) if outputs[number] == f"made {number}\n"]
    assert f'teacher: "{winner}" in the cache, "{1 - winner}" now' in outputs[1 - winner]
    folder = CacheFolder.open(tmp_path / "cache")
    assert folder.key.fields == {"teacher": str(winner)}
    with pytest.raises(CacheError, match="is missing"):
        folder.read([0])

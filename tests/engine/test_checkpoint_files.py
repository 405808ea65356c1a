"""A checkpoint on disk: complete or absent, nothing pickled, damage found; the newest whole one is chosen."""

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unikd_fast.engine.checkpoint import CheckpointWriter, DamagedCheckpoint, find_newest, read_folder
from unikd_fast.engine.checkpoint import files as files_module
from unikd_fast.engine.checkpoint import store as store_module
from unikd_fast.engine.checkpoint.files import HEADER, check_folder, write_folder
from unikd_fast.engine.checkpoint.store import FOLDER, LATEST, checkpoint_name
from unikd_fast.engine.checkpoint.tree import flatten, on_cpu, unflatten
from unikd_fast.errors import CheckpointError

PARTS: dict[str, Any] = {
    "student": {"conv.weight": torch.arange(24.0).view(2, 3, 2, 2).to(memory_format=torch.channels_last)},
    "optimizer": {"state": {0: {"momentum": torch.ones(5, dtype=torch.bfloat16)}}, "betas": (0.9, 0.999)},
    "average": None,
    "processes": [{"rng": torch.arange(9, dtype=torch.uint8)}, {"rng": None}],
    "run": {"step": 7, "name": "ü", "scalar": torch.tensor(3)},
}


def assert_equal(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right)
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_equal(a, b)
    else:
        assert left == right


keys = st.one_of(st.text(max_size=4), st.integers(-3, 3), st.sampled_from(["$tensor", "$tuple", "$pairs", "a/b", "a"]))
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(max_size=4), st.floats(allow_nan=False), st.just(torch.ones(2))
)
states = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.tuples(inner, inner), st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


@given(states)
def test_any_state_comes_back_through_json(state: Any) -> None:
    tensors, rest = flatten(state)
    assert_equal(unflatten(tensors, json.loads(json.dumps(rest))), state)


@pytest.mark.parametrize("state", [{"a": {1.5: 0}}, {"a": {True: 0}}, {"a": {1, 2}}, {"a": object()}])
def test_what_json_cannot_hold_is_refused_by_its_place(state: Any) -> None:
    with pytest.raises(TypeError, match=r"a checkpoint cannot hold .*a"):
        flatten(state)


def test_a_copy_shares_nothing_with_what_it_was_taken_of() -> None:
    state = {"a": [torch.zeros(3)]}
    taken = on_cpu(state)
    state["a"][0].add_(1)
    assert taken["a"][0].tolist() == [0, 0, 0]


def test_a_checkpoint_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    write_folder(tmp_path / "c", PARTS)
    check_folder(tmp_path / "c")
    assert_equal(read_folder(tmp_path / "c"), PARTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]
    assert {path.suffix for path in (tmp_path / "c").iterdir()} == {".safetensors", ".json"}


def test_a_checkpoint_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    write_folder(tmp_path / "c", PARTS)
    write_folder(tmp_path / "c", {"run": {"step": 8}})
    assert read_folder(tmp_path / "c") == {"run": {"step": 8}}
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def damages() -> dict[str, Any]:
    def flip(path: Path, place: int) -> None:
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)

    return {
        "a tensor file cut off": lambda c: os.truncate(c / "student.safetensors", 60),
        "a tensor file without its last byte": lambda c: os.truncate(
            c / "student.safetensors", (c / "student.safetensors").stat().st_size - 1
        ),
        "an empty tensor file": lambda c: os.truncate(c / "student.safetensors", 0),
        "a bit of a tensor": lambda c: flip(c / "student.safetensors", -3),
        "a bit of its header": lambda c: flip(c / "student.safetensors", 12),
        "a tensor file gone": lambda c: (c / "optimizer.safetensors").unlink(),
        "a tensor file that is a folder": lambda c: (
            (c / "optimizer.safetensors").unlink(),
            (c / "optimizer.safetensors").mkdir(),
        ),
        "no header": lambda c: (c / HEADER).unlink(),
        "an empty header": lambda c: (c / HEADER).write_text(""),
        "a header cut off": lambda c: os.truncate(c / HEADER, 100),
        "a digit of the header": lambda c: (c / HEADER).write_text(
            (c / HEADER).read_text().replace('\\"step\\": 7', '\\"step\\": 9')
        ),
        "a header that is a list": lambda c: (c / HEADER).write_text("[1]"),
    }


@pytest.mark.parametrize("damage", damages())
def test_damage_is_found_and_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "c"
    write_folder(path, PARTS)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    damages()[damage](path)
    assert before != {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
    with pytest.raises(DamagedCheckpoint, match=str(path)):
        check_folder(path)


def test_a_header_leads_to_no_file_outside(tmp_path: Path) -> None:
    write_folder(tmp_path / "c", PARTS)
    wrapped = json.loads((tmp_path / "c" / HEADER).read_text())
    header = json.loads(wrapped["header"])
    header["files"]["../secret"] = {"bytes": 1, "crc32": 0}
    text = json.dumps(header)
    import zlib

    (tmp_path / "c" / HEADER).write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "header": text}))
    with pytest.raises(DamagedCheckpoint, match=r"names the file '\.\./secret'"):
        check_folder(tmp_path / "c")


class Shell:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    write_folder(tmp_path / "c", PARTS)
    pickled = pickle.dumps(Shell(f"touch {tmp_path / 'owned'}"))
    for name in ("student.safetensors", HEADER):
        copy = tmp_path / f"spoilt-{name}"
        shutil.copytree(tmp_path / "c", copy)
        (copy / name).write_bytes(pickled)
        for read in (check_folder, read_folder):
            with pytest.raises(DamagedCheckpoint):
                read(copy)
    assert not (tmp_path / "owned").exists()


def write_steps(run: Path, *steps: int, keep: int = 9, beside_training: bool = False) -> None:
    writer = CheckpointWriter(run, keep=keep, beside_training=beside_training)
    for step in steps:
        writer.write(step, {"run": {"step": step}, "student": {"w": torch.full((3,), float(step))}})
    writer.close()


@pytest.mark.parametrize("beside_training", [False, True], ids=["in line", "in a thread"])
def test_the_last_few_are_kept_and_the_newest_is_found(tmp_path: Path, beside_training: bool) -> None:
    assert find_newest(tmp_path) is None
    write_steps(tmp_path, 1, 5, 10, 999_999_999, keep=2, beside_training=beside_training)
    there = sorted(path.name for path in (tmp_path / FOLDER).iterdir())
    assert there == [LATEST, checkpoint_name(10), checkpoint_name(999_999_999)]
    newest = find_newest(tmp_path)
    assert newest is not None
    assert read_folder(newest)["run"]["step"] == 999_999_999


def test_damaged_ones_are_passed_over_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_steps(tmp_path, 1, 2, 3)
    folder = tmp_path / FOLDER
    os.truncate(folder / checkpoint_name(3) / "student.safetensors", 10)
    (folder / checkpoint_name(2) / HEADER).unlink()
    with caplog.at_level(logging.WARNING, logger="unikd_fast"):
        assert find_newest(tmp_path) == folder / checkpoint_name(1)
    assert [record.getMessage().count("passed over a checkpoint") for record in caplog.records] == [1, 1]
    assert checkpoint_name(3) in caplog.text and checkpoint_name(2) in caplog.text
    # The run goes on from the first; what lay after it is not of this run any more.
    write_steps(tmp_path, 2, keep=2)
    assert find_newest(tmp_path) == folder / checkpoint_name(2)
    assert not (folder / checkpoint_name(3)).exists()


def test_what_a_run_removes_while_it_goes_on_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one that is looked at goes meanwhile, with a newer one in its place, until the run rests at step 4."""
    looked_at: list[str] = []

    def check(path: Path) -> None:
        looked_at.append(path.name)
        if len(looked_at) < 4:
            write_steps(tmp_path, len(looked_at) + 1, keep=1)
        check_folder(path)

    write_steps(tmp_path, 1)
    monkeypatch.setattr(store_module, "check_folder", check)
    assert find_newest(tmp_path) == tmp_path / FOLDER / checkpoint_name(4)
    assert looked_at == [checkpoint_name(step) for step in range(1, 5)]


def test_without_a_whole_one_all_faults_are_told(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / FOLDER / checkpoint_name(step) / "student.safetensors").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"no checkpoint in .* is whole: .*000002/.*000001/.*new run folder"):
        find_newest(tmp_path)


@pytest.mark.parametrize("said", ["", "../elsewhere", "step-000000009", "step-1", "\0", "step-000000001"])
def test_what_latest_says_is_believed_only_if_it_names_a_checkpoint(tmp_path: Path, said: str) -> None:
    write_steps(tmp_path, 1, 2)
    (tmp_path / FOLDER / LATEST).write_text(said)
    shutil.copytree(tmp_path / FOLDER / checkpoint_name(2), tmp_path / "elsewhere")
    expected = 1 if said == "step-000000001" else 2
    assert find_newest(tmp_path) == tmp_path / FOLDER / checkpoint_name(expected)


def test_a_thread_writes_while_training_goes_on_and_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed, order = threading.Event(), []
    whole = store_module.write_folder

    def held(path: Path, parts: dict[str, Any]) -> None:
        order.append(f"begin {path.name}")
        assert allowed.wait(20)
        whole(path, parts)
        order.append(f"end {path.name}")

    monkeypatch.setattr(store_module, "write_folder", held)
    writer = CheckpointWriter(tmp_path, keep=9, beside_training=True)
    writer.write(1, PARTS)
    assert find_newest(tmp_path) is None  # this line is reached while the checkpoint is held up
    allowed.set()
    writer.write(2, PARTS)
    writer.close()
    one, two = checkpoint_name(1), checkpoint_name(2)
    assert order == [f"begin {one}", f"end {one}", f"begin {two}", f"end {two}"]


def test_an_error_of_the_thread_comes_with_the_next_call(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("a file where the folder should be")
    writer = CheckpointWriter(tmp_path, keep=9, beside_training=True)
    writer.write(1, PARTS)
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*step-000000001"):
        writer.write(2, PARTS)
    writer.close()


WRITE_FOREVER = """
import sys
from pathlib import Path
import torch
from unikd_fast.engine.checkpoint import CheckpointWriter
writer = CheckpointWriter(Path(sys.argv[1]), keep=2, beside_training=False)
print("ready", flush=True)
for step in range(1, 10**6):
    writer.write(step, {"run": {"step": step}, "student": {"w": torch.full((50_000,), float(step))}})
"""


@pytest.mark.slow
def test_killed_at_any_moment_the_newest_is_whole(tmp_path: Path) -> None:
    step = 0
    for round_ in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITE_FOREVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            assert "ready\n" in iter(process.stdout.readline, "")  # DeepSpeed has its say before
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.05 + 0.037 * round_)
        finally:
            process.kill()
            process.wait()
        newest = find_newest(tmp_path)
        assert newest is not None
        saved = read_folder(newest)
        assert saved["student"]["w"].unique().tolist() == [saved["run"]["step"]]
        step = max(step, saved["run"]["step"])
    assert step > 1


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        small, large = {"student": {"w": torch.ones(50_000)}}, {"student": {"w": torch.ones(100_000)}}
        writer = CheckpointWriter(disk, keep=2, beside_training=False)
        writer.write(1, small)
        with pytest.raises(
            CheckpointError, match=r"step-000000002: it needs 0\.4 MiB and 0\.3 MiB are free; .* free at"
        ):
            writer.write(2, large)
        # What was foreseen wrongly: the room goes while it is written.
        monkeypatch.setattr(files_module, "_require_room", lambda folder, needed: None)
        with pytest.raises(CheckpointError, match=r"step-000000002: No space left on device; .* free at least"):
            writer.write(2, large)
        assert sorted(path.name for path in (disk / FOLDER).iterdir()) == [LATEST, checkpoint_name(1)]
        newest = find_newest(disk)
        assert newest is not None and torch.equal(read_folder(newest)["student"]["w"], small["student"]["w"])
    finally:
        subprocess.run(["umount", str(disk)], check=True)

"""A checkpoint written to disk: complete or absent, beside training or in line, and read back as it was."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.kills import killed_at_each_operation
from support.long_rounds import quick
from support.small_disks import small_disk
from support.written_checkpoints import PARTS, write_steps
from unikd_fast.engine.checkpoint import CheckpointWriter, find_newest, read_folder
from unikd_fast.engine.checkpoint import files as files_module
from unikd_fast.engine.checkpoint import store as store_module
from unikd_fast.engine.checkpoint.files import check_folder, flatten, on_cpu, unflatten, write_folder
from unikd_fast.engine.checkpoint.store import FOLDER, checkpoint_name
from unikd_fast.errors import CheckpointError
from unikd_fast.io import replaced


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
def test_states_round_trip_through_json(state: Any) -> None:
    tensors, rest = flatten(state)
    assert_equal(unflatten(tensors, json.loads(json.dumps(rest))), state)


@pytest.mark.parametrize("state", [{"a": {1.5: 0}}, {"a": {True: 0}}, {"a": {1, 2}}, {"a": object()}])
def test_unsupported_values_are_refused_by_path(state: Any) -> None:
    with pytest.raises(TypeError, match=r"a checkpoint cannot hold .*a"):
        flatten(state)


def test_a_copy_shares_no_memory() -> None:
    state = {"a": [torch.zeros(3)]}
    taken = on_cpu(state)
    state["a"][0].add_(1)
    assert taken["a"][0].tolist() == [0, 0, 0]


def test_a_checkpoint_round_trips(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("beside_training", [False, True], ids=["in line", "in a thread"])
def test_the_last_few_are_kept_and_the_newest_is_found(tmp_path: Path, beside_training: bool) -> None:
    assert find_newest(tmp_path) is None
    write_steps(tmp_path, 1, 5, 10, 999_999_999, keep=2, beside_training=beside_training)
    there = sorted(path.name for path in (tmp_path / FOLDER).iterdir())
    assert there == [checkpoint_name(10), checkpoint_name(999_999_999)]
    newest = find_newest(tmp_path)
    assert newest is not None
    assert read_folder(newest)["run"]["step"] == 999_999_999


def test_a_thread_writes_one_at_a_time_beside_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_thread_errors_surface_at_the_next_call(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("a file where the folder should be")
    writer = CheckpointWriter(tmp_path, keep=9, beside_training=True)
    writer.write(1, PARTS)
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*step-000000001"):
        writer.write(2, PARTS)
    writer.close()


BEFORE = {"step 5": (5,), "steps 4 and 5": (4, 5)}


@pytest.mark.parametrize("step", [5, 6], ids=["the same step", "the next step"])
@pytest.mark.parametrize("before", quick(BEFORE, "steps 4 and 5"))
@pytest.mark.parametrize("keep", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_kill_leaves_the_newest_checkpoint_intact(tmp_path: Path, step: int, before: str, keep: int) -> None:
    write_steps(tmp_path, *BEFORE[before], keep=keep)
    found: set[int] = set()
    kills = 0
    for _ in killed_at_each_operation(lambda: write_steps(tmp_path, step, keep=keep), tmp_path):
        newest = find_newest(tmp_path)
        assert newest is not None
        saved = read_folder(newest)
        assert saved["student"]["w"].unique().tolist() == [saved["run"]["step"]]
        found.add(saved["run"]["step"])
        kills += 1
        # What a kill leaves hides nothing from the next write, and does not stop it.
        copy = tmp_path.with_name(f"{tmp_path.name}-{kills}")
        shutil.copytree(tmp_path, copy)
        write_steps(copy, 7, keep=1)
        assert [path.name for path in (copy / FOLDER).iterdir()] == [checkpoint_name(7)]
        shutil.rmtree(copy)
    assert kills > 8 and found >= {5}
    there = sorted({*BEFORE[before], step})[-keep:]
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == [checkpoint_name(each) for each in there]


def test_a_checkpoint_left_aside_by_a_kill_is_found(tmp_path: Path) -> None:
    """Between the two renames of a replacement the good checkpoint has another name, and is the only one."""
    write_steps(tmp_path, 5, keep=1)
    aside = replaced(tmp_path / FOLDER / checkpoint_name(5))
    (tmp_path / FOLDER / checkpoint_name(5)).rename(aside)
    assert find_newest(tmp_path) == aside
    write_steps(tmp_path, 6, keep=2)
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == [checkpoint_name(5), checkpoint_name(6)]


def test_a_leftover_folder_does_not_block_a_write(tmp_path: Path) -> None:
    """After the second rename both are there; another write of that step must not stumble over it."""
    write_steps(tmp_path, 5, keep=1)
    whole = tmp_path / FOLDER / checkpoint_name(5)
    shutil.copytree(whole, replaced(whole))
    write_steps(tmp_path, 5, keep=1)
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == [checkpoint_name(5)]


@pytest.mark.slow
def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, kib=500):
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
        assert sorted(path.name for path in (disk / FOLDER).iterdir()) == [checkpoint_name(1)]
        newest = find_newest(disk)
        assert newest is not None and torch.equal(read_folder(newest)["student"]["w"], small["student"]["w"])

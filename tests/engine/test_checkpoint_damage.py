"""A checkpoint that is damaged: found and named, nothing in it run, and the newest whole one taken instead."""

import json
import logging
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from written_checkpoints import PARTS, write_steps

from unikd_fast.engine.checkpoint import DamagedCheckpoint, find_newest, read_folder
from unikd_fast.engine.checkpoint import store as store_module
from unikd_fast.engine.checkpoint.files import HEADER, check_folder, write_folder
from unikd_fast.engine.checkpoint.store import FOLDER, LATEST, checkpoint_name


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

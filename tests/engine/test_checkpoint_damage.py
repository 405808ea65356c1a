"""A checkpoint that is damaged: found and named, nothing in it run, and the newest whole one taken instead."""

import itertools
import json
import logging
import os
import pickle
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from support.exported_runs import SHORT, short, trained
from support.forged_json import places
from support.real_runs import ALONE
from support.written_checkpoints import PARTS, write_steps
from unikd_fast.engine.build import build_experiment
from unikd_fast.engine.checkpoint import DamagedCheckpoint, find_newest, read_folder, require_usable
from unikd_fast.engine.checkpoint import store as store_module
from unikd_fast.engine.checkpoint.files import HEADER, check_folder, write_folder
from unikd_fast.engine.checkpoint.store import FOLDER, checkpoint_name


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


def test_a_header_cannot_name_outside_files(tmp_path: Path) -> None:
    write_folder(tmp_path / "c", PARTS)
    wrapped = json.loads((tmp_path / "c" / HEADER).read_text())
    header = json.loads(wrapped["header"])
    header["files"]["../secret"] = {"bytes": 1, "crc32": 0}
    text = json.dumps(header)
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


def test_damaged_checkpoints_are_skipped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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


def test_a_removed_checkpoint_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_all_faults_are_listed_if_none_is_intact(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / FOLDER / checkpoint_name(step) / "student.safetensors").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"no checkpoint in .* is whole: .*000002/.*000001/.*new run folder"):
        find_newest(tmp_path)


def forge(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header, and give it a checksum that fits."""
    header = json.loads(json.loads((path / HEADER).read_text())["header"])
    change(header)
    text = json.dumps(header)
    (path / HEADER).write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "header": text}))


ODD = (None, -1, 0.5, 2**70, "", "../x", "/etc/passwd", [], {}, [[]], {"$tensor": []}, {"$pairs": 1})


@pytest.fixture(scope="module")
def run_before_training(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """The student's side of a run, and the checkpoint that it wrote."""
    config = short(tmp_path_factory.mktemp("forged"), "run", train={**SHORT["train"], "total_epochs": 1})
    folder = trained(config)
    return build_experiment(config, ALONE).student_module, folder / FOLDER / checkpoint_name(2)


@pytest.mark.parametrize("tries", [150, pytest.param(5000, marks=pytest.mark.long)])
def test_forged_headers_are_named_errors(
    run_before_training: tuple[nn.Module, Path], tmp_path: Path, tries: int
) -> None:
    """A header whose checksum fits and whose content does not: refused by name, or read, but never a raw error."""
    side, whole = run_before_training
    require_usable(whole, side)
    header = json.loads(json.loads((whole / HEADER).read_text())["header"])
    forgeries = list(itertools.product(places(header), ODD))
    near = [(way, odd) for way, odd in forgeries if len(way) < 4 and way[-1] != "format"]
    path, refused = tmp_path / "c", 0
    shutil.copytree(whole, path)
    pristine = (path / HEADER).read_bytes()
    # Half of them near the root, where each one matters, half among the many tensors.
    tries = min(tries, 2 * len(near))
    for way, odd in random.Random(0).sample(near, tries // 2) + random.Random(1).sample(forgeries, tries // 2):

        def put(content: Any, way: tuple[Any, ...] = way, odd: Any = odd) -> None:
            for key in way[:-1]:
                content = content[key]
            content[way[-1]] = odd

        (path / HEADER).write_bytes(pristine)
        forge(path, put)
        try:
            check_folder(path)
            require_usable(path, side)
        except DamagedCheckpoint as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 0.6 * tries


@pytest.mark.parametrize("kind", ["a folder outside", "an absolute path", "no checksum", "a link", "a linked header"])
def test_parts_are_files_of_the_folder_with_a_checksum(tmp_path: Path, kind: str) -> None:
    path, outside = tmp_path / "c", tmp_path / "outside.safetensors"
    write_folder(path, PARTS)
    shutil.copy(path / "student.safetensors", outside)
    if kind == "a folder outside":
        forge(path, lambda header: header["parts"].update({"../outside": header["parts"]["student"]}))
    elif kind == "an absolute path":
        forge(path, lambda header: header["parts"].update({str(outside)[:-12]: header["parts"]["student"]}))
    elif kind == "no checksum":
        forge(path, lambda header: header["files"].pop("student.safetensors"))
    elif kind == "a link":
        (path / "student.safetensors").unlink()
        (path / "student.safetensors").symlink_to(outside)
    else:
        (path / HEADER).rename(tmp_path / "header")
        (path / HEADER).symlink_to(tmp_path / "header")
    for read in (check_folder, read_folder):
        with pytest.raises(DamagedCheckpoint, match=str(path)):
            read(path)


def test_a_forged_checkpoint_does_not_hide_an_older_one(
    run_before_training: tuple[nn.Module, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    side, whole = run_before_training
    for step in (1, 2, 3, 4):
        shutil.copytree(whole, tmp_path / FOLDER / checkpoint_name(step))
    forge(tmp_path / FOLDER / checkpoint_name(4), lambda header: header.pop("format"))
    forge(tmp_path / FOLDER / checkpoint_name(3), lambda header: header["parts"]["run"].update(step="three"))
    forge(tmp_path / FOLDER / checkpoint_name(2), lambda header: header["parts"].pop("processes"))
    with caplog.at_level(logging.WARNING, logger="unikd_fast"):
        found = find_newest(tmp_path, lambda path: require_usable(path, side))
    assert found == tmp_path / FOLDER / checkpoint_name(1)
    assert caplog.text.count("passed over a checkpoint") == 3
    assert "does not say its format" in caplog.text and "run is {'step': 'three'" in caplog.text

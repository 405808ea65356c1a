"""Files are written whole or not at all, never through a link, and readable as umask says."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from unikd_fast.errors import ConfigError, FileError
from unikd_fast.io import (
    append_line,
    make_folder,
    naming,
    new_file,
    new_path,
    open_own,
    read_json,
    remove_leftovers,
    write_file,
    write_json,
)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_written_files_have_the_mode_of_umask(tmp_path: Path) -> None:
    write_file(tmp_path / "text", "τ = 4")
    write_json(tmp_path / "json", {"a": [1, 2]})
    with new_path(tmp_path / "model.bin") as path:
        path.write_bytes(b"weights")
        path.chmod(0o600)
    open_own(tmp_path / "log", append=True).close()
    assert (tmp_path / "text").read_text(encoding="utf-8") == "τ = 4"
    assert read_json(tmp_path / "json") == {"a": [1, 2]}
    assert (tmp_path / "model.bin").read_bytes() == b"weights"
    assert names(tmp_path) == {"text", "json", "model.bin", "log"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


def test_a_link_is_replaced_and_never_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("kept")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("symbolic", "path"):
        (folder / name).symlink_to(precious)
    (folder / "hard").hardlink_to(precious)
    write_file(folder / "symbolic", "new")
    write_file(folder / "hard", "new")
    with new_path(folder / "path") as path:
        path.write_text("new")
    assert precious.read_text() == "kept"
    assert [(folder / name).read_text() for name in ("symbolic", "hard", "path")] == ["new"] * 3
    assert not any(path.is_symlink() for path in folder.iterdir())


@pytest.mark.parametrize("writer", [new_file, new_path])
def test_a_pipe_is_not_replaced(tmp_path: Path, writer: Callable[[Path], AbstractContextManager[object]]) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="pipe is not a regular file, and would be replaced; choose another"):
        writer(tmp_path / "pipe").__enter__()
    assert (tmp_path / "pipe").is_fifo()
    assert names(tmp_path) == {"pipe"}


@pytest.mark.parametrize("kind", ["symbolic", "hard", "pipe"])
def test_a_file_that_stays_open_is_not_a_link(tmp_path: Path, kind: str) -> None:
    precious, path = tmp_path / "precious", tmp_path / "lock"
    precious.write_text("kept")
    if kind == "symbolic":
        path.symlink_to(precious)
    elif kind == "hard":
        path.hardlink_to(precious)
    else:
        os.mkfifo(path)
    with pytest.raises(FileError, match=f"{path}.* remove it"):
        open_own(path)
    assert precious.read_text() == "kept"


def test_own_files_can_be_read_and_appended_to(tmp_path: Path) -> None:
    with open_own(tmp_path / "log", append=True) as log:
        log.write(b"one\n")
    with open_own(tmp_path / "log", append=True) as log:
        log.write(b"two\n")
    with open_own(tmp_path / "log") as log:
        assert log.read() == b"one\ntwo\n"


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_file(path, "old")
    with pytest.raises(FileError, match=rf"{path} cannot be written: File too large, .* MiB are free .*; make room"):
        write_file(path, b"x" * 5000)
    with pytest.raises(FileError, match=r"make room"), new_path(path) as unfinished:
        unfinished.write_bytes(b"x" * 5000)
    assert path.read_text() == "old" and names(tmp_path) == {"state"}


def test_an_error_in_the_block_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_file(path, "old")
    with pytest.raises(ZeroDivisionError), new_file(path) as file:
        file.write(b"half")
        _ = 1 / 0
    with pytest.raises(ZeroDivisionError), new_path(path) as unfinished:
        unfinished.write_bytes(b"half")
        _ = 1 / 0
    assert path.read_text() == "old" and names(tmp_path) == {"state"}


def test_folders_that_cannot_be_created_are_named(tmp_path: Path) -> None:
    write_file(tmp_path / "file", "")
    with pytest.raises(FileError, match=r"file/run cannot be written: Not a directory; part of its path is a file"):
        make_folder(tmp_path / "file" / "run")
    with pytest.raises(FileError, match=r"file cannot be written: File exists; a file of that name exists"):
        make_folder(tmp_path / "file")
    with pytest.raises(FileError, match=r"File name too long; choose a shorter name"):
        make_folder(tmp_path / ("x" * 300))
    with pytest.raises(FileError, match=r"File name too long"):
        write_file(tmp_path / ("ä" * 250), "")
    with pytest.raises(FileError, match=r"gone/file cannot be written: .*; its folder is missing"):
        write_file(tmp_path / "gone" / "file", "")
    assert names(tmp_path) == {"file"}
    long = tmp_path / ("ä" * 127)
    write_file(long, "as long as a name can be")
    assert long.exists()


def test_errors_have_the_requested_class_and_advice(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "file"
    refused = pytest.raises(ConfigError, match=r"its folder is missing; create it; set run.dir$")
    with refused, naming(path, ConfigError, advice="set run.dir"):
        path.write_text("")
    with pytest.raises(ConfigError, match=r"^as it is$"), naming(path):
        raise ConfigError("as it is")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\0\0\0\0", "is empty"),
        (b'{"a": 1', "is damaged"),
        (b'{"a": "\xff"}', "is damaged"),
        (b"[1, 2]", "it holds list where an object belongs"),
        (b"[" * 100_000, "is damaged"),
    ],
)
def test_damaged_json_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(content)
    with pytest.raises(FileError, match=f"{path} {said}" if said.startswith("is") else said):
        read_json(path)


def test_missing_json_raises_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "result.json")
    with pytest.raises(FileError, match="cannot be read: Is a directory"):
        read_json(tmp_path)


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    write_file(tmp_path / "kept", "")
    (tmp_path / ".kept.tmp").write_text("of another program")
    script = (
        "import os, signal; from pathlib import Path; from unikd_fast.io import new_file, new_path\n"
        "with new_file(Path('a')) as a, new_path(Path('b')) as b:\n"
        "    a.write(b'half'); b.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    if (child := os.fork()) == 0:
        os.chdir(tmp_path)
        exec(script)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == 9
    assert len(names(tmp_path)) == 4
    remove_leftovers(tmp_path)
    assert names(tmp_path) == {"kept", ".kept.tmp"}


def test_lines_are_appended_whole(tmp_path: Path) -> None:
    log = tmp_path / "log"
    append_line(log, "one")
    log.write_bytes(log.read_bytes() + b"cut")
    append_line(log, "zwölf")
    assert log.read_text() == "one\ncut\nzwölf\n"
    (tmp_path / "link").symlink_to(log)
    with pytest.raises(FileError, match="link, which is not followed"):
        append_line(tmp_path / "link", "three")
    assert log.read_text() == "one\ncut\nzwölf\n"


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_leaves_no_partial_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    append_line(log, "x" * 1000)
    with pytest.raises(FileError, match=r"log cannot be written: File too large, .*make room"):
        append_line(log, "y" * 1000)
    assert log.read_text() == "x" * 1000 + "\n"

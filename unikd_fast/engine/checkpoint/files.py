"""One checkpoint on disk: a folder of safetensors files and one JSON file, complete or absent, checked when it is read.

    checkpoint.json      step, what else is no tensor, and size and CRC-32 of every other file
    student.safetensors  ...

The folder is written under another name and renamed when everything is on the disk.
"""

import json
import os
import shutil
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from unikd_fast.engine.checkpoint.tree import flatten, unflatten
from unikd_fast.errors import CheckpointError

FORMAT = 2
HEADER = "checkpoint.json"
UNFINISHED = ".unfinished-"


class DamagedCheckpoint(CheckpointError):
    """What was read is not what was written."""


def write_folder(path: Path, parts: dict[str, Any]) -> None:
    """Writes a checkpoint; it is there when this returns, and not at all if it raises.

    Args:
        path: folder to make; one of this name is replaced.
        parts: nested state by name; each becomes a file.

    Raises:
        CheckpointError: the disk is full, or cannot be written to.
    """
    parts_of_it = {name: flatten(state) for name, state in parts.items()}
    needed = sum(t.numel() * t.element_size() for tensors, _ in parts_of_it.values() for t in tensors.values())
    unfinished = path.with_name(UNFINISHED + path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        _require_room(path.parent, needed)
        unfinished.mkdir()
        files: dict[str, Any] = {}
        for name, (tensors, _) in parts_of_it.items():
            content = save({key: tensor.contiguous() for key, tensor in tensors.items()})
            files[f"{name}.safetensors"] = {"bytes": len(content), "crc32": zlib.crc32(content)}
            _write(unfinished / f"{name}.safetensors", content)
        header = {"format": FORMAT, "parts": {name: rest for name, (_, rest) in parts_of_it.items()}, "files": files}
        text = json.dumps(header, indent=1)
        _write(unfinished / HEADER, json.dumps({"crc32": zlib.crc32(text.encode()), "header": text}).encode())
        _sync_folder(unfinished)
        replaced = _aside(path)
        if path.exists():
            path.rename(replaced)
        unfinished.rename(path)
        _sync_folder(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        with suppress(OSError):
            shutil.rmtree(unfinished)
        raise CheckpointError(
            f"cannot write the checkpoint {path}: {error.strerror or error}; those before it are as they were; free at "
            f"least {needed / 2**20:,.1f} MiB there and continue with --resume auto"
        ) from error


def remove_folder(path: Path) -> None:
    """Removes a checkpoint as far as that can be done; under its own name it is whole until it is gone."""
    removed = _aside(path)
    with suppress(OSError):
        path.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a small file; it has all of its old content or all of the new one.

    Raises:
        CheckpointError: the disk is full, or cannot be written to.
    """
    unfinished = path.with_name(UNFINISHED + path.name)
    try:
        _write(unfinished, text.encode())
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error.strerror}; the checkpoints are as they were") from error


def read_folder(path: Path) -> dict[str, Any]:
    """Reads a checkpoint back: the nested state of every part, on the CPU.

    Raises:
        DamagedCheckpoint: a file is missing or no safetensors file, or this version cannot read it; names it. Whether
            its bytes are those that were written is what `check_folder` looks at.
    """
    parts: dict[str, Any] = {}
    for name, rest in read_header(path)["parts"].items():
        file = path / f"{name}.safetensors"
        try:
            parts[name] = unflatten(load_file(file), rest)
        except (OSError, RuntimeError, KeyError, SafetensorError) as error:  # torch's, of a file that went meanwhile
            raise DamagedCheckpoint(f"{file} is damaged: {error}") from error
    return parts


def check_folder(path: Path) -> None:
    """Holds every byte of a checkpoint against what was written.

    Raises:
        DamagedCheckpoint: a file is missing, cut off or changed, or this version cannot read it; names it.
    """
    for name, expected in read_header(path)["files"].items():
        if Path(name).name != name:
            raise DamagedCheckpoint(f"{path / HEADER} names the file {name!r}, which is none of this folder")
        _check(path / name, expected)


def read_header(path: Path) -> dict[str, Any]:
    """What is no tensor in a checkpoint: its "parts", with names for their tensors, and its "files".

    Raises:
        DamagedCheckpoint: see `read_folder`.
    """
    file = path / HEADER
    try:
        wrapped = json.loads(file.read_bytes())
        text, checksum = wrapped["header"], wrapped["crc32"]
        intact = zlib.crc32(text.encode()) == checksum
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{file} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{file} is damaged: {type(error).__name__}: {error}") from error
    if not intact:
        raise DamagedCheckpoint(f"{file} is damaged: its checksum is not that of its text")
    header: dict[str, Any] = json.loads(text)
    if header["format"] != FORMAT:
        raise DamagedCheckpoint(
            f"{path} has format {header['format']}, this version reads {FORMAT}; start a new run folder"
        )
    return header


def _aside(path: Path) -> Path:
    """Where a checkpoint goes that is being removed."""
    return path.with_name(f"{UNFINISHED}old-{path.name}")


def _check(file: Path, expected: dict[str, int]) -> None:
    try:
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise DamagedCheckpoint(f"{file} is damaged: it has {size} bytes, {expected['bytes']} were written")
        checksum = 0
        with file.open("rb") as content:
            while block := content.read(2**24):
                checksum = zlib.crc32(block, checksum)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{file} is missing") from None
    except OSError as error:
        raise DamagedCheckpoint(f"{file} cannot be read: {error.strerror}") from error
    if checksum != expected["crc32"]:
        raise DamagedCheckpoint(
            f"{file} is damaged: its checksum is {checksum:08x}, {expected['crc32']:08x} was written"
        )


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(None, f"it needs {needed / 2**20:,.1f} MiB and {free / 2**20:,.1f} MiB are free")


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""One checkpoint on disk: a folder of safetensors files and one JSON file, complete or absent, checked when it is read.

checkpoint.json      step, what else is not a tensor, and size and CRC-32 of every other file
student.safetensors  ...

Nested state is named tensors and JSON, so that nothing pickled is needed to read it back.
"""

import json
import shutil
import stat
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from unikd_fast.errors import CheckpointError
from unikd_fast.io import create_file, new_folder

_TENSOR, _TUPLE, _PAIRS = "$tensor", "$tuple", "$pairs"
_MARKS = (_TENSOR, _TUPLE, _PAIRS)


def flatten(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Take the tensors out of dicts, lists and tuples.

    Args:
        state: tensors, numbers, strings, booleans and None, nested arbitrarily; keys of dicts are strings or ints.

    Returns:
        The tensors by path, and the rest, which JSON can hold.

    Raises:
        TypeError: the state holds something else; names where and what.

    Example:
        >>> flatten({"momentum": {0: torch.zeros(2)}, "lr": 0.1})[1]
        {'momentum': {'$pairs': [[0, {'$tensor': 'momentum/0'}]]}, 'lr': 0.1}
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _flatten(state, "", tensors)


def unflatten(tensors: dict[str, Tensor], rest: Any) -> Any:
    """Reassemble what `flatten` took apart.

    Raises:
        KeyError: a tensor is missing.

    Example:
        >>> unflatten(*flatten((1, [None])))
        (1, [None])
    """
    if isinstance(rest, list):
        return [unflatten(tensors, item) for item in rest]
    if not isinstance(rest, dict):
        return rest
    if _TENSOR in rest:
        return tensors[rest[_TENSOR]]
    if _TUPLE in rest:
        return tuple(unflatten(tensors, item) for item in rest[_TUPLE])
    pairs = rest[_PAIRS] if _PAIRS in rest else rest.items()
    return {key: unflatten(tensors, value) for key, value in pairs}


def _flatten(state: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(state, Tensor):
        # Two ways could lead to one name, {"a/b": ...} and {"a": {"b": ...}}.
        name = path
        while name in tensors:
            name += "'"
        tensors[name] = state
        return {_TENSOR: name}
    if isinstance(state, dict):
        return _flatten_dict(state, path, tensors)
    if isinstance(state, list | tuple):
        items = [_flatten(item, _join(path, i), tensors) for i, item in enumerate(state)]
        return {_TUPLE: items} if isinstance(state, tuple) else items
    if state is None or isinstance(state, bool | int | float | str):
        return state
    raise TypeError(f"a checkpoint cannot hold {path or 'its root'}: {type(state).__name__}, {state!r}")


def _flatten_dict(state: dict[Any, Any], path: str, tensors: dict[str, Tensor]) -> Any:
    for key in state:
        if not isinstance(key, str | int) or isinstance(key, bool):
            raise TypeError(f"a checkpoint cannot hold the key {key!r} of {path or 'its root'}: {type(key).__name__}")
    values = {key: _flatten(value, _join(path, key), tensors) for key, value in state.items()}
    if all(isinstance(key, str) and key not in _MARKS for key in state):
        return values
    return {_PAIRS: [list(pair) for pair in values.items()]}


def _join(path: str, key: object) -> str:
    return f"{path}/{key}" if path else str(key)


def on_cpu(state: Any) -> Any:
    """Return a copy of nested state whose tensors are on the CPU, contiguous, and share no memory with the originals.

    Copies from a device are started together and awaited once.

    Example:
        >>> on_cpu({"a": torch.ones(2)})
        {'a': tensor([1., 1.])}
    """
    tensors, rest = flatten(state)
    copies = {name: _copy(tensor) for name, tensor in tensors.items()}
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()
    return unflatten(copies, rest)


def _copy(tensor: Tensor) -> Tensor:
    source = tensor.detach()
    target = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
    return target.copy_(source, non_blocking=True)


FORMAT = 3
HEADER = "checkpoint.json"


class DamagedCheckpoint(CheckpointError):
    """What was read is not what was written."""


def write_folder(path: Path, parts: dict[str, Any]) -> None:
    """Write a checkpoint; it is there when this returns, and what was there before if this raises.

    Args:
        path: folder to make; one of this name is replaced.
        parts: nested state by name; each becomes a file.

    Raises:
        CheckpointError: the disk is full, or cannot be written to.
    """
    parts_of_it = {name: flatten(state) for name, state in parts.items()}
    needed = sum(t.numel() * t.element_size() for tensors, _ in parts_of_it.values() for t in tensors.values())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _require_room(path.parent, needed)
        with new_folder(path) as folder:
            files: dict[str, Any] = {}
            for name, (tensors, _) in parts_of_it.items():
                content = save({key: tensor.contiguous() for key, tensor in tensors.items()})
                files[f"{name}.safetensors"] = {"bytes": len(content), "crc32": zlib.crc32(content)}
                create_file(folder / f"{name}.safetensors", content)
            header = {
                "format": FORMAT,
                "parts": {name: rest for name, (_, rest) in parts_of_it.items()},
                "files": files,
            }
            text = json.dumps(header, indent=1)
            create_file(folder / HEADER, json.dumps({"crc32": zlib.crc32(text.encode()), "header": text}).encode())
    except OSError as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        raise CheckpointError(
            f"cannot write the checkpoint {path}: {cause.strerror or cause}; those before it are as they were; free at "
            f"least {needed / 2**20:,.1f} MiB there and continue with --resume auto"
        ) from error


def read_folder(path: Path) -> dict[str, Any]:
    """Read a checkpoint back: the nested state of every part, on the CPU.

    Raises:
        DamagedCheckpoint: a file is missing or is not a safetensors file, the header does not fit the files, or this
            version cannot read it; names it. Whether the bytes are those that were written is for `check_folder`.
    """
    parts: dict[str, Any] = {}
    for name, rest in read_header(path)["parts"].items():
        file = path / f"{name}.safetensors"
        try:
            _require_regular(file)
            parts[name] = unflatten(load_file(file), rest)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's, of a file that went meanwhile
            raise DamagedCheckpoint(f"{file} is damaged: {error}") from error
        except (LookupError, TypeError, ValueError) as error:
            raise DamagedCheckpoint(
                f"{path / HEADER} is damaged: its part {name!r} does not fit {file.name}: {error}"
            ) from error
    return parts


def check_folder(path: Path) -> None:
    """Compare every byte of a checkpoint with what was written.

    Raises:
        DamagedCheckpoint: a file is missing, cut off or changed, or this version cannot read it; names it.
    """
    for name, expected in read_header(path)["files"].items():
        _check(path / name, expected)


def read_header(path: Path) -> dict[str, Any]:
    """Read what is not a tensor in a checkpoint: its "parts", with names for their tensors, and its "files".

    Raises:
        DamagedCheckpoint: see `read_folder`.
    """
    file = path / HEADER
    try:
        _require_regular(file)
        wrapped = json.loads(file.read_bytes())
        text, checksum = wrapped["header"], wrapped["crc32"]
        intact = zlib.crc32(text.encode()) == checksum
        header = json.loads(text)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{file} is missing") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{file} is damaged: {type(error).__name__}: {error}") from error
    if not intact:
        raise DamagedCheckpoint(f"{file} is damaged: its checksum is not that of its text")
    if not isinstance(header, dict) or "format" not in header:
        raise DamagedCheckpoint(f"{file} is damaged: it does not say its format")
    if header["format"] != FORMAT:
        raise DamagedCheckpoint(
            f"{path} has format {header['format']}, this version reads {FORMAT}; start a new run folder"
        )
    _check_header(file, header)
    return header


def _check_header(file: Path, header: dict[str, Any]) -> None:
    """Refuse a header whose text is intact, but was not written by `write_folder`."""
    parts, files = header.get("parts"), header.get("files")
    if not isinstance(parts, dict) or not isinstance(files, dict):
        raise DamagedCheckpoint(f"{file} is damaged: it lacks its parts or its files")
    for name, expected in files.items():
        if Path(name).name != name or not name:
            raise DamagedCheckpoint(f"{file} names the file {name!r}, which is not in this folder")
        values = [expected.get("bytes"), expected.get("crc32")] if isinstance(expected, dict) else []
        if [type(value) for value in values] != [int, int]:
            raise DamagedCheckpoint(f"{file} is damaged: size or checksum of {name} is missing")
    for name in parts:
        if f"{name}.safetensors" not in files:
            raise DamagedCheckpoint(f"{file} is damaged: its part {name!r} has no file with a checksum")


def _require_regular(file: Path) -> None:
    """Refuse a link, a pipe or a device: what leads elsewhere was not written by us."""
    if not stat.S_ISREG(file.lstat().st_mode):
        raise DamagedCheckpoint(f"{file} is damaged: it is not a regular file")


def _check(file: Path, expected: dict[str, int]) -> None:
    try:
        _require_regular(file)
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

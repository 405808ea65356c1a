"""The names of a packed store's files, and its manifest."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT = "unikd packed images"
VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "val")
ARRAYS = ("index", "labels", "ids")

PACKING = ".unikd-packing"
"""Folder in the store of what is not finished; gone when it is."""


def shard_name(split: str, number: int) -> str:
    """File name of a shard."""
    return f"{split}-{number:05}.bin"


def array_name(split: str, array: str) -> str:
    """File name of one of `ARRAYS`."""
    return f"{split}-{array}.npy"


@dataclass(frozen=True)
class SplitManifest:
    """What a store holds of one split."""

    count: int
    """Images packed."""
    source_count: int
    """Images of the folder it was packed from."""
    source_hash: str
    """SHA-256 of their names and sizes, see `hash_split`."""
    shard_bytes: tuple[int, ...]
    """Size of each shard in bytes."""
    array_hashes: dict[str, str]
    """SHA-256 of the file of each of `ARRAYS`."""
    skipped: tuple[tuple[str, str], ...]
    """Images that could not be decoded and were left out: path below the split's folder, and why."""


@dataclass(frozen=True)
class StoreManifest:
    """What a packed store holds."""

    class_names: tuple[str, ...]
    settings: dict[str, Any]
    """How it was packed, see `PackSettings.record`."""
    splits: dict[str, SplitManifest]
    """Of each of `SPLITS`."""

    def to_json(self) -> bytes:
        """The file's content: the same bytes for the same store, with a hash of all that is in it."""
        content = asdict(self)
        sealed = {"format": FORMAT, "version": VERSION, "sha256": _seal(content), "content": content}
        return json.dumps(sealed, indent=1).encode() + b"\n"


def read_manifest(root: Path) -> StoreManifest:
    """Read the manifest of a packed store.

    Raises:
        ValueError: the folder is no packed store or an unfinished one, of another version, or its manifest is damaged.

    Example:
        >>> read_manifest(Path("/data/imagenet-256")).splits["train"].count
        1281167
    """
    path = root / MANIFEST
    if not path.is_file():
        if (root / PACKING).is_dir():
            raise ValueError(f"{root} is a packed store that is not finished; run the same `unikd-data pack` again")
        raise ValueError(f"{root} is no packed store, it has no {MANIFEST}; make one by `unikd-data pack`")
    try:
        sealed = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; restore it or pack again") from error
    if not isinstance(sealed, dict) or sealed.get("format") != FORMAT:
        raise ValueError(f"{path} is not the manifest of a packed store; make one by `unikd-data pack` in a new folder")
    if sealed.get("version") != VERSION:
        raise ValueError(
            f"{path} has format version {sealed.get('version')} and this version of unikd_fast reads {VERSION}; pack "
            "again, or use the version it was packed with"
        )
    content: dict[str, Any] = sealed.get("content", {})
    if sealed.get("sha256") != _seal(content):
        raise ValueError(
            f"{path} is damaged: its hash is {sealed.get('sha256')} and its content gives {_seal(content)}; restore it "
            "or pack again"
        )
    return StoreManifest(
        class_names=tuple(content["class_names"]),
        settings=content["settings"],
        splits={name: _split_manifest(part) for name, part in content["splits"].items()},
    )


def _split_manifest(part: dict[str, Any]) -> SplitManifest:
    skipped = tuple((name, reason) for name, reason in part["skipped"])
    return SplitManifest(**{**part, "shard_bytes": tuple(part["shard_bytes"]), "skipped": skipped})


def _seal(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

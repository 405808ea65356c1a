"""The identity of a cache folder, and what belongs to all its records: who built it, and the fitted head."""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from unikd_fast.errors import CacheError
from unikd_fast.io import make_folder, sync_folder, write_file
from unikd_fast.teacher.cache.codec import Codec
from unikd_fast.teacher.cache.files import LOCK, Layout, folder_lock, refuse_link, writing
from unikd_fast.teacher.cache.key import CacheKey, canonical_json, differences, hash_tensors, refuse_differences

FORMAT = 1
MANIFEST = "manifest.json"
SAMPLE_IDS = "sample_ids.npy"
_BEFORE_THE_MANIFEST = {LOCK, SAMPLE_IDS}


@dataclass(eq=False)
class Manifest:
    """The identity of a cache folder.

    Args:
        key: what the cache is made from.
        codec: codec of its records.
        sample_ids: ids of the training split, (n,) int64, in its order.
        views: number of views of each sample.
        records_per_shard: number of records in a shard, as in `Layout`.

    Raises:
        ValueError: there are no samples, or the number of views or records is out of range.
    """

    key: CacheKey
    codec: Codec
    sample_ids: NDArray[np.int64]
    views: int
    records_per_shard: int
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        self.layout = Layout(
            self.sample_ids,
            views=self.views,
            payload_bytes=self.codec.record_bytes,
            seal=canonical_json([self.key.digest, self.codec.settings]).encode(),
            records_per_shard=self.records_per_shard,
        )

    def require_same(self, found: "Manifest", folder: Path) -> None:
        """Raise CacheError with every difference between the folder's identity and this one, which is asked for now.

        The number of records in a shard does not matter, and a folder with more views than asked for is accepted.
        """
        lines = differences(found.key.fields, self.key.fields)
        lines += differences(found._numbers(), {**self._numbers(), "views": max(self.views, found.views)})
        common = min(len(found.sample_ids), len(self.sample_ids))
        differing = np.flatnonzero(found.sample_ids[:common] != self.sample_ids[:common])
        if differing.size:
            first = int(differing[0])
            lines.append(
                f"sample ids: {differing.size} of {common} positions, the first is {first}: "
                f"{found.sample_ids[first]} in the cache, {self.sample_ids[first]} now"
            )
        refuse_differences(f"the cache in {folder}", lines)

    def write(self, folder: Path) -> None:
        """Write the folder's two files, unless another process was faster.

        Raises:
            CacheError: the folder holds something else, or the disk is full.
        """
        with writing(folder):
            make_folder(folder)
        with folder_lock(folder):
            if (folder / MANIFEST).exists():
                return
            strays = sorted({entry.name for entry in folder.iterdir()} - _BEFORE_THE_MANIFEST)
            if strays:
                raise CacheError(
                    f"{folder} holds {strays[0]} ({len(strays)} such in all) but no {MANIFEST}: it is not a cache, or "
                    "it lost its manifest; choose another folder or delete this one"
                )
            with writing(folder):
                write_file(folder / SAMPLE_IDS, _npy(self.sample_ids))
                write_file(folder / MANIFEST, _sealed(self._content()))
                sync_folder(folder.parent)

    def _content(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "key": self.key.fields,
            "key_digest": self.key.digest,
            **self._numbers(),
            "sample_ids_sha256": _hash_ids(self.sample_ids),
            "records_per_shard": self.records_per_shard,
        }

    def _numbers(self) -> dict[str, Any]:
        return {"codec": self.codec.settings, "samples": len(self.sample_ids), "views": self.views}


def read_manifest(folder: Path) -> Manifest:
    """Read the identity of a cache folder.

    Raises:
        CacheError: there is none, or it is damaged or of another format.
    """
    path = folder / MANIFEST
    try:
        refuse_link(path)
    except (FileNotFoundError, NotADirectoryError):
        raise CacheError(
            f"{folder} is not a cache, {MANIFEST} is missing; build the cache first, or check the path"
        ) from None
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{path} is damaged ({error}); delete {folder} and build the cache again") from error
    stored = content.pop("format", None) if isinstance(content, dict) else None
    if stored != FORMAT:
        raise CacheError(f"{path} has format {stored}, but this version reads {FORMAT}; build into another folder")
    checksum = content.pop("sha256", None)
    try:
        computed = _checksum({"format": stored, **content})
    except ValueError as error:  # NaN, which json reads but a digest cannot cover
        raise CacheError(f"{path} is damaged ({error}); delete {folder} and build the cache again") from error
    if checksum != computed:
        raise CacheError(
            f"{path} is damaged or was edited: its checksum is {checksum} but its content gives {computed}; "
            f"delete {folder} and build the cache again"
        )
    try:
        return _from_content(folder, content)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise CacheError(
            f"{path} is intact but does not describe a cache ({said}); delete {folder} and build the cache again"
        ) from error


def _from_content(folder: Path, content: dict[str, Any]) -> Manifest:
    codec, numbers = content["codec"], {key: content[key] for key in ("views", "records_per_shard", "samples")}
    numbers |= {key: codec[key] for key in ("num_classes", "top_k") if codec.get(key) is not None}
    if odd := {key: value for key, value in numbers.items() if type(value) is not int}:
        raise TypeError(f"these must be whole numbers: {odd}")
    key, ids = CacheKey(content["key"]), checked_sample_ids(_read_ids(folder, content["sample_ids_sha256"]))
    if content["key_digest"] != key.digest or content["samples"] != len(ids):
        raise ValueError(
            f"key_digest or samples do not match the key and {SAMPLE_IDS}: got {content['key_digest']} and "
            f"{content['samples']}, expected {key.digest} and {len(ids)}"
        )
    return Manifest(key, Codec(**codec), ids, numbers["views"], numbers["records_per_shard"])


def checked_sample_ids(sample_ids: ArrayLike) -> NDArray[np.int64]:
    """Return sample ids as (n,) int64, a copy.

    Raises:
        ValueError: they are not a vector of integers that fit into int64, or there are none.
    """
    array = np.asarray(sample_ids)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu" or int(array.max()) >= 2**63:
        raise ValueError(
            f"CacheFolder: sample_ids must be a vector of one or more int64, got shape {array.shape} of {array.dtype}"
        )
    return array.astype(np.int64)


def _read_ids(folder: Path, expected: str) -> NDArray[np.int64]:
    path = folder / SAMPLE_IDS
    remedy = f"restore it, or delete {folder} and build the cache again"
    try:
        refuse_link(path)
        ids: NDArray[np.int64] = np.load(path, allow_pickle=False)
        found = _hash_ids(ids)
    except FileNotFoundError as error:
        raise CacheError(f"{path} is missing; {remedy}") from error
    except (ValueError, EOFError, AttributeError, TypeError, MemoryError) as error:
        raise CacheError(f"{path} is damaged ({error}); {remedy}") from error
    if found != expected:
        raise CacheError(f"{path} is damaged: its hash is {found} but {MANIFEST} says {expected}; {remedy}")
    return ids


def _hash_ids(ids: NDArray[np.int64]) -> str:
    return hashlib.sha256(np.ascontiguousarray(ids, dtype="<i8").data).hexdigest()


def _npy(array: NDArray[np.int64]) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _sealed(content: dict[str, Any]) -> bytes:
    return (json.dumps({**content, "sha256": _checksum(content)}, indent=2) + "\n").encode()


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


ATTACHMENT = "teacher.safetensors"


class Attachment(NamedTuple):
    """Named tensors and a JSON-serialisable record."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]


def write_attachment(folder: Path, key_digest: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write the attachment of a cache, unless another process was faster; its attachment is then kept.

    Args:
        folder: cache folder.
        key_digest: digest of its key.
        tensors: dense tensors by name.
        record: JSON-serialisable values.

    Raises:
        CacheError: the disk is full.
    """
    own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    sealed = {"key": key_digest, "record": canonical_json(record)}
    sealed["seal"] = _seal(own, sealed)
    with folder_lock(folder):
        if not (folder / ATTACHMENT).exists():
            with writing(folder / ATTACHMENT):
                write_file(folder / ATTACHMENT, save(own, sealed))


def read_attachment(folder: Path, key_digest: str) -> Attachment | None:
    """Read the attachment of a cache, or return None if there is none yet.

    Raises:
        CacheError: it is damaged, or belongs to another cache.
    """
    path = folder / ATTACHMENT
    remedy = f"delete {folder} and build the cache again"
    try:
        refuse_link(path)
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            sealed = dict(file.metadata() or {})
    except FileNotFoundError:
        return None
    except (SafetensorError, ValueError) as error:
        raise CacheError(f"{path} is damaged ({error}); {remedy}") from error
    found = sealed.pop("seal", None)
    computed = _seal(tensors, sealed)
    if found != computed:
        raise CacheError(f"{path} is damaged: its seal is {found} but its content gives {computed}; {remedy}")
    if sealed["key"] != key_digest:
        raise CacheError(
            f"{path} belongs to another cache: its key is {sealed['key']}, the folder's is {key_digest}; {remedy}"
        )
    return Attachment(tensors, json.loads(sealed["record"]))


def _seal(tensors: Mapping[str, Tensor], sealed: Mapping[str, str]) -> str:
    text = canonical_json([hash_tensors(tensors), sealed.get("key"), sealed.get("record")])
    return hashlib.sha256(text.encode()).hexdigest()

"""What belongs to all records of a cache: who built it, and the head that its Gaussians come from."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from unikd_fast.errors import CacheError
from unikd_fast.io import write_file
from unikd_fast.teacher.cache.disk import folder_lock, refuse_link, writing
from unikd_fast.teacher.cache.key import canonical_json, hash_tensors

ATTACHMENT = "teacher.safetensors"


class Attachment(NamedTuple):
    """Named tensors and a JSON-able record."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]


def write_attachment(folder: Path, key_digest: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write the attachment of a cache, unless another process was faster; then what is there stays.

    Args:
        folder: of the cache.
        key_digest: of its key.
        tensors: dense tensors.
        record: JSON-able.

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
    """Read the attachment of a cache; None if nobody wrote one yet.

    Raises:
        CacheError: it is damaged, or of another cache.
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
        raise CacheError(f"{path} is damaged: its seal is {found} and its content gives {computed}; {remedy}")
    if sealed["key"] != key_digest:
        raise CacheError(
            f"{path} belongs to another cache: its key is {sealed['key']} and the folder's {key_digest}; {remedy}"
        )
    return Attachment(tensors, json.loads(sealed["record"]))


def _seal(tensors: Mapping[str, Tensor], sealed: Mapping[str, str]) -> str:
    text = canonical_json([hash_tensors(tensors), sealed.get("key"), sealed.get("record")])
    return hashlib.sha256(text.encode()).hexdigest()

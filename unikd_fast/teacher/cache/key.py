"""What a cache was made from, as a set of fields: two caches are the same if and only if their keys are."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unikd_fast.errors import CacheError

_ABSENT = "absent"


class CacheKey:
    """The settings that determine every byte of a cache, in a form that can be compared, hashed and stored.

    Args:
        fields: JSON-serialisable values by name, nested as needed: str, int, float, bool, None, lists, mappings.
                They are copied. 1, 1.0 and True differ; tuples and lists do not.

    Raises:
        TypeError: a value JSON cannot hold, or a name that is not a string.
        ValueError: a value is inf or NaN.

    Example:
        >>> key = CacheKey({"teacher": {"weights": "sha256:1f0c"}, "resolution": 224})
        >>> key.require_same(CacheKey({"teacher": {"weights": "sha256:9a9e"}, "resolution": 224}))
        Traceback (most recent call last):
        unikd_fast.errors.CacheError: the cache was built from something else:
          teacher.weights: "sha256:9a9e" in the cache, "sha256:1f0c" now
        build into another folder or delete this one
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._canonical = canonical_json(fields)

    @property
    def fields(self) -> dict[str, Any]:
        """Return a copy of the fields, as JSON holds them."""
        fields: dict[str, Any] = json.loads(self._canonical)
        return fields

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the canonical JSON, 64 hexadecimal digits."""
        return hashlib.sha256(self._canonical.encode()).hexdigest()

    def require_same(self, found: "CacheKey") -> None:
        """Compare with the key of an existing cache.

        Args:
            found: key of the cache; `self` is the key asked for.

        Raises:
            CacheError: they differ; the message lists every differing field with both values.
        """
        refuse_differences("the cache", differences(found.fields, self.fields))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CacheKey) and self._canonical == other._canonical

    def __hash__(self) -> int:
        return hash(self._canonical)

    def __repr__(self) -> str:
        return f"CacheKey({self._canonical})"


def canonical_json(value: Any) -> str:
    """Return the same text for equal values: names sorted, no spaces, ASCII only.

    Raises:
        TypeError: a value JSON cannot hold, or a name that is not a string.
        ValueError: a value is inf or NaN.

    Example:
        >>> canonical_json({"b": (1, 2), "a": None})
        '{"a":null,"b":[1,2]}'
    """
    return json.dumps(_plain(value, ()), sort_keys=True, separators=(",", ":"), allow_nan=False)


def differences(found: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Return one line per field in which two mappings differ, with both values; see `CacheKey`."""
    in_cache, now = _leaves(found, ()), _leaves(asked, ())
    return [
        f"{'.'.join(name)}: {in_cache.get(name, _ABSENT)} in the cache, {now.get(name, _ABSENT)} now"
        for name in sorted(in_cache.keys() | now.keys())
        if in_cache.get(name) != now.get(name)
    ]


def refuse_differences(cache: str, lines: list[str]) -> None:
    """Raise CacheError with these lines, if there are any; `cache` says which cache."""
    if lines:
        raise CacheError(
            f"{cache} was built from something else:\n  "
            + "\n  ".join(lines)
            + "\nbuild into another folder or delete this one"
        )


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hash named tensors: names, dtypes, shapes and bytes, independent of order and device.

    Args:
        tensors: dense tensors of any shape, such as a state dict.

    Returns:
        SHA-256, 64 hexadecimal digits.

    Raises:
        TypeError: a value is not a dense tensor with data.

    Example:
        >>> hash_tensors(teacher.state_dict()) == hash_tensors(dict(reversed(teacher.state_dict().items())))
        True
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = f"{tensor.layout} on {tensor.device}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"hash_tensors: {name} must be a dense tensor with data, got {kind}; leave it out")
        # Name, dtype and shape determine the number of bytes that follow, so no two mappings give the same stream.
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain(value: Any, name: tuple[str, ...]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"CacheKey: {'.'.join(name) or 'the value'} must be finite, got {value}; JSON has no such number"
        )
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, (*name, str(index))) for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"CacheKey: names must be strings, got {key!r} under {'.'.join(name) or 'the top'}")
        return {key: _plain(item, (*name, key)) for key, item in value.items()}
    raise TypeError(
        f"CacheKey: {'.'.join(name) or 'the value'} must be JSON-serialisable, got {type(value).__name__}; "
        "pass a number, a string or a hash of it"
    )


def _leaves(value: Any, name: tuple[str, ...]) -> dict[tuple[str, ...], str]:
    # As canonical text: in Python 1 == 1.0 == True, in the digest they differ.
    if isinstance(value, Mapping) and value:
        return {leaf: text for key in value for leaf, text in _leaves(value[key], (*name, key)).items()}
    return {name: canonical_json(value)} if name else {}

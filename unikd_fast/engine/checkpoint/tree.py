"""Nested state as named tensors and JSON, so that nothing pickled is needed to read it back."""

from typing import Any

import torch
from torch import Tensor

_TENSOR, _TUPLE, _PAIRS = "$tensor", "$tuple", "$pairs"
_MARKS = (_TENSOR, _TUPLE, _PAIRS)


def flatten(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Takes the tensors out of dicts, lists and tuples.

    Args:
        state: tensors, numbers, strings, booleans and None, nested in any way; keys of dicts are strings or ints.

    Returns:
        The tensors by the path that leads to them, and what is left, which json can write.

    Raises:
        TypeError: it holds something else; names where and what.

    Example:
        >>> flatten({"momentum": {0: torch.zeros(2)}, "lr": 0.1})[1]
        {'momentum': {'$pairs': [[0, {'$tensor': 'momentum/0'}]]}, 'lr': 0.1}
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _flatten(state, "", tensors)


def unflatten(tensors: dict[str, Tensor], rest: Any) -> Any:
    """Puts together what :func:`flatten` took apart.

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
    """A copy of nested state whose tensors are on the CPU, contiguous, and share nothing with the originals.

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

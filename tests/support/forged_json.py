"""JSON that nothing of ours would write, made from JSON that something has written."""

from collections.abc import Iterator
from typing import Any


def places(value: Any, *before: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the way to everything in nested JSON: the keys and positions that lead there."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*before, key)
        yield from places(inner, *before, key)

"""Objects of the caller, which a configuration names by their digest as it names files by their paths.

`unikd_fast.distill` is given networks and data sets as objects; here their names lead to them while the call lasts.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from unikd_fast.errors import ConfigError

PREFIX = "given:"
_objects: dict[str, Any] = {}


@contextmanager
def giving(objects: Mapping[str, Any]) -> Iterator[None]:
    """Let configurations name these objects meanwhile.

    Args:
        objects: objects by name; a name is `PREFIX` and a digest.
    """
    before = dict(_objects)
    _objects.update(objects)
    try:
        yield
    finally:
        _objects.clear()
        _objects.update(before)


def is_given(name: str | None) -> bool:
    """Return whether a name is that of an object.

    Example:
        >>> is_given("given:1f3a90c2"), is_given("pretrained")
        (True, False)
    """
    return name is not None and name.startswith(PREFIX)


def find(name: str | None, key: str) -> Any:
    """Return the object with this name.

    Args:
        name: name as configured.
        key: key of the configuration.

    Raises:
        ConfigError: no call with this object is in progress.
    """
    if name not in _objects:
        raise ConfigError(
            f"{key} = {name!r} is an object that was passed to unikd_fast.distill, and no file holds it; call "
            "unikd_fast.distill with it again"
        )
    return _objects[name]

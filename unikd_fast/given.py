"""Objects of the caller, which a configuration names by their digest as it names files by their paths.

`unikd_fast.distill` is given networks and data sets as objects; here their names lead to them while the call lasts.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from unikd_fast.errors import ConfigError

PREFIX = "given:"
_objects: ContextVar[Mapping[str, Any]] = ContextVar("objects", default={})  # noqa: B039  never changed in place


@contextmanager
def giving(objects: Mapping[str, Any]) -> Iterator[None]:
    """Let configurations name these objects meanwhile.

    Args:
        objects: objects by name; a name is `PREFIX` and a digest.
    """
    before = _objects.set({**_objects.get(), **objects})
    try:
        yield
    finally:
        _objects.reset(before)


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
    objects = _objects.get()
    if name is None or name not in objects:
        raise ConfigError(
            f"{key} = {name!r} is an object that was passed to unikd_fast.distill, and no file holds it; call "
            "unikd_fast.distill with it again"
        )
    return objects[name]

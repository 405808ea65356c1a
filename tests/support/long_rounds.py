"""What is left to the long rounds of `make test-all`."""

from collections.abc import Iterable
from typing import Any

import pytest


def long(*values: Any) -> Any:
    """Leave a set of parameters to the long rounds."""
    return pytest.param(*values, marks=pytest.mark.long)


def quick(values: Iterable[Any], *chosen: Any) -> list[Any]:
    """Leave all but the chosen values to the long rounds.

    Example:
        >>> len(quick("abc", "b"))
        3
    """
    values = list(values)
    assert all(value in values for value in chosen), f"not among {values}: {chosen}"
    return [value if value in chosen else long(value) for value in values]

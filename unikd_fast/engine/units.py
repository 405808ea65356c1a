"""Bytes and seconds for people."""

import math

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: float) -> str:
    """Bytes, in the largest unit that gives a number of one or more.

    Example:
        >>> size(2.4 * 2**30)
        '2.4 GiB'
    """
    power = min(len(_UNITS) - 1, int(math.log2(max(count, 1)) // 10))
    return f"{count / 1024**power:.3g} {_UNITS[power]}"


def duration(seconds: float) -> str:
    """Seconds, in the unit that a clock would use.

    Example:
        >>> duration(600)
        '10 min'
    """
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 86400:.3g} days"

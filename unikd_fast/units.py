"""Human-readable bytes and seconds."""

import math

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: float) -> str:
    """Return bytes in the largest unit that gives a number of at least one.

    Example:
        >>> size(2.4 * 2**30)
        '2.4 GiB'
    """
    power = min(len(_UNITS) - 1, int(math.log2(max(count, 1)) // 10))
    return f"{_three(count / 1024**power)} {_UNITS[power]}"


def duration(seconds: float) -> str:
    """Return seconds in a suitable unit.

    Example:
        >>> duration(600)
        '10 min'
    """
    for limit, unit, name in ((0.1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{_three(seconds / unit)} {name}"
    return f"{_three(seconds / 86400)} days"


def _three(value: float) -> str:
    """Return three digits, or all before the decimal point, never with an exponent."""
    if value >= 999.5:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 1e-3 or value == 0 else f"{value:.3f}"

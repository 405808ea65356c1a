"""The course of a figure over the epochs: seeds drawn together as a mean with a band."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unikd_fast.report.records import is_number

Floats = NDArray[np.float64]
Records = Sequence[dict[str, Any]]

# What stands in a "train" record and is no loss term of the method. The terms stand before the learning rate.
_NOT_TERMS = {"kind", "step", "epoch", "total", "ce"}
_AFTER_TERMS = "lr"


class Line(NamedTuple):
    """One group's course.

    Args:
        name: of the group.
        x, mean: (P,) each.
        low, high: (P,), the lowest and the highest seed; the mean itself where there is one.
        seeds: how many.
    """

    name: str
    x: Floats
    mean: Floats
    low: Floats
    high: Floats
    seeds: int


def course(records: Records, kind: str, key: str) -> dict[float, float]:
    """Epoch -> value, of the records of a kind that have the key; a later record of an epoch replaces an earlier."""
    return {
        float(record["epoch"]): float(record[key])
        for record in records
        if record.get("kind") == kind and "epoch" in record and is_number(record.get(key))
    }


def line_over_seeds(name: str, courses: Sequence[dict[float, float]]) -> Line | None:
    """The mean of several courses at the epochs that all have; None if there is no such epoch."""
    shared = sorted(set.intersection(*map(set, courses))) if courses else []
    if not shared:
        return None
    values = np.array([[one[epoch] for epoch in shared] for one in courses])
    return line(name, np.array(shared), values)


def line(name: str, x: Floats, values: Floats) -> Line:
    """A Line of the ``values`` (S, P) of S seeds."""
    return Line(name, x, values.mean(axis=0), values.min(axis=0), values.max(axis=0), len(values))


def loss_terms(records: Records) -> list[str]:
    """The method's own terms in training, besides cross-entropy and total; those that are always zero are left out."""
    terms: dict[str, bool] = {}
    for record in records:
        if record.get("kind") != "train":
            continue
        for key, value in record.items():
            if key == _AFTER_TERMS:
                break
            if key not in _NOT_TERMS and is_number(value):
                terms[key] = terms.get(key, False) or value != 0
    return [key for key, used in terms.items() if used]


def keys_with(records: Records, kind: str, wanted: Callable[[str], bool]) -> list[str]:
    """The keys of a kind's records that are ``wanted`` and numbers, in the order of their appearance."""
    found: dict[str, None] = {}
    for record in records:
        if record.get("kind") == kind:
            found |= {key: None for key, value in record.items() if wanted(key) and is_number(value)}
    return list(found)

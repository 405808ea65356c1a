"""Choosing part of a labelled data set: balanced few-label subsets and stratified splits, reproducible from a seed."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unikd_fast.data.philox import FIRST_RESERVED_STREAM, sort_keys, uniforms

_SUBSET_STREAM = FIRST_RESERVED_STREAM + 1
_SPLIT_STREAM = FIRST_RESERVED_STREAM + 2
_CLASS_STREAM = FIRST_RESERVED_STREAM + 3


def class_balanced_subset(labels: ArrayLike, total: int, *, seed: int) -> NDArray[np.int64]:
    """Choose `total` samples, equally many of each class; a remainder goes to randomly chosen classes, one each.

    With one seed a smaller subset is part of every larger one, so curves over the number of labels are comparable.

    Args:
        labels: (N,) class of each sample.
        total: samples to choose, at least one per class.
        seed: in [0, 2^64).

    Returns:
        (total,) sorted positions in `labels`.

    Raises:
        ValueError: fewer samples than classes are asked for, or a class is too small.

    Example:
        >>> class_balanced_subset([0, 0, 0, 1, 1, 1], 2, seed=0).shape
        (2,)
    """
    values = np.asarray(labels)
    classes, counts = np.unique(values, return_counts=True)
    if not len(classes) <= total <= len(values):
        raise ValueError(
            f"class_balanced_subset: total must be between the {len(classes)} classes and the {len(values)} samples, "
            f"got {total}"
        )
    share, remainder = divmod(total, len(classes))
    wanted = np.full(len(classes), share)
    wanted[sort_keys(seed, 0, np.arange(len(classes)), stream=_CLASS_STREAM).argsort(kind="stable")[:remainder]] += 1
    if (counts < wanted).any():
        small = int((counts < wanted).argmax())
        raise ValueError(
            f"class_balanced_subset: class {classes[small]} has {counts[small]} samples, "
            f"{wanted[small]} are needed for a balanced subset of {total}; lower the total to "
            f"{int(counts.min()) * len(classes)} or less"
        )
    order, rank_in_class = _shuffle_classes(values, seed, _SUBSET_STREAM)
    return np.sort(order[rank_in_class < wanted[np.searchsorted(classes, values[order])]])


def stratified_split(labels: ArrayLike, sizes: Sequence[int], *, seed: int) -> tuple[NDArray[np.int64], ...]:
    """Cut a data set into disjoint parts that each hold the classes in the proportions of the whole.

    Args:
        labels: (N,) class of each sample.
        sizes: samples of each part, in all at most N.
        seed: in [0, 2^64).

    Returns:
        One vector of sorted positions in `labels` per part.

    Raises:
        ValueError: a part is empty, or the parts hold more than N samples.

    Example:
        >>> train, val = stratified_split([0, 1] * 10, (14, 6), seed=0)
    """
    values = np.asarray(labels)
    if min(sizes, default=0) < 1 or sum(sizes) > len(values):
        raise ValueError(
            f"stratified_split: sizes must be positive and add up to at most {len(values)} samples, got {tuple(sizes)}"
        )
    # Spread each class evenly over (0, 1), at an offset of its own: any stretch of the line then holds the classes in
    # proportion, whatever its length.
    classes, class_of, counts = np.unique(values, return_inverse=True, return_counts=True)
    offsets = uniforms(seed, 0, np.arange(len(classes)), 1, stream=_CLASS_STREAM)[:, 0]
    order, rank_in_class = _shuffle_classes(values, seed, _SPLIT_STREAM)
    places = (rank_in_class + offsets[class_of[order]]) / counts[class_of[order]]
    line = order[places.argsort(kind="stable")]
    ends = np.cumsum(sizes)
    return tuple(np.sort(line[end - size : end]) for size, end in zip(sizes, ends, strict=True))


def _shuffle_classes(labels: NDArray, seed: int, stream: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return positions grouped by class in random order, (N,), and the rank of each within its class, (N,)."""
    keys = sort_keys(seed, 0, np.arange(len(labels)), stream=stream)
    order = np.lexsort((keys, labels))
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    return order, np.arange(len(labels)) - np.repeat(starts, counts)

"""Labels and ids that cannot be: refused where a data set is put together, whatever index they come from."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from unikd_fast.data.sets import open_data
from unikd_fast.data.settings import DataSettings
from unikd_fast.data.splits import ArrowImages, ImageFiles, Split, TensorImages

Make = Callable[[NDArray, NDArray | None], Split]
KINDS: dict[str, Make] = {
    "TensorImages": lambda labels, ids: TensorImages(torch.zeros(3, 3, 2, 2, dtype=torch.uint8), labels, ids),
    "ImageFiles": lambda labels, ids: ImageFiles(["a", "b", "c"], labels, ids),
    "ArrowImages": lambda labels, ids: ArrowImages(("a",), "image", np.zeros((3, 2), np.int64), labels, ids),
}


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_below_zero_are_refused(kind: str) -> None:
    """-100 and -1 are what losses ignore."""
    good, make = np.arange(3), KINDS[kind]
    for bad in (-100, -1):
        numbers = np.array([0, bad, 2])
        with pytest.raises(ValueError, match=f"{kind}: labels must be at least 0, got {bad} at position 1; correct it"):
            make(numbers, None)
        with pytest.raises(ValueError, match=f"{kind}: ids must be at least 0, got {bad} at position 1; correct it"):
            make(good, numbers)
    with pytest.raises(ValueError, match=f"{kind}: labels must be whole numbers, got float64"):
        make(np.array([0.0, np.nan, 2.0]), None)
    assert make(good, good[::-1].copy()).sample_ids.tolist() == [2, 1, 0]


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_labels_beyond_the_classes_are_refused(name: str) -> None:
    splits = open_data(DataSettings(name="synthetic", image_size=16, num_classes=4, synthetic_samples=12))
    split = getattr(splits, name)
    labels = split.labels.copy()
    labels[2] = 4
    with pytest.raises(
        ValueError, match=f"DataSplits: labels of {name} must be below .* classes, 4, got 4 at position 2"
    ):
        replace(splits, **{name: replace(split, labels=labels)})

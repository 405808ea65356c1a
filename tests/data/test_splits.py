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
from unikd_fast.values import NO_LABEL

Make = Callable[[NDArray, NDArray | None], Split]
KINDS: dict[str, Make] = {
    "TensorImages": lambda labels, ids: TensorImages(torch.zeros(3, 3, 2, 2, dtype=torch.uint8), labels, ids),
    "ImageFiles": lambda labels, ids: ImageFiles(["a", "b", "c"], labels, ids),
    "ArrowImages": lambda labels, ids: ArrowImages(("a",), "image", np.zeros((3, 2), np.int64), labels, ids),
}


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_below_zero_are_refused(kind: str) -> None:
    """Only -100 stands for no label."""
    good, make = np.arange(3), KINDS[kind]
    for bad in (-100, -99, -1):
        numbers = np.array([0, bad, 2])
        with pytest.raises(ValueError, match=f"{kind}: ids must be at least 0, got {bad} at position 1; correct it"):
            make(good, numbers)
        if bad == NO_LABEL:
            assert make(numbers, None).labels is numbers
            continue
        said = f"{kind}: labels must be at least 0, or -100 for none, got {bad} at position 1; correct it"
        with pytest.raises(ValueError, match=said):
            make(numbers, None)
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


@pytest.mark.parametrize("name", ["val", "test"])
def test_only_training_images_may_lack_a_label(name: str) -> None:
    splits = open_data(DataSettings(name="synthetic", image_size=16, num_classes=4, synthetic_samples=12))
    labels = splits.train.labels.copy()
    labels[[2, 5]] = NO_LABEL
    assert replace(splits, train=replace(splits.train, labels=labels)).unlabelled == 2
    split = getattr(splits, name)
    labels = split.labels.copy()
    labels[1] = NO_LABEL
    with pytest.raises(ValueError, match=f"DataSplits: {name} has no label at position 1, and accuracies need one"):
        replace(splits, **{name: replace(split, labels=labels)})

"""Few-label subsets and splits: balanced, disjoint, nested, reproducible."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unikd_fast.data.splits import class_balanced_subset, stratified_split

labels_of_any_kind = st.lists(st.integers(0, 6), min_size=1, max_size=120).map(np.array)


@pytest.fixture
def labels() -> np.ndarray:
    """Ten classes of 20 to 38 samples, mixed."""
    return np.random.default_rng(0).permutation(np.repeat(np.arange(10), np.arange(20, 40, 2)))


@pytest.mark.parametrize("total", [10, 50, 57, 200])
def test_subset_is_balanced(labels: np.ndarray, total: int) -> None:
    ids = class_balanced_subset(labels, total, seed=4)
    counts = np.bincount(labels[ids], minlength=10)
    assert len(np.unique(ids)) == total
    assert counts.max() - counts.min() == (1 if total % 10 else 0)
    assert np.array_equal(ids, np.sort(ids))


def test_smaller_subsets_are_part_of_larger_ones(labels: np.ndarray) -> None:
    subsets = [set(class_balanced_subset(labels, total, seed=4).tolist()) for total in range(10, 200, 7)]
    assert all(small < large for small, large in pairwise(subsets))


def test_subset_depends_on_the_seed_alone(labels: np.ndarray) -> None:
    first = class_balanced_subset(labels, 53, seed=1)
    assert np.array_equal(first, class_balanced_subset(labels.tolist(), 53, seed=1))
    other = class_balanced_subset(labels, 53, seed=2)
    assert len(np.intersect1d(first, other)) < 40
    assert not np.array_equal(np.bincount(labels[first]), np.bincount(labels[other]))  # the remainder moves too


def test_subset_takes_no_fixed_places(labels: np.ndarray) -> None:
    picked = np.concatenate([class_balanced_subset(np.zeros(40, int), 10, seed=seed) for seed in range(400)])
    assert np.abs(np.bincount(picked, minlength=40) - 100).max() < 6 * np.sqrt(75)


@pytest.mark.parametrize("total", [0, 9, 291])
def test_subset_refuses_impossible_totals(labels: np.ndarray, total: int) -> None:
    with pytest.raises(ValueError, match=f"between the 10 classes and the 290 samples, got {total}"):
        class_balanced_subset(labels, total, seed=0)


def test_subset_names_the_class_that_is_too_small(labels: np.ndarray) -> None:
    with pytest.raises(
        ValueError, match=r"class 0 has 20 samples, 21 are needed .* 210; lower the total to 200 or less"
    ):
        class_balanced_subset(labels, 210, seed=0)


@settings(max_examples=80, deadline=None)
@given(labels_of_any_kind, st.data())
def test_parts_are_disjoint_and_in_proportion(labels: np.ndarray, data: st.DataObject) -> None:
    first = data.draw(st.integers(1, len(labels)))
    parts = [first] if first == len(labels) else [first, data.draw(st.integers(1, len(labels) - first))]
    split = stratified_split(labels, parts, seed=data.draw(st.integers(0, 2**64 - 1)))
    assert [len(part) for part in split] == parts
    together = np.concatenate(split)
    assert len(np.unique(together)) == len(together)
    shares = np.bincount(labels, minlength=7) / len(labels)
    for part in split:
        assert np.abs(np.bincount(labels[part], minlength=7) - shares * len(part)).max() <= 2


def test_split_is_shuffled_and_depends_on_the_seed(labels: np.ndarray) -> None:
    train, _ = stratified_split(labels, (200, 90), seed=0)
    assert np.array_equal(train, stratified_split(labels, (200, 90), seed=0)[0])
    assert len(np.intersect1d(train, stratified_split(labels, (200, 90), seed=1)[0])) < 180
    assert not np.array_equal(train, np.arange(200))


def test_split_favours_no_class_where_they_cannot_all_be_served() -> None:
    equal = np.tile(np.arange(10), 20)
    taken = np.concatenate([equal[stratified_split(equal, (5, 195), seed=seed)[0]] for seed in range(200)])
    assert np.abs(np.bincount(taken, minlength=10) - 100).max() < 6 * np.sqrt(100 / 2)


@pytest.mark.parametrize("sizes", [(0, 10), (200, 91), (), (-1, 5)])
def test_split_refuses_sizes_that_do_not_fit(labels: np.ndarray, sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="positive and add up to at most 290"):
        stratified_split(labels, sizes, seed=0)

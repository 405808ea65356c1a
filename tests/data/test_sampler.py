"""The order of an epoch: complete, reproducible, the same however the work is divided."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unikd_fast.data.sampler import EpochSampler, micro_batch_size

sizes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5))  # world size, accumulation, micro-batch


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 100), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
def test_every_id_at_most_once_and_only_the_remainder_missing(
    division: tuple[int, int, int], extra: int, seed: int, epoch: int
) -> None:
    world_size, accumulation_steps, micro = division
    batch = world_size * accumulation_steps * micro
    sampler = EpochSampler(batch + extra, batch, seed=seed)
    seen = np.concatenate(
        [
            sampler.local_batch(epoch, step, rank, world_size, micro_step, accumulation_steps)
            for step in range(sampler.steps_per_epoch)
            for micro_step in range(accumulation_steps)
            for rank in range(world_size)
        ]
    )
    assert len(np.unique(seen)) == len(seen) == (batch + extra) // batch * batch
    assert seen.min() >= 0
    assert seen.max() < batch + extra


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 2**32), st.integers(0, 5))
def test_a_global_batch_is_ordered_by_micro_step_and_rank(
    division: tuple[int, int, int], seed: int, epoch: int
) -> None:
    world_size, accumulation_steps, micro = division
    batch = world_size * accumulation_steps * micro
    sampler = EpochSampler(3 * batch, batch, seed=seed)
    parts = [
        sampler.local_batch(epoch, 1, rank, world_size, micro_step, accumulation_steps)
        for micro_step in range(accumulation_steps)
        for rank in range(world_size)
    ]
    assert {len(part) for part in parts} == {micro}
    assert np.array_equal(np.concatenate(parts), sampler.global_batch(epoch, 1))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_id_exactly_once_per_epoch(world_size: int) -> None:
    sampler = EpochSampler(48, 12, seed=3)
    seen = [
        sampler.local_batch(5, step, rank, world_size)
        for step in range(sampler.steps_per_epoch)
        for rank in range(world_size)
    ]
    assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(48))


def test_one_slice_per_rank_or_per_micro_step_is_the_same_slice() -> None:
    sampler = EpochSampler(64, 16, seed=0)
    for part in range(4):
        by_rank = sampler.local_batch(1, 2, part, 4)
        by_micro_step = sampler.local_batch(1, 2, 0, 1, part, 4)
        assert np.array_equal(by_rank, by_micro_step)


def test_order_is_a_function_of_seed_and_epoch_alone() -> None:
    forward, jumping = EpochSampler(500, 10, seed=9), EpochSampler(500, 10, seed=9)
    expected = [forward.global_batch(epoch, 7) for epoch in range(4)]
    for epoch in (3, 0, 2, 1):  # the cache of one epoch must not leak into another
        assert np.array_equal(jumping.global_batch(epoch, 7), expected[epoch])
    other_batch = EpochSampler(500, 50, seed=9)
    assert np.array_equal(other_batch.permutation(2), forward.permutation(2))


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    first = EpochSampler(1000, 10, seed=0)
    orders = [
        np.arange(1000),
        first.permutation(0),
        first.permutation(1),
        EpochSampler(1000, 10, seed=1).permutation(0),
    ]
    for i, order in enumerate(orders):
        for other in orders[:i]:
            assert (order == other).mean() < 0.01


def test_shuffles_evenly() -> None:
    # Each of 6 ids in each of 6 places about equally often: 1200 epochs, 200 expected, 6 standard deviations allowed.
    sampler = EpochSampler(6, 1, seed=0)
    counts = np.zeros((6, 6))
    for epoch in range(1200):
        counts[np.arange(6), sampler.permutation(epoch)] += 1
    assert np.abs(counts - 200).max() < 6 * np.sqrt(200 * 5 / 6)


def test_callers_cannot_disturb_the_order() -> None:
    with pytest.raises(ValueError, match="read-only"):
        EpochSampler(10, 5, seed=0).global_batch(0, 0)[0] = 3


@pytest.mark.parametrize("step", [-1, 3])
def test_refuses_a_step_outside_the_epoch(step: int) -> None:
    with pytest.raises(ValueError, match=rf"step must be in \[0, 3\), got {step}"):
        EpochSampler(35, 10, seed=0).global_batch(0, step)


def test_refuses_too_few_samples() -> None:
    with pytest.raises(ValueError, match=r"63 samples .* global batch of 64; lower train\.global_batch_size to 63 or"):
        EpochSampler(63, 64, seed=0)


@pytest.mark.parametrize(
    ("batch", "nearest"),
    [(100, "96 or 108"), (5, "12"), (13, "12 or 24")],
    ids=["between", "below", "above"],
)
def test_refuses_an_uneven_batch_and_names_the_nearest(batch: int, nearest: str) -> None:
    division = rf"{batch} .*world_size 4 x accumulation_steps 3 .*; set it to {nearest} \(train\.global_batch_size\)$"
    with pytest.raises(ValueError, match=division):
        micro_batch_size(batch, world_size=4, accumulation_steps=3)


def test_refuses_ranks_and_micro_steps_out_of_range() -> None:
    sampler = EpochSampler(16, 8, seed=0)
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        sampler.local_batch(0, 0, 2, 2)
    with pytest.raises(ValueError, match=r"micro_step must be in \[0, 2\), got 2"):
        sampler.local_batch(0, 0, 0, 1, 2, 2)
    with pytest.raises(ValueError, match=r"at least 1, got 0 and 1; raise train\.accumulation_steps or start more"):
        sampler.local_batch(0, 0, 0, 0)
    with pytest.raises(ValueError, match=r"at least 1, got 0; raise train\.global_batch_size"):
        EpochSampler(16, 0, seed=0)
    with pytest.raises(ValueError, match="seed must be in"):
        EpochSampler(16, 8, seed=-1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(0, 60), st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_groups_share_batches_at_their_borders_alone(batch: int, extra: int, seed: int, epoch: int) -> None:
    """And the epoch has the samples that it has without groups."""
    count = batch + extra
    groups = np.random.default_rng(seed).integers(0, 2, count)
    grouped = EpochSampler(count, batch, seed=seed, groups=groups)
    batches = [grouped.global_batch(epoch, step) for step in range(grouped.steps_per_epoch)]
    assert sum(len(np.unique(groups[each])) > 1 for each in batches) <= 1
    plain = EpochSampler(count, batch, seed=seed)
    assert set(grouped.permutation(epoch)[: len(batches) * batch]) == set(
        plain.permutation(epoch)[: len(batches) * batch]
    )
    assert sorted(grouped.permutation(epoch)) == list(range(count))


def test_batches_of_groups_are_shuffled() -> None:
    """Each epoch anew, and not one group after the other."""
    groups = np.arange(400) % 2
    sampler = EpochSampler(400, 4, seed=1, groups=groups)
    kinds = np.array([[groups[sampler.global_batch(epoch, step)[0]] for step in range(100)] for epoch in range(2)])
    assert (kinds[0] != kinds[1]).any()
    changes = (kinds[:, 1:] != kinds[:, :-1]).sum(axis=1)
    assert (changes > 25).all() and (changes < 75).all()  # 49.5 expected, with a deviation of 5
    assert not np.array_equal(sampler.permutation(0), sampler.permutation(1))

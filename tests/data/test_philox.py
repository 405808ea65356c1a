"""The generator against its published vectors, and the addressing on top of it."""

import numpy as np
import pytest
from scipy import stats

from unikd_fast.data.philox import philox_4x32, sort_keys, uniforms, words

# kat_vectors of Random123, philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    assert philox_4x32(np.array(counter, np.uint32), key).tolist() == list(expected)


def test_known_answers_as_a_batch_with_one_key() -> None:
    counters = np.array([[0, 0, 0, 0], [1, 0, 0, 0]], np.uint32)
    both = philox_4x32(counters, (0, 0))
    assert both[0].tolist() == list(KNOWN_ANSWERS[0][2])
    assert both[1].tolist() == philox_4x32(counters[1], (0, 0)).tolist()


def test_words_address_the_counter_as_documented() -> None:
    seed, epoch, sample_id, stream = (7 << 32) | 5, 3, (2 << 32) | 9, 4
    second_block = philox_4x32(np.array([9, 2, 3, (4 << 16) | 1], np.uint32), (5, 7))
    assert words(seed, epoch, [sample_id], stream, 8)[0, 4:].tolist() == second_block.tolist()


def test_a_sample_has_its_numbers_in_any_company_and_count() -> None:
    many = uniforms(11, 2, np.arange(1000), 9)
    assert np.array_equal(uniforms(11, 2, [640], 5)[0], many[640, :5])


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 2},
        {"seed": 1 + 2**32},
        {"epoch": 1},
        {"stream": 1},
        {"sample_ids": np.arange(50) + 2**32},
    ],
    ids=str,
)
def test_every_part_of_the_address_matters(other: dict) -> None:
    address = {"seed": 1, "epoch": 0, "sample_ids": np.arange(50), "stream": 0}
    same = uniforms(**address, count=4) == uniforms(**{**address, **other}, count=4)
    assert same.mean() < 0.01


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    draws = uniforms(0, 0, np.arange(20_000), 4)
    assert draws.min() >= 0
    assert draws.max() < 1
    for column in draws.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    correlation = np.corrcoef(np.concatenate((draws[:-1].T, draws[1:].T)))
    assert np.abs(correlation - np.eye(8)).max() < 0.03


def test_uniforms_never_reach_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unikd_fast.data.philox.words", lambda *_: np.full((1, 1), 0xFFFFFFFF, np.uint32))
    assert 0.999 < uniforms(0, 0, [0], 1)[0, 0] < 1


def test_sort_keys_use_all_64_bits() -> None:
    keys = sort_keys(0, 0, np.arange(4000), stream=0)
    ones = [int(((keys >> np.uint64(bit)) & np.uint64(1)).sum()) for bit in range(64)]
    assert min(ones) > 1800
    assert max(ones) < 2200


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, 0, [0], 0, 1), ValueError, "seed must be in"),
        ((2**64, 0, [0], 0, 1), ValueError, "seed must be in"),
        ((0, 2**32, [0], 0, 1), ValueError, "epoch must be in"),
        ((0, 0, [-1], 0, 1), ValueError, "sample ids must be in .* got -1"),
        ((0, 0, np.array([2**63], np.uint64), 0, 1), ValueError, "sample ids must be in"),
        ((0, 0, [[0]], 0, 1), ValueError, "vector"),
        ((0, 0, [0.5], 0, 1), TypeError, "integers"),
        ((0.5, 0, [0], 0, 1), TypeError, "integer"),
        ((0, 0, [0], 2**16, 1), ValueError, "stream must be in"),
        ((0, 0, [0], 0, 0), ValueError, "count must be in"),
        ((0, 0, [0], 0, 2**18 + 1), ValueError, "count must be in"),
    ],
)
def test_refuses_what_does_not_fit_the_counter(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        words(*arguments)


def test_the_largest_address_is_accepted() -> None:
    assert words(2**64 - 1, 2**32 - 1, [2**63 - 1], 2**16 - 1, 4).shape == (1, 4)


def test_no_samples_give_no_numbers() -> None:
    assert uniforms(0, 0, [], 3).shape == (0, 3)

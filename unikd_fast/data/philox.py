"""Philox-4x32-10 in numpy: random numbers addressed by (seed, epoch, sample id, stream) instead of drawn in sequence.

A counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) has no state, so a number
does not depend on the batch, the worker or the rank that asks for it. The key is the seed; the 128-bit counter is

    word 0, 1   sample id, low and high half
    word 2      epoch
    word 3      stream << 16 | block
"""

import operator

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS = 10
FIRST_RESERVED_STREAM = 0xFF00
"""Views take the streams below; those from here on order and split the data set itself."""

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_MASK, _HALF = np.uint64(_WORD), np.uint64(32)


def philox_4x32(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Return the four random words of each counter.

    Args:
        counter: (..., 4) 32-bit words.
        key: two 32-bit words.

    Example:
        >>> philox_4x32(np.zeros((1, 4), np.uint32), (0, 0))[0, 0] == 0x6627E8D5
        np.True_
    """
    # A product of two words needs 64 bits, so the words stay in uint64 until the end.
    c0, c1, c2, c3 = (counter[..., word].astype(np.uint64) for word in range(4))
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (p1 >> _HALF) ^ c1 ^ np.uint64(k0),
            p1 & _MASK,
            (p0 >> _HALF) ^ c3 ^ np.uint64(k1),
            p0 & _MASK,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return np.stack((c0, c1, c2, c3), axis=-1).astype(np.uint32)


def words(seed: int, epoch: int, sample_ids: ArrayLike, stream: int, count: int) -> NDArray[np.uint32]:
    """Return `count` random words per sample; asking for more leaves the first ones as they are.

    Args:
        seed: seed in [0, 2^64).
        epoch: epoch in [0, 2^32).
        sample_ids: (N,) integers in [0, 2^63).
        stream: number in [0, 2^16) of the purpose of the words.
        count: number of words per sample, in [1, 2^18].

    Returns:
        (N, count) words.

    Raises:
        ValueError: an argument is outside its range.
        TypeError: an argument is not an integer.

    Example:
        >>> words(0, 0, [7, 8], 0, 6).shape
        (2, 6)
    """
    seed = check_below("seed", seed, 2**64)
    epoch = check_below("epoch", epoch, 2**32)
    stream = check_below("stream", stream, 2**16)
    if not 1 <= count <= 2**18:
        raise ValueError(
            f"philox: count must be in [1, {2**18}], got {count}; take further numbers from another stream"
        )
    ids = checked_ids(sample_ids)
    blocks = (count + 3) // 4
    counter = np.empty((len(ids), blocks, 4), np.uint32)
    counter[..., 0] = (ids & _MASK)[:, None]
    counter[..., 1] = (ids >> _HALF)[:, None]
    counter[..., 2] = epoch
    counter[..., 3] = (stream << 16) + np.arange(blocks)
    return philox_4x32(counter, (seed & _WORD, seed >> 32)).reshape(len(ids), 4 * blocks)[:, :count]


def uniforms(seed: int, epoch: int, sample_ids: ArrayLike, count: int, *, stream: int = 0) -> NDArray[np.float64]:
    """Return `count` uniform numbers per sample, in steps of 2^-32; arguments and errors as for `words`.

    Returns:
        (N, count) numbers in [0, 1).

    Example:
        >>> bool((uniforms(0, 3, [5, 6], 2)[1] == uniforms(0, 3, [6], 2)[0]).all())
        True
    """
    return words(seed, epoch, sample_ids, stream, count).astype(np.float64) * 2.0**-32


def sort_keys(seed: int, epoch: int, sample_ids: ArrayLike, *, stream: int) -> NDArray[np.uint64]:
    """Return one 64-bit word per sample, to shuffle by sorting; arguments and errors as for `words`.

    Example:
        >>> order = sort_keys(0, 0, range(10), stream=0).argsort()
    """
    high, low = words(seed, epoch, sample_ids, stream, 2).astype(np.uint64).T
    return (high << _HALF) | low


def check_below(name: str, value: int, limit: int) -> int:
    """Return `value` as an int if it lies in [0, limit).

    Raises:
        ValueError: it is outside that range.
        TypeError: it is not an integer.

    Example:
        >>> check_below("seed", 3, 2**64)
        3
    """
    if not 0 <= operator.index(value) < limit:
        raise ValueError(f"philox: {name} must be in [0, {limit}), got {value}; choose a {name} within the range")
    return operator.index(value)


def checked_ids(sample_ids: ArrayLike) -> NDArray[np.uint64]:
    """Return sample ids as (N,) 64-bit words.

    Raises:
        ValueError: an id is negative or not below 2^63, or the ids are not a vector.
        TypeError: the ids are not integers.

    Example:
        >>> checked_ids([0, 2**40]).tolist()
        [0, 1099511627776]
    """
    ids = np.asarray(sample_ids)
    if ids.size == 0 and ids.ndim == 1:
        return np.empty(0, np.uint64)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"philox: sample ids must be integers below 2^63, got an array of {ids.dtype}")
    if ids.ndim != 1:
        raise ValueError(f"philox: sample ids must be a vector, got shape {ids.shape}; ravel them")
    if int(ids.min()) < 0 or int(ids.max()) >= 2**63:
        raise ValueError(f"philox: sample ids must be in [0, 2^63), got {ids.min()} to {ids.max()}")
    return ids.astype(np.uint64)

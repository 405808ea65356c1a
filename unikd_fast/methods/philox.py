"""Philox-4x32-10 in torch operations: random integers on the device, addressed by what they are for.

A counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) has no state to save and
nothing on the host, so that a step that draws can be captured in a CUDA graph and repeated bit for bit. Words are
32-bit numbers in int64 tensors, which have room for their products.
"""

import torch
from torch import Tensor

_ROUNDS = 10
_WORD, _BITS = 0xFFFFFFFF, 32
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> Tensor:
    """Give the four random words of each counter.

    Args:
        counter: four words in [0, 2^32), int64 tensors that broadcast to one shape (...).
        seed: in [0, 2^64), the key.

    Returns:
        (..., 4) int64 in [0, 2^32).

    Example:
        >>> hex(philox_4x32((torch.zeros(1, dtype=torch.int64),) * 4, seed=0)[0, 0])
        '0x6627e8d5'
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & _WORD, seed >> _BITS
    for _ in range(_ROUNDS):
        # A product of two words fills the 64 bits with its sign: both of its halves are right all the same.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> _BITS) & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            ((p0 >> _BITS) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return torch.stack((c0, c1, c2, c3), dim=-1)


def uniform_integers(seed: int, step: Tensor, ids: Tensor, stream: int, count: int, below: Tensor) -> Tensor:
    """Give integers in [0, below), uniform to within below / 2^32; asking for more leaves the first ones as they are.

    Args:
        seed: in [0, 2^64).
        step: 0-d int64.
        ids: (N,) int64 in [0, 2^32), tells the rows apart.
        stream: in [0, 2^16), tells apart what the numbers are for.
        count: K, at most 2^18.
        below: (N,) int64 in [1, 2^31].

    Returns:
        (N, K) int64.
    """
    blocks = torch.arange((count + 3) // 4, device=ids.device) + (stream << 16)
    high, low = (step >> _BITS) & _WORD, step & _WORD
    words = philox_4x32((ids[:, None], low, high, blocks), seed).flatten(1)[:, :count]
    return (words * below[:, None]) >> _BITS

"""Philox4x32-10: random words that are a function of a key and a counter, the same on every device.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROUNDS = 10
Words = NDArray[np.uint64]
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox(counter: tuple[Words, int, int, int], key: int) -> tuple[Words, Words, Words, Words]:
    """The four 32-bit words of each counter, as four uint64 arrays.

    counter: word 0 for each of n counters, [n], and words 1 to 3, the same for all. key: 64 bits, low word first.
    """
    c0 = counter[0]
    c1, c2, c3 = (np.array([word], dtype=np.uint64) for word in counter[1:])
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(ROUNDS):
        left, right = c0 * _M0, c2 * _M1
        c0 = (right >> _HALF) ^ (c1 ^ np.uint64(k0))
        c2 = (left >> _HALF) ^ (c3 ^ np.uint64(k1))
        c1, c3 = right & _LOW, left & _LOW
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return c0, c1, c2, c3


def philox_tensor(counter: tuple[Tensor, int, int, int], key: int) -> Tensor:
    """The same words, int64 [n, 4], on the device of `counter[0]`, int64 [n].

    torch has no unsigned product of 64 bits. The signed one wraps to the same bits, and its sign is shifted in above those that are kept.
    """
    c0 = counter[0]
    c1, c2, c3 = (torch.full_like(c0, word) for word in counter[1:])
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(ROUNDS):
        left, right = c0 * int(_M0), c2 * int(_M1)
        c0, c2 = (right >> 32 & 0xFFFFFFFF) ^ c1 ^ k0, (left >> 32 & 0xFFFFFFFF) ^ c3 ^ k1
        c1, c3 = right & 0xFFFFFFFF, left & 0xFFFFFFFF
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return torch.stack((c0, c1, c2, c3), 1)

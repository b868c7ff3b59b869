"""Philox against the published known answers and a slow twin."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from diptych.kernels.philox import philox, philox_tensor


def slow(counter, key):
    """Philox4x32-10, word by word, in Python integers."""
    c, k = list(counter), [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        left, right = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(right >> 32) ^ c[1] ^ k[0], right & 0xFFFFFFFF, (left >> 32) ^ c[3] ^ k[1], left & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


# Random123 1.14, tests/kat_vectors, philox4x32 10
KNOWN = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    fast = philox((np.array([counter[0]], dtype=np.uint64), *counter[1:]), key)
    assert tuple(int(word[0]) for word in fast) == words == tuple(slow(counter, key))


def test_equals_the_slow_twin():
    order = random.Random(0)
    for _ in range(20):
        key, rest = order.getrandbits(64), [order.getrandbits(32) for _ in range(3)]
        firsts = [order.getrandbits(32) for _ in range(7)]
        fast = np.stack(philox((np.array(firsts, dtype=np.uint64), *rest), key), axis=1)
        assert fast.tolist() == [slow((first, *rest), key) for first in firsts]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_device_makes_the_same_words(device):
    """Signed 64-bit products wrap to the same bits."""
    order = random.Random(1)
    for _ in range(20):
        key, rest = order.getrandbits(64), [order.getrandbits(32) for _ in range(3)]
        firsts = [0, 2**32 - 1, *(order.getrandbits(32) for _ in range(50))]
        words = philox_tensor((torch.tensor(firsts, device=device), *rest), key)
        assert words.tolist() == np.stack(philox((np.array(firsts, dtype=np.uint64), *rest), key), axis=1).tolist()

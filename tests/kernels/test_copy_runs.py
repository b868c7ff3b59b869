"""Runs of bytes, against the C library's copy of each."""

from __future__ import annotations

from array import array
from functools import partial
from itertools import chain

import numpy as np
import pytest
from diptych.kernels.copy_runs import copy_runs, copy_runs_memmove
from diptych.kernels.native import native
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

SIZE = 1 << 20
LENGTHS = st.one_of(st.integers(0, 300), st.integers((16 << 10) - 70, (16 << 10) + 70), st.integers(1, 100_000))


@st.composite
def runs(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Up to nine, anywhere at the source, one behind the other with gaps at the destination."""
    found, end = [], 0
    for length in draw(st.lists(LENGTHS, min_size=1, max_size=9)):
        begin = end + draw(st.integers(0, 130))
        found.append((draw(st.integers(0, SIZE - length)), begin, length))
        end = begin + length
    return found


def layers(piece: int, source: NDArray[np.uint8], into: NDArray[np.uint8]) -> list[tuple[int, int]]:
    return [(source.ctypes.data + shift, into.ctypes.data + shift) for shift in (2 * piece * SIZE, (2 * piece + 1) * SIZE)]


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    if native() is None:
        pytest.skip("no C++ compiler")


@given(st.lists(runs(), min_size=1, max_size=3), st.booleans())
def test_as_the_c_library_copies(found: list[list[tuple[int, int, int]]], again: bool) -> None:
    """Pieces of two layers each, one behind the other."""
    length = 2 * SIZE * len(found)
    source = np.random.default_rng(1).integers(0, 256, length, np.uint8)
    ours, expected = (np.full(length, 7, np.uint8) for _ in range(2))
    for copy, into in ((partial(copy_runs, again=again), ours), (copy_runs_memmove, expected)):
        copy([(layers(i, source, into), array("q", chain.from_iterable(each))) for i, each in enumerate(found)])
    assert np.array_equal(ours, expected)

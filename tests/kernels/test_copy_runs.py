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


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    if native() is None:
        pytest.skip("no C++ compiler")


@given(runs(), st.booleans())
def test_as_the_c_library_copies(found: list[tuple[int, int, int]], again: bool) -> None:
    source = np.random.default_rng(1).integers(0, 256, 2 * SIZE, np.uint8)
    ours, expected = (np.full(2 * SIZE, 7, np.uint8) for _ in range(2))
    table = array("q", chain.from_iterable(found))
    for copy, into in ((partial(copy_runs, again=again), ours), (copy_runs_memmove, expected)):
        copy([(source.ctypes.data + shift, into.ctypes.data + shift) for shift in (0, SIZE)], table)
    assert np.array_equal(ours, expected)

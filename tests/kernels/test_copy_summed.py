"""Copies to and from one place with the sums of what lies there: in one pass as in three, and what the sums find."""

from __future__ import annotations

from array import array
from itertools import chain

import pytest
import torch
from diptych.kernels.copy_summed import ROW, WORDS, copy_summed, copy_summed_torch, table_sums
from diptych.kernels.native import native
from hypothesis import given, settings
from hypothesis import strategies as st

SIZE = 40 * ROW
WHOLE_ROWS = st.integers(1, SIZE // 4 // ROW).map(lambda rows: rows * ROW)
LENGTHS = st.one_of(st.integers(1, 300), st.integers((16 << 10) - 70, (16 << 10) + 70), st.integers(1, SIZE // 4), WHOLE_ROWS)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(LENGTHS, min_size=1, max_size=4), layers=st.integers(1, 2), packed=st.booleans(), data=st.data())
def test_one_pass_does_what_three_do(lengths: list[int], layers: int, packed: bool, data: st.DataObject) -> None:
    """Runs to (`packed`) or from one place. Those from it in any order, as where blocks are longer there."""
    if native() is None:
        pytest.skip("no C++ compiler")
    begins = [sum(lengths[:i]) for i in range(len(lengths))]
    runs = [(SIZE // 4 * i, begin, length) for i, (begin, length) in enumerate(zip(begins, lengths, strict=True))]
    if not packed:
        runs = [(begin, there, length) for there, begin, length in data.draw(st.permutations(runs))]
    each = sum(lengths)
    torch.manual_seed(each)
    before = [torch.randint(0, 256, (layers, SIZE), dtype=torch.uint8), torch.randint(0, 256, (layers * SIZE,), dtype=torch.uint8)]
    found = []
    for copy in (
        lambda piece, place: copy_summed(piece, place, layers * each, packed=packed),
        lambda piece, place: copy_summed_torch(piece, place, layers * each),
    ):
        pool, place = (tensor.clone() for tensor in before)
        ends = [(pool[i].data_ptr(), place[i * each :].data_ptr()) for i in range(layers)]
        sums = copy([ends if packed else [(there, here) for here, there in ends], array("q", chain.from_iterable(runs))], place)
        found.append((sums, pool, place[: layers * each]))
    for ours, expected in zip(*found, strict=True):
        assert torch.equal(ours, expected)


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 3 * ROW), data=st.data())
def test_a_changed_or_moved_byte_changes_the_sums(length: int, data: st.DataObject) -> None:
    torch.manual_seed(length)
    place = torch.randint(0, 256, (3 * ROW,), dtype=torch.uint8)
    before = table_sums(place, length)
    assert len(before) == WORDS + -(-length // ROW)
    at, other = (data.draw(st.integers(0, length - 1)) for _ in range(2))
    changed = place.clone()
    changed[at] ^= 1 << data.draw(st.integers(0, 7))
    assert not torch.equal(table_sums(changed, length), before)
    swapped = place.clone()
    swapped[at], swapped[other] = place[other].clone(), place[at].clone()
    assert torch.equal(table_sums(swapped, length), before) == bool(place[at] == place[other])

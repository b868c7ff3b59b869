"""Which workers join and which leave, when there shall be another number of them. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import count, islice


@dataclass(frozen=True, slots=True)
class Change:
    """Numbers of the workers of one group that come and go (`decode-3` has number 3)."""

    join: tuple[int, ...]
    leave: tuple[int, ...]


def changes(present: Sequence[Collection[int]], wanted: Sequence[int]) -> list[Change]:
    """From the workers `present` in each group of one phase to `wanted` of them: the lowest free numbers join, the highest leave."""
    taken = {number for group in present for number in group}
    found = []
    for group, size in zip(present, wanted, strict=True):
        free = (number for number in count() if number not in taken)
        join = tuple(islice(free, max(0, size - len(group))))
        taken.update(join)
        found.append(Change(join, tuple(sorted(group)[size:][::-1])))
    return found

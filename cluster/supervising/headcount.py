"""Which workers join and which leave, when there shall be another number of them. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice

from ...core.fleet import Phase

Present = Mapping[Phase, Sequence[Collection[int]]]
"""The numbers of the workers there are, by phase and group."""
Wanted = Mapping[Phase, Sequence[int]]
"""How many there shall be in each group."""


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


def phase_changes(present: Present, wanted: Wanted) -> dict[Phase, list[Change]]:
    """`changes` of each phase."""
    return {phase: changes(present[phase], sizes) for phase, sizes in wanted.items()}


def pair_changes(present: Present, wanted: Wanted) -> dict[Phase, list[Change]]:
    """Where workers of one number are a pair: both come or go, and one that lacks its partner gets it back or goes too."""
    pairs = [set[int]().union(*groups) for groups in zip(*present.values(), strict=True)]
    found = changes(pairs, wanted[Phase.DECODE])
    after = [(pair | set(change.join)) - set(change.leave) for pair, change in zip(pairs, found, strict=True)]
    return {
        phase: [
            Change(tuple(sorted(numbers - set(there))), tuple(sorted(set(there) - numbers, reverse=True)))
            for there, numbers in zip(groups, after, strict=True)
        ]
        for phase, groups in present.items()
    }

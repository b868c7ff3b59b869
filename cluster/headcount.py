"""Which workers join and which leave, when there shall be another number of them. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Change:
    """Numbers of the workers of one phase that come and go (`decode-3` has number 3)."""

    join: tuple[int, ...]
    leave: tuple[int, ...]


def change(present: Collection[int], wanted: int) -> Change:
    """From the workers `present` to `wanted` of them: the lowest free numbers join, the highest leave."""
    free = (number for number in range(len(present) + wanted) if number not in present)
    join = tuple(number for _, number in zip(range(wanted - len(present)), free, strict=False))
    return Change(join, tuple(sorted(present)[wanted:][::-1]))

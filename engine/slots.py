"""The engine's slots: each remembers the last token drawn in it, so that a step can follow one still in flight."""

from __future__ import annotations

from collections import deque


class Slots:
    """Slots 0..count-1. One given back is taken again only after the last step that might use it has completed."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._fenced: deque[tuple[int, int]] = deque()
        self._taken: set[int] = set()

    @property
    def available(self) -> int:
        """How many `take` can give now."""
        return len(self._free)

    def take(self) -> int | None:
        """A slot nobody uses, or None."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._taken.add(slot)
        return slot

    def give_back(self, slot: int, fence: int | None) -> None:
        """`fence`: the last step in flight, None if there is none."""
        self._taken.remove(slot)
        if fence is None:
            self._free.append(slot)
        else:
            self._fenced.append((fence, slot))

    def completed(self, step: int) -> None:
        while self._fenced and self._fenced[0][0] <= step:
            self._free.append(self._fenced.popleft()[1])

    def check(self, taken: set[int]) -> None:
        """Raise `AssertionError` unless exactly `taken` are in use and every slot is in one state."""
        assert self._taken == taken, f"slots in use {self._taken}, users have {taken}"
        rest = [*self._free, *(slot for _, slot in self._fenced)]
        assert sorted([*rest, *taken]) == list(range(self.count)), "a slot is lost or in two states"

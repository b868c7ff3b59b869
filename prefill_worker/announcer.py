"""From the ranks' engines to the source: which layers of which rows are stored."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Tables = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Positions [start, stop) of a transfer's prompt, computed by one row of a step into `tables`."""

    transfer_id: str
    start: int
    stop: int
    tables: Tables


class Computed(Protocol):
    """`Source.computed`."""

    def __call__(self, transfer_id: str, layers: tuple[int, ...], start: int, stop: int, tables: Tables, rank: int = 0) -> None: ...


class Announcer:
    """Tells the source what one rank has stored in one step, so many layers at a time as are worth a message, waking the asyncio thread
    once for all it has not yet seen. Woken for each layer it took 13 more turns for a prompt of 256 tokens, from the cores that computed
    it.

    One announcer per step: its first call follows what was told the asyncio thread before the step was submitted, the Offer among it.
    And one per rank: of two ranks one may be a step ahead, and what the other stores must be told in the order of its own steps.
    """

    def __init__(
        self, stretches: tuple[Stretch, ...], computed: Computed, call_soon: Callable[[Callable[[], None]], None], *,
        layers: int, together: int = 1, rank: int = 0,
    ) -> None:  # fmt: skip
        """`call_soon` has a call made on the asyncio thread, in order, from any thread. `layers`: how many the rank
        stores in a step. `together`: how many are told at a time, but for the last ones."""
        self._stretches, self._computed, self._call_soon, self._rank = stretches, computed, call_soon, rank
        self._left, self._together = layers, together
        self._untold = 0
        self._stored: deque[int] = deque()
        self._woken = False

    def stored(self, layer: int) -> None:
        """On the rank's one thread, after the layer's KV is stored."""
        self._stored.append(layer)
        self._untold, self._left = self._untold + 1, self._left - 1
        if self._untold < self._together and self._left:
            return
        self._untold = 0
        if not self._woken:
            self._woken = True
            self._call_soon(self._announce)

    def _announce(self) -> None:
        # Before the queue is emptied: a layer stored from here on wakes this thread again.
        self._woken = False
        layers: list[int] = []
        while self._stored:
            layers.append(self._stored.popleft())
        if layers:  # else an earlier call has taken them between the append and the wake-up
            for stretch in self._stretches:
                self._computed(stretch.transfer_id, tuple(layers), stretch.start, stretch.stop, stretch.tables, self._rank)
